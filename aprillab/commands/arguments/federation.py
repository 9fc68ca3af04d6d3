"""Arguments of ``aprillab federation``."""

from __future__ import annotations

import argparse
from typing import Any

from ..messages import EXIT_CODES
from .types import positive, whole

_WHAT = """what is done: a SuperLink and a SuperNode for each client are started on the loopback address, on free
  ports; flwr run starts the course's ServerApp, FedAvg with a server that looks at what it is sent; each client
  trains on its own public photographs; then all that was started is ended, and the server attacks what it kept.
  Needs Flower: pip install "aprillab[federation]", in an environment of its own. Linux and macOS; elsewhere, and
  with --in-process, strategy and clients are the same, in one process and without a network.
what is written: federation.log, what each process printed; recording/, what the server kept; federation.png,
  photographs and what the server has of them; federation.json, for each client and round attack, psnr, exact and
  seconds; audits/, a report for each client and round."""


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    command = commands.add_parser(
        "federation",
        help="a real federation on this machine, by Flower, and what its server sees",
        description="Run FedAvg by real processes over the loopback address, and attack what the server received.",
        epilog=f"{_WHAT}\n\n{EXIT_CODES}",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for all of it; made if need be")
    command.add_argument("--clients", default=2, type=whole(1), metavar="N", help="(%(default)s)")
    command.add_argument("--rounds", default=2, type=whole(1), metavar="N", help="(%(default)s)")
    command.add_argument(
        "--images", default=1, type=whole(1), metavar="N", help="photographs that each client holds (%(default)s)"
    )
    command.add_argument(
        "--timeout", default=300.0, type=positive, metavar="S", help="seconds for the federation (%(default)s)"
    )
    command.add_argument(
        "--round-timeout", default=120.0, type=positive, metavar="S",
        help="seconds after which a round ends without the clients that are still silent (%(default)s)",
    )  # fmt: skip
    command.add_argument("--in-process", action="store_true", help="without processes and network")
    _add_training(command)
    _add_model(command)


def _add_training(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how clients train")
    group.add_argument("--local-steps", default=1, type=whole(1), metavar="N", help="in each round (%(default)s)")
    group.add_argument("--learning-rate", default=0.1, type=positive, metavar="X", help="(%(default)s)")
    group.add_argument(
        "--optimizer", default="sgd", choices=("sgd", "adam", "adamw", "adagrad", "rmsprop"), help="(%(default)s)"
    )
    group.add_argument("--momentum", default=0.0, type=float, metavar="X", help="of SGD (%(default)s)")
    group.add_argument("--weight-decay", default=0.0, type=float, metavar="X", help="(%(default)s)")
    group.add_argument("--batch-size", type=whole(1), metavar="N", help="photographs a step (all)")
    group.add_argument("--clip-norm", type=positive, metavar="X", help="of each step's gradient (none)")


def _add_model(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the model, architecture B")
    for name, default, words in (
        ("image-size", 32, "pixels a side"), ("patch-size", 8, "pixels a side"), ("width", 192, "of a token"),
        ("depth", 2, "blocks"), ("heads", 4, "in each attention"), ("classes", 10, "of the head"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", default=default, type=whole(1), metavar="N", help=f"{words} (%(default)s)")
    group.add_argument("--seed", default=0, type=whole(0), metavar="N", help="of weights and batches (%(default)s)")
