"""A real federation: how a client trains, a server that looks at what it is sent, and both of them
run on Flower by real processes.

    strategy = CuriousServer(FedAvg(), "recording")     # in your ServerApp; then as before
    recording = read_recording("recording")             # anywhere
    found = al.invert(model, recording.of_client("7321"))

What needs Flower is imported when it is asked for: :class:`CuriousServer`,
:class:`NearbyGrid` and :func:`run_nearby`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .flower import FlowerMissing, need_flower
from .index import Fault, Reply
from .keeping import Recorder
from .local import LocalTraining, train_locally, update_of
from .recording import Recording, example_recording, read_recording

if TYPE_CHECKING:
    from .curious import CuriousServer
    from .nearby import NearbyGrid, run_nearby

__all__ = [
    "CuriousServer",
    "Fault",
    "FlowerMissing",
    "LocalTraining",
    "NearbyGrid",
    "Recorder",
    "Recording",
    "Reply",
    "example_recording",
    "read_recording",
    "run_nearby",
    "train_locally",
    "update_of",
]

_WITH_FLOWER = {"CuriousServer": "curious", "NearbyGrid": "nearby", "run_nearby": "nearby"}

# A type checker that saw this function would take every name for one of the package's.
if not TYPE_CHECKING:

    def __getattr__(name):
        """Import what needs Flower when it is first asked for (PEP 562)."""
        if name not in _WITH_FLOWER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        need_flower()
        return getattr(import_module(f".{_WITH_FLOWER[name]}", __name__), name)
