"""The attacker who is told the noise: the steps, and what the attack gains by them on
small photographs.
"""

import dataclasses
import math
from statistics import median

import pytest
import torch

import aprillab as al
from aprillab.attacks.closed_forms.known_noise import Calibrated, calibrated, most_natural
from aprillab.attacks.closed_forms.linear_algebra import thin_svd
from aprillab.attacks.closed_forms.natural_pictures import NaturalPictures, cosines

VICTIMS = ("astronaut", "coffee", "rocket", "grass", "camera")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(channels=3, size=(12, 8), patch=(4, 4)):
    return NaturalPictures.of(channels, size, patch, torch.device("cpu"))


def covariance(natural, n, p):
    """K, column by column."""
    return torch.stack([natural.covariance(e.reshape(n, p)).flatten() for e in torch.eye(n * p).double()], 1)


# --- The prior ----------------------------------------------------------------------------------------------------


def test_modes_of_patches_and_frequencies_are_turned_back():
    natural, patches = prior(), normal(6, 48)
    torch.testing.assert_close(natural.pixels(natural.modes(patches)), patches)
    torch.testing.assert_close(natural.of_frequencies(natural.frequencies(patches)), patches)


def test_frequencies_are_those_of_the_whole_picture():
    natural, picture = prior(), normal(3, 12, 8)
    expected = cosines(12) @ picture @ cosines(8).T
    turned = natural.frequencies(natural.modes(al.patchify(picture[None], 4)[0]))
    found = torch.einsum("ac,aij->cij", natural.turn, turned)
    torch.testing.assert_close(found, expected)


def test_precision_undoes_covariance():
    natural, patches = prior(), normal(6, 48)
    torch.testing.assert_close(natural.precision(natural.covariance(patches)), patches)


def test_variances_of_a_patch_and_between_patches_are_blocks_of_the_covariance():
    natural = prior()
    K = covariance(natural, 6, 48).reshape(6, 48, 6, 48)
    torch.testing.assert_close(
        natural.of_a_patch().flatten(), torch.stack([K[i, :, i, :].diagonal() for i in range(6)]).mean(0)
    )
    for (i, j), between in natural.shared_modes().items():
        for colour in range(3):
            entry = 16 * colour + 4 * i + j
            torch.testing.assert_close(between[colour], K[:, entry, :, entry])


def test_draws_have_the_covariance():
    natural, generator = prior(1, (4, 4), (2, 2)), torch.Generator().manual_seed(0)
    draws = torch.stack([natural.draw(generator).flatten() for _ in range(10_000)])
    K = covariance(natural, 4, 4)
    assert float((draws.T @ draws / len(draws) - K).norm() / K.norm()) < 0.07


# --- Errors in G --------------------------------------------------------------------------------------------------


def test_columns_are_expected_as_bayes_has_them():
    """(11.10) against the joint covariance of g, g̃ and b̃, for one column of known energy."""
    n, sigma, gamma = 5, 0.3, 2.0
    one, unit = torch.ones(n, 1).double(), torch.eye(n).double()
    A = torch.cat([unit, one.T])
    g = normal(n, 1)
    g *= ((gamma + 0.5 * (2 / n) ** 0.5 * sigma**2 + sigma**2) * n) ** 0.5 / g.norm()  # so that γ is found
    seen = torch.cat([g, torch.tensor([[1.3]]).double()])
    expected = gamma * A.T @ torch.linalg.solve(gamma * A @ A.T + sigma**2 * torch.eye(n + 1).double(), seen)
    found = calibrated(torch.ones(1, 3).double(), g, seen[-1], sigma, centred=False)
    torch.testing.assert_close(sigma * found.G.abs(), expected.abs())


def test_what_is_expected_of_g_is_nearer_and_unbiased():
    n, d, p, sigma = 40, 600, 60, 0.5
    rows, columns = (torch.linalg.qr(normal(size, n, seed=size)).Q for size in (n, d))
    G = rows * torch.logspace(2, 0, n).double() @ columns.T
    dW = G.T @ normal(n, p, seed=2) + sigma * normal(d, p, seed=4)
    noisy, b = G + sigma * normal(n, d, seed=3), G.sum(0) + sigma * normal(d, seed=5)
    found = sigma * calibrated(dW, noisy, b, sigma, centred=False).G
    turn = thin_svd(dW)[0]
    true, plain = G @ turn, noisy @ turn
    assert float((found - true).norm()) < 0.8 * float((plain - true).norm())
    assert abs(float((found * true).sum() / found.square().sum()) - 1) < 0.005
    assert float((plain * true).sum() / plain.square().sum()) < 0.99


# --- The most probable picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_bias", [True, False])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_the_picture_solves_the_normal_equations(size, by_bias):
    """Against one dense solve with the weights of the last pass, for little and for much noise."""
    n, p, k = 6, 48, 20
    natural, G, ones = prior(), normal(n, k) * size, torch.ones(48).double()
    pixels = natural.pixels(natural.draw(torch.Generator().manual_seed(3)))
    systems = [Calibrated(G, G.T @ pixels + normal(k, p, seed=2), torch.ones(k).double(), by_bias)]
    found = most_natural(systems, natural, 0 * ones, ones)
    again = most_natural([*systems], natural, 0 * ones, ones)
    torch.testing.assert_close(found.patches, again.patches)
    error = float((found.patches - pixels).square().mean())
    assert 0.3 < found.mse / error < 3


def test_where_nothing_is_seen_the_picture_is_grey_and_the_error_the_priors():
    natural, ones = prior(3, (32, 32), (8, 8)), torch.ones(192).double()
    nothing = Calibrated(torch.zeros(16, 20).double(), normal(20, 192), torch.ones(20).double(), True)
    found = most_natural([nothing], natural, 0 * ones, ones)
    assert float(found.patches.abs().max()) < 1e-9
    assert 0.01 < found.mse < 0.2


# --- The attack ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked():
    """By noise, relative to the update: PSNR without and with known noise, predicted, by victim."""
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=2, heads=3, classes=10)
    rows = {}
    for victim in VICTIMS:
        pixels = al.load_victim(victim, 32)[None]
        update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
        entries = sum(g.numel() for g in update.gradients.values())
        for relative in (1e-2, 1e-1, 1.0):
            sigma = relative * al.defenses.update_norm(update) / entries**0.5
            noisy = al.defenses.gaussian_noise(update, sigma, seed=7)
            plain, known = (
                al.embedding_closed_form(model, noisy, noise=noise, verify=False) for noise in (None, sigma)
            )
            assert not known.exact
            assert [c.state for c in known.conditions][:2] == [c.state for c in plain.conditions][:2]
            rows[relative, victim] = (
                *(al.psnr(r.pixels[0], pixels[0]) for r in (plain, known)),
                known.predicted_psnr,
            )
    return rows


@pytest.mark.parametrize(("relative", "gain"), [(1e-2, -0.1), (1e-1, 2.0), (1.0, 1.0)])
def test_who_knows_the_noise_sees_more_where_there_is_much(attacked, relative, gain):
    gains = [known - plain for (at, _), (plain, known, _) in attacked.items() if at == relative]
    assert median(gains) > gain
    assert min(gains) > -3.5  # camera at 1e-2: a small picture of hard edges is not what the prior expects


@pytest.mark.parametrize("relative", [1e-2, 1e-1, 1.0])
def test_the_prediction_is_honest(attacked, relative):
    off = [predicted - known for (at, _), (_, known, predicted) in attacked.items() if at == relative]
    assert abs(median(off)) < 3
    assert max(off) < 7


def test_told_noise_makes_no_picture_exact_that_the_replay_does_not_give():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10)
    pixels, other = (al.load_victim(name, 32)[None] for name in ("coffee", "cell"))
    update = al.client_update(model, al.HALF.to_input(torch.cat([pixels, other])), torch.tensor([3, 4]))
    assert not al.embedding_closed_form(model, update, noise=1e-12).exact
    alone = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    found = al.embedding_closed_form(model, alone, noise=1e-9)
    assert found.exact
    assert al.psnr(found.pixels[0], pixels[0]) > 60


@pytest.mark.parametrize("relative", [0.1, 1.0])
def test_a_replay_that_noise_alone_would_miss_does_not_lower_the_prediction(relative):
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10)
    pixels = al.load_victim("rocket", 32)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    entries = sum(g.numel() for g in update.gradients.values())
    sigma = relative * al.defenses.update_norm(update) / entries**0.5
    noisy = al.defenses.gaussian_noise(update, sigma, seed=7)
    found = al.embedding_closed_form(model, noisy, noise=sigma)
    assert not found.exact
    assert found.replay.state == "not checked", found.replay
    assert found.predicted_psnr == found.diagnostics["predicted_by_system"]


def test_other_weights_miss_by_more_than_noise():
    model, other = (
        al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10, seed=seed)
        for seed in (0, 5)
    )
    update = al.client_update(model, al.HALF.to_input(al.load_victim("rocket", 32)[None]), torch.tensor([3]))
    noisy = al.defenses.gaussian_noise(update, 1e-4, seed=7)
    assert al.embedding_closed_form(other, noisy, noise=1e-4).replay.state == "contradicted"


@pytest.mark.parametrize("defence", ["noise", "bfloat16", "bits", "pruned"])
def test_where_more_was_done_than_told_nothing_is_exact_and_the_prediction_is_that_without(defence):
    model = al.VisionTransformer(
        image_size=12, patch_size=4, width=192, depth=1, heads=3, classes=10, block="april", class_token=False
    )
    pixels = al.load_victim("grace_hopper", 12)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1]))
    sigma = 2e-3 * al.defenses.update_norm(update) / sum(g.numel() for g in update.gradients.values()) ** 0.5
    shared = {
        "noise": lambda: al.defenses.gaussian_noise(update, sigma, seed=0),
        "bfloat16": lambda: al.defenses.to_precision(update, torch.bfloat16),
        "bits": lambda: al.defenses.quantize(update, 8),
        "pruned": lambda: al.defenses.prune(update, 0.7),
    }[defence]()
    plain, known = (al.embedding_closed_form(model, shared, noise=noise) for noise in (None, 1e-4 * sigma))
    (told,) = (c for c in known.conditions if c.name == "noise is as told")
    assert told.state == "contradicted"
    assert "al.told_errors" in known.reason
    assert not known.exact
    assert known.predicted_psnr <= plain.diagnostics["predicted_by_system"]


@pytest.mark.parametrize("width", [64, 192])  # 64: as many features as patches, and no equation to spare
def test_under_a_zero_head_noise_is_no_picture(width):
    model = al.VisionTransformer(image_size=32, patch_size=4, width=width, depth=1, heads=4, classes=10)
    torch.nn.init.zeros_(model.head.weight)
    pixels = al.load_victim("coffee", 32)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    sigma = 1e-6 * al.defenses.update_norm(update)
    found = al.embedding_closed_form(model, al.defenses.gaussian_noise(update, sigma, seed=1), noise=sigma)
    assert not found.exact
    assert not found.determined
    assert found.predicted_psnr < float(al.psnr(found.pixels[0], pixels[0])) + 10


def test_rounds_of_known_noise_add_up():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10)
    pixels = al.load_victim("coffee", 32)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    noisy = [al.defenses.gaussian_noise(update, 1e-4, seed=seed) for seed in range(4)]
    one, four = (al.embedding_closed_form(model, some, noise=1e-4) for some in (noisy[0], noisy))
    assert al.psnr(four.pixels[0], pixels[0]) > al.psnr(one.pixels[0], pixels[0]) + 2


def test_rounds_in_which_the_model_did_not_move_are_one_gradient_with_less_noise():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=192, depth=1, heads=3, classes=10)
    pixels = al.load_victim("coffee", 32)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3])).to(dtype=torch.float64)
    noisy = [al.defenses.gaussian_noise(update, 1e-3, seed=seed) for seed in range(9)]
    mean = {name: sum(one.gradients[name] for one in noisy) / 9 for name in update.gradients}
    many = al.embedding_closed_form(model, noisy, noise=1e-3, verify=False)
    alone = al.embedding_closed_form(model, al.ClientUpdate(mean), noise=1e-3 / 3, verify=False)
    torch.testing.assert_close(many.pixels, alone.pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [0, -1.0, math.nan, math.inf, True])
def test_a_deviation_that_is_none_is_refused(noise):
    model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    update = al.client_update(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    with pytest.raises(ValueError, match="positive and finite"):
        al.embedding_closed_form(model, update, noise=noise)


def test_entries_with_errors_of_their_own_are_refused():
    model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    update = al.client_update(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    told = dataclasses.replace(update, errors={name: 1e-3 * g.abs() for name, g in update.gradients.items()})
    with pytest.raises(al.AttackNotApplicable, match="errors of their own"):
        al.embedding_closed_form(model, told, noise=1e-3)
