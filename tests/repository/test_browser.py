"""End to end: JupyterLab in a headless Chromium runs a chapter, a slider moves, the picture
changes.

Skipped, with the reason, where there is no Chromium or no playwright (``pip install playwright``;
the browser itself is the system's, ``apt install chromium``, or named in the variable
APRILLAB_CHROMIUM).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, SWITCHES, needs_chromium

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.browser, pytest.mark.slow, needs_chromium]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """JupyterLab on a free port, over a copy of chapter 01."""
    notebook = ROOT / "notebooks" / "01_what_a_gradient_reveals.ipynb"
    shutil.copy(notebook, tmp_path / "chapter.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # By default JupyterLab leaves cells that are out of sight out of the page.
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
    }
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root",
            "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api", timeout=2):
                break
            time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer within two minutes")
        yield address
    finally:
        server.terminate()
        server.wait(20)


def test_a_slider_changes_the_picture(lab: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab}/lab/tree/chapter.ipynb?reset", timeout=120_000)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
        with contextlib.suppress(playwright.TimeoutError):  # which kernel? only asked when the server just started
            page.locator(".jp-Dialog").get_by_role("button", name="Select").click(timeout=15_000)
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        page.locator('li[data-command="runmenu:run-all"]').click()
        slider = page.locator(".widget-slider, .widget-hslider").first
        slider.wait_for(state="attached", timeout=240_000)
        slider.scroll_into_view_if_needed(timeout=60_000)
        pictures = page.locator(".jp-OutputArea-output:has(.widget-slider, .widget-hslider) img, .widget-output img")
        pictures.first.wait_for(state="attached", timeout=60_000)
        before = pictures.first.get_attribute("src")
        handle = slider.locator(".noUi-handle")
        handle.focus()
        page.keyboard.press("ArrowRight")
        for _ in range(120):
            after = pictures.first.get_attribute("src") if pictures.count() else before
            if after != before:
                break
            page.wait_for_timeout(500)
        assert after is not None
        assert after != before, "the slider moved and the picture stayed"
        browser.close()
