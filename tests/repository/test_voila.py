"""End to end: Voilà shows the playground in a headless Chromium, a control moves, picture
and evidence follow.

Skipped, with the reason, where there is no Voilà (``pip install -e ".[workshop]"``), no
playwright or no Chromium.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chromium import CHROMIUM, SWITCHES, needs_chromium
from PIL import Image

from aprillab.playground import CONTROLS

ROOT = Path(__file__).parents[2]
needs_voila = pytest.mark.skipif(
    importlib.util.find_spec("voila") is None, reason='Voilà is not installed: pip install -e ".[workshop]"'
)


def test_the_make_target_opens_it_on_this_machine_only() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^playground: .*installed-workshop.*\n\t(.*)$", makefile, re.M)
    assert recipe is not None
    assert recipe[1].split()[1:] == ["notebooks/playground.ipynb", "--Voila.ip=127.0.0.1"]


@pytest.fixture
def voila(tmp_path: Path) -> Iterator[str]:
    """The make target's server, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "voila", str(ROOT / "notebooks/playground.ipynb"), "--Voila.ip=127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    with (tmp_path / "voila.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--no-browser", f"--port={port}"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
        try:
            for _ in range(240):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.5)
            else:
                pytest.fail(f"Voilà did not answer: {(tmp_path / 'voila.log').read_text()}")
            yield f"http://127.0.0.1:{port}/"
        finally:
            kernels = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            server.wait(30)
    _, left = psutil.wait_procs(kernels, timeout=20)
    assert not left, f"Voilà left its kernels behind: {left}"


@pytest.mark.browser
@pytest.mark.slow
@needs_voila
@needs_chromium
def test_controls_have_names_and_the_page_follows_them(voila: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(voila, timeout=120_000)
        status, picture = page.get_by_role("status"), page.get_by_alt_text("Left, the private picture")
        playwright.expect(status).to_contain_text("exactly: patch-embedding system", timeout=180_000)
        for control in CONTROLS.values():
            named = page.get_by_role("combobox", name=control.label, exact=True)
            playwright.expect(named).to_have_count(1)
        page.get_by_text("What the controls mean").click()
        for control in CONTROLS.values():
            playwright.expect(page.get_by_text(control.help)).to_be_visible()
        for width in (400, 1000):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width

        before = picture.get_attribute("src")
        noise = page.get_by_role("combobox", name="Noise", exact=True)
        noise.focus()
        for _ in range(len(CONTROLS["noise"].choices) - 1):
            page.keyboard.press("ArrowDown")
        playwright.expect(status).to_contain_text("Nothing but noise", timeout=60_000)
        playwright.expect(page.get_by_text("no better than plain grey").first).to_be_visible()
        playwright.expect(picture).to_have_attribute("alt", re.compile("hardly anything"))
        assert picture.get_attribute("src") != before

        page.get_by_role("button", name="Back to the first setting").click()
        playwright.expect(status).to_contain_text("exactly", timeout=60_000)
        red = io.BytesIO()
        Image.new("RGB", (40, 40), (200, 30, 30)).save(red, format="png")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Upload your own picture").click()
        chooser.value.set_files({"name": "mine.png", "mimeType": "image/png", "buffer": red.getvalue()})
        playwright.expect(picture).to_have_attribute("alt", re.compile("the user's own"), timeout=60_000)
        playwright.expect(page.get_by_role("combobox", name="Private picture")).to_have_value("your own picture")
        browser.close()
