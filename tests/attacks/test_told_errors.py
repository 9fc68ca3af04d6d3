"""What an attacker who knows the defence is told of each entry: true of an update; wrong
claims are refused.
"""

import math

import pytest
import torch

import aprillab as al


@pytest.fixture(scope="module")
def update():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10)
    return al.client_update(model, al.HALF.to_input(al.load_victim("coffee", 32)[None]), torch.tensor([3]))


def off(update, shared, told, name):
    """Each entry's error over what was told of it."""
    return (shared.gradients[name] - update.gradients[name]) / told.errors[name]


def test_the_update_itself_stays(update):
    told = al.told_errors(update, noise=1e-3)
    assert all(torch.equal(told.gradients[name], g) for name, g in update.gradients.items())
    assert update.errors is None
    assert all(torch.allclose(e, torch.tensor(1e-3)) for e in told.errors.values())


@pytest.mark.parametrize(("bits", "stochastic"), [(12, False), (12, True)])
def test_rounding_to_levels_is_as_told(update, bits, stochastic):
    options = {"stochastic": True, "seed": 1} if stochastic else {}
    shared = al.defenses.quantize(update, bits, **options)
    told = al.told_errors(shared, bits=bits, stochastic=stochastic)
    name = "position_embedding"
    assert float(off(update, shared, told, name).square().mean()) == pytest.approx(1.0, rel=0.15)


def test_signs_are_known_up_to_a_half_normals_width(update):
    g = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    one = al.ClientUpdate({"weight": g})
    shared = al.defenses.sign(one)
    told = al.told_errors(shared, bits=1)
    assert float(off(one, shared, told, "weight").square().mean()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("keep", [0.5, 0.05])
def test_of_pruned_entries_what_stayed_is_known_and_the_rest_lies_below_the_threshold(update, keep):
    shared = al.defenses.prune(update, keep)
    told = al.told_errors(shared, pruned=True)
    threshold = min(float(g[g != 0].abs().min()) for g in shared.gradients.values() if g.any())
    for name, g in shared.gradients.items():
        zero = g == 0
        assert torch.allclose(told.errors[name][zero], torch.tensor(threshold / math.sqrt(3)), rtol=1e-3)
        assert float(update.gradients[name][zero].abs().max() if zero.any() else 0.0) <= threshold
        assert bool((told.errors[name][~zero] < 1e-5 * g.abs().max()).all())


def test_tensors_that_were_pruned_one_by_one_have_thresholds_of_their_own():
    one = {name: torch.randn(40, 25, generator=torch.Generator().manual_seed(i)) * 10**i
           for i, name in enumerate("abc")}  # fmt: skip
    shared = {name: al.defenses.prune(al.ClientUpdate({name: g}), 0.1).gradients[name] for name, g in one.items()}
    told = al.told_errors(al.ClientUpdate(shared), pruned=True)
    largest = [float(told.errors[name].max()) for name in "abc"]
    assert largest[1] == pytest.approx(10 * largest[0], rel=0.2)
    assert largest[2] == pytest.approx(100 * largest[0], rel=0.2)


@pytest.mark.parametrize("keep", [1e-5, 1e-4])
def test_where_next_to_nothing_stayed_errors_are_finite(update, keep):
    told = al.told_errors(al.defenses.prune(update, keep), pruned=True)
    assert all(bool(torch.isfinite(error).all()) for error in told.errors.values())


def test_what_is_told_adds_up(update):
    shared = al.defenses.quantize(al.defenses.prune(update, 0.3), 8)
    both = al.told_errors(shared, pruned=True, bits=8)
    each = [al.told_errors(shared, pruned=True), al.told_errors(shared, bits=8)]
    for name, error in both.errors.items():
        assert torch.allclose(error**2, sum(one.errors[name] ** 2 for one in each), rtol=1e-3)
    twice = al.told_errors(al.told_errors(update, noise=3e-4), noise=4e-4)
    assert torch.allclose(twice.errors["head.bias"], torch.tensor(5e-4))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "nothing is told"),
        ({"noise": 0.0}, "positive and finite"),
        ({"noise": math.nan}, "positive and finite"),
        ({"noise": True}, "positive and finite"),
        ({"bits": 0}, "from 1"),
        ({"bits": 2.5}, "from 1"),
        ({"bits": 25}, "from 1"),
        ({"noise": 1.0, "stochastic": True}, "bits from 2"),
        ({"bits": 1, "stochastic": True}, "bits from 2"),
    ],
)
def test_what_tells_nothing_or_contradicts_itself_is_refused(update, told, words):
    with pytest.raises(ValueError, match=words):
        al.told_errors(update, **told)


def test_a_defence_that_is_not_this_updates_is_refused(update):
    with pytest.raises(al.UpdateError, match="off the 255 levels of bits=8"):
        al.told_errors(update, bits=8)
    with pytest.raises(al.UpdateError, match="off the 127 levels"):
        al.told_errors(al.defenses.quantize(update, 8), bits=7)
    with pytest.raises(al.UpdateError, match="not of one magnitude"):
        al.told_errors(update, bits=1)
    nothing = al.ClientUpdate({"weight": torch.zeros(4)})
    with pytest.raises(al.UpdateError, match="every entry is zero"):
        al.told_errors(nothing, pruned=True)
    with pytest.raises(al.UpdateError, match="weight is not finite"):
        al.told_errors(al.ClientUpdate({"weight": torch.tensor([1.0, math.inf])}), noise=1.0)
