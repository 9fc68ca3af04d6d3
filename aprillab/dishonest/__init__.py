"""What a server may send instead of the model, and what a client can see of it before it answers.

    model.load_state_dict(al.dishonest.class_fishing(model, 3))    # the image of class 3 alone
    al.dishonest.bisect_features(model, ask, batch_size, rounds=20)  # all of a batch, one threshold a round
    al.dishonest.imprint(model)                                    # those alone in a bin of brightness
    al.dishonest.lora_spanning(model)                              # LoRA's adapters report the tokens at once
    al.dishonest.silenced(model)                                   # for every client but one
    print(al.inspect_model(model, previous, images=images, labels=labels))

Each of the first returns a state dict, a copy that the model loads, so that any framework can
send it. Each says what it changes, what it costs the federation, how it can be seen, and whose
idea it is. They are here so that clients can learn to look: nothing in this package sends
anything anywhere.
"""

from .features import Bin, bisect_features, feature_fishing, feature_range
from .fingerprint import fingerprint
from .fishing import class_fishing, silenced
from .imprint import Imprinted, imprint, read_imprint
from .inspection import LIMITS, Finding, Inspection, SuspiciousModel, inspect_model
from .lora import lora_spanning
from .sent import CannotCheat

__all__ = [
    "LIMITS",
    "Bin",
    "CannotCheat",
    "Finding",
    "Imprinted",
    "Inspection",
    "SuspiciousModel",
    "bisect_features",
    "class_fishing",
    "feature_fishing",
    "feature_range",
    "fingerprint",
    "imprint",
    "inspect_model",
    "lora_spanning",
    "read_imprint",
    "silenced",
]
