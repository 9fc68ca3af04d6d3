"""The browser of the tests: the system's Chromium, or the one that the variable
APRILLAB_CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = os.environ.get("APRILLAB_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")
