"""``python -m aprillab``: the same as the command ``aprillab``."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
