"""The pictures this course attacks: victims, digits, a user's own photograph; and what the studies
measured.

Everything is a tensor of pixels in [0, 1], shape (C, H, W) or (N, C, H, W). Nothing is downloaded
unless asked for, and no data set silently stands in for another.
"""

from .datasets import DatasetMissing, mnist5k, torchvision_dataset
from .folders import recorded, result_file
from .pictures import PICTURE_FORMATS, PictureError, PictureWarning, decode_picture, read_picture
from .victims import VictimInfo, load_victim, load_victims, victim_info, victims

__all__ = [
    "PICTURE_FORMATS",
    "DatasetMissing",
    "PictureError",
    "PictureWarning",
    "VictimInfo",
    "decode_picture",
    "load_victim",
    "load_victims",
    "mnist5k",
    "read_picture",
    "recorded",
    "result_file",
    "torchvision_dataset",
    "victim_info",
    "victims",
]
