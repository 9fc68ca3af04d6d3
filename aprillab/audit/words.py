"""What an audit says: how far to trust a picture, and the verdict over all."""

from __future__ import annotations

from typing import Literal

#: How far to trust a picture, best first: from the attack's conditions, its predicted PSNR and the
#: replay.
Trust = Literal[
    "exact", "close", "likely", "coarse", "unverified", "poor", "contradicted", "mixture", "noise", "none"
]  # fmt: skip

#: What an audit found, for machines: the trust of the best picture; "unclear" where pictures came
#: out and none can be relied on, "none" where no attack applies.
Leak = Literal["exact", "close", "likely", "coarse", "unclear", "none"]

TRUST_WORDS: dict[Trust, str] = {
    "exact": "Trust it. The attack's conditions are shown by this very update, the predicted error is below half a "
    "grey level, and played back the picture gives this update: this is the private picture.",
    "close": "Trust what you see, not every grey level. The conditions are shown, and the predicted error is too "
    "small for the eye.",
    "likely": "Very probably the private picture, though not all that it rests on is shown (see the reason): a "
    "condition, or by a replay that its brightness is right.",
    "coarse": "Trust the scene, not the details. The predicted error leaves a picture that can be recognized.",
    "unverified": "Take it for a hint, and look at it. A condition is not shown (see the reason), so the error "
    "predicted cannot be relied on.",
    "poor": "Trust no detail of it, and look at it. The error predicted, or the miss when it is played back, is "
    "large. Some of the scene may still be recognizable.",
    "contradicted": "The equations fix this picture, but played back through the model it does not give this update. "
    "Other weights than the client's, another protocol, or factors for parts of the model would explain that; the "
    "picture may be right but for its brightness.",
    "mixture": "Do not take it for one photograph. More than one picture, or strong noise, is behind this update; a "
    "closed form returns their mixture, in which parts of each may be seen.",
    "noise": "There is nothing in it to trust: by its own prediction it is no better than plain grey.",
    "none": "There is nothing to trust: the attack does not apply.",
}

NOT_SAFE = (
    "That an attack fails does not make the update safe: gradient matching needs none of these conditions, an attack "
    "tuned to this system may need fewer, and what was not shared this time may be shared next time."
)

#: Notes of an audit without the head's gradient; the first where a caller described the model, and
#: named no head.
_UNPLAYED = "no label was read off it, and without one no picture is played back."
HEAD_UNNAMED = f"The head is not named, so {_UNPLAYED}"
HEAD_UNSHARED = f"The head's gradient is not shared: {_UNPLAYED}"

_AWAY = "This update gives the private picture away"

#: What the verdict begins with when the attack named has this trust. The order counts: the first
#: trust that was found decides.
HEADLINES: dict[Trust, str] = {
    "exact": f"{_AWAY}, exactly: {{attack}}.",
    "close": f"{_AWAY}, with errors too small for the eye: {{attack}}.",
    "likely": f"{_AWAY}, very probably: {{attack}}.",
    "coarse": f"{_AWAY}, recognizable though with visible errors: {{attack}}.",
    "contradicted": "A picture came out that the equations fix, and yet it does not give this update when played "
    "back: look at it, and check that the model has the weights and the mode the client used, and that the update is "
    "a gradient.",
    "unverified": "A picture came out, but its error cannot be relied on: look at it yourself.",
    "poor": "A picture came out with large errors, in which some of the scene may be recognizable: look at it "
    "yourself.",
    "mixture": "The closed forms return a mixture of pictures, or noise: no photograph that could be relied on, "
    "though parts of each may be seen.",
    "noise": "Nothing but noise came out: by its own prediction the picture of each closed form is no better than "
    "plain grey.",
}
NOTHING_APPLIES = "No closed form applies to this update."
_ADDED: dict[Trust, str] = {"exact": "", "close": "", "likely": " Not all that the picture rests on is shown."}
#: The whole of it.
VERDICTS = {trust: words + _ADDED.get(trust, f" {NOT_SAFE}") for trust, words in HEADLINES.items()}

#: Under a picture that is not to be taken for the private one.
BELOW_PICTURE: dict[Trust, str] = {
    "likely": "very probably the picture",
    "mixture": "a mixture, or noise",
    "contradicted": "does not give this update when played back",
    "unverified": "a hint: a condition is not shown",
    "poor": "large errors",
    "noise": "no better than plain grey",
}
