"""A comparison that takes a second: a tiny model, a quick search."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {"image_size": 8, "patch_size": 4, "width": 32, "depth": 1, "heads": 2}
QUICK: dict[str, Any] = {"max_evaluations": 12, "curve_every": 5, "progress": False}
