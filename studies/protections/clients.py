"""The study's clients: one picture each, one step of SGD, in Flower's two interfaces; and how a
reply is attacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from torch import Tensor, nn

import aprillab as al
from aprillab.audit import audit

SHAPE = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, "heads": 3, "classes": 10}
VICTIMS = ("astronaut", "coffee", "retina")
SEEDS = (0, 1)
RATE = 0.1
FIRST = 1  # node of the victim; the others follow

State = Mapping[str, Tensor]
Mod = Callable[..., Any]


def model_of(seed: int) -> al.VisionTransformer:
    """The study's model: 32×32, patches of 8, d = 192, 4 blocks, random weights."""
    return al.VisionTransformer(**SHAPE, seed=seed)


@dataclass(frozen=True)
class Owner:
    """Who has one picture, and trains on it."""

    victim: str
    label: int

    def pixels(self) -> Tensor:
        return al.load_victim(self.victim, SHAPE["image_size"])[None]

    def trained(self, state: State, rate: float) -> dict[str, Tensor]:
        """The weights after one step of SGD."""
        model = model_of(0)
        model.load_state_dict(dict(state))
        images = al.dissect(model).preprocessing.to_input(self.pixels())
        gradients = al.client_update(model, images, torch.tensor([self.label])).gradients
        return {name: value - rate * gradients[name] if name in gradients else value for name, value in state.items()}


def owners(victim: str, number: int = 3) -> list[Owner]:
    """The victim and as many others as are wanted, each with another photograph and label."""
    others = [name for name in al.victims() if name != victim]
    return [Owner(name, 3 + k) for k, name in enumerate((victim, *others[: number - 1]))]


def client_app(owner: Owner, mods: Sequence[Mod] = ()) -> ClientApp:
    """In today's interface; the learning rate comes with the round."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, _: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        after = owner.trained(state, float(message.content["config"]["learning-rate"]))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(after), "metrics": metrics}), reply_to=message)

    return app


def older_client(owner: Owner, *, idle: bool = False) -> Client:
    """In the older interface, which secure aggregation still needs: weights in lists, without
    names.

    An idle one sends back what it was sent.
    """
    names = list(model_of(0).state_dict())

    class OneStep(NumPyClient):
        def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
            state = {name: torch.from_numpy(array) for name, array in zip(names, parameters, strict=True)}
            after = state if idle else owner.trained(state, float(config["learning-rate"]))
            return [tensor.numpy() for tensor in after.values()], 1, {}

    return OneStep().to_client()


def older_app(owner: Owner, mods: Sequence[Mod] = (), *, idle: bool = False) -> ClientApp:
    """The same as an app."""
    return ClientApp(client_fn=lambda _: older_client(owner, idle=idle), mods=list(mods))


def config_of(rate: float) -> ConfigRecord:
    return ConfigRecord({"learning-rate": rate})


def distance(first: State, second: State) -> float:
    """The norm of their difference, over all tensors."""
    return math.sqrt(sum(float((first[name].double() - second[name].double()).square().sum()) for name in first))


def rms(first: State, second: State) -> float:
    """The same a number."""
    return distance(first, second) / math.sqrt(sum(value.numel() for value in first.values()))


# --- What a server makes of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attacked:
    """What came of one attack."""

    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    attack: str = ""
    note: str = ""


def attacked(model: nn.Module, updates: Any, owner: Owner) -> Attacked:
    """:func:`aprillab.invert`'s best picture of the owner's, scored."""
    try:
        result = al.invert(model, updates, strict=False)
    except al.AttackNotApplicable as refusal:
        return Attacked(note=f"refused: {refusal.reason}")
    psnr = float(al.psnr(result.pixels[0], owner.pixels()[0].double()))
    chosen = str(result.diagnostics["chosen"])
    return Attacked(psnr, result.predicted_psnr, result.exact, chosen, "" if result.exact else result.reason)


def verdict(model: nn.Module, updates: Any) -> str:
    """The audit's, up to its first full stop or colon."""
    said = audit(model, updates).verdict
    return said.split(". ")[0].split(":")[0].rstrip(".")
