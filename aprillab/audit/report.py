"""An audit's findings as files: pictures, a report for programs, a report for people."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .. import viz
from ..attacks.result import Reconstruction
from ..update import ClientUpdate
from .findings import Audit, Finding
from .words import BELOW_PICTURE, NOT_SAFE, TRUST_WORDS

FORMAT = "aprillab-audit-1"


def report(found: Audit) -> dict[str, Any]:
    """The audit as numbers and words that JSON can hold: no NaN, no infinity, no tensor."""
    tensors = found.anatomy.names()
    update = found.update
    return json_safe(
        {
            "format": FORMAT,
            "verdict": found.verdict,
            "model": {
                "class": found.model,
                "family": found.anatomy.family,
                "image_size": found.anatomy.image_size,
                "first_block": found.anatomy.first_block,
                "tensors": tensors,
                "preprocessing": {"mean": found.preprocessing.mean, "std": found.preprocessing.std},
            },
            "update": {
                "tensors": len(update.gradients),
                "dtype": _dtype(update),
                "source": update.source,
                "batch_size_claimed": update.batch_size,
                "withheld": update.withheld,
            },
            "parts": [vars(part) for part in found.parts],
            "labels": {
                "labels": None if found.labels is None else found.labels.labels,
                "exact": found.labels is not None and found.labels.exact,
                "reason": found.labels_reason,
            },
            "batch": {"suspected": not found.one_image.holds, "evidence": found.one_image.text},
            "attacks": {finding.attack.name: _finding(finding) for finding in found.findings},
            "notes": found.notes,
        }
    )


def _finding(finding: Finding) -> dict[str, Any]:
    result = finding.result
    entry: dict[str, Any] = {
        "function": finding.attack.function.__name__,
        "applies": result is not None,
        "exact": finding.trust == "exact",
        "trust": finding.trust,
        "trust_words": TRUST_WORDS[finding.trust],
        "reason": finding.reason,
        "picture": picture_name(finding),
        "predicted_psnr": None,
        "conditions": [],
        "gradient_residual": finding.replay,
        "seconds": None,
        "diagnostics": {},
    }
    if result is not None:
        entry |= {
            "predicted_psnr": result.predicted_psnr,
            "conditions": [
                {"name": c.name, "holds": c.holds, "numbers": c.numbers, "words": c.text} for c in result.conditions
            ],
            "seconds": result.seconds,
            "diagnostics": result.diagnostics,
        }
    return entry


def picture_name(finding: Finding) -> str | None:
    """File of a finding's picture; a mixture is called one."""
    if finding.result is None:
        return None
    return f"{finding.attack.name}{'_mixture' if finding.trust == 'mixture' else ''}.png"


def markdown(found: Audit) -> str:
    """The audit in words, as Markdown, with the pictures by file name."""
    picture = [f"![{overview_alt(found)}](overview.png)", ""] if found.applied else []
    notes = ["", "## What limits this audit", "", *(f"- {note}" for note in found.notes)] if found.notes else []
    lines = [
        "# What this update gives away",
        "",
        f"**{found.verdict}**",
        "",
        *picture,
        *_parts_lines(found),
        "",
        "## Labels and number of images",
        "",
        f"- Labels: {labels_words(found)}",
        f"- {'One image' if found.one_image.holds else 'More than one image, or noise'}: {found.one_image.text}.",
        "",
        "## The attacks",
        *(line for finding in found.findings for line in _finding_lines(finding)),
        *notes,
        "",
        *_HOW_TO_READ,
        "",
    ]
    return "\n".join(lines)


_HOW_TO_READ = (
    "## How to read it",
    "",
    "- *Predicted PSNR* comes from the attack's residuals, without the original; above 59 dB the error is below "
    "an 8-bit rounding. It holds only if the attack's conditions do.",
    "- *Gradient residual* is how far the reconstruction, played back as a client, misses this update: near 0 "
    "for the right picture, near 1 for an unrelated one. A small value alone is no proof: very different "
    "pictures can have almost the same gradient.",
    f"- {NOT_SAFE}",
    "- A reconstruction of a private picture is as private as the picture. Keep this folder accordingly.",
)


def _parts_lines(found: Audit) -> list[str]:
    """The section on the gradients that are there."""
    lines = [
        "## What is in the update",
        "",
        "| part | parameter | in the update | what it gives |",
        "|---|---|---|---|",
    ]
    for part in found.parts:
        parameter = f"`{part.parameter}`" if part.parameter else ""
        norm = f", norm {part.norm:.2e}" if part.norm else ""
        lines.append(f"| {part.part} | {parameter} | {part.state}{norm} | {part.gives} |")
    update, size = found.update, "×".join(map(str, found.anatomy.image_size))
    return [
        *lines,
        "",
        f"{len(update.gradients)} tensors in {_dtype(update)}, read as a {update.source} update of {found.model} "
        f"({found.anatomy.family}), images of {size}.",
    ]


def _finding_lines(finding: Finding) -> list[str]:
    """The section on one attack."""
    title, result = finding.attack.title, finding.result
    head = ["", f"### {title[0].upper()}{title[1:]} (`{finding.attack.function.__name__}`)", ""]
    if result is None:
        return [*head, f"Does not apply: {finding.reason}."]
    return [
        *head,
        f"**{TRUST_WORDS[finding.trust]}**",
        "",
        f"- exact: {'yes' if finding.trust == 'exact' else 'no'}",
        *(f"- {name}: {value}" for name, value in _numbers(finding, result).items()),
        f"- reason: {finding.reason}",
        f"- picture: [{picture_name(finding)}]({picture_name(finding)})",
    ]


def _dtype(update: ClientUpdate) -> str:
    return str(update.dtype).removeprefix("torch.")


def labels_words(found: Audit) -> str:
    """The labels, and how sure they are."""
    if found.labels is None:
        return f"not recovered: {found.labels_reason}."
    values = ", ".join(map(str, found.labels.labels.tolist()))
    return f"{values} ({'exact' if found.labels.exact else 'not certain'}: {found.labels_reason})."


def _numbers(finding: Finding, result: Reconstruction) -> dict[str, str]:
    """The figures of a finding that decide, in words and in the report's order."""
    numbers = {"predicted PSNR": f"{result.predicted_psnr:.1f} dB"}
    if finding.trust == "mixture":
        numbers["predicted PSNR"] += " (of the mixture, not of a photograph)"
    known = result.diagnostics
    if "rank" in known:
        numbers["rank"] = f"{known['rank']}, for {known['patches']} patches; width {known['width']}"
        numbers["condition number"] = f"{known['condition']:.1e}"
    if "tokens_above_noise" in known:
        numbers["tokens above the noise"] = f"{known['tokens_above_noise']} of {known['tokens']}"
    if "residual" in known:
        numbers["relative residual"] = f"{known['residual']:.1e}"
    numbers["gradient residual"] = "not computed" if finding.replay is None else f"{finding.replay:.1e}"
    return numbers


def overview(found: Audit) -> Figure:
    """Every picture the attacks returned, side by side, each under what to think of it."""
    shown = _pictures(found)
    fig, axes = viz.figure(1, len(shown), size=(max(4.4 * len(shown), 5.5), 5.4))
    for ax, (finding, result) in zip(axes[0], shown, strict=True):
        viz.draw(ax, result.pixels[0])
        ax.set_title(finding.attack.title, fontsize=15.5, fontweight="bold")
        believed = finding.trust not in BELOW_PICTURE
        words = BELOW_PICTURE.get(finding.trust, f"{finding.trust}, predicted {result.predicted_psnr:.1f} dB")
        colour = viz.COLOURS["black"] if believed or finding.trust == "likely" else viz.COLOURS["red"]
        ax.set_xlabel(words, fontsize=14, fontweight="bold", color=colour, labelpad=8)
    fig.supxlabel("Made from model and update alone; no original seen.", fontsize=12.5, color="0.25")
    return fig


def _pictures(found: Audit) -> list[tuple[Finding, Reconstruction]]:
    """The findings of attacks that returned a picture, each with it."""
    return [(finding, finding.result) for finding in found.findings if finding.result is not None]


def overview_alt(found: Audit) -> str:
    """Alternative text of the overview."""
    return "What the attacks made of the update: " + "; ".join(
        f"{finding.attack.title}, {finding.trust}" for finding in found.applied
    )


def write_audit(found: Audit, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md``, one picture an attack at its own size, and
    ``overview.png``.

    Parameters
    ----------
    found : Audit
    folder : Path, made if it is not there

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "report.json": (json.dumps(report(found), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode(),
        "report.md": markdown(found).encode(),
    }
    if found.applied:
        files["overview.png"] = viz.to_png(overview(found))
    for finding, result in _pictures(found):
        files[str(picture_name(finding))] = picture_bytes(result.pixels[0])
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def picture_bytes(pixels: Tensor) -> bytes:
    """Pixels (C, H, W) in [0, 1] as an 8-bit PNG of that very size; one channel is grey, three are
    RGB.

    >>> picture_bytes(torch.zeros(3, 2, 2))[1:4]
    b'PNG'
    """
    levels = (255 * pixels.double().clamp(0, 1)).round().to(torch.uint8).cpu()
    array = np.ascontiguousarray(levels[:3].permute(1, 2, 0) if len(levels) >= 3 else levels[0])
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def json_safe(value: Any) -> Any:
    """The same in JSON's types: tensors as lists, NaN and infinities as null, what JSON does not
    know as a string.

    Examples
    --------
    >>> json_safe({"rank": torch.tensor([4, 4]), "condition": math.inf})
    {'rank': [4, 4], 'condition': None}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Tensor):
        return json_safe(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    return str(value)
