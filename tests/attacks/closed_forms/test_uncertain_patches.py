"""The attacker who knows the defence: what is expected of G, intervals, and what the picture gains."""

from statistics import median

import pytest
import torch

import aprillab as al
from aprillab.attacks.closed_forms.natural_pictures import NaturalPictures
from aprillab.attacks.closed_forms.uncertain_patches import columns_of, interval, most_natural_of

VICTIMS = ("astronaut", "coffee", "rocket", "grass")
DEFENCES = {
    "prune 0.1": (lambda u: al.defenses.prune(u, 0.1), {"pruned": True}),
    "prune 0.05": (lambda u: al.defenses.prune(u, 0.05), {"pruned": True}),
    "bits 8": (lambda u: al.defenses.quantize(u, 8), {"bits": 8}),
    "at random": (lambda u: al.defenses.quantize(u, 8, stochastic=True, seed=3), {"bits": 8, "stochastic": True}),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_interval_adds_what_moments_of_a_cut_normal_say():
    """Against a sum over many numbers, for a narrow and a wide interval, in the middle and off it."""
    for mean, variance, within in ((0.0, 1.0, 1.0), (0.8, 0.5, 1.0), (-1.5, 1.0, 1.0), (0.1, 4.0, 0.3)):
        x = torch.linspace(-within, within, 20_001).double()
        p = (-((x - mean) ** 2) / (2 * variance)).exp()
        p = p / p.sum()
        first, spread = float((p * x).sum()), float((p * x**2).sum() - (p * x).sum() ** 2)
        weight, value = interval(*(torch.tensor([v], dtype=torch.float64) for v in (mean, variance, within)))
        both = 1 / variance + float(weight)
        assert 1 / both == pytest.approx(spread, rel=1e-3)
        assert (mean / variance + float(weight * value)) / both == pytest.approx(first, abs=1e-3)


def test_columns_tell_of_each_other():
    """Columns of rank two, three entries of four set to zero: nearer than zero,
    unbiased, errors as told.
    """
    n, d = 12, 400
    G = normal(n, 2) @ normal(2, d, seed=1) + 0.1 * normal(n, d, seed=2)
    threshold = float(G.abs().flatten().kthvalue(int(0.75 * n * d)).values)
    kept = torch.where(G.abs() > threshold, G, 0.0)
    error = torch.where(kept == 0, threshold / 3**0.5, 1e-9)
    b = G.sum(0)
    found = columns_of(kept, error, b, 1e-6 + 0 * b)
    off = found.mean.T - G
    assert float(off.norm()) < 0.7 * float((kept - G).norm())
    assert float((found.mean.T * G).sum() / found.mean.square().sum()) == pytest.approx(1.0, abs=0.05)
    told = float(found.covariance.diagonal(dim1=1, dim2=2).sum())
    assert 0.5 < told / float(off.square().sum()) < 3


def test_where_entries_are_known_the_patches_are_those_of_least_squares():
    natural = NaturalPictures.of(1, (16, 16), (4, 4), torch.device("cpu"))
    Y = natural.pixels(natural.draw(torch.Generator().manual_seed(1)))
    G = normal(16, 60)
    tiny = torch.full((60, 16), 1e-9, dtype=torch.float64)
    columns = columns_of(G, 1e-9 + 0 * G, None, None)
    X, mse = most_natural_of(G.T @ Y, tiny, columns, natural, torch.zeros(16).double(), torch.ones(16).double())
    assert float((X - Y).square().mean()) < 1e-4 * float(Y.square().mean())
    assert mse < 1e-3 * float(Y.square().mean())


@pytest.fixture(scope="module")
def attacked():
    """By defence and victim: PSNR of who does not know it and of who does, predicted."""
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=2, heads=3, classes=10)
    rows = {}
    for victim in VICTIMS:
        pixels = al.load_victim(victim, 32)[None]
        update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
        for name, (defend, told) in DEFENCES.items():
            shared = defend(update)
            plain = al.embedding_closed_form(model, shared, verify=False)
            known = al.embedding_closed_form(
                model, al.told_errors(shared, **told), verify=(name, victim) == ("prune 0.1", "coffee")
            )
            assert not known.exact
            rows[name, victim] = *(al.psnr(r.pixels[0], pixels[0]) for r in (plain, known)), known.predicted_psnr
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gain"), [("prune 0.1", 4), ("prune 0.05", 3), ("bits 8", 2), ("at random", 1)])
def test_who_knows_the_defence_sees_more(attacked, name, gain):
    gains = [known - plain for (at, _), (plain, known, _) in attacked.items() if at == name]
    assert median(gains) > gain
    assert min(gains) > -2


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENCES)
def test_the_prediction_is_not_far_off(attacked, name):
    off = [predicted - known for (at, _), (_, known, predicted) in attacked.items() if at == name]
    assert abs(median(off)) < 6
    assert max(off) < 9


@pytest.mark.parametrize("victim", ["coffee", "text"])
def test_what_is_pruned_to_almost_nothing_is_grey_and_said_to_be_little(victim):
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=2, heads=3, classes=10)
    update = al.client_update(model, al.HALF.to_input(al.load_victim(victim, 32)[None]), torch.tensor([3]))
    told = al.told_errors(al.defenses.prune(update, 0.001), pruned=True)
    try:
        found = al.embedding_closed_form(model, told, verify=False)
    except al.AttackNotApplicable:
        return
    assert bool(torch.isfinite(found.pixels).all())
    assert not found.determined
    assert found.predicted_psnr < 25


def test_two_images_behind_a_pruned_update_are_not_called_exact():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10)
    pixels = torch.stack([al.load_victim(name, 32) for name in ("coffee", "cell")])
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3, 4]))
    for keep in (0.9, 0.2):
        told = al.told_errors(al.defenses.prune(update, keep), pruned=True)
        assert not al.embedding_closed_form(model, told).exact


def test_pruning_that_leaves_the_embeddings_alone_gives_the_picture():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=2, heads=3, classes=10)
    pixels = al.load_victim("grass", 32)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    told = al.told_errors(al.defenses.prune(update, 0.5), pruned=True)
    found = al.embedding_closed_form(model, told)
    assert al.psnr(found.pixels[0], pixels[0]) > 60


@pytest.mark.parametrize("first", ["clean", "noisy"])
def test_a_round_that_was_shared_as_it_is_goes_with_one_of_which_a_defence_is_told(first):
    model = al.VisionTransformer(image_size=16, patch_size=4, width=24, depth=1, heads=3, classes=10)
    pixels = al.load_victim("coffee", 16)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1]))
    sigma = 0.1 * al.defenses.update_norm(update) / sum(g.numel() for g in update.gradients.values()) ** 0.5
    told = al.told_errors(al.defenses.gaussian_noise(update, sigma, seed=0), noise=sigma)
    rounds = [update, told] if first == "clean" else [told, update]
    alone, both = (al.embedding_closed_form(model, some) for some in (told, rounds))
    assert al.psnr(both.pixels[0], pixels[0]) > al.psnr(alone.pixels[0], pixels[0]) + 3


@pytest.mark.parametrize("scale", [1.0, 1e8])
def test_where_the_embeddings_bias_alone_was_kept_there_is_nothing_to_read(scale):
    model = al.VisionTransformer(image_size=16, patch_size=4, width=24, depth=1, heads=3, classes=10)
    update = al.client_update(model, torch.zeros(1, 3, 16, 16), torch.tensor([1]))
    kept = {name: g * scale * (name == "patch_embedding.bias") for name, g in update.gradients.items()}
    with pytest.raises(al.AttackNotApplicable, match="is zero"):
        al.embedding_closed_form(model, al.told_errors(al.ClientUpdate(kept), pruned=True))
