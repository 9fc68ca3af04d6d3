"""``aprillab map``: what a model would give away, tensor group by tensor group."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..sharing import leak_map
from .user_model import built_model, described, here_importable


def run(arguments: argparse.Namespace) -> int:
    """Count, and print the map; returns 0."""
    with here_importable():
        model = built_model(arguments.model)
        anatomy = described(model, arguments)
    found = leak_map(model, anatomy=anatomy, rank=arguments.rank)
    if arguments.format == "json":
        facts = asdict(found.facts)
        text = {"model": found.model, "family": found.family, "facts": facts, "rows": found.as_dicts()}
        print(json.dumps(text | {"notes": found.notes}, indent=2, ensure_ascii=False))
    else:
        print(found.markdown() if arguments.format == "markdown" else found)
    return 0
