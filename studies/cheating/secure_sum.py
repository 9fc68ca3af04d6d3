"""One round of Flower's own SecAgg+ with a server that cheats, and what is in the sum. Needs
Flower.

Protocol, masks, quantization and FedAvg are Flower's. The server follows the protocol, and cheats
by one method of its strategy: ``configure_fit`` gives each node a model of its own. Node k is sent
θ_k and sends back, masked, n_k (θ_k − η u_k). The server gets the average A alone, and knows each
θ_k, and n_k, which goes beside in plain text. So it has Σ n_k θ_k − N A = η Σ n_k u_k; and where
all but one u_k are zero, one client's update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import FitIns, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig
from flwr.server.compat import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from torch import Tensor, nn

import aprillab as al
from aprillab.federation import LocalTraining, train_locally

from ..protections.wire import Wire
from .clients import loaded, read

FIRST = 1  # node of the client that is read; the others follow
CLIENTS, THRESHOLD = 3, 2  # of the shares of a secret, which each client has of each, two bring it back
LEVELS = 2**22  # of the quantization, Flower's default

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Precision:
    """What the server tells the clients of the quantization; Flower's defaults.

    A client multiplies its weights by n / ``max_weight``, cuts them off at ± ``clipping_range``,
    and rounds them at random to one of 2²² levels.
    """

    max_weight: float = 1000.0
    clipping_range: float = 8.0

    @property
    def step(self) -> float:
        """Between two levels."""
        return 2 * self.clipping_range / LEVELS


@dataclass(frozen=True)
class Owner:
    """A client: images (n, C, H, W) in model-input space, and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def trained(self, model: nn.Module, state: State, how: LocalTraining) -> dict[str, Tensor]:
        """The weights that it sends back."""
        return train_locally(loaded(model, dict(state)), self.images, self.labels, how)


class Cheating(FedAvg):
    """FedAvg, but for the models that it sends; keeps what it is given.

    Parameters
    ----------
    sent : the states of nodes 1, 2, …
    how : what it asks the clients for
    """

    def __init__(self, sent: Sequence[State], how: LocalTraining) -> None:
        self.names, self.parameters = list(sent[0]), [_parameters(state) for state in sent]
        super().__init__(
            fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=len(sent), min_available_clients=len(sent),
            initial_parameters=self.parameters[0], on_fit_config_fn=lambda _: how.to_config(),
        )  # fmt: skip
        self.average: dict[str, Tensor] = {}
        self.pictures: dict[int, int] = {}

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Each node's own model, and the same request."""
        asked = super().configure_fit(server_round, parameters, client_manager)
        return [(proxy, FitIns(self.parameters[proxy.node_id - FIRST], told.config)) for proxy, told in asked]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """In each client's place there is the same: the average of all of them."""
        for proxy, reply in results:
            arrays = map(torch.as_tensor, parameters_to_ndarrays(reply.parameters))
            self.average = dict(zip(self.names, arrays, strict=True))
            self.pictures[proxy.node_id] = reply.num_examples
        return super().aggregate_fit(server_round, results, failures)


def _parameters(state: State) -> Parameters:
    return ndarrays_to_parameters([tensor.numpy() for tensor in state.values()])


@dataclass(frozen=True)
class Round:
    """What the server has after a round: what it sent to whom and asked for, and what
    the protocol gave it.

    ``average`` (float64) is empty where the protocol was halted; ``pictures`` are of those
    who are in the sum.
    """

    sent: Sequence[State]
    how: LocalTraining
    precision: Precision
    average: State
    pictures: Mapping[int, int]

    def weights(self) -> dict[int, float]:
        """What each reply counts in the sum: n_k / max_weight, as the protocol rounds it."""
        return {node: round(n / self.precision.max_weight * LEVELS) / LEVELS for node, n in self.pictures.items()}


def play(
    model: nn.Module, sent: Sequence[State], everyone: Sequence[Owner], how: LocalTraining, *,
    precision: Precision | None = None, seed: int = 0, lost: Callable[[Message], bool] | None = None,
) -> Round:  # fmt: skip
    """One round; ``seed`` is of the stochastic rounding, for the masks are drawn from the
    system's randomness.
    """
    strategy, told = Cheating(sent, how), precision or Precision()
    coarse = {"max_weight": float(told.max_weight), "clipping_range": float(told.clipping_range)}  # no int is taken
    protocol = SecAggPlusWorkflow(CLIENTS, THRESHOLD, quantization_range=LEVELS, **coarse)
    workflow = DefaultWorkflow(fit_workflow=protocol)
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), ServerConfig(num_rounds=1), strategy)
    wire = Wire([app_of(owner, model) for owner in everyone], lost=lost, keep=lambda asked, answered: None)
    wire.run(lambda grid: workflow(grid, context), seed=seed)
    return Round(sent, how, told, strategy.average, strategy.pictures)


def app_of(owner: Owner, model: nn.Module) -> ClientApp:
    """The client, behind Flower's mod, in the older interface that SecAgg+ needs:
    weights without names.
    """
    names = list(model.state_dict())

    class Trains(NumPyClient):
        def fit(self, parameters: list[Any], config: Any) -> tuple[list[Any], int, dict[str, Any]]:
            state = {name: torch.from_numpy(array) for name, array in zip(names, parameters, strict=True)}
            after = owner.trained(model, state, LocalTraining.from_config(config))
            return [tensor.numpy() for tensor in after.values()], len(owner.images), {}

    return ClientApp(client_fn=lambda _: Trains().to_client(), mods=[secaggplus_mod])


# --- What a server makes of it ------------------------------------------------------------------------------------


def update_of(model: nn.Module, played: Round, node: int = FIRST) -> al.ClientUpdate:
    """The update of the clients in the sum, as if ``node`` had sent it: in units of
    its mean gradient.

    Raises
    ------
    ValueError
        If there is no sum, or the node is not in it.
    """
    weights = played.weights()
    if node not in weights:
        found = f"it is of nodes {', '.join(map(str, weights))}" if weights else "there is none, the round was halted"
        raise ValueError(f"node {node} is not in the sum: {found}")
    before, total = played.sent[node - FIRST], sum(weights.values())
    moved = {
        name: sum(w * played.sent[k - FIRST][name].double() for k, w in weights.items()) - total * average
        for name, average in played.average.items()
    }
    after = {name: value.double() - moved[name] / weights[node] for name, value in before.items()}
    how = played.how
    return al.update_from_states(
        before, after, learning_rate=how.learning_rate, local_steps=how.steps, trained=model
    )  # fmt: skip


def foretold(played: Round) -> float:
    """The rms error of the average's weights: of each reply a step of the quantization,
    rounded at random.
    """
    return played.precision.step * math.sqrt(len(played.pictures) / 6) / sum(played.weights().values())


def noise_of(played: Round, node: int = FIRST) -> float:
    """The same in the units of :func:`update_of`."""
    weights, how = played.weights(), played.how
    return foretold(played) * sum(weights.values()) / (weights[node] * how.learning_rate * how.steps)


def picture_of(model: nn.Module, played: Round, node: int = FIRST) -> al.Reconstruction:
    """By the patch-embedding system, told the quantization's noise."""
    sent = loaded(model, dict(played.sent[node - FIRST]))
    update = update_of(model, played, node)
    return read(sent, update, preprocessing=al.HALF, noise=noise_of(played, node), strict=False)
