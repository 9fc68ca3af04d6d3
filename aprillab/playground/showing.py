"""An outcome of the playground as a picture with its words, and as HTML: pure functions,
tested without a kernel.
"""

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
from ..audit.page import images_words, predicted_psnr, predicted_words, short_labels
from ..audit.words import BELOW_PICTURE, TRUST_WORDS
from ..data import victim_info
from ..sharing import LeakRow
from ..widgets import STILL
from .outcome import Outcome
from .state import CONTROLS, OWN, State

STATES = {"shown": "holds", "contradicted": "fails", "not checked": "not checked"}
POSITIONS = {
    "learned": "learned", "frozen": "frozen", "sinusoidal": "1-D sinusoidal", "sinusoidal 2-D": "2-D sinusoidal",
    "none": "no",
}  # fmt: skip
#: The private one and what came back, as the eye has them, by true PSNR in dB.
_BY_EYE = ((40.0, "no difference can be seen"), (20.0, "the same scene, with visible errors"))
_GREY = 0.5  # what is shown where nothing came back


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


def status_html(words: str) -> str:
    """A line that a screen reader reads out whenever it changes."""
    line = f"<strong>{escape(words)}</strong>"
    return f'<div role="status" aria-live="polite" aria-atomic="true" style="line-height:1.4">{line}</div>'


def status(outcome: Outcome) -> str:
    """One line when all is done: the time, and the verdict's first sentence.

    >>> from aprillab.playground import State, play
    >>> status(play(State())).partition(": ")[2]
    'This update gives the private picture away, exactly: patch-embedding system.'
    """
    said = outcome.refused if outcome.found is None else outcome.found.headline
    return f"Done in {outcome.seconds:.1f} s: {said}"


def strip(outcomes: Sequence[Outcome], titles: Sequence[str]) -> Figure:
    """What came back in several states side by side, the first one's private picture before them."""
    fig, axes = viz.figure(1, len(outcomes) + 1, size=(2.0 * (len(outcomes) + 1), 2.9))
    viz.draw(axes[0, 0], outcomes[0].private[0], "private")
    for ax, outcome, title in zip(axes[0, 1:], outcomes, titles, strict=True):
        true = f"true {max(outcome.true_psnr):.0f} dB" if outcome.true_psnr else "no closed form"
        viz.draw(ax, shown(outcome), f"{title}\n{true}")
    return fig


# --- The evidence -------------------------------------------------------------------------------------------------


def picture_html(outcome: Outcome) -> str:
    """The figure as HTML, with caption and alternative text."""
    return _block(viz.captioned(viz.to_png(figure(outcome)), caption=caption(outcome), alt=alt(outcome))["text/html"])


def summary_html(outcome: Outcome) -> str:
    """What the server can say of the picture, and beside it the one number that only we know."""
    found = outcome.found
    if found is None:
        return _block(f"<p><strong>No update: {escape(outcome.refused)}</strong></p>")
    said = [
        ("Exact", _exact(outcome)),
        ("Predicted PSNR", "no picture came back" if outcome.best is None else predicted_words(outcome.best)),
        ("Label", short_labels(found)),
        ("How many images", images_words(found)),
    ]
    return _block(
        f"<p><strong>{escape(found.verdict)}</strong></p>{_list('What the server can say', said)}"
        f"{_list('What only we can see', [('True PSNR', _true(outcome))])}"
    )


def _exact(outcome: Outcome) -> str:
    if outcome.best is None:
        return "no: no picture came back"
    return f"{'yes' if outcome.best.trust == 'exact' else 'no'}. {TRUST_WORDS[outcome.best.trust]}"


def _true(outcome: Outcome) -> str:
    if not outcome.true_psnr:
        return "no picture came back"
    best = max(outcome.true_psnr)
    number = "infinite" if math.isinf(best) else f"{best:.1f} dB"
    which = "" if len(outcome.true_psnr) == 1 else f" against private picture {1 + outcome.true_psnr.index(best)}"
    return f"{number}{which}. The server has no original to compare with."


def evidence_html(outcome: Outcome) -> str:
    """Conditions, attacks and counts as lists."""
    found, best = outcome.found, outcome.best
    if found is None:
        return ""
    lists = []
    if best is not None and best.result is not None:
        title = f"What the {_the(best.attack.title)}'s picture rests on"
        lists.append(_list(title, map(_condition_row, best.result.conditions)))
    lists.append(_list("Which attacks apply, and why", _attack_rows(outcome, found)))
    if outcome.leak is not None:
        lists.append(_list("What counting says of the tensors that are shared", _leak_rows(outcome.leak)))
    if found.notes:
        lists.append(_list("What limits all this", [("", note) for note in found.notes]))
    return _block("".join(lists))


def _condition_row(condition: Condition) -> tuple[str, str]:
    return condition.name, f"{STATES[condition.state]}: {condition.clause}"


def _attack_rows(outcome: Outcome, found: Audit) -> list[tuple[str, str]]:
    rows = [(finding.attack.title, _applies(finding)) for finding in found.findings]
    if outcome.searches:
        names = [attack.title for attack in outcome.searches]
        matching = [name for name in names if name.startswith("gradient matching")]
        names = [name for name in names if name not in matching]
        names += [f"gradient matching ({len(matching)} recipes)"] if matching else []
        why = "not run here. They need no count, and search for seconds to minutes: chapters 05 to 08 run them."
        rows.append(("; ".join(names), why))
    return rows


def _applies(finding: Finding) -> str:
    """Whether it applies, and why not; else what it predicts, and which of its
    conditions do not hold.
    """
    if finding.result is None:
        return f"does not apply. {finding.reason[:1].upper()}{finding.reason[1:]}."
    others = [c for c in finding.result.conditions if c.state != "shown"]
    unmet = "; ".join(f"{c.name} {STATES[c.state]} ({c.clause})" for c in others)
    brief = BELOW_PICTURE.get(finding.trust, finding.trust)
    return f"applies: {brief}. Predicted PSNR {predicted_words(finding)}; {unmet or 'all its conditions hold'}."


def _leak_rows(row: LeakRow) -> list[tuple[str, str]]:
    rows = [("Closed form", f"{row.title}, {row.when}" if row.when else row.title), ("Count", row.why)]
    rows += [("Evidence", "; ".join(row.evidence))] if row.evidence else []
    return [*rows, *([("What else leaks", "; ".join(row.also))] if row.also else [])]


def _list(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A heading and a list, each row with its name in front: readable at any width."""
    items = "".join(
        f'<li style="margin:0.15em 0"><strong>{escape(name)}{": " if name else ""}</strong>{escape(words)}</li>'
        for name, words in rows
    )
    return (
        f'<h4 style="margin:0.8em 0 0.2em;padding:0;font-size:1em">{escape(title)}</h4>'
        f'<ul style="margin:0;padding-left:1.2em;list-style:disc">{items}</ul>'
    )


def help_html() -> str:
    """What each control means, folded: ipywidgets 8 shows no tooltip on a control that
    has a description.
    """
    rows = [(control.label, control.help) for control in CONTROLS.values()]
    return _block(f"<details><summary>What the controls mean</summary>{_list('Controls', rows)}</details>")


def _block(html: str) -> str:
    """Widgets have lines as high as a slider: text wants them closer."""
    return f'<div style="line-height:1.4;overflow-wrap:break-word;white-space:normal">{html}</div>'


def page_html(outcome: Outcome) -> str:
    """A state with all that is said of it, for readers without a kernel."""
    chosen = _block(_list("What is chosen", outcome.state.in_words().items()))
    return f"<p>{STILL}</p>{picture_html(outcome)}{summary_html(outcome)}{chosen}{evidence_html(outcome)}"
