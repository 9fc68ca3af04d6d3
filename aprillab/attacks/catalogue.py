"""Which attacks there are."""

from __future__ import annotations

from collections.abc import Callable

from .closed_forms.april import april_closed_form
from .closed_forms.patch_embedding import embedding_closed_form
from .closed_forms.span import span_closed_form
from .grey_levels.span_then_round import span_then_round
from .result import Reconstruction
from .searches.span_then_match import span_then_match

#: The closed forms, the strongest first: fewest conditions and least amplification of rounding errors.
CLOSED_FORMS: dict[str, Callable[..., Reconstruction]] = {
    "embedding": embedding_closed_form,
    "april": april_closed_form,
    "span": span_closed_form,
}

#: All that :func:`invert` takes by name: the closed forms, and the two that go on where the span attack ends.
ATTACKS: dict[str, Callable[..., Reconstruction]] = {
    **CLOSED_FORMS,
    "span_then_round": span_then_round,
    "span_then_match": span_then_match,
}
