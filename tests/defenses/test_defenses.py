"""Each defence: what it does to the numbers, the attack it stops, and one it does not stop."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

import aprillab as al
from aprillab import defenses

POSITION = "position_embedding"


def vit(dtype: torch.dtype = torch.float64, **options) -> al.VisionTransformer:
    """Four patches of 48 numbers in a width of 64: every closed form applies."""
    shape = {"image_size": 8, "patch_size": 4, "width": 64, "depth": 2, "heads": 2, "classes": 5}
    return al.VisionTransformer(**{**shape, **options}).to(dtype)


def torchvision_vit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TorchvisionViT(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=64, num_classes=5
        )
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.double().eval()


def play(model: nn.Module, name: str = "astronaut") -> tuple[al.ClientUpdate, torch.Tensor]:
    """The client's update on one victim with label 3, and the victim (1, 3, H, W) in [0, 1]."""
    anatomy = al.dissect(model)
    pixels = al.load_victim(name, anatomy.image_size[0], dtype=torch.float64)[None]
    images = anatomy.preprocessing.to_input(pixels).to(next(model.parameters()))
    return al.client_update(model, images, torch.tensor([3])), pixels


def quality(model: nn.Module, update: al.ClientUpdate, attack: str, pixels: torch.Tensor) -> float:
    return float(al.psnr(al.invert(model, update, attack=attack).pixels, pixels))


def assert_refused(model: nn.Module, update: al.ClientUpdate, attack: str, word: str) -> None:
    with pytest.raises(al.AttackNotApplicable, match=word):
        al.invert(model, update, attack=attack)


ALL = {
    "withhold": lambda u: defenses.withhold(u, POSITION),
    "clip": lambda u: defenses.clip(u, 1e-2),
    "noise": lambda u: defenses.gaussian_noise(u, 1e-3, seed=0),
    "prune": lambda u: defenses.prune(u, 0.3),
    "quantize": lambda u: defenses.quantize(u, 6),
    "stochastic": lambda u: defenses.quantize(u, 6, stochastic=True, seed=0),
    "sign": lambda u: defenses.sign(u),
    "precision": lambda u: defenses.to_precision(u, torch.bfloat16),
}


@pytest.mark.parametrize("name", ALL)
def test_what_every_defence_keeps(name: str) -> None:
    model = vit(torch.float32)
    update, _ = play(model)
    before = {key: g.clone() for key, g in update.gradients.items()}
    state = torch.get_rng_state()
    shared = ALL[name](update)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(g, before[key]) for key, g in update.gradients.items())
    assert set(shared.gradients) | set(shared.withheld) == set(before)
    assert (shared.batch_size, shared.source) == (update.batch_size, update.source)
    assert all(g.shape == before[key].shape for key, g in shared.gradients.items())
    assert shared.dtype == (torch.bfloat16 if name == "precision" else torch.float32)
    al.check_update(model, shared)
    assert any(not torch.equal(g.float(), before[key]) for key, g in shared.gradients.items()) or name == "withhold"


def test_they_compose() -> None:
    update, _ = play(vit(torch.float32))
    shared = update
    for defend in ALL.values():
        shared = defend(shared)
    assert shared.withheld == (POSITION,)
    assert shared.dtype == torch.bfloat16


# --- Withholding and fixing the position embedding ------------------------------------------------------------


@pytest.mark.parametrize("block", ["april", "prenorm"])
@pytest.mark.parametrize("how", ["withhold", "freeze"])
def test_without_the_embeddings_gradient_two_attacks_stop_and_the_span_goes_through(block: str, how: str) -> None:
    for dtype, least in ((torch.float64, 120), (torch.float32, 60)):
        model = vit(dtype, block=block)
        update, pixels = play(model)
        assert quality(model, update, "embedding", pixels) > 60
        if how == "freeze":
            assert defenses.freeze_position(model) is model
            assert model.position == "frozen"
            update, _ = play(model)
        else:
            update = defenses.withhold(update, al.dissect(model).position)
        assert POSITION not in update.gradients
        assert_refused(model, update, "embedding", "position embedding gradient")
        assert_refused(model, update, "april", "position embedding" if block == "april" else "LayerNorm")
        assert quality(model, update, "span", pixels) > least
        assert int(al.recover_labels(model, update).labels) == 3


def test_withholding_another_tensor_stops_the_attack_that_reads_it_and_no_other() -> None:
    model = vit(block="april")
    update, pixels = play(model)
    without_patches = defenses.withhold(update, ["patch_embedding.weight"])
    assert_refused(model, without_patches, "embedding", "patch_embedding.weight")
    april = al.april_closed_form(model, without_patches, regularization="none")
    assert float(al.psnr(april.pixels, pixels)) > 100
    without_queries = defenses.withhold(update, "blocks.0.attention.query.weight")
    assert_refused(model, without_queries, "april", "query")
    assert quality(model, without_queries, "span", pixels) > 100  # the others' rows span the same
    without_any = defenses.withhold(
        update, [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]
    )
    assert_refused(model, without_any, "span", "query")
    assert quality(model, without_any, "embedding", pixels) > 100


def test_withhold_says_what_is_not_there_and_leaves_something() -> None:
    update, _ = play(vit())
    with pytest.raises(al.UpdateError, match="no_such"):
        defenses.withhold(update, ["no_such"])
    with pytest.raises(al.UpdateError, match="nothing would be left"):
        defenses.withhold(update, list(update.gradients))


def test_freezing_torchvisions_embedding() -> None:
    model = torchvision_vit()
    update, pixels = play(model)
    values = model.encoder.pos_embedding.detach().clone()
    assert quality(model, update, "embedding", pixels) > 100
    frozen, _ = play(defenses.freeze_position(model))
    assert set(update.gradients) - set(frozen.gradients) == {"encoder.pos_embedding"}
    assert torch.equal(model.encoder.pos_embedding, values)
    assert_refused(model, frozen, "embedding", "position embedding gradient")
    assert quality(model, frozen, "span", pixels) > 60


@pytest.mark.parametrize("kind", ["1d", "2d"])
@pytest.mark.parametrize("make", [vit, torchvision_vit])
def test_sinusoidal_values(kind: str, make) -> None:
    model = defenses.use_sinusoidal(make(), kind, base=50.0, scale=2.0)
    table = al.anatomy.tensors_of(model)[al.dissect(model).position][0]
    # Row 4 is the last of a 2 × 2 grid: place 4 in a row of tokens, or row 1 and column 1.
    angle, step = (4.0, 2 / 64) if kind == "1d" else (1.0, 2 / 32)
    assert math.isclose(float(table[4, 0]), 2 * math.sin(angle), rel_tol=1e-9)
    assert math.isclose(float(table[4, 3]), 2 * math.cos(angle * 50.0**-step), rel_tol=1e-9)
    assert bool(table[0].any()) == (kind == "1d")
    if kind == "2d":
        assert math.isclose(float(table[2, 0]), 0.0)  # row 0, column 1
        assert math.isclose(float(table[2, 32]), 2 * math.sin(1.0), rel_tol=1e-9)
    assert al.dissect(model).position not in play(model)[0].gradients


def test_sinusoids_stop_the_span_in_float32_and_not_in_float64() -> None:
    shape = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3}
    for dtype, defence, low, high in (
        (torch.float64, defenses.use_sinusoidal, 100, 400),
        (torch.float32, defenses.use_sinusoidal, 0, 35),
        (torch.float32, defenses.freeze_position, 80, 400),
    ):
        model = defence(vit(dtype, **shape))
        update, pixels = play(model)
        assert_refused(model, update, "embedding", "position embedding gradient")
        assert low < quality(model, update, "span", pixels) < high
        assert al.invert(model, update, attack="span").exact == (low > 0)


def test_without_a_position_the_patches_are_a_set() -> None:
    model = defenses.no_position(vit())
    update, pixels = play(model)
    assert_refused(model, update, "embedding", "position embedding gradient")
    assert_refused(model, update, "span", "same at every patch")
    # The permuted picture has the same gradient: no attack can tell them apart.
    patches = al.patchify(al.HALF.to_input(pixels), 4)
    jigsaw = al.unpatchify(patches[:, [2, 0, 3, 1]], 4, (8, 8))
    permuted = al.client_update(model, jigsaw, torch.tensor([3]))
    for name, g in update.gradients.items():
        assert torch.allclose(g, permuted.gradients[name], atol=1e-12), name
    learned = vit()
    with_places, _ = play(learned)
    permuted = al.client_update(learned, jigsaw, torch.tensor([3]))
    assert not torch.allclose(with_places.gradients["head.weight"], permuted.gradients["head.weight"], atol=1e-6)


def test_model_defences_refuse_what_makes_no_sense() -> None:
    for defence in (defenses.freeze_position, defenses.use_sinusoidal, defenses.no_position):
        with pytest.raises(ValueError, match="no position embedding"):
            defence(vit(position="none"))
    with pytest.raises(ValueError, match="'3d'"):
        defenses.use_sinusoidal(vit(), "3d")
    with pytest.raises(ValueError, match="scale=0"):
        defenses.use_sinusoidal(vit(), scale=0.0)
    fixed = vit(position="sinusoidal")
    assert defenses.freeze_position(fixed).position == "sinusoidal"


# --- Clipping, noise, pruning, quantization, precision --------------------------------------------------------


def test_clip_bounds_the_norm_of_all_and_stops_nothing() -> None:
    model = vit()
    update, pixels = play(model)
    total = defenses.update_norm(update)
    assert math.isclose(
        total, float(torch.cat([g.flatten() for g in update.gradients.values()]).norm()), rel_tol=1e-9
    )
    clipped = defenses.clip(update, total / 7)
    assert math.isclose(defenses.update_norm(clipped), total / 7, rel_tol=1e-9)
    for name, g in update.gradients.items():
        assert torch.allclose(clipped.gradients[name], g / 7, rtol=1e-9, atol=0)
    assert defenses.clip(update, 2 * total) is update
    assert quality(model, clipped, "embedding", pixels) > 100
    for norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="norm="):
            defenses.clip(update, norm)


def test_noise_has_its_deviation_and_no_direction() -> None:
    update, _ = play(vit())
    for relative, sigma in ((False, 0.3), (True, 0.7)):
        noisy = defenses.gaussian_noise(update, sigma, relative=relative, seed=1)
        noise = torch.cat([(noisy.gradients[k] - g).flatten() for k, g in update.gradients.items()])
        count = len(noise)
        rms = defenses.update_norm(update) / count**0.5 if relative else 1.0
        assert abs(float(noise.std()) / (sigma * rms) - 1) < 5 / (2 * count) ** 0.5
        assert abs(float(noise.mean())) < 5 * sigma * rms / count**0.5
        # Independent from one tensor to the next, also of the same shape.
        a, b = (
            noisy.gradients[f"blocks.{i}.attention.query.weight"]
            - update.gradients[f"blocks.{i}.attention.query.weight"]
            for i in (0, 1)
        )
        assert abs(float((a * b).mean())) < 5 * (sigma * rms) ** 2 / a.numel() ** 0.5


def test_noise_comes_from_the_seed_or_the_generator() -> None:
    update, _ = play(vit(torch.float32))
    noisy = [defenses.gaussian_noise(update, 0.1, seed=seed).gradients[POSITION] for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    generator = torch.Generator().manual_seed(1)
    rounds = [defenses.gaussian_noise(update, 0.1, generator=generator).gradients[POSITION] for _ in range(2)]
    assert torch.equal(rounds[0], noisy[0])
    assert not torch.equal(rounds[0], rounds[1])
    assert all(
        torch.equal(g, update.gradients[k]) for k, g in defenses.gaussian_noise(update, 0.0, seed=0).gradients.items()
    )
    for options in ({}, {"seed": 1, "generator": generator}):
        with pytest.raises(ValueError, match="a seed or a generator"):
            defenses.gaussian_noise(update, 0.1, **options)
    with pytest.raises(ValueError, match="sigma=-1"):
        defenses.gaussian_noise(update, -1, seed=0)


def test_noise_hides_the_picture_but_neither_the_label_nor_from_the_mean_of_many() -> None:
    model = vit(image_size=32, width=192)
    update, pixels = play(model)
    found = [
        quality(model, defenses.gaussian_noise(update, sigma, relative=True, seed=0), "embedding", pixels)
        for sigma in (0.0, 1e-4, 1e-2, 1.0)
    ]
    assert found[0] > 100 > 60 > found[1] > found[2] + 15
    assert found[2] > found[3]
    assert found[3] < 15
    rounds = [defenses.gaussian_noise(update, 1e-2, relative=True, seed=seed) for seed in range(64)]
    assert {int(round_.gradients["head.bias"].argmin()) for round_ in rounds} == {3}
    mean = {name: sum(r.gradients[name] for r in rounds) / len(rounds) for name in update.gradients}
    assert quality(model, al.ClientUpdate(mean, batch_size=1), "embedding", pixels) > found[2] + 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1.0, 0.3, 0.01, 1e-9])
def test_prune_keeps_the_largest_of_all(dtype: torch.dtype, keep: float) -> None:
    update, _ = play(vit())
    update = update.to(dtype=dtype)
    shared = defenses.prune(update, keep)
    whole, left = (torch.cat([g.flatten() for g in u.gradients.values()]) for u in (update, shared))
    count = max(1, round(keep * len(whole)))
    kept = whole.abs().double().topk(count).values
    assert torch.equal(left.abs().double().topk(count).values, kept)  # the largest are there …
    assert int((left != 0).sum()) == int((kept != 0).sum())  # … and nothing else
    assert torch.equal(left[left != 0], whole[left != 0])  # with their signs and values


def test_prune_and_quantize_ties_zeros_and_limits() -> None:
    ties = al.ClientUpdate({"a": torch.ones(10), "b": torch.zeros(4)})
    assert int(defenses.prune(ties, 3 / 14).gradients["a"].sum()) == 3
    assert not defenses.quantize(ties, 2).gradients["b"].any()
    for keep in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="keep="):
            defenses.prune(ties, keep)
    for bits in (1, 25):
        with pytest.raises(ValueError, match="bits="):
            defenses.quantize(ties, bits)
    with pytest.raises(ValueError, match="stochastic=True"):
        defenses.quantize(ties, 4, seed=1)
    with pytest.raises(ValueError, match="a seed or a generator"):
        defenses.quantize(ties, 4, stochastic=True)


def test_pruning_stops_the_solve_and_not_the_label() -> None:
    model = vit(image_size=32, width=192)
    update, pixels = play(model)
    sparse = defenses.prune(update, 0.1)
    assert quality(model, sparse, "embedding", pixels) < 20
    assert not al.invert(model, sparse, attack="embedding").exact
    assert int(sparse.gradients["head.bias"].argmin()) == 3
    assert quality(model, defenses.prune(update, 0.9999), "embedding", pixels) > 40


def test_signs_keep_one_bit_of_an_entry_and_the_label() -> None:
    model = vit(torch.float32)
    update, _ = play(model)
    shared = defenses.sign(update)
    for name, g in update.gradients.items():
        one = shared.gradients[name]
        assert torch.equal(one.sign(), g.sign())
        assert torch.allclose(one.abs()[g != 0], g.double().abs().mean().float())
    assert int(shared.gradients["head.bias"].argmin()) == 3


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_quantize_rounds_each_tensor_to_its_levels(bits: int) -> None:
    update, _ = play(vit())
    for options in ({}, {"stochastic": True, "seed": 0}):
        shared = defenses.quantize(update, bits, **options)
        for name, g in update.gradients.items():
            step = float(g.abs().max()) / (2 ** (bits - 1) - 1)
            levels = shared.gradients[name] / step
            assert torch.allclose(levels, levels.round(), atol=1e-6)
            assert float(levels.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-6
            worst = float((shared.gradients[name] - g).abs().max())
            assert worst <= step * (1.0 if options else 0.5) * (1 + 1e-9)


def test_stochastic_rounding_has_the_right_mean_and_rounding_to_nearest_has_not() -> None:
    g = torch.tensor([1.0, 0.3, -0.2, 0.0], dtype=torch.float64)
    update = al.ClientUpdate({"a": g})
    drawn = torch.stack([defenses.quantize(update, 2, stochastic=True, seed=s).gradients["a"] for s in range(2000)])
    assert torch.allclose(drawn.mean(0), g, atol=5 * 0.5 / 2000**0.5)
    assert defenses.quantize(update, 2).gradients["a"].tolist() == [1, 0, 0, 0]


def test_quantizing_degrades_the_picture_bit_by_bit_and_leaves_the_label() -> None:
    model = vit(image_size=32, width=192)
    update, pixels = play(model)
    found = [quality(model, defenses.quantize(update, bits), "embedding", pixels) for bits in (24, 20, 16)]
    assert found[0] > found[1] + 15 > found[2] + 30
    assert_refused(model, defenses.quantize(update, 2), "embedding", "gradient is zero")
    assert int(defenses.quantize(update, 2).gradients["head.bias"].argmin()) == 3


def test_low_precision_is_seen_and_leaves_a_picture() -> None:
    model = vit(image_size=32, width=192)
    update, pixels = play(model)
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        shared = defenses.to_precision(update, dtype)
        assert shared.dtype == dtype
        g, rounded = update.gradients["head.weight"], shared.gradients["head.weight"].double()
        assert 0 < float(((rounded - g) / g).abs().max()) <= 2.0**-bits
        result = al.invert(model, shared, attack="embedding")
        assert result.exact == (dtype == torch.float32)
        assert float(al.psnr(result.pixels, pixels)) > 25


def test_precision_refuses_what_it_would_falsify() -> None:
    small = al.ClientUpdate({"a": torch.ones(3, dtype=torch.bfloat16)})
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match="finer"):
            defenses.to_precision(small, dtype)
    with pytest.raises(ValueError, match="float64"):
        defenses.to_precision(small, torch.float64)
    large = al.ClientUpdate({"a": torch.tensor([1.0, -1e6])})
    with pytest.raises(al.UpdateError, match="a: 1e\\+06 is too large"):
        defenses.to_precision(large, torch.float16)
    assert torch.isfinite(defenses.to_precision(large, torch.bfloat16).gradients["a"]).all()
