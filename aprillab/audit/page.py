"""An audit's report for people: Markdown, and the words that the terminal shares with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ..attacks.result import Reconstruction, conditions_words
from ..update import ClientUpdate
from ..version import __version__
from .advice import Advice, advice, introduction, reading
from .findings import Audit, Finding, Part
from .words import NOT_SAFE, TRUST_WORDS


@dataclass(frozen=True)
class Source:
    """Where an audit comes from, so that it can be filed and made again.

    Attributes
    ----------
    command : str
        The command line.
    model : str
        The function that built the model, ``"module:function"``.
    file, sha256 : str
        The update's file: its name, without folders, and its checksum.
    loss : str
        The client's, as far as it was said.
    exit_code : int or None
        Of the command.
    date : str
        UTC, ISO 8601.
    """

    command: str = ""
    model: str = ""
    file: str = ""
    sha256: str = ""
    loss: str = ""
    exit_code: int | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def markdown(found: Audit, source: Source | None = None) -> str:
    """The audit in words, as Markdown, with the pictures by file name."""
    source = source or Source()
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
        f"- {images_words(found)}.",
        "",
        "## The attacks",
        *(line for finding in found.findings for line in _finding_lines(finding)),
        *notes,
        *_sharing_lines(found),
        "",
        *_advice_lines(found),
        "",
        *_HOW_TO_READ,
        "",
        *_source_lines(found, source),
        "",
    ]
    return "\n".join(lines)


_AFTER_ADVICE = (
    "*A guarantee* holds against every attacker, under its assumptions and with its number. *No closed form* says "
    "that the attacks of this course have no equations left, for this model and one image: searches need none, "
    "candidates can be told apart by what is left, and a server that prepares the model has other ways "
    "(chapter 12).",
    "",
    "**Audit again** after each change, with several updates: a rare picture, a batch of one or the first round may "
    "give away what others do not.",
)


def _advice_lines(found: Audit) -> list[str]:
    """The section on what to do: a table in order of cost, then why."""
    given = advice(found)
    files = ", ".join(f"`{name}`" for name in reading(found))
    return [
        "## What to do about it", "", f"{introduction(found)} What costs least comes first.", "",
        "| change | does it end it? | cost | chapter |", "|---|---|---|---|",
        *(f"| {one.change} | {ends_words(one)} | {one.cost} | {one.chapter[:2]} |" for one in given), "",
        *(line for one in given for line in _reasons(one)), "",
        *_AFTER_ADVICE, "", f"In aprillab's repository: {files}.",
    ]  # fmt: skip


def _reasons(one: Advice) -> list[str]:
    first, *more = one.words.splitlines()
    return [f"- **{one.change[0].upper()}{one.change[1:]}.** {first}", *(f"  - {line}" for line in more)]


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


def _source_lines(found: Audit, source: Source) -> list[str]:
    """The section by which the audit can be filed and made again."""
    preprocessing = found.preprocessing
    facts = {
        "result": f"`{found.leak}`" + ("" if source.exit_code is None else f", exit code {source.exit_code}"),
        "date": source.date,
        "aprillab": __version__,
        "command": f"`{source.command}`" if source.command else "",
        "model": f"`{source.model}`, a {found.model}" if source.model else found.model,
        "update": f"`{source.file}`, SHA-256 `{source.sha256}`" if source.file else "",
        "loss": source.loss,
        "input": f"(pixels − mean) / std, {normalization_words(preprocessing.mean, preprocessing.std)}"
        + ("" if found.pixels is None else f"; {found.pixels.text}"),
    }
    return ["## What was audited", "", *(f"- {name}: {value}" for name, value in facts.items() if value)]


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
        lines.append(f"| {part.part} | {parameter} | {state_words(found, part)}{norm} | {part.gives} |")
    update, size = found.update, "×".join(map(str, found.anatomy.image_size))
    return [
        *lines,
        "",
        f"{len(update.gradients)} tensors in {dtype_name(update)}, read as a {update.source} update of {found.model} "
        f"({found.anatomy.family}), images of {size}.",
    ]


def _sharing_lines(found: Audit) -> list[str]:
    """The section on what other tensors would give away, by the leak map's counts."""
    if found.sharing is None:
        return []
    lines = [
        "", "## If you shared less", "",
        "Counted for this model and one image, without any update. “No closed form” is no promise: other attacks "
        "need no count.", "",
        "| if only this is shared | closed form | because |", "|---|---|---|",
    ]  # fmt: skip
    for row in found.sharing.rows:
        if row.kind == "combination":
            form = f"{row.title}, {row.when}" if row.when else row.title
            lines.append(f"| {row.shared} | {form} | {row.why} |")
    return lines


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
        f"- reason: {reason_words(finding)}",
        f"- picture: [{picture_name(finding)}]({picture_name(finding)})",
    ]


def _numbers(finding: Finding, result: Reconstruction) -> dict[str, str]:
    """The figures of a finding that decide, in words and in the report's order."""
    numbers = {"predicted PSNR": predicted_words(finding)}
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


# --- Words that the terminal uses too ------------------------------------------------------------------------------


def picture_name(finding: Finding) -> str | None:
    """File of a finding's picture; a mixture is called one."""
    if finding.result is None:
        return None
    return f"{finding.attack.name}{'_mixture' if finding.trust == 'mixture' else ''}.png"


def predicted_psnr(finding: Finding) -> float | None:
    """The PSNR in dB predicted of a photograph; None for a mixture, which is none, and where no
    finite number was predicted.
    """
    result = finding.result
    if result is None or result.predicted_psnr is None or not math.isfinite(result.predicted_psnr):
        return None
    several = any(c.name == "one image" and c.state == "contradicted" for c in result.conditions)
    return None if several or finding.trust == "mixture" else result.predicted_psnr


def believed(finding: Finding) -> bool:
    """Whether the picture is shown to be the private one, sharp or not."""
    return finding.trust in ("exact", "close", "likely", "coarse")


def predicted_words(finding: Finding) -> str:
    """The predicted PSNR with its unit, or why there is none."""
    predicted = predicted_psnr(finding)
    if predicted is not None:
        return f"{predicted:.1f} dB" + ("" if believed(finding) else ", which cannot be relied on")
    return "none, for this is no photograph" if finding.trust == "mixture" else "none"


def reason_words(finding: Finding) -> str:
    """Why it is exact, or not; without a predicted PSNR the conditions that failed."""
    if finding.result is None or predicted_psnr(finding) is not None:
        return finding.reason
    failed = [f"{c.name} fails ({c.text})" for c in finding.result.conditions if c.state == "contradicted"]
    return "; ".join(failed) or conditions_words(finding.result.conditions)


def ends_words(one: Advice) -> str:
    """Whether a change ends what was found, and by what."""
    if one.ends != "yes":
        return one.ends
    return {"guarantee": "yes, a guarantee", "count": "no closed form is left", "measurement": "yes"}[one.by]


def state_words(found: Audit, part: Part) -> str:
    """Whether a part is in the update. A part of a described model may be there and not be named."""
    described = found.anatomy.family == "described by the caller"
    return "not named" if part.parameter is None and described else part.state


def labels_words(found: Audit) -> str:
    """The labels, and how sure they are."""
    if found.labels is None:
        return f"not recovered: {found.labels_reason}."
    return f"{short_labels(found)[:-1]}: {found.labels_reason})."


_ONE_IMAGE = {
    "shown": "One image",
    "contradicted": "More than one image, or noise",
    "not checked": "Whether one image is behind the update was not checked",
}


def short_labels(found: Audit) -> str:
    """The labels in a few words; where there are none, why."""
    if found.labels is None:
        return f"not recovered: {found.labels_reason}"
    values = ", ".join(map(str, found.labels.labels.tolist()))
    return f"{values} ({'exact' if found.labels.exact else 'not certain'})"


def images_words(found: Audit) -> str:
    """Whether one image is behind the update, and by what evidence."""
    return f"{_ONE_IMAGE[found.one_image.state]}: {found.one_image.clause}"


def normalization_words(mean: Sequence[float], std: Sequence[float]) -> str:
    """Mean and standard deviation, channel by channel where they differ.

    >>> normalization_words((0.5,), (0.25, 0.5))
    'mean 0.5, std 0.25/0.5'
    """
    return ", ".join(
        f"{name} {'/'.join(f'{value:g}' for value in values)}" for name, values in (("mean", mean), ("std", std))
    )


def dtype_name(update: ClientUpdate) -> str:
    """The update's precision."""
    return str(update.dtype).removeprefix("torch.")


def overview_alt(found: Audit) -> str:
    """Alternative text of the overview."""
    return "What the attacks made of the update: " + "; ".join(
        f"{finding.attack.title}, {finding.trust}" for finding in found.applied
    )
