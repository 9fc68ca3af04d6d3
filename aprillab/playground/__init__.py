"""The playground: one federated round with knobs on it, and what the closed forms make of the
update.

:func:`play` is a plain function of a frozen :class:`State`; what is said and drawn of its
:class:`Outcome` is in :mod:`~aprillab.playground.showing`. :func:`playground` puts ipywidgets
around both, and alone knows them.
"""

from .outcome import Outcome, play
from .state import CONTROLS, OWN, Control, State

__all__ = ["CONTROLS", "OWN", "Control", "Outcome", "State", "play", "playground"]


def playground(state: State | None = None) -> None:
    """Show the playground in a notebook or on a page of Voilà; see
    :func:`aprillab.playground.page.show`.
    """
    from .page import show

    show(state)
