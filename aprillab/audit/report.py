"""An audit's findings as files: pictures, a report for programs, and page.py's for people."""

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
from ..attacks.catalogue import CLOSED_FORMS
from ..attacks.result import Reconstruction
from ..sharing import LeakMap
from ..version import __version__
from .advice import advice
from .findings import Audit, Finding
from .page import Source, believed, dtype_name, markdown, picture_name, predicted_psnr, reason_words, state_words
from .words import BELOW_PICTURE, TRUST_WORDS

FORMAT = "aprillab-audit-1"


def report(found: Audit, source: Source | None = None) -> dict[str, Any]:
    """The audit as numbers and words that JSON can hold: no NaN, no infinity, no tensor."""
    source = source or Source()
    return json_safe(
        {
            "format": FORMAT,
            "leak": found.leak,
            "exit_code": source.exit_code,
            "verdict": found.verdict,
            "aprillab": __version__,
            "date": source.date,
            "command": source.command or None,
            "model": _model(found, source),
            "update": _update(found, source),
            "parts": [vars(part) | {"state": state_words(found, part)} for part in found.parts],
            "labels": {
                "labels": None if found.labels is None else found.labels.labels,
                "exact": found.labels is not None and found.labels.exact,
                "reason": found.labels_reason,
            },
            "one_image": {"state": found.one_image.state, "evidence": found.one_image.text},
            "normalization": None
            if found.pixels is None
            else {"state": found.pixels.state, "evidence": found.pixels.text, "numbers": found.pixels.numbers},
            "attacks": {finding.attack.name: _finding(finding) for finding in found.findings},
            "what_to_do": [vars(one) for one in advice(found)],
            "rounds": found.rounds,
            "if_less_were_shared": None if found.sharing is None else _sharing(found.sharing),
            "notes": found.notes,
        }
    )


def _model(found: Audit, source: Source) -> dict[str, Any]:
    return {
        "built_by": source.model or None,
        "class": found.model,
        "family": found.anatomy.family,
        "image_size": found.anatomy.image_size,
        "first_block": found.anatomy.first_block,
        "tensors": found.anatomy.names(),
        "preprocessing": {"mean": found.preprocessing.mean, "std": found.preprocessing.std},
    }


def _update(found: Audit, source: Source) -> dict[str, Any]:
    update = found.update
    return {
        "file": source.file or None,
        "sha256": source.sha256 or None,
        "tensors": len(update.gradients),
        "dtype": dtype_name(update),
        "source": update.source,
        "batch_size_claimed": update.batch_size,
        "withheld": update.withheld,
        "loss": source.loss or None,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    result = finding.result
    entry: dict[str, Any] = {
        "function": finding.attack.function.__name__,
        "applies": result is not None,
        "exact": finding.trust == "exact",
        "trust": finding.trust,
        "trust_words": TRUST_WORDS[finding.trust],
        "reason": reason_words(finding),
        "picture": picture_name(finding),
        "predicted_psnr": predicted_psnr(finding),
        "conditions": [],
        "gradient_residual": finding.replay,
        "seconds": None,
        "diagnostics": {},
    }
    if result is not None:
        entry |= {
            "conditions": [
                {"name": c.name, "state": c.state, "numbers": c.numbers, "words": c.text} for c in result.conditions
            ],
            "seconds": result.seconds,
            "diagnostics": result.diagnostics,
        }
    return entry


def _sharing(found: LeakMap) -> list[dict[str, Any]]:
    """The leak map's rows, without the tensors' names."""
    names = ("shared", "kind", "attack", "why", "rounds", "silent_rounds", "evidence", "also")
    return [{name: getattr(row, name) for name in names} for row in found.rows]


def overview(found: Audit) -> Figure:
    """Every picture the attacks returned, side by side, each under what to think of it."""
    shown = _pictures(found)
    fig, axes = viz.figure(1, len(shown), size=(max(4.4 * len(shown), 5.5), 5.4))
    for ax, (finding, result) in zip(axes[0], shown, strict=True):
        viz.draw(ax, result.pixels[0])
        ax.set_title(finding.attack.title, fontsize=15.5, fontweight="bold")
        predicted = predicted_psnr(finding)
        sure = finding.trust if predicted is None else f"{finding.trust}, predicted {predicted:.1f} dB"
        words = BELOW_PICTURE.get(finding.trust, sure)
        colour = viz.COLOURS["black" if believed(finding) else "red"]
        ax.set_xlabel(words, fontsize=14, fontweight="bold", color=colour, labelpad=8)
    fig.supxlabel("Made from model and update alone; no original seen.", fontsize=12.5, color="0.25")
    return fig


def _pictures(found: Audit) -> list[tuple[Finding, Reconstruction]]:
    """The findings of attacks that returned a picture, each with it."""
    return [(finding, finding.result) for finding in found.findings if finding.result is not None]


def write_audit(found: Audit, folder: Path, *, source: Source | None = None) -> list[Path]:
    """Write ``report.json``, ``report.md``, one picture an attack at its own size, and
    ``overview.png``.

    Parameters
    ----------
    found : Audit
    folder : Path, made if it is not there
        Of an earlier audit in it, all pictures go: no report would name them.
    source : Source, optional
        Where it comes from; default is the date alone.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OSError
        If it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import torch, aprillab as al
    >>> from aprillab.audit import audit
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape)
    >>> images = al.HALF.to_input(al.load_victim("coffee", 16)[None])
    >>> found = audit(model, al.client_update(model, images, torch.tensor([3])))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in write_audit(found, Path(folder)))
    ['embedding.png', 'overview.png', 'report.json', 'report.md', 'span.png']
    """
    source = source or Source()
    numbers = json.dumps(report(found, source), indent=2, allow_nan=False, ensure_ascii=False)
    files = {"report.json": f"{numbers}\n".encode(), "report.md": markdown(found, source).encode()}
    if found.applied:
        files["overview.png"] = viz.to_png(overview(found))
    for finding, result in _pictures(found):
        files[str(picture_name(finding))] = picture_bytes(result.pixels[0])
    earlier = (folder / "report.json").is_file()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in _ALL_PICTURES - files.keys() if earlier else ():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


_ALL_PICTURES = {"overview.png", *(f"{name}{kind}.png" for name in CLOSED_FORMS for kind in ("", "_mixture"))}


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
