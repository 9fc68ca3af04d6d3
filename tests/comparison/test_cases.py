"""Cases that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from aprillab.comparison.cases import Case, CompareError


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"victims": ("nobody",)}, "no victim 'nobody'"),
        ({"victims": ("mnist:3",)}, "one channel"),
        ({"victims": ("coffee",) * 11}, "11 victims in a batch"),
        ({"position": "spiral"}, "position 'spiral' is none of learned"),
        ({"dtype": "float16"}, "'float16' is none of float32, float64"),
        ({"labels": "guess"}, "'guess'"),
    ],
)
def test_cases_that_cannot_be(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(CompareError, match=fragment):
        Case(**{"attack": "span", "victims": ("coffee",), **change})
