"""A fished update: the audit says that the model deserves a look, and does not say so of honest
ones.
"""

import pytest
import torch

import aprillab as al
from aprillab.audit import audit

SHAPE = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 2, "heads": 3, "classes": 10}
WORDS = "Look at the model that the client was sent, with al.inspect_model(model): it finds "


def vit():
    return al.VisionTransformer(**SHAPE).eval()


def update_of(model, labels):
    pixels = torch.rand(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return al.client_update(model, al.HALF.to_input(pixels), labels)


def notes_on(model, labels):
    found = audit(model, update_of(model, labels), preprocessing=al.HALF, verify=False)
    return [note for note in found.notes if "al.inspect_model" in note]


def test_a_fished_update_points_to_the_model():
    model = vit()
    model.load_state_dict(al.dishonest.class_fishing(model, 3))
    (note,) = notes_on(model, torch.tensor([1, 3, 4, 4]))
    assert WORDS + "head rows inf (limit 4), head directions 9 (limit 3)" in note
    assert "at least 3 labels" in note


def test_soft_labels_of_one_image_are_named_as_the_other_cause():
    soft = torch.full((1, 10), 0.02)
    soft[0, 3], soft[0, 5] = 0.44, 0.4
    (note,) = notes_on(vit(), soft)
    assert WORDS + "nothing there" in note


@pytest.mark.parametrize("labels", [[3], [1, 3, 4, 4]], ids=str)
def test_honest_updates_have_no_such_note(labels):
    assert notes_on(vit(), torch.tensor(labels)) == []
