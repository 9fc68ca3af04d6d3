"""How a model cuts its picture into patches, and in which order it reads a patch's numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models import patchify, unpatchify

#: Channel, row, column: the order in which a convolution reads a patch.
CONVOLUTION = "c h w"


@dataclass(frozen=True)
class Tiling:
    """Pictures as patches and back, in the order that the patch embedding's weight has.

    Attributes
    ----------
    patch_size, image_size : (height, width), in pixels
    pixel_order : str
        The letters c, h and w (channel, row, column), the slowest first: ``"c h w"`` of a
        convolution, ``"h w c"`` of most linear layers that read flattened patches.

    Examples
    --------
    >>> import torch
    >>> image = torch.arange(8.0).reshape(1, 2, 2, 2)  # two channels
    >>> Tiling((2, 2), (2, 2), "h w c").patches(image)
    tensor([[[0., 4., 1., 5., 2., 6., 3., 7.]]])
    """

    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    pixel_order: str = CONVOLUTION

    @classmethod
    def square(cls, patch_size: int, image_size: tuple[int, int]) -> Tiling:
        """Square patches, as a convolution reads them.

        >>> Tiling.square(4, (8, 12)).grid
        (2, 3)
        """
        return cls((patch_size, patch_size), image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row of the picture."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def count(self) -> int:
        """n, the patches of a picture."""
        return self.grid[0] * self.grid[1]

    def patches(self, images: Tensor) -> Tensor:
        """Patches (B, n, p) of pictures (B, C, H, W)."""
        patches = patchify(images, self.patch_size)
        if self.pixel_order == CONVOLUTION:
            return patches
        boxes = patches.unflatten(-1, (-1, *self.patch_size))  # (B, n, C, h, w)
        return boxes.permute(0, 1, *(2 + CONVOLUTION.split().index(axis) for axis in self._axes)).flatten(2)

    def images(self, patches: Tensor) -> Tensor:
        """Pictures (B, C, H, W) of patches (B, n, p)."""
        return unpatchify(self.boxes(patches).flatten(2), self.patch_size, self.image_size)

    def boxes(self, patches: Tensor) -> Tensor:
        """Patches (B, n, p) as small pictures (B, n, C, h, w)."""
        sizes = dict(zip("hw", self.patch_size, strict=True)) | {"c": -1}
        boxes = patches.unflatten(-1, [sizes[axis] for axis in self._axes])
        return boxes.permute(0, 1, *(2 + self._axes.index(axis) for axis in CONVOLUTION.split()))

    @property
    def _axes(self) -> list[str]:
        return self.pixel_order.split()
