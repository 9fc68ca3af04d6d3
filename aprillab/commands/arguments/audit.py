"""Arguments of ``aprillab audit``."""

from __future__ import annotations

import argparse
from typing import Any

from ..losses import LOSSES
from ..messages import AUDIT_EXIT_CODES
from .names import LEAKS
from .types import add_judging, add_own_model, normalization, part, setting, whole

_UPDATE = """update: any safetensors file whose tensors are gradients, or a multiple of them, each under its
  parameter's name in model.named_parameters(), with or without a wrapper's "module."; float16, bfloat16, float32
  or float64.
  aprillab.save_update writes one, and aprillab.update_from_states makes one of the weights before and after a
  FedAvg step. Optional metadata: "format": "aprillab-update-1", and "update", a JSON text with any of withheld,
  batch_size, source, learning_rate, local_steps, momentum, nesterov and weight_decay, such as
  {"withheld": ["pos_embed"], "batch_size": 1, "source": "fedavg", "learning_rate": 0.1, "local_steps": 5}.
  Pickles (torch.save) are refused: reading one can run code."""


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    command = commands.add_parser(
        "audit",
        help="what an update of your own federated system gives away",
        description="Try every closed form on one client's update and say how much of each picture is to be\n"
        "believed. Needs no labels and no originals.",
        epilog=f"{_UPDATE}\n\n{LOSSES}\n\n{AUDIT_EXIT_CODES}",
    )
    add_own_model(command, "and in the mode (train or eval) that the client used")
    _add_rounds(command)
    command.add_argument(
        "--out", required=True, metavar="DIR",
        help="folder for report.md, report.json, overview.png and a picture an attack; of a recording, a folder for "
        "each client and round, and summary.json; made if need be",
    )  # fmt: skip
    command.add_argument(
        "--withheld", default=[], type=lambda text: text.split(","), metavar="NAME,…",
        help="parameters that are trained but whose gradients clients do not share",
    )  # fmt: skip
    command.add_argument(
        "--preprocessing", type=normalization, metavar="P",
        help="unit, half, imagenet, or MEAN,STD (0.5,0.5; channels apart: 0.485/0.456/0.406,0.229/0.224/0.225); "
        "default: what the model's library uses, which the report names",
    )  # fmt: skip
    command.add_argument(
        "--part", default=[], action="append", type=part, metavar="PART=TENSOR",
        help="for a model aprillab does not know: where a part is, as in patch_weight=stem.weight, image_size=224, "
        "position=pos, position_prefix=1, query=attn.qkv.weight[0:768], head_weight=fc.weight, first_block=prenorm "
        "(repeat); vit=NAME picks one of several",
    )  # fmt: skip
    add_judging(command, strict=False)
    command.add_argument(
        "--fail-on", choices=LEAKS, metavar="LEVEL",
        help=f"for continuous integration: exit with 3 where this or worse is found, of {', '.join(LEAKS)}",
    )  # fmt: skip
    command.add_argument("--quiet", action="store_true", help="print the verdict alone")


def _add_rounds(command: argparse.ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--update", default=[], nargs="+", metavar="FILE",
        help="the client's update, safetensors; of several rounds several files, read together; see below",
    )  # fmt: skip
    what.add_argument(
        "--recording", metavar="DIR",
        help="what aprillab.federation.CuriousServer kept of a Flower app: every client in every round",
    )  # fmt: skip
    command.add_argument(
        "--client", default=[], action="append", metavar="NAME", help="of a recording: this client alone (repeat)"
    )
    command.add_argument(
        "--round", default=[], action="append", type=whole(1), metavar="N",
        help="of a recording: this round alone (repeat)",
    )  # fmt: skip
    command.add_argument(
        "--training", default=[], action="append", type=setting, metavar="KEY=VALUE",
        help="of a recording: how its clients train, if the server did not send it, as in learning-rate=0.01, "
        "local-steps=5, optimizer=adamw, momentum=0.9, weight-decay=0.01 (repeat)",
    )  # fmt: skip
    command.add_argument(
        "--state", default=[], nargs="+", metavar="FILE",
        help="with several rounds: the weights that were sent in each, safetensors, in the order of the updates; a "
        "state may lack what the client does not train",
    )  # fmt: skip
