"""The report of an audit."""

from __future__ import annotations

import math

import torch

from aprillab.audit.report import json_safe


def test_json_safe() -> None:
    assert json_safe({1: math.inf, "a": [math.nan, -0.5], "b": torch.tensor([[1, 2]]), "c": (None, True)}) == {
        "1": None, "a": [None, -0.5], "b": [[1, 2]], "c": [None, True],
    }  # fmt: skip
    assert json_safe(torch.tensor([math.inf])) == [None]
    assert json_safe(torch.float16) == "torch.float16"
