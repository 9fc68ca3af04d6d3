"""What each defence costs in accuracy: `python -m studies.defences.accuracy` writes
defences_accuracy.csv.

The small pre-norm ViT of `studies.accuracy`, its data and its split; accuracy of the last epoch,
five seeds. Seconds are of a machine that was shared: they mean something only as ratios.

DP-SGD is `aprillab.privacy.train_privately`: each image's gradient clipped, noise on the sum, ε of
the trained weights for one image more or less. Its batch and rate were chosen on seeds 100 and 101,
which are not among those reported: other splits of the same 5000 images. That is *not* counted in
ε. A hospital that tunes on its patients has to count it, or to tune on public pictures. ε = ∞ clips
and adds nothing, with the batch, rate and epochs of the runs without a defence.

The cheap defences are what each client does to its gradient in federated SGD, fifty clients of
one image a round, whose average takes one step: see `accuracy_federated`. Noise is σ·C in every
entry of every update, clipped to C, the median norm of the images' gradients before training
(which costs privacy, too, and is not counted; at σ = 0.1 on seed 100, C = 1 gave two points
more). ε is then *local*: of all updates that a client sends, one an epoch, to a server that reads
each. The column of the sums is for a server that sees only what fifty clients sent together, as
by secure aggregation.

    python -m studies.defences.accuracy                               # MNIST-5k, forty minutes of one core
    python -m studies.defences.accuracy --data cifar10 --root DIR     # CIFAR-10 is there: days, without a GPU
    python -m studies.defences.accuracy --quick
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

import aprillab as al

from .._rows import fill, read
from .._runner import run_study, study_parser
from .._tables import grouped, markdown
from ..accuracy import SETTINGS, checked, images_and_labels, interval, small_vit
from ..accuracy import add_arguments as add_study_arguments
from .accuracy_federated import (
    RATE,
    Defence,
    client_gradients,
    clipped,
    in_bfloat16,
    norms,
    pruned,
    quantized,
    signs,
    train_federated,
    untouched,
)

DELTA, CLIENTS = 1e-5, 50
#: Of DP-SGD by ε: found on seeds 100 and 101 for 3 and 8. Without noise it is the budget of
#: the other runs.
PRIVATE: dict[float, dict[str, Any]] = {
    1.0: {"batch_size": 1000, "epochs": 20, "lr": 0.012},
    3.0: {"batch_size": 1000, "epochs": 20, "lr": 0.012},
    8.0: {"batch_size": 500, "epochs": 20, "lr": 0.012},
    math.inf: {"batch_size": CLIENTS, "epochs": 10, "lr": RATE},
}
CLIP = 1.0


class Case(NamedTuple):
    """One run. The strength is DP-SGD's ε, noise's σ, the share kept by pruning, bits,
    or images a client.
    """

    seed: int
    defence: str
    strength: float


#: Defence and strength.
CELLS: tuple[tuple[str, float], ...] = (
    ("none", math.nan),
    *(("DP-SGD", epsilon) for epsilon in (1.0, 3.0, 8.0, math.inf)),
    *(("noise", sigma) for sigma in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
    *(("prune", keep) for keep in (0.1, 0.01, 0.001)),
    *(("quantize", float(bits)) for bits in (8, 4, 2)),
    ("sign", 1.0),
    ("bfloat16", 16.0),
    ("batch", 8.0),
)


@dataclass(frozen=True)
class Row:
    """One run.

    ``epsilon`` is DP-SGD's, of the weights, or that of all updates a client sends under
    noise; ``epsilon_round`` of one of them; ``epsilon_sum`` of the rounds' sums alone, for a
    server that cannot see what is in them. All at δ = 1e-5, for one image more or less.
    ``batch`` is images a step.
    """

    data: str
    defence: str
    strength: float
    seed: int
    accuracy: float
    epsilon: float
    epsilon_round: float
    epsilon_sum: float
    epochs: int
    batch: int
    lr: float
    clip: float
    noise_multiplier: float
    seconds: float


def measured(options: argparse.Namespace, case: Case) -> Iterator[Row]:
    """One run."""
    (x, y), test = images_and_labels(options, case.seed)
    model = small_vit(options, x, case.seed)
    start = time.perf_counter()
    run = privately if case.defence == "DP-SGD" else federated
    found = run(options, case, model, (x, y), test)
    yield Row(options.data, case.defence, case.strength, case.seed, **found, seconds=time.perf_counter() - start)


Pairs = tuple[Tensor, Tensor]  # images and labels


def privately(
    options: argparse.Namespace, case: Case, model: al.VisionTransformer, train: Pairs, test: Pairs
) -> dict[str, Any]:
    """DP-SGD at ε = strength."""
    chosen = PRIVATE[case.strength] | ({"epochs": options.epochs} if options.quick else {})
    chosen["batch_size"] = min(chosen["batch_size"], len(train[0]))
    model = model.to(options.device)
    history = al.privacy.train_privately(
        model, *train, epsilon=case.strength, delta=DELTA, seed=case.seed, test=test, at_once=250, progress=False,
        clip=CLIP, **chosen,
    )  # fmt: skip
    if len(history) < chosen["epochs"]:  # train_privately ends at Ctrl-C
        raise KeyboardInterrupt
    last = history[-1]
    return {
        "accuracy": last["test_accuracy"], "epsilon": last["epsilon"], "epsilon_round": math.nan,
        "epsilon_sum": math.nan, "epochs": chosen["epochs"], "batch": chosen["batch_size"], "lr": chosen["lr"],
        "clip": CLIP, "noise_multiplier": last["noise_multiplier"],
    }  # fmt: skip


def federated(
    options: argparse.Namespace, case: Case, model: al.VisionTransformer, train: Pairs, test: Pairs
) -> dict[str, Any]:
    """Federated SGD under a cheap defence."""
    clip = epsilon = each = together = math.nan
    sigma, batch = 0.0, CLIENTS
    if case.defence == "noise":
        sigma, clip = case.strength, median_norm(model, *train)
        each, epsilon = (al.privacy.epsilon(sigma, rounds=n, delta=DELTA) for n in (1, options.epochs))
        least = len(train[0]) % CLIENTS or CLIENTS  # clients of the smallest round, with the least noise
        together = al.privacy.epsilon(sigma * least**0.5, rounds=options.epochs, delta=DELTA)
    elif case.defence == "batch":  # the average of their averages is the average of all: one image each is the same
        batch = CLIENTS // int(case.strength) * int(case.strength)
    accuracy = train_federated(
        model, *train, defence_of(case, clip), epochs=options.epochs, seed=case.seed, clients=batch,
        deviation=sigma * clip if sigma else 0.0, test=test,
    )  # fmt: skip
    return {
        "accuracy": accuracy, "epsilon": epsilon, "epsilon_round": each, "epsilon_sum": together,
        "epochs": options.epochs, "batch": batch, "lr": RATE, "clip": clip, "noise_multiplier": sigma,
    }  # fmt: skip


def defence_of(case: Case, clip: float) -> Defence:
    """What each client does to its gradient, but for the noise."""
    strength = case.strength
    found: dict[str, Defence] = {
        "none": untouched,
        "batch": untouched,
        "noise": partial(clipped, clip=clip),
        "prune": partial(pruned, keep=strength),
        "quantize": lambda gradients: quantized(gradients, int(strength)),
        "sign": signs,
        "bfloat16": in_bfloat16,
    }
    return found[case.defence]


def median_norm(model: al.VisionTransformer, images: Tensor, labels: Tensor, at_once: int = 50) -> float:
    """Of the images' gradients, at the model's weights."""
    parts = zip(images.split(at_once), labels.split(at_once), strict=True)
    found = [norm for x, y in parts for norm in norms(client_gradients(model, x, y)).tolist()]
    return float(pd.Series(found).median())


def file_name(options: argparse.Namespace) -> str:
    return "defences_accuracy" if options.data == "mnist5k" else f"defences_accuracy_{options.data}"


def measure_accuracy(folder: Path, options: argparse.Namespace) -> None:
    """Seed by seed, so that an interrupted study has whole seeds."""
    cases = [Case(seed, *cell) for seed in range(options.seeds) for cell in CELLS]
    private = {f"{epsilon:g}": {**chosen, "clip": CLIP} for epsilon, chosen in PRIVATE.items()}
    settings = {name: getattr(options, name) for name in SETTINGS} | {"DP-SGD by ε": private, "delta": DELTA}
    path = folder / f"{file_name(options)}.csv"
    fill(path, Row, cases, partial(measured, options), key=Case._fields, settings=settings, workers=options.workers)


# --- Its share of the page ----------------------------------------------------------------------------------------

_WORDS = {
    "none": "none", "DP-SGD": "DP-SGD, ε = {:g}", "noise": "noise, σ = {:g}", "prune": "pruning, {:.3g} % kept",
    "quantize": "{:.0f} bits", "sign": "sign (1 bit)", "bfloat16": "bfloat16", "batch": "{:.0f} images a client",
}  # fmt: skip


def named(defence: str, strength: float) -> str:
    """A defence and its strength in words.

    >>> named("prune", 0.001), named("DP-SGD", 3.0)
    ('pruning, 0.1 % kept', 'DP-SGD, ε = 3')
    """
    return _WORDS[defence].format(100 * strength if defence == "prune" else strength)


def summary(rows: pd.DataFrame) -> str:
    """A line for each defence and strength: mean accuracy, its 95 % interval (of several
    seeds), ε, seconds.
    """

    def line(runs: pd.DataFrame) -> dict[str, Any]:
        first = runs.iloc[0]
        mean, half = interval(100 * runs.accuracy)
        epsilons = [first[name] for name in ("epsilon", "epsilon_round", "epsilon_sum")]
        texts = [None if math.isnan(value) else f"{value:.3g}" for value in epsilons]
        return {
            "what is done": named(first.defence, first.strength),
            "seeds": len(runs),
            "accuracy %": f"{mean:.1f}" + (f" ± {half:.1f}" if len(runs) > 1 else ""),
            "ε": texts[0],
            "ε of one round": texts[1],
            "ε of the sums": texts[2],
            "noise multiplier": f"{first.noise_multiplier:.3g}" if first.noise_multiplier else None,
            "epochs": first.epochs,
            "images a step": first.batch,
            "s a run": f"{runs.seconds.median():.0f}",
        }

    return markdown(grouped(rows, ["defence", "strength"], line).drop(columns=["defence", "strength"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this part of the study can be asked."""
    add_study_arguments(
        parser, epochs="of the federated runs (%(default)s)",
        device="of DP-SGD; the federated runs stay on the CPU",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("defences.accuracy", __doc__)
    add_arguments(parser)
    options = checked(parser, parser.parse_args(argv))
    run_study(file_name(options), options, measure=measure_and_print)


def measure_and_print(folder: Path, options: argparse.Namespace) -> None:
    measure_accuracy(folder, options)
    print(summary(read(folder / f"{file_name(options)}.csv", Row)))


if __name__ == "__main__":
    main()
