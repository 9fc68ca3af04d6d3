"""Where the update says that the *model* deserves a look: a batch by the head, and yet one
image by the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..anatomy import Anatomy
from ..attacks.evidence import one_image
from ..dishonest import inspect_model
from ..update import ClientUpdate
from .findings import Finding


def of_sent_model(model: nn.Module, update: ClientUpdate, anatomy: Anatomy, findings: Sequence[Finding]) -> list[str]:
    """A note where the head's gradient is of several images, and a system shows one below the head.

    A head that lets the gradient of one class alone pass leaves it so; soft labels of
    one image do, too.
    """
    conditions = [c for f in findings if f.result is not None for c in f.result.conditions if c.name == "one image"]
    by_head = one_image(anatomy, replace(update, batch_size=None))
    if by_head.state != "contradicted" or not any(c.state == "shown" and "spare" in c.numbers for c in conditions):
        return []
    seen = [f"{f.name} {f.score:.3g} (limit {f.threshold:g})" for f in inspect_model(model, anatomy=anatomy).findings
            if f.suspicious]  # fmt: skip
    looked = f"it finds {', '.join(seen)}" if seen else "it finds nothing there"
    return [
        f"The head's gradient is that of several images ({by_head.text}), and yet below it the equations show one: "
        "one image's labels were soft, or the server sent a model that lets the gradient of one class alone pass. "
        f"Look at the model that the client was sent, with al.inspect_model(model): {looked}."
    ]
