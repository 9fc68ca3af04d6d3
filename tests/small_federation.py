"""A small federation for tests, in this process: clients that train, and clients that do
what they should not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import private_batch, tiny_vit
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import Tensor

from aprillab.federation import CuriousServer, LocalTraining, run_nearby, train_locally
from aprillab.models import VisionTransformer

TOLD = LocalTraining(learning_rate=0.5, steps=2, momentum=0.9)


def model() -> VisionTransformer:
    return tiny_vit(torch.float32)


def private(node: int) -> tuple[Tensor, Tensor]:
    return private_batch(model(), seed=node)


def trained(node: int, state: Mapping[str, Tensor], how: LocalTraining) -> dict[str, Tensor]:
    client = model()
    client.load_state_dict(dict(state))
    return train_locally(client, *private(node), how)


def spoiled(state: dict[str, Tensor], does: str) -> dict[str, Tensor]:
    """What a client returns that is not what was asked for."""
    first = next(iter(state))
    if does == "nan":
        state[first] = torch.full_like(state[first], torch.nan)
    elif does == "shape":
        state[first] = state[first][..., :1]
    elif does == "few":
        del state[first]
    elif does == "more":
        state["__metadata__"] = torch.ones(2)
    return state


def client_app(mods: Sequence[Any] = ()) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Any) -> Message:
        node = context.node_config
        if node.get("does") == "raise":
            raise RuntimeError("the disk\nis full")
        how = LocalTraining.from_config(message.content["config"])
        state = trained(node["partition-id"], message.content["arrays"].to_torch_state_dict(), how)
        arrays = ArrayRecord(spoiled(state, node.get("does", "")))
        if node.get("does") == "bytes":
            next(iter(arrays.values())).data = b"no array"
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "loss": float("nan")})}
        if "name" in node:
            content["client"] = ConfigRecord(
                {"name": node["name"], **{k: node[k] for k in node if k == "local-steps"}}
            )
        return Message(RecordDict(content), reply_to=message)

    return app


def federate(
    strategy: Any, nodes: Sequence[Mapping[str, Any]], *, rounds: int = 2, config: Mapping[str, Any] | None = None,
    mods: Sequence[Any] = (), **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the strategy; the model in the end. The same nodes are drawn in the same order each time."""
    kept: list[Any] = []
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        told = ConfigRecord(dict(TOLD.to_config() if config is None else config))
        arrays = ArrayRecord(model().state_dict())
        kept.append(strategy.start(grid, arrays, num_rounds=rounds, train_config=told, **options))

    random.seed(0)
    run_nearby(app, client_app(mods), nodes)
    return kept[0].arrays.to_torch_state_dict()


def two(**of_second: Any) -> list[dict[str, Any]]:
    """Two nodes."""
    return [{"partition-id": 0, "name": "anna"}, {"partition-id": 1, "name": "ben", **of_second}]


def curious(strategy: Any, folder: Path, **options: Any) -> CuriousServer:
    return CuriousServer(strategy, folder / "recording", **options)
