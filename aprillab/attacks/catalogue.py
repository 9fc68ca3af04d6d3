"""Which attacks there are: one row each, read by every list, help text and study.

A new attack is a file with a function and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .closed_forms import april, april_system, patch_embedding, span
from .grey_levels.span_then_round import span_then_round
from .result import Reconstruction
from .searches.match import match_gradients
from .searches.recipes import RECIPES
from .searches.span_then_match import span_then_match

Family = Literal["closed form", "search", "grey levels"]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes
    ----------
    name : str
        By which :func:`~aprillab.invert`, the comparison and the command line call it.
    title : str
        In words, for reports and figures.
    function : callable
        ``(model, update, *, anatomy, preprocessing, labels, device, …)`` to
        :class:`Reconstruction`.
    family : {"closed form", "search", "grey levels"}
        A closed form takes a second and no budget. The others take ``seed``, ``max_evaluations``,
        ``max_seconds``, ``callback`` and ``progress`` besides.
    needs : tuple of str
        Fields of :class:`~aprillab.Anatomy` whose gradients must be shared; of the span attacks',
        one of them, or an adapter beside it.
    """

    name: str
    title: str
    function: Callable[..., Reconstruction]
    family: Family
    needs: tuple[str, ...]

    @property
    def searches(self) -> bool:
        """Whether it takes a budget."""
        return self.family != "closed form"


# The closed forms come first, the strongest before the others: fewest conditions, least
# amplification of rounding.
_ROWS = (
    Attack(
        "embedding", "patch-embedding system", patch_embedding.embedding_closed_form, "closed form",
        patch_embedding.NEEDS,
    ),
    Attack("april", "APRIL's closed form", april.april_closed_form, "closed form", april_system.NEEDS),
    Attack("span", "span attack", span.span_closed_form, "closed form", span.NEEDS),
    Attack("span_then_match", "span, then matching", span_then_match, "search", span.NEEDS),
    Attack("span_then_round", "span, then whole grey levels", span_then_round, "grey levels", span.NEEDS),
    *(
        Attack(f"match:{name}", f"gradient matching, {name}", partial(match_gradients, recipe=name), "search", ())
        for name in RECIPES
    ),
)  # fmt: skip

ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ROWS}
"""All attacks by name."""

CLOSED_FORMS: dict[str, Attack] = {name: attack for name, attack in ATTACKS.items() if not attack.searches}
"""Those that :func:`~aprillab.invert` tries by itself, in this order."""
