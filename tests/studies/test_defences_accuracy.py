"""The costs of defences: each client is defended as `aprillab.defenses` would, runs are
counted and resumed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import aprillab as al
from aprillab.privacy import clipped_gradients, epsilon
from aprillab.training import evaluate, train
from studies.defences import accuracy, accuracy_clipping, accuracy_federated
from studies.defences.accuracy import CELLS, Case, Row
from studies.defences.accuracy_federated import client_gradients, train_federated, untouched

try:
    import opacus  # noqa: F401
except ImportError:
    HAS_OPACUS = False
else:
    HAS_OPACUS = True
TINY = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 3}


def pictures(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[..., 2 * int(label) : 2 * int(label) + 3] += 1
    return images, labels


def digits(part: str, seed: int) -> tuple[Tensor, Tensor]:
    count = 60 if part == "train" else 20
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(count)), torch.arange(count) % 10


def options(*words: str) -> argparse.Namespace:
    parser = accuracy.study_parser("defences.accuracy", None)
    accuracy.add_arguments(parser)
    return accuracy.checked(parser, parser.parse_args(words))


# --- Each client for itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        (("none", math.nan), lambda update: update),
        (("noise", 0.1), lambda update: al.defenses.clip(update, 2.0)),
        (("prune", 0.1), lambda update: al.defenses.prune(update, 0.1)),
        (("prune", 1e-3), lambda update: al.defenses.prune(update, 1e-3)),
        (("quantize", 8.0), lambda update: al.defenses.quantize(update, 8)),
        (("quantize", 2.0), lambda update: al.defenses.quantize(update, 2)),
        (("bfloat16", 16.0), lambda update: al.defenses.to_precision(update, torch.bfloat16)),
    ],
)
def test_many_clients_are_defended_as_each_alone(
    case: tuple[str, float], alone: Callable[[al.ClientUpdate], al.ClientUpdate]
) -> None:
    model, (images, labels) = al.VisionTransformer(**TINY), pictures(6)
    shared = client_gradients(model, images, labels)
    some_clipped = [norm > 2.0 for norm in accuracy_federated.norms(shared).tolist()]
    assert any(some_clipped)
    defended = accuracy.defence_of(Case(0, *case), clip=2.0)(shared)
    for client in range(6):
        expected = alone(al.ClientUpdate({name: g[client] for name, g in shared.items()})).gradients
        for name, gradient in expected.items():
            assert torch.allclose(defended[name][client], gradient.float(), rtol=1e-6, atol=1e-9), name
            assert torch.equal(defended[name][client] == 0, gradient == 0), name


def test_clients_gradients_are_those_they_would_share() -> None:
    model, (images, labels) = al.VisionTransformer(**TINY), pictures(4)
    shared = client_gradients(model, images, labels)
    for client, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
        for name, gradient in al.client_update(model, image, label).gradients.items():
            assert torch.allclose(shared[name][client], gradient, atol=1e-6)


def test_a_gradient_of_zeros_has_no_step_to_divide_by() -> None:
    zero = {"weight": torch.zeros(2, 3)}
    assert torch.equal(accuracy_federated.quantized(zero, 4)["weight"], zero["weight"])
    assert torch.equal(accuracy_federated.clipped(zero, 1.0)["weight"], zero["weight"])


def test_signs_are_one_bit() -> None:
    assert accuracy_federated.signs({"weight": torch.tensor([[3.0, -1e-9]])})["weight"].tolist() == [[1.0, -1.0]]


# --- Rounds -------------------------------------------------------------------------------------------------------


def test_without_a_defence_it_is_the_training_of_all_images_together() -> None:
    """60 images by 16 leave a last, smaller round."""
    (images, labels), test = pictures(60), pictures(30)
    data, test = (images.double(), labels), (test[0].double(), test[1])  # Adam would enlarge float32's rounding
    one, other = al.VisionTransformer(**TINY).double(), al.VisionTransformer(**TINY).double()
    found = train_federated(one, *data, untouched, epochs=2, seed=3, clients=16, test=test)
    settings = {"batch_size": 16, "lr": accuracy_federated.RATE, "weight_decay": accuracy_federated.DECAY}
    train(other, *data, epochs=2, seed=3, **settings, progress=False)  # type: ignore[arg-type]
    assert found == evaluate(one, *test)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9)


def test_noise_of_the_mean_is_that_of_all_clients_over_the_root_of_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With plain SGD of rate 1 and no gradient the step is minus the noise."""
    descent = lambda model, **_: (sgd := torch.optim.SGD(model.parameters(), lr=1.0),  # noqa: E731
                                  torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0))  # fmt: skip
    monkeypatch.setattr(accuracy_federated, "_adamw", descent)
    model, before = al.VisionTransformer(**TINY), al.VisionTransformer(**TINY)
    data = pictures(25)

    def silent(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(g) for name, g in gradients.items()}

    train_federated(model, *data, silent, epochs=1, seed=0, clients=25, deviation=2.0, test=data)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    noise = torch.cat([(p - q).detach().flatten() for p, q in pairs])
    assert float(noise.std()) == pytest.approx(2.0 / 5, rel=4 / math.sqrt(2 * len(noise)))


# --- The study ----------------------------------------------------------------------------------------------------


def test_noise_is_counted_for_the_client_and_for_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        accuracy, "images_and_labels", lambda options, seed: [digits("train", seed), digits("test", seed)]
    )
    chosen = options("--width", "16", "--depth", "1", "--epochs", "2")
    (row,) = accuracy.measured(chosen, Case(0, "noise", 0.5))
    assert row.epsilon_round == pytest.approx(epsilon(0.5))
    assert row.epsilon == pytest.approx(epsilon(0.5, rounds=2))
    # Sixty clients by fifty: the sum of ten has the least noise.
    assert row.epsilon_sum == pytest.approx(epsilon(0.5 * 10**0.5, rounds=2))
    model = al.VisionTransformer(
        image_size=28, patch_size=7, channels=1, width=16, depth=1, heads=4, classes=10, mlp_ratio=2.0
    )
    lengths = clipped_gradients(model, *digits("train", 0), 1e9).double().norm(dim=1)
    assert row.clip == pytest.approx(float(pd.Series(lengths.tolist()).median()), rel=1e-4)


@pytest.mark.skipif(not HAS_OPACUS, reason="needs opacus: pip install -e .[privacy]")
def test_a_study_has_every_cell_and_goes_on_where_it_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("studies.accuracy.al.mnist5k", digits)
    monkeypatch.setattr(accuracy, "DELTA", 1e-3)
    command = ["--quick", "--out", str(tmp_path)]
    accuracy.main(command)
    path = tmp_path / "defences_accuracy.csv"
    rows = accuracy.read(path, Row)
    assert [*zip(rows.defence, map(str, rows.strength), strict=True)] == [(d, str(s)) for d, s in CELLS]
    assert rows.accuracy.between(0, 1).all()
    private = rows[rows.defence == "DP-SGD"]
    assert (private.epsilon <= private.strength).all()
    assert list(private.noise_multiplier > 0) == [True, True, True, False]
    kept = path.read_text().splitlines()[:-2]
    path.write_text("\n".join(kept).replace(kept[1], kept[1].replace(f",{rows.accuracy[0]:.4g},", ",0.123,")) + "\n")
    accuracy.main(command)
    again = accuracy.read(path, Row)
    assert again.accuracy[0] == 0.123
    assert list(again.accuracy[1:]) == list(rows.accuracy[1:])
    assert "| DP-SGD, ε = 3 | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"'epochs': 1.*'epochs': 10"):
        accuracy.main(["--out", str(tmp_path)])


def test_a_line_of_the_table() -> None:
    def row(defence: str, strength: float, seed: int, share: float, found: float) -> Row:
        return Row(
            "mnist5k", defence, strength, seed, share, found, math.nan, math.nan, 20, 1000, 0.1, 1.0, 2.5, 60.0
        )

    rows = [row("DP-SGD", 3.0, seed, 0.6 + 0.05 * seed, 2.99) for seed in range(3)]
    rows += [row("prune", 0.001, seed, 0.5, math.nan) for seed in range(3)]
    rows += [row("bfloat16", 16.0, 0, 0.5, math.nan)]
    table = accuracy.summary(pd.DataFrame(rows))
    assert "| DP-SGD, ε = 3 | 3 | 65.0 ± 12.4 | 2.99 | – | – | 2.5 | 20 | 1000 | 60 |" in table
    assert "| bfloat16 | 1 | 50.0 | – |" in table
    assert "| pruning, 0.1 % kept | 3 | 50.0 ± 0.0 | – |" in table


def test_cifar10_needs_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--data", "cifar10"])
    assert "--root" in capsys.readouterr().err
    found = options("--data", "cifar10", "--root", "somewhere", "--limit", "100")
    assert (found.patch_size, accuracy.file_name(found)) == (4, "defences_accuracy_cifar10")
    with pytest.raises(FileNotFoundError, match="somewhere"):
        next(iter(accuracy.measured(found, Case(0, "none", math.nan))))


# --- Clipping an update -------------------------------------------------------------------------------------------


def test_changes_are_those_of_every_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    members, others = torch.randn(3, 40, generator=generator), 5 * torch.randn(4, 40, generator=generator)
    clip = 3.0

    def bounded(g: Tensor) -> Tensor:
        return g * min(1.0, clip / float(g.norm()))

    each, whole = 0.0, 0.0
    for out in range(3):
        for new in others:
            after = members.clone()
            after[out] = new
            whole = max(whole, float((bounded(after.mean(0)) - bounded(members.mean(0))).norm()))
            means = [torch.stack([bounded(g) for g in rows]).mean(0) for rows in (members, after)]
            each = max(each, float((means[1] - means[0]).norm()))
    gram = accuracy_clipping.gram_of(torch.cat([members, others]))
    assert accuracy_clipping.changes(gram, 3, clip) == pytest.approx((each, whole), rel=1e-5)
    assert each <= 2 * clip / 3 < whole <= 2 * clip


def test_clipping_is_measured_before_and_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.accuracy.al.mnist5k", digits)
    accuracy_clipping.main(["--quick", "--out", str(tmp_path)])
    rows = accuracy_clipping.read(tmp_path / accuracy_clipping.FILE, accuracy_clipping.Row)
    assert list(rows.weights) == ["initial", "trained"]
    assert (rows.per_image <= rows.bound).all()
    assert (rows.per_update > 0).all()
