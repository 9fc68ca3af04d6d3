"""The playground's widgets: a thin layer over :func:`play`, and the only file here
that knows ipywidgets.

It stands on ipywidgets 7.7.1, which Colab ships, and on 8. An uploaded picture stays in the memory
of the kernel: it is taken out of the upload's own state, which Jupyter may save with a notebook, as
soon as it has arrived.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from ..data import PictureError, PictureWarning, decode_picture
from ..widgets import with_still
from . import showing
from .outcome import Outcome, play
from .state import CONTROLS, OWN, State, patch_sizes

_UPLOAD_HELP = "The file stays in this kernel's memory: it is never written to disk, and gone when the kernel ends."


@dataclass
class Page:
    """The widgets of one playground, and what is on them now.

    Attributes
    ----------
    box : ipywidgets.VBox
        All of it.
    controls : mapping of str to widgets
        By field of :class:`State`.
    upload, reset : widgets
    status, picture, summary, evidence : ipywidgets.HTML
    outcome : Outcome
        What is shown.
    content : bytes
        The file of the user's own picture; empty where there is none.
    """

    box: Any
    controls: Mapping[str, Any]
    upload: Any
    reset: Any
    status: Any
    picture: Any
    summary: Any
    evidence: Any
    outcome: Outcome
    content: bytes = field(default=b"", repr=False)
    busy: bool = False

    def show(self, compute: Callable[[], Outcome]) -> None:
        """Say that it computes, compute, and show what came out, or in words what went wrong."""
        self.status.value = showing.status_html("Computing …")
        try:
            self.outcome = outcome = compute()
        except Exception as error:  # a widget's callback has nobody above it who would say so
            self.status.value = showing.status_html(f"Not done, and the page is as it was: {error}")
            return
        # A batch takes the page's whole width.
        self.picture.layout.flex = "1 1 24em" if len(outcome.private) == 1 else "1 1 100%"
        self.picture.value = showing.picture_html(outcome)
        self.summary.value = showing.summary_html(outcome)
        self.evidence.value = showing.evidence_html(outcome)
        self.status.value = showing.status_html(showing.status(outcome))

    def own(self, size: int) -> Tensor | None:
        """The user's own picture at that size, (3, H, W)."""
        return _decoded(self.content, size) if self.content else None

    def changed(self, change: Any) -> None:
        """A control moved: play the new state."""
        if self.busy:
            return
        if change["owner"] is self.controls["size"]:
            self._offer_patches(change["new"])
        self.show(self._played)

    def _played(self) -> Outcome:
        state = State(**{name: control.value for name, control in self.controls.items()})
        return play(state, self.own(state.size) if state.picture == OWN else None)

    def _offer_patches(self, size: int) -> None:
        """Only the patch sizes that go with the image size."""
        control, offered = self.controls["patch"], patch_sizes(size)
        choices = [(words, value) for words, value in CONTROLS["patch"].choices.items() if value in offered]
        value = control.value if control.value in offered else offered[0]
        self.busy = True
        control.options = choices
        control.value = value
        self.busy = False

    def uploaded(self, change: Any) -> None:
        """A file arrived: keep it here, take it out of the widget, and play it."""
        content = _content_of(change["new"])
        if not content:
            return
        _forget(self.upload)
        try:
            _decoded(content, self.controls["size"].value)
        except PictureError as error:
            self.status.value = showing.status_html(f"Not a picture that can be read: {error}")
            return
        self.content, self.busy = content, True
        self.controls["picture"].options = list(CONTROLS["picture"].choices.items())
        self.controls["picture"].value = OWN
        self.busy = False
        self.show(self._played)

    def back(self, _: Any) -> None:
        """All controls as they were at first."""
        self.busy = True
        self.controls["patch"].options = list(CONTROLS["patch"].choices.items())
        for name, control in self.controls.items():
            control.value = getattr(State(), name)
        self.busy = False
        self._offer_patches(State().size)
        self.show(self._played)


def build(state: State | None = None) -> Page:
    """The widgets, in a state.

    Parameters
    ----------
    state : State, optional
        The first one; without a picture of the user's own, which is not there yet.

    Returns
    -------
    Page
    """
    import ipywidgets as w

    # The first optimizer of a process takes seconds: not while somebody waits for a change.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    outcome = play(state or State())
    controls = {name: _dropdown(w, name, getattr(outcome.state, name)) for name in CONTROLS}
    upload = w.FileUpload(
        accept="image/*", multiple=False, description="Upload your own picture",
        layout=w.Layout(width="22.5em", max_width="100%"), **_tooltip(w, _UPLOAD_HELP, button=True),
    )  # fmt: skip
    reset = w.Button(
        description="Back to the first setting", layout=w.Layout(width="22.5em", max_width="100%"),
        **_tooltip(w, "All controls as they were at first.", button=True),
    )  # fmt: skip
    status, picture, summary, evidence = (w.HTML(layout=w.Layout(max_width="100%")) for _ in range(4))
    groups = [_group(w, title, controls, upload) for title in dict.fromkeys(c.group for c in CONTROLS.values())]
    row = w.Layout(display="flex", flex_flow="row wrap", align_items="flex-start", width="100%", overflow="visible")
    summary.layout.flex = "1 1 24em"
    meaning = w.HTML(showing.help_html(), layout=w.Layout(max_width="100%"))
    box = w.VBox([w.Box(groups, layout=row), reset, meaning, status, w.Box([picture, summary], layout=row), evidence])
    page = Page(box, controls, upload, reset, status, picture, summary, evidence, outcome)
    page._offer_patches(outcome.state.size)
    page.show(lambda: outcome)
    for control in controls.values():
        control.observe(page.changed, "value")
    upload.observe(page.uploaded, "value")
    reset.on_click(page.back)
    return page


def show(state: State | None = None) -> None:
    """Display a playground; a stored notebook keeps its first state as HTML."""
    from IPython.display import display

    page = build(state)
    words = f"{showing.caption(page.outcome)} [{showing.alt(page.outcome)}]"
    display(with_still(page.box, lambda: {"text/html": showing.page_html(page.outcome), "text/plain": words}))


# --- Widgets of both versions -------------------------------------------------------------------------------------


def _dropdown(w: Any, name: str, value: Any) -> Any:
    control = CONTROLS[name]
    choices = [(words, choice) for words, choice in control.choices.items() if choice != OWN or value == OWN]
    return w.Dropdown(
        options=choices, value=value, description=control.label, style={"description_width": "7.5em"},
        layout=w.Layout(width="22.5em", max_width="100%"), **_tooltip(w, control.help),
    )  # fmt: skip


def _group(w: Any, title: str, controls: Mapping[str, Any], upload: Any) -> Any:
    inside = [controls[name] for name, control in CONTROLS.items() if control.group == title]
    more = (
        [upload, w.HTML(f'<div style="font-size:0.85em;line-height:1.3">{escape(_UPLOAD_HELP)}</div>')]
        if controls["picture"] in inside
        else []
    )
    heading = w.HTML(f'<h3 style="margin:0">{escape(title)}</h3>')
    return w.VBox([heading, *inside, *more], layout=w.Layout(width="23.5em", max_width="100%"))


def _tooltip(w: Any, words: str, *, button: bool = False) -> dict[str, str]:
    """The keyword of a tooltip: ipywidgets 7 knows it by another name, and none on an upload."""
    if hasattr(w.DOMWidget, "tooltip"):
        return {"tooltip": words}
    return {} if button else {"description_tooltip": words}


def _content_of(value: Any) -> bytes:
    """The uploaded file's bytes: ipywidgets 7 has a mapping from names, 8 a tuple."""
    files = list(value.values()) if isinstance(value, Mapping) else list(value)
    return bytes(files[0]["content"]) if files else b""


def _decoded(content: bytes, size: int) -> Tensor:
    """The picture, without a word on frames or transparency: what is used of it is on the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        return decode_picture(content, size)


def _forget(upload: Any) -> None:
    """Take the file out of the widget's state, which a notebook may be saved with."""
    if hasattr(upload, "data"):
        upload.data, upload.metadata = [], []
        upload.set_trait("value", {})
    else:
        upload.value = ()
