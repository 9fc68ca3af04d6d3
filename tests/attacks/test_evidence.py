"""What an update proves of the number of its images."""

import torch
from attacked import make, private

import aprillab as al
from aprillab.attacks.evidence import one_image_residual


def test_one_image_residual_tells_one_from_two():
    model = make("prenorm")
    for labels in ([3], [3, 3], [3, 5]):
        update = al.client_update(model, al.HALF.to_input(private(model, len(labels))), torch.tensor(labels))
        residual = one_image_residual(update.gradients["head.weight"])
        assert (residual < 1e-12) == (len(labels) == 1)
