"""What the span leaves open, and the search in it: against constructions with known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from search_tools import randn
from torch import Tensor, nn

import aprillab as al
from aprillab.anatomy import Tiling, dissect
from aprillab.attacks.closed_forms.span import solve_span
from aprillab.attacks.closed_forms.span_solution import SpanSolution
from aprillab.attacks.result import AttackNotApplicable, Reconstruction
from aprillab.attacks.searches.span_then_match import open_coordinates, span_then_match
from aprillab.metrics import match_batch, psnr
from aprillab.models import VisionTransformer, patchify
from aprillab.preprocessing import HALF
from aprillab.update import ClientUpdate, client_update


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(size, size, seed=seed)).Q


# --- What the span leaves open ----------------------------------------------------------------------------------


def test_rows_are_the_longer_the_greater_the_error_to_be_expected() -> None:
    s = torch.tensor([1e4, 20.0, 4.0, 0.5, 1e-6, 1e9], dtype=torch.float64)
    Q = rotation(6)  # its columns are the directions
    upper = torch.linalg.qr(s[:, None] * Q.T).R
    solution = SpanSolution(
        patches=randn(6, 4, seed=3), root=upper, variance=0.04, tiling=Tiling.square(1, (2, 2)),
        token_sides=(), width_needed=0, usable_width=0, numbers={},
    )  # fmt: skip
    found, opened = open_coordinates(solution)  # deviations 0.2 / s
    errors = torch.tensor([2e-5, 0.01, 0.05, 0.4, 0.5], dtype=torch.float64)
    lengths = torch.cat([(errors / 2).sqrt(), torch.tensor([1e-6], dtype=torch.float64)])
    assert opened == 4  # wrong by more than 1e-3 are all but the first and the last
    for length, direction in zip(lengths, Q.T, strict=True):
        along = (found.basis @ direction).abs()
        assert along.max().item() == pytest.approx(length.item(), rel=1e-3)
    torch.testing.assert_close(found.basis.norm(dim=1).sort().values, lengths.sort().values)
    torch.testing.assert_close(found.origin, solution.patches.T)


def vit(**options: Any) -> VisionTransformer:
    """Four patches of 48 pixels and a frozen embedding; ``options`` overwrite."""
    sizes = {
        "image_size": 8, "patch_size": 4, "channels": 3, "width": 32, "depth": 1, "heads": 4, "classes": 6,
        "mlp_ratio": 2.0, "position": "frozen", "seed": 0,
    }  # fmt: skip
    return VisionTransformer(**{**sizes, **options})


def smooth(batch: int, channels: int, size: int, seed: int) -> Tensor:
    """Pixels in [0, 1] that resemble their neighbours."""
    pixels = torch.rand(
        batch, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)


def frozen_batch(batch: int, seed: int = 0) -> tuple[nn.Module, Tensor, ClientUpdate]:
    model = vit(seed=seed).double()
    pixels = smooth(batch, 3, 8, seed)
    return model, pixels, client_update(model, HALF.to_input(pixels), torch.arange(batch) + 1)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_leaves_its_own_differences_open_and_nothing_else(batch: int) -> None:
    model, pixels, update = frozen_batch(batch)
    solution = solve_span(model, update, anatomy=dissect(model), batch_size=batch)
    found, opened = open_coordinates(solution)
    assert opened == (batch - 1) * 4
    lengths = found.basis.norm(dim=1)
    assert lengths.sort().values[-opened] > 2e-3  # above what counts as open, and the others far below
    closed = found.basis[lengths < 1e-5]
    assert len(closed) == 48 - opened
    closed = closed / closed.norm(dim=1, keepdim=True)
    truth = patchify(HALF.to_input(pixels), 4)  # (B, n, p)
    assert ((truth - solution.patches.T) @ closed.T).abs().max() < 1e-8
    assert ((truth - solution.patches.T) @ found.basis.T).abs().max() > 1e-2
    # What is open is spanned by the differences of the images at their places.
    differences = (truth[1:] - truth[:1]).flatten(0, 1)
    assert torch.linalg.matrix_rank(differences) == opened
    assert (differences @ closed.T).abs().max() < 1e-8
    assert solution.width_needed == batch * 4 + (batch * 4 + 1) + 1 - (batch - 1) * 4


# --- The search -------------------------------------------------------------------------------------------------


def quietly(*arguments: Any, **options: Any) -> Reconstruction:
    return span_then_match(*arguments, progress=False, **options)


def sinusoidal(seed: int = 1) -> tuple[nn.Module, Tensor, ClientUpdate]:
    """One grey picture of 16 patches under the usual sinusoids, all in float32."""
    model = vit(image_size=16, channels=1, width=48, depth=2, position="sinusoidal", seed=seed)
    pixels = smooth(1, 1, 16, seed)
    return model, pixels, client_update(model, HALF.to_input(pixels).float(), torch.tensor([4]))


def span_of(model: nn.Module, update: ClientUpdate, batch: int = 1) -> SpanSolution:
    return solve_span(model, update, anatomy=dissect(model), batch_size=batch, strict=False)


def test_sinusoids_in_float32_fall() -> None:
    model, pixels, update = sinusoidal()
    span = psnr(HALF.to_pixels(span_of(model, update).images), pixels).item()
    result = quietly(model, update, max_evaluations=100)
    assert psnr(result.pixels, pixels).item() > span + 15
    assert result.attack == "span_then_match"
    assert result.exact is False
    assert result.labels.tolist() == [4]
    assert result.diagnostics["labels"].startswith("recovered")
    assert result.diagnostics["dtype"] == "float32"
    opened = result.diagnostics["open_directions"]
    assert 0 < opened < 16
    assert result.diagnostics["directions"] == 16  # none is impossible, but they are the span's
    assert f"left {opened} of 16 directions" in result.reason
    assert result.diagnostics["span"]["tokens"] == 17
    assert quietly(model, update, dtype=torch.float64, max_evaluations=2).diagnostics["dtype"] == "float64"


def test_a_batch_is_set_apart() -> None:
    model, pixels, update = frozen_batch(2)
    labels = torch.tensor([1, 2])
    mixture = HALF.to_pixels(span_of(model, update, 2).images.expand(2, -1, -1, -1))
    before = psnr(mixture, pixels).mean().item()
    result = quietly(model, update, labels=labels, max_evaluations=100)
    order = match_batch(result.pixels, pixels)
    assert psnr(result.pixels[order], pixels).mean().item() > before + 10
    assert result.labels[order].tolist() == labels[order].tolist() == [1, 2]
    assert result.diagnostics["labels"] == "known to the attacker"
    assert result.diagnostics["batch_size"] == 2
    recovered = quietly(model, update, max_evaluations=2)  # the client says how many they are
    assert sorted(recovered.labels.tolist()) == [1, 2]
    assert recovered.images.shape == (2, 3, 8, 8)


def first_picture(model: nn.Module, update: ClientUpdate, **options: Any) -> Tensor:
    seen: list[Tensor] = []
    quietly(model, update, max_evaluations=1, callback=lambda _, images: seen.append(images.clone()), **options)
    return seen[0].double()


def test_the_search_begins_at_the_spans_picture() -> None:
    model, _, update = sinusoidal()
    start = first_picture(model, update)
    torch.testing.assert_close(start, span_of(model, update).images, rtol=0, atol=1e-5)


def test_a_batch_begins_apart_in_the_open_directions_alone() -> None:
    model, _, update = frozen_batch(2)
    solution = span_of(model, update, 2)
    basis = open_coordinates(solution)[0].basis
    lengths = basis.norm(dim=1)
    closed = basis[lengths < 1e-5] / lengths[lengths < 1e-5, None]
    steps = {seed: patchify(first_picture(model, update, seed=seed), 4) - solution.patches.T for seed in (0, 1)}
    for step in steps.values():
        assert (step @ closed.T).abs().max() < 1e-5
        # The patches of one image as far from the span's as it may err.
        assert step.norm() == pytest.approx(lengths.norm().item() * math.sqrt(8), rel=0.5)
        assert (step[0] - step[1]).norm() > 0.5 * step.norm()
    assert (steps[0] - steps[1]).norm() > 0.5 * steps[0].norm()


def test_the_same_seed_gives_the_same_pictures() -> None:
    model, _, update = frozen_batch(2)
    one, two, other = (quietly(model, update, max_evaluations=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.images, two.images)
    assert [e["loss"] for e in one.history] == [e["loss"] for e in two.history]
    assert not torch.equal(one.images, other.images)


def test_ctrl_c_returns_the_best_so_far() -> None:
    model, _, update = frozen_batch(2)

    def press(entry: dict[str, Any], _: Tensor) -> None:
        if entry["evaluation"] == 9:
            raise KeyboardInterrupt

    result = quietly(model, update, callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert len(result.history) == 9
    assert result.diagnostics["loss"] == min(entry["loss"] for entry in result.history)
    assert result.attack == "span_then_match"
    assert "interrupted" in result.reason


def test_an_earlier_search_goes_on() -> None:
    model, _, update = frozen_batch(2)
    one = quietly(model, update, max_evaluations=15, seed=3)
    two = quietly(model, update, max_evaluations=40, seed=3, start=one)
    assert [entry["evaluation"] for entry in two.history] == list(range(1, 41))
    assert two.history[15]["loss"] == pytest.approx(one.diagnostics["loss"], rel=1e-6)
    assert two.diagnostics["loss"] < one.diagnostics["loss"]
    seconds = [entry["seconds"] for entry in two.history]
    assert seconds == sorted(seconds)
    assert two.seconds >= seconds[-1] >= one.seconds


def test_it_refuses_where_the_span_does() -> None:
    _, pixels, _ = frozen_batch(1)
    unplaced = vit(position="none").double()
    update = client_update(unplaced, HALF.to_input(pixels), torch.tensor([1]))
    with pytest.raises(AttackNotApplicable, match="position embedding"):
        quietly(unplaced, update)
    model, _, update = frozen_batch(1)
    names = [rows.name for rows in (dissect(model).query, dissect(model).key, dissect(model).value)]
    with pytest.raises(AttackNotApplicable, match="query"):
        quietly(model, update.without(names))


def test_the_width_does_not_matter_here() -> None:
    """Where the span alone refuses, the search takes what it gives and goes on."""
    narrow = vit(width=8, heads=2).double()
    pixels = smooth(1, 3, 8, 0)
    update = client_update(narrow, HALF.to_input(pixels), torch.tensor([1]))
    with pytest.raises(AttackNotApplicable, match="min"):
        solve_span(narrow, update, anatomy=dissect(narrow))
    result = quietly(narrow, update, max_evaluations=10)
    assert result.diagnostics["open_directions"] > 0
    assert result.diagnostics["loss"] < result.history[0]["loss"]


# --- As one of the attacks that invert knows ------------------------------------------------------------------


def test_invert_takes_it_by_name() -> None:
    model, pixels, update = sinusoidal()
    options = {"max_evaluations": 60, "progress": False}
    named = al.invert(model, update, attack="span_then_match", **options)
    assert named.attack == "span_then_match"
    assert torch.equal(named.images, al.span_then_match(model, update, **options).images)
    assert named.diagnostics["attacks"]["span_then_match"].startswith("not exact: the span left")
    assert al.psnr(named.pixels, pixels).item() > al.psnr(al.invert(model, update).pixels, pixels).item() + 15


def test_invert_says_where_it_would_go_on_but_searches_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a search was run unasked")

    row = al.attacks.ATTACKS["span_then_match"]
    monkeypatch.setitem(al.attacks.ATTACKS, row.name, replace(row, function=never))
    model, _, update = sinusoidal()
    outcome = al.invert(model, update).diagnostics["attacks"]
    assert "name it to go on from the span's picture" in outcome["span_then_match"]
    frozen, _, exactly = frozen_batch(1)
    exact = al.invert(frozen, exactly)
    assert exact.exact
    assert "span_then_match" not in exact.diagnostics["attacks"]
