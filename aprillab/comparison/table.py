"""The summary of a comparison: a table in Markdown, and the page around it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .records import ROW_COLUMNS, Row, cells

BY = ("model", "image_size", "weights", "dtype", "batch_size", "labels", "position", "attack")
_SETTING = (
    "model", "image_size", "patch_size", "width", "depth", "heads", "mlp_ratio", "channels", "classes", "position",
    "weights", "dtype", "labels", "batch_size", "seed",
)  # fmt: skip


def table(rows: Sequence[Row], *, by: Sequence[str] = BY) -> str:
    """A Markdown table: one line for each combination of the columns ``by``, then why attacks were
    refused.

    Columns with one value in all rows are left out, except the attack. PSNR in dB (a run's is the
    mean over its batch), seconds of the attack; medians over the runs that were not refused.
    """
    texts = [cells(row) for row in rows]
    by = [name for name in by if name == "attack" or len({text[name] for text in texts}) > 1]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for line, row in zip(texts, rows, strict=True):
        groups.setdefault(tuple(line[name] for name in by), []).append(row)
    head = [name.replace("_", " ") for name in by]
    head += ["runs", "median dB", "least dB", "exact", "refused", "median s"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join([*key, *_summary(group)])} |" for key, group in groups.items()]
    # The groups' order, in which the attacks stand in the table.
    refused = [row for group in groups.values() for row in group if row.psnr is None]
    return "\n".join([*lines, *_refusals(refused)])


def _summary(group: Sequence[Row]) -> list[str]:
    """The cells of one line: runs, median and least dB, how many are exact, how many refused,
    median seconds.
    """
    scored = [row for row in group if row.psnr is not None]
    refused = str(len(group) - len(scored))
    if not scored:
        return [str(len(group)), "–", "–", "–", refused, "–"]
    decibels = sorted(-math.inf if math.isnan(row.psnr) else row.psnr for row in scored if row.psnr is not None)
    return [
        str(len(group)),
        f"{statistics.median(decibels):.1f}",
        f"{decibels[0]:.1f}",
        f"{sum(bool(row.exact) for row in scored)} of {len(scored)}",
        refused,
        f"{statistics.median(row.seconds for row in scored):.3g}",
    ]


def _refusals(refused: Sequence[Row]) -> list[str]:
    """Each attack's reasons, and how often it gave them."""
    if not refused:
        return []
    reasons: dict[str, list[str]] = {}
    for row in refused:
        reasons.setdefault(row.case.attack, []).append(row.outcome.reason)
    lines = [
        f"- {attack} ({given.count(reason)}): {reason}"
        for attack, given in reasons.items()
        for reason in dict.fromkeys(given)
    ]
    return ["", "Refused, and why:", "", *lines]


def report(rows: Sequence[Row], command: str, figures: dict[str, str] | None = None) -> str:
    """The summary as a Markdown page with the command that makes it; ``figures`` maps files to
    alternative texts.
    """
    lines = [cells(row) for row in rows]
    # Every value of a column, in the order of the rows; "" where there is none.
    values = {name: " / ".join(filter(None, dict.fromkeys(line[name] for line in lines))) for name in ROW_COLUMNS}
    setting = ", ".join(f"{name.replace('_', ' ')} {values[name]}" for name in _SETTING if values[name])
    limit = f"{values['max_evaluations']} evaluations" + (f" or {s} s" if (s := values["max_seconds"]) else "")
    pictures = "".join(f"![{alt}]({name})\n\n" for name, alt in (figures or {}).items())
    versions = ", ".join(f"{name} {values[name]}" for name in ("aprillab", "torch", "python"))
    return (
        f"# Attacks compared\n\n{setting}; victims {values['victims']}. A search ends after {limit}. PSNR of pixels "
        "in [0, 1], mean over a batch after the best assignment. Exact is what the attack itself could verify.\n\n"
        f"{table(rows)}\n\n{pictures}"
        f"{versions}, {values['machine']}, {values['threads']} thread(s), {values['device']}. Made by `{command}`. "
        "Seconds, and what a limit in seconds cut short, depend on the machine.\n"
    )
