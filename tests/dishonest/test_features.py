"""Thresholds on a feature: what passes one, what lies between two, and a batch taken
apart over rounds.
"""

import copy

import pytest
import torch
from torch import nn

import aprillab as al
from aprillab.dishonest import CannotCheat, bisect_features, feature_fishing, feature_range
from aprillab.dishonest.features import difference, next_threshold

SHAPE = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 1, "heads": 3, "classes": 10}


def vit(**changes):
    return al.VisionTransformer(**{**SHAPE, **changes}).eval()


def batch(count=4, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def client(model, pixels, labels):
    """Answers with the same images each time."""
    sent = copy.deepcopy(model)

    def ask(state):
        sent.load_state_dict(state)
        return al.client_update(sent, al.HALF.to_input(pixels), torch.tensor(labels))

    return ask


def features_of(model, pixels, label=3):
    u = model.head.weight[label].detach()
    body = copy.deepcopy(model)
    body.head = nn.Identity()
    with torch.no_grad():
        return body(al.HALF.to_input(pixels)) @ u / u.norm()


def picture(model, update):
    return al.embedding_closed_form(model, update, preprocessing=al.HALF, verify=False).pixels[0]


def test_of_one_class_those_below_the_threshold_pass():
    model, pixels = vit(), batch()
    order = features_of(model, pixels).sort()
    threshold = float(order.values[:2].mean())
    update = client(model, pixels, [3] * 4)(feature_fishing(model, 3, threshold=threshold))
    assert al.psnr(picture(model, update), pixels[order.indices[0]]) > 90
    assert float(update.gradients["head.bias"][3]) == pytest.approx(-1 / 4, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("labels", [[3, 3, 3, 3, 3], [0, 1, 2, 3, 3]], ids=str)
def test_a_batch_is_taken_apart_whatever_its_classes(changes, labels):
    model, pixels = vit(**changes), batch(5)
    bins = bisect_features(model, client(model, pixels, labels), 5, rounds=20, label=3)
    assert [found.count for found in bins] == [1] * 5
    assert all(found.high > found.low for found in bins)
    expected = pixels if changes else pixels[features_of(model, pixels).argsort(descending=True)]
    scores = [max(al.psnr(picture(model, b.update), p) for p in expected) for b in bins]
    assert min(scores) > 60
    if not changes:
        assert min(al.psnr(picture(model, b.update), p) for b, p in zip(bins, expected, strict=True)) > 60


def test_few_rounds_leave_images_together():
    model, pixels = vit(), batch(5)
    bins = bisect_features(model, client(model, pixels, [3] * 5), 5, rounds=3)
    assert sum(found.count for found in bins) == 5
    assert max(found.count for found in bins) > 1


def test_a_client_of_fresh_batches_is_not_read():
    """A difference of two batches is no image, and the system says so."""
    model = vit()
    asked = iter(range(100))

    def ask(state):
        return client(model, batch(4, seed=next(asked)), [3] * 4)(state)

    for found in bisect_features(model, ask, 4, rounds=8):
        result = al.embedding_closed_form(model, found.update, preprocessing=al.HALF, verify=False)
        assert next(c for c in result.conditions if c.name == "one image").state == "contradicted"


def test_every_feature_lies_in_its_range():
    for model in (vit(), vit(bias=False)):
        low, high = feature_range(model, 3)
        if model.head.bias is None:
            model.norm.bias.data.fill_(1.0)
        assert bool(((features_of(model, batch(32)) > low) & (features_of(model, batch(32)) < high)).all())


def test_the_next_threshold_halves_the_fullest_bin():
    assert next_threshold({0.0: 4, 1.0: 3, 2.0: 0}, 0.1) == 1.5
    assert next_threshold({0.0: 4, 1.0: 2, 4.0: 0}, 0.1) == 2.5  # of two with as many images the widest
    assert next_threshold({0.0: 2, 1.0: 1, 4.0: 0}, 0.1) is None
    assert next_threshold({0.0: 2, 0.05: 0}, 0.1) is None


def test_a_difference_is_the_first_less_the_second():
    one, two = (al.ClientUpdate({"w": torch.tensor([float(i), 1.0])}) for i in (1, 3))
    assert difference(two, one).gradients["w"].tolist() == [2.0, 0.0]


def test_what_is_refused():
    model = vit()
    with pytest.raises(CannotCheat, match="direction must be 96 finite numbers"):
        feature_fishing(model, 3, threshold=0.0, direction=torch.zeros(96))
    with pytest.raises(CannotCheat, match="strength=-1 must be positive"):
        feature_fishing(model, 3, threshold=0.0, strength=-1)
    with pytest.raises(CannotCheat, match=r"not be finite in torch\.float16"):
        feature_fishing(model.half(), 3, threshold=100.0)
    with pytest.raises(ValueError, match="a difference needs two"):
        bisect_features(vit(), lambda state: None, 4, rounds=1)
    with pytest.raises(ValueError, match=r"no gradient of head\.bias"):
        bisect_features(vit(), lambda state: al.ClientUpdate({"w": torch.ones(1)}), 4, rounds=3)
    bare = vit()
    bare.norm = nn.Identity()
    with pytest.raises(CannotCheat, match="no known range"):
        feature_range(bare)
