"""What a comparison keeps: a CSV row for each case, the searches' points on their way, the
pictures.

A CSV ends between two lines whenever the program ends, and what is read back is what was written,
to six digits.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cases import Case, CompareError, cell


@dataclass(frozen=True)
class CaseOutcome:
    """What an attack said of its picture, or why it made none.

    Attributes
    ----------
    state : {"exact", "not exact", "refused"}
    reason : str
        The attack's, in one line.

    Examples
    --------
    >>> str(CaseOutcome("refused", "rank 15 of 16"))
    'refused: rank 15 of 16'
    """

    state: str
    reason: str

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"

    @classmethod
    def of_cell(cls, text: str) -> CaseOutcome:
        """From a CSV's cell, which has state and reason in one.

        Raises
        ------
        ValueError
            If it has no state in front.
        """
        state, colon, reason = text.partition(": ")
        if not colon or state not in ("exact", "not exact", "refused"):
            raise ValueError(f"an outcome is 'exact: …', 'not exact: …' or 'refused: …', not {state!r:.40}")
        return cls(state, reason)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a case. A refused attack has no scores, and why in ``outcome``.

    Attributes
    ----------
    case : Case
    psnr, psnr_min, ssim : float
        Mean (and least) over the batch, pixels in [0, 1], PSNR in dB, each picture beside the
        victim that the best assignment gives it. One picture for a whole batch, a mixture, is
        scored against every victim.
    exact, predicted_psnr, loss, residual, evaluations, stopped
        As the attack says, where it does.
    seconds : float
        Of the attack, less what scoring it on its way took.
    gradient_seconds : float
        Of the client's forward and backward pass, after a forward pass to warm up.
    outcome : CaseOutcome
    max_evaluations, max_seconds
        The budget of a search.
    weights_sha256 : str
        First 16 digits, of the file of weights.
    aprillab, torch, python, threads, device, machine
        Versions, and what it ran on.
    """

    case: Case
    psnr: float | None = None
    psnr_min: float | None = None
    ssim: float | None = None
    exact: bool | None = None
    predicted_psnr: float | None = None
    loss: float | None = None
    residual: float | None = None
    evaluations: int | None = None
    seconds: float
    gradient_seconds: float
    stopped: str = ""
    outcome: CaseOutcome
    max_evaluations: int
    max_seconds: float | None
    weights_sha256: str
    aprillab: str
    torch: str
    python: str
    threads: int
    device: str
    machine: str


@dataclass(frozen=True)
class Point:
    """A search on its way: the lowest loss so far and the picture that has it, PSNR in dB (mean
    over the batch).
    """

    update: str
    attack: str
    labels: str
    evaluation: int
    seconds: float
    loss: float
    psnr: float


# --- Files ----------------------------------------------------------------------------------------------------------


def curves_file(path: Path) -> Path:
    """The CSV of :class:`Point` beside the CSV of rows.

    Examples
    --------
    >>> curves_file(Path("results/compare.csv")).name
    'compare_curves.csv'
    """
    return path.with_name(f"{path.stem}_curves.csv")


def pictures_file(path: Path, case: Case) -> Path:
    """An update's ``"private"`` pictures and what each ``"ATTACK, labels LABELS"`` returned, 8-bit
    (B, C, H, W).
    """
    return path.with_name(f"{path.stem}_pictures") / f"{case.update}.safetensors"


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV of :func:`run`; none where there is no file. A line that was cut short is
    left out.

    Raises
    ------
    CompareError
        If it has other columns, or a value that makes no sense.
    """
    rows = []
    for number, line in enumerate(_read(path, ROW_COLUMNS), start=2):
        try:
            rows.append(Row(case=Case(**_values(Case, line)), **_values(Row, line)))
        except (ValueError, TypeError, KeyError) as error:
            raise CompareError(f"{path}, line {number}: {error}") from error
        if line["update"] != rows[-1].case.update:
            raise CompareError(f"{path}, line {number}: its update {line['update']} is not the one of its columns")
    return rows


def read_curves(path: Path) -> dict[tuple[str, str, str], list[Point]]:
    """The searches' points by (update, attack, labels), of the CSV that belongs to the rows at
    ``path``.
    """
    curves: dict[tuple[str, str, str], list[Point]] = {}
    for line in _read(curves_file(path), POINT_COLUMNS):
        point = Point(**_values(Point, line))
        curves.setdefault((point.update, point.attack, point.labels), []).append(point)
    return curves


def read_pictures(path: Path, case: Case) -> tuple[Tensor, Tensor, Tensor] | None:
    """Private and reconstructed pixels (B, C, H, W), in [0, 1] from 8 bits, and PSNR (B,) in dB;
    None if not kept.
    """
    file = pictures_file(path, case)
    kept = load_file(file) if file.is_file() else {}
    name = _picture_name(case)
    return (kept["private"] / 255, kept[name] / 255, kept[f"{name}, dB"]) if name in kept else None


def private_levels(path: Path, case: Case) -> Tensor | None:
    """The private pictures (B, C, H, W) in 8 bits, as kept with an update; None if not kept."""
    file = pictures_file(path, case)
    return load_file(file).get("private") if file.is_file() else None


def _picture_name(case: Case) -> str:
    return f"{case.attack}, labels {case.labels}"


ROW_COLUMNS = [
    *(f.name for f in fields(Case)), "batch_size", "update", *(f.name for f in fields(Row) if f.name != "case"),
]  # fmt: skip
POINT_COLUMNS = [f.name for f in fields(Point)]


def cells(record: Row | Point) -> dict[str, str]:
    """A record as the text of its columns.

    Examples
    --------
    >>> point = Point("2f3a", "match:april", "recover", evaluation=11, seconds=0.5, loss=0.25, psnr=43.0)
    >>> cells(point)["psnr"]
    '43'
    """
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    if isinstance(record, Row):
        case = values.pop("case")
        values = {**asdict(case), "batch_size": case.batch_size, "update": case.update, **values}
    return {name: cell(value) for name, value in values.items()}


_KINDS: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__,
    "tuple[str, ...]": lambda text: tuple(text.split("+")), "CaseOutcome": CaseOutcome.of_cell,
}  # fmt: skip


def _values(kind: type, line: dict[str, str]) -> dict[str, Any]:
    """The columns of a line that are fields of ``kind``, each in its type."""
    values = {}
    for f in fields(kind):
        if f.name in line:
            read = _KINDS.get(str(f.type).removesuffix(" | None"), str)
            empty = str(f.type).endswith("None") and not line[f.name]
            values[f.name] = None if empty else read(line[f.name])
    return values


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The whole lines of a CSV with these columns; one that was cut short at the end is left out."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True)
        lines, found = list(reader), list(reader.fieldnames or [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise CompareError(f"{path}: not a CSV file ({error})") from error
    if found and found != list(columns):
        odd = sorted(set(found) ^ set(columns)) or ["their order"]
        raise CompareError(
            f"{path}: its columns are not this version's (different: {', '.join(odd[:4])}): name another file, or "
            "begin this one again"
        )
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
    """The whole file at once: what was there stays until it is complete."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(",".join(columns) + "\n" + _csv(lines, columns), encoding="utf-8")
    beside.replace(path)


def append_lines(path: Path, lines: Sequence[dict[str, str]]) -> None:
    """Whole lines in one write, so that the file ends between two of them whenever it ends."""
    if lines:
        with path.open("ab", buffering=0) as file:
            file.write(_csv(lines, list(lines[0])).encode())


def _csv(lines: Sequence[dict[str, str]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, fieldnames=columns, lineterminator="\n").writerows(lines)
    return text.getvalue()


def keep_pictures(path: Path, case: Case, private: Tensor, found: Tensor, decibels: Tensor) -> None:
    """Add a case's pictures and their PSNR, in the victims' order, to its update's file."""
    file = pictures_file(path, case)
    file.parent.mkdir(exist_ok=True)
    kept = load_file(file) if file.is_file() else {}
    name = _picture_name(case)
    kept |= {"private": levels_of(private), name: levels_of(found), f"{name}, dB": decibels}
    save_file(kept, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def levels_of(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as 8-bit levels.

    >>> levels_of(torch.tensor([0.0, 0.5, 1.2]))
    tensor([  0, 128, 255], dtype=torch.uint8)
    """
    return (255 * pixels.nan_to_num(0.0).clamp(0, 1)).round().to(torch.uint8).contiguous()
