"""The figures."""

from __future__ import annotations

from pathlib import Path

import torch
from compared import QUICK, TINY

from aprillab import viz
from aprillab.comparison import figures as compare_figures
from aprillab.comparison.cases import cross
from aprillab.comparison.records import read_pictures
from aprillab.comparison.run import run
from aprillab.data import load_victim


def test_figures_show_every_attack(path: Path) -> None:
    cases = cross(
        victims=["coffee", "clock"], attacks=["embedding", "match:april"], positions=["learned", "frozen"],
        batch_sizes=[1, 2], seeds=[0, 1], **TINY,
    )  # fmt: skip
    rows = run(cases, path=path, **QUICK)
    first, second = compare_figures.picture_pages(rows, path, lines=5)
    assert (len(first.axes), len(second.axes)) == (5 * 3, 3 * 3)  # one seed: 4 single pictures, 2 batches of 2
    assert [ax.get_title() for ax in first.axes[:3]] == ["private", "embedding", "match:\napril"]
    assert first.axes[0].get_ylabel() == "coffee\nlearned"
    assert second.axes[0].get_ylabel() == "clock\nlearned\nbatch of 2"
    assert first.axes[1].get_xlabel() == f"{rows[0].psnr:.1f} dB"
    drawn = first.axes[0].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn).permute(2, 0, 1), load_victim("coffee", 8).double(), atol=1e-6)
    found = read_pictures(path, rows[1].case)
    assert found is not None
    assert not torch.allclose(found[0], found[1], atol=0.1)
    drawn = first.axes[2].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn).permute(2, 0, 1), found[1][0].double(), atol=1e-6)
    assert [text.get_text() for text in first.axes[7].texts] == ["refused"]
    assert not first.axes[7].images
    curves = compare_figures.curves(rows, path)
    assert curves is not None
    assert [ax.get_title() for ax in curves.axes] == ["learned, float32", "frozen, float32", "", ""]
    assert curves.axes[0].get_yscale() == "log"
    assert curves.axes[0].lines[0].get_ydata()[0] == 1
    seconds = compare_figures.seconds(rows)
    assert seconds is not None
    assert len(seconds.axes[0].lines) == 1 + sum(row.case.position == "learned" for row in rows)
    assert curves.legends[0].get_texts()[0].get_text() == "match:april"
    colours = [figure.legends[0].get_lines()[-1].get_color() for figure in (curves, seconds)]
    assert colours[0] == colours[1]  # an attack has one colour
    for figure in (first, curves, seconds):
        png = viz.to_png(figure)
        assert png.startswith(b"\x89PNG")
        assert 300 < int.from_bytes(png[16:20]) < 3000


def test_no_figures_of_refusals(path: Path) -> None:
    rows = run(cross(victims=["coffee"], attacks=["embedding"], positions=["none"], **TINY), path=path, **QUICK)
    assert compare_figures.curves(rows, path) is None
    assert compare_figures.seconds(rows) is None
    assert len(compare_figures.picture_pages(rows, path)) == 1
