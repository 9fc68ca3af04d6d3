"""A study's tables, written into a folder, and the claims of its page that they break."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """A CSV for each, under its name."""
    for name, table in tables.items():
        table.to_csv(folder / name, index=False)


def broken(folder: Path, options: argparse.Namespace, *parts: Any) -> list[str]:
    """Phrases of the claims that do not hold, of a study's parts or its page: of what can
    ``describe`` the folder.
    """
    return [claim.phrase for part in parts for claim in part.describe(folder, options)[1] if not claim.holds]
