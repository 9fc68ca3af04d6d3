"""An outcome of the playground as a picture with its words, and as HTML: pure functions, tested without a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import viz
from ..attacks.result import Condition
from ..audit.findings import Audit, Finding
from ..audit.page import images_words, predicted_psnr, predicted_words, reason_words, short_labels
from ..audit.words import BELOW_PICTURE, TRUST_WORDS
from ..data import victim_info
from .play import Outcome
from .state import OWN, State

STATES = {"shown": "holds", "contradicted": "fails", "not checked": "not checked"}
POSITIONS = {
    "learned": "learned", "frozen": "frozen", "sinusoidal": "1-D sinusoidal", "sinusoidal 2-D": "2-D sinusoidal",
    "none": "no",
}  # fmt: skip
#: The private one and what came back, as the eye has them, by true PSNR in dB.
_BY_EYE = ((40.0, "no difference can be seen"), (20.0, "the same scene, with visible errors"))
_GREY = 0.5


# --- The picture --------------------------------------------------------------------------------------------------


def figure(outcome: Outcome) -> Figure:
    """The private pictures, and what came back beside them; plain grey where nothing did.

    Examples
    --------
    >>> from aprillab.playground import State, play
    >>> [ax.get_title() for ax in figure(play(State(shared="head"))).axes]
    ['private', 'came back: nothing']
    """
    count = len(outcome.private)
    fig, axes = viz.figure(1, count + 1, size=(2.5 * (count + 1), 3.0))
    for i, private in enumerate(outcome.private):
        viz.draw(axes[0, i], private, f"private {i + 1} of {count}" if count > 1 else "private")
    viz.draw(axes[0, -1], shown(outcome), f"came back: {_in_brief(outcome)}")
    return fig


def shown(outcome: Outcome) -> Tensor:
    """What came back, (3, H, W); grey where nothing did."""
    return torch.full_like(outcome.private[0], _GREY) if outcome.picture is None else outcome.picture


def _in_brief(outcome: Outcome) -> str:
    """What came back in two or three words."""
    if outcome.best is None:
        return "nothing"
    predicted = predicted_psnr(outcome.best)
    words = BELOW_PICTURE.get(outcome.best.trust, outcome.best.trust)
    if outcome.best.trust in ("exact", "close", "likely", "coarse") and predicted is not None:
        return f"{outcome.best.trust}\npredicted {predicted:.0f} dB"
    return f"\n{words}"


def caption(outcome: Outcome) -> str:
    """What was set, and what came back by which attack."""
    came = "No closed form returned a picture."
    if outcome.best is not None:
        came = f"Right: the {_the(outcome.best.attack.title)}'s picture."
    return f"{setting(outcome.state)}. {came}"


def alt(outcome: Outcome) -> str:
    """What somebody who does not see the pictures needs to know."""
    state, count = outcome.state, len(outcome.private)
    private = "a picture of the user's own" if state.picture == OWN else victim_info(state.picture).alt.rstrip(".")
    left = f"Left, the private picture: {private}" + (f", and {count - 1} more" if count > 1 else "")
    if outcome.best is None:
        return f"{left}. Right, plain grey: no picture came back."
    true = max(outcome.true_psnr)
    eye = next((words for least, words in _BY_EYE if true >= least), "hardly anything of it can be recognized")
    of = f"private picture {1 + outcome.true_psnr.index(true)}, the nearest" if count > 1 else "the private picture"
    return f"{left}. Right, what came back by the {_the(outcome.best.attack.title)}. Against {of}: {eye}."


def setting(state: State) -> str:
    """The state in one line.

    >>> setting(State())
    'ordinary ViT (pre-norm), 32×32, patch 8, width 256, learned positions, random weights; shared: all, float32'
    """
    words = state.in_words()
    line = (
        f"{words['Architecture']}, {words['Image size']}, patch {state.patch}, width {state.width}, "
        f"{POSITIONS[state.position]} positions, random weights; "
        f"shared: {words['Shared']}, {words['Precision']}"
    )
    more = [f"batch of {state.batch}"] if state.batch > 1 else []
    more += [f"{state.steps} local steps"] if state.steps > 1 else []
    more += [f"noise {words['Noise']}"] if state.noise else []
    return ", ".join([line, *more])


def _the(title: str) -> str:
    """A title that "the" can stand before: "APRIL's closed form" has its article."""
    return title.replace("APRIL's", "APRIL")


def status(outcome: Outcome) -> str:
    """One line when all is done: the time, and the verdict's first sentence.

    >>> from aprillab.playground import State, play
    >>> status(play(State())).partition(": ")[2]
    'This update gives the private picture away, exactly: patch-embedding system.'
    """
    said = outcome.refused if outcome.found is None else outcome.found.verdict.partition(". ")[0].rstrip(".") + "."
    return f"Done in {outcome.seconds:.1f} s: {said}"


def strip(outcomes: Sequence[Outcome], titles: Sequence[str]) -> Figure:
    """What came back in several states side by side, the first one's private picture before them."""
    fig, axes = viz.figure(1, len(outcomes) + 1, size=(2.0 * (len(outcomes) + 1), 2.9))
    viz.draw(axes[0, 0], outcomes[0].private[0], "private\n\n")
    for ax, outcome, title in zip(axes[0, 1:], outcomes, titles, strict=True):
        true = f"true {max(outcome.true_psnr):.0f} dB" if outcome.true_psnr else "no closed form"
        viz.draw(ax, shown(outcome), f"{title}\n{true}")
    return fig


# --- The evidence -------------------------------------------------------------------------------------------------


def picture_html(outcome: Outcome) -> str:
    """The figure as HTML, with caption and alternative text."""
    return viz.captioned(viz.to_png(figure(outcome)), caption=caption(outcome), alt=alt(outcome))["text/html"]


def summary_html(outcome: Outcome) -> str:
    """What the server can say of the picture, and beside it the one number that only we know."""
    found = outcome.found
    if found is None:
        return f"<p><strong>No update: {escape(outcome.refused)}</strong></p>"
    rows = [
        ("Exact", _exact(outcome)),
        ("Predicted PSNR", "no picture came back" if outcome.best is None else predicted_words(outcome.best)),
        ("True PSNR", _true(outcome)),
        ("Label", short_labels(found)),
        ("How many images", images_words(found)),
    ]
    return f"<p><strong>{escape(found.verdict)}</strong></p>{_table('What the server can say', (), rows)}"


def _exact(outcome: Outcome) -> str:
    if outcome.best is None:
        return "no: no picture came back"
    trust = outcome.best.trust
    return ("yes. " if trust == "exact" else "no. ") + TRUST_WORDS[trust].partition(". ")[0].rstrip(".") + "."


def _true(outcome: Outcome) -> str:
    if not outcome.true_psnr:
        return "no picture came back"
    best = max(outcome.true_psnr)
    number = "infinite" if math.isinf(best) else f"{best:.1f} dB"
    which = "" if len(outcome.true_psnr) == 1 else f" against private picture {1 + outcome.true_psnr.index(best)}"
    return f"{number}{which}. Only we can see this number: the server has no original."


def evidence_html(outcome: Outcome) -> str:
    """Conditions, attacks and counts as tables."""
    found, best = outcome.found, outcome.best
    if found is None:
        return ""
    parts = []
    if best is not None and best.result is not None:
        title = f"What the {_the(best.attack.title)}'s picture rests on"
        parts.append(_table(title, ("condition", "", "numbers"), map(_condition_row, best.result.conditions)))
    parts.append(_table("Which attacks apply, and why", ("attack", "", "why"), _attack_rows(outcome, found)))
    if outcome.leak is not None:
        parts.append(_table("What counting says of the tensors that are shared", (), _leak_rows(outcome)))
    if found.notes:
        parts.append(f"<p>{escape(' '.join(found.notes))}</p>")
    return "".join(parts)


def _condition_row(condition: Condition) -> tuple[str, str, str]:
    return condition.name, STATES[condition.state], condition.text


def _attack_rows(outcome: Outcome, found: Audit) -> list[tuple[str, str, str]]:
    rows = [(f.attack.title, _applies(f), reason_words(f)) for f in found.findings]
    if outcome.searches:
        names = [attack.title for attack in outcome.searches]
        matching = [name for name in names if name.startswith("gradient matching")]
        names = [name for name in names if name not in matching]
        names += [f"gradient matching ({len(matching)} recipes)"] if matching else []
        why = "They search, for seconds to minutes, and this page answers in three: chapters 05 to 08 run them."
        rows.append(("; ".join(names), "apply, not run here", why))
    return rows


def _applies(finding: Finding) -> str:
    if finding.result is None:
        return "does not apply"
    return f"applies: {BELOW_PICTURE.get(finding.trust, finding.trust)}"


def _leak_rows(outcome: Outcome) -> list[tuple[str, str]]:
    row = outcome.leak
    if row is None:
        return []
    rows = [("Closed form", f"{row.title}, {row.when}" if row.when else row.title), ("Count", row.why)]
    rows += [("Evidence", "; ".join(row.evidence))] if row.evidence else []
    return [*rows, *([("What else leaks", "; ".join(row.also))] if row.also else [])]


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a caption; the first cell of a row is its heading."""
    left = 'style="text-align:left;vertical-align:top;padding:0.15em 0.8em 0.15em 0;font-weight:{}"'
    bold, plain = left.format("bold"), left.format("normal")
    names = "".join(f'<th scope="col" {bold}>{escape(head) or "state"}</th>' for head in heads)
    lines = [
        f'<tr><th scope="row" {plain}>{escape(first)}</th>'
        + "".join(f"<td {plain}>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    ]
    head = f"<thead><tr>{names}</tr></thead>" if heads else ""
    caption_style = "text-align:left;caption-side:top;font-weight:bold;padding-top:0.8em"
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;font-size:0.95em;line-height:1.35;'
        f'overflow-wrap:anywhere"><caption style="{caption_style}">{escape(title)}</caption>'
        f"{head}<tbody>{''.join(lines)}</tbody></table></div>"
    )


def page_html(outcome: Outcome) -> str:
    """A state with all that is said of it, for readers without a kernel."""
    chosen = _table("What is chosen", (), list(outcome.state.in_words().items()))
    return f"{chosen}{picture_html(outcome)}{summary_html(outcome)}{evidence_html(outcome)}"
