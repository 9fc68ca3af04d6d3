"""What a client shares in a round of federated learning, and how to write, read and check it.

FedSGD: the gradient of the loss over the client's batch (:func:`client_update`). FedAvg: the
difference of two states (:func:`update_from_states`), which after one local step is the gradient,
and after more a sum of gradients. :func:`fitted` brings either to the model that it came from. A
:class:`Round` has the weights that were sent, besides: several rounds say more than one.
"""

from .client import client_update, logits_of
from .files import load_state, load_update, save_update
from .first_step import error_scale
from .fit import check_update, fitted, missing_words
from .record import DTYPES, FORMAT, MAX_BATCH, ClientUpdate, UpdateError
from .rounds import Round, Updates, listed, only_one, state_of_round
from .states import update_from_states

__all__ = [
    "DTYPES",
    "FORMAT",
    "MAX_BATCH",
    "ClientUpdate",
    "Round",
    "UpdateError",
    "Updates",
    "check_update",
    "client_update",
    "error_scale",
    "fitted",
    "listed",
    "load_state",
    "load_update",
    "logits_of",
    "missing_words",
    "only_one",
    "save_update",
    "state_of_round",
    "update_from_states",
]
