"""A federation: how a client trains, what a curious server keeps."""

from .local import LocalTraining, train_locally, update_of

__all__ = ["LocalTraining", "train_locally", "update_of"]
