"""Arguments of ``aprillab record``."""

from __future__ import annotations

from typing import Any

EXIT_CODES = "Exit codes: 0 fine, 2 bad input or usage, 130 interrupted."


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    command = commands.add_parser(
        "record",
        help="which exercises are solved, as a page to hand in",
        description="Read what the checks answered in notebooks, and write a page with every exercise: solved or\n"
        "not, stars, points (1, 2, 4), and each notebook's SHA-256. The page says whether the notebooks were read\n"
        "as they were saved (whoever holds a file can edit its outputs) or run first.",
        epilog=f"{EXIT_CODES}\n--run executes a student's code: do it where you would run any code from students.",
    )
    command.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help="notebooks, or folders of them")
    command.add_argument("--out", default="record.md", metavar="FILE", help="the page, in Markdown (%(default)s)")
    command.add_argument("--json", metavar="FILE", help="also write it as JSON")
    command.add_argument("--name", metavar="WHO", help="whose exercises these are")
    command.add_argument(
        "--run", action="store_true",
        help="run each notebook first, top to bottom in a fresh kernel; the files stay as they are (needs Jupyter)",
    )  # fmt: skip
