"""Where the files of ``data/`` are: in a source checkout, or within an installed package."""

from __future__ import annotations

import csv
import io
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path


def data_folder(name: str, holding: str) -> Traversable:
    """A folder of ``data/``: within the package when it came as a wheel, beside it in a checkout.

    Raises
    ------
    FileNotFoundError
        If the file ``holding`` is in neither.
    """
    installed = resources.files("aprillab") / f"_{name}"
    checkout = Path(__file__).resolve().parents[2] / "data" / name
    for folder in (installed, checkout):
        if (folder / holding).is_file():
            return folder
    raise FileNotFoundError(
        f"{holding} is neither in {installed} nor in {checkout}: install aprillab again from a complete checkout of "
        "its repository (in its folder: pip install -e .)"
    )


def result_file(name: str) -> Traversable:
    """A file of ``data/results``, where studies write what they measured, from a wheel as from a
    checkout.

    Parameters
    ----------
    name : str
        Its name, such as ``"accuracy.csv"``.

    Returns
    -------
    Traversable
        To be opened: ``result_file("accuracy.csv").open(newline="")``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> import aprillab as al
    >>> result_file("accuracy.csv").read_text().splitlines()[0].split(",")[0]
    'data'
    """
    return data_folder("results", name) / name


def recorded(name: str, **wanted: str | float) -> list[dict[str, str]]:
    """Rows of a study's table in ``data/results``: those that have the wanted values.

    Parameters
    ----------
    name : str
        Of the CSV file.
    **wanted : str or float, by column
        Strings are compared as they stand, numbers as numbers.

    Returns
    -------
    list of dict
        From column to text, in the file's order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    KeyError
        If the table has no such column.

    Examples
    --------
    >>> len(recorded("cheating_looks.csv", kind="honest", model="april", seed=0))
    1
    """
    reader = csv.DictReader(io.StringIO(result_file(name).read_text(encoding="utf-8")))
    columns = reader.fieldnames or []
    if missing := [key for key in wanted if key not in columns]:
        raise KeyError(f"{name} has no column {', '.join(missing)}: there are {', '.join(columns)}")
    return [row for row in reader if all(_same(row[key], value) for key, value in wanted.items())]


def _same(text: str, value: str | float) -> bool:
    return text == value if isinstance(value, str) else text != "" and float(text) == value
