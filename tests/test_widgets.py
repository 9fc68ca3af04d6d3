"""What a stored notebook keeps of an interactive figure."""

import sys
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from aprillab import viz, widgets


def test_sliders_leave_their_first_state_where_a_notebook_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    ipywidgets = pytest.importorskip("ipywidgets")
    from IPython.core.formatters import DisplayFormatter

    monkeypatch.setattr(viz, "show", lambda *args, **kwargs: None)
    slider, button = ipywidgets.IntSlider(2, 1, 4), ipywidgets.Button()
    words = {"caption": lambda size: f"batch of {size}", "alt": "the <same> words"}
    panel = widgets.sliders(lambda size: Figure(), size=slider, below=[button], **words)
    assert panel.children[-1] is button
    slider.value = 3
    shown, _ = DisplayFormatter().format(panel)  # as IPython asks an object how it wants to be shown
    assert shown[widgets.WIDGET_VIEW]["model_id"] == panel.model_id
    assert "batch of 2 (A still picture" in shown["text/html"]
    assert "the &lt;same&gt; words" in shown["text/html"]
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert "text/html" not in DisplayFormatter().format(panel)[0]
