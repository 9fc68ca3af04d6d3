"""What an audit says: how far to trust a picture, and the verdict over all."""

from __future__ import annotations

from typing import Literal

#: How far to trust a picture, best first: from the attack's own verdict, its predicted PSNR and the
#: replay.
Trust = Literal["exact", "close", "likely", "coarse", "unverified", "poor", "contradicted", "mixture", "none"]

TRUST_WORDS: dict[Trust, str] = {
    "exact": "Trust it. The attack's conditions were verified on this very update, and the predicted error is below "
    "half a grey level: this is the private picture.",
    "close": "Trust what you see, not every grey level. The conditions hold, and the predicted error is too small "
    "for the eye.",
    "likely": "Very probably the private picture. A condition failed (see the reason), but played back through the "
    "model the picture gives this update, up to less than a hundredth.",
    "coarse": "Trust the scene, not the details. The conditions hold, and the predicted error leaves a picture that "
    "can be recognized.",
    "unverified": "Take it for a hint. A condition failed (see the reason), so the error predicted cannot be relied "
    "on.",
    "poor": "Trust no detail of it. The error predicted, or the miss when it is played back, is large. Some of the "
    "scene may still be recognizable: look at it.",
    "contradicted": "Do not trust it. By its own numbers it should be right, but played back through the model it "
    "does not give this update: other weights than the client's, dropout, or an update that is no gradient would "
    "explain that.",
    "mixture": "Do not take it for a photograph. More than one picture, or strong noise, is behind this update; a "
    "closed form returns their mixture.",
    "none": "There is nothing to trust: the attack does not apply.",
}

NOT_SAFE = (
    "That an attack fails does not make the update safe: gradient matching needs none of these conditions, an attack "
    "tuned to this system may need fewer, and what was not shared this time may be shared next time."
)

_AWAY = "This update gives the private picture away"

#: The verdict when the attack named has this trust. The order counts: the first trust that was
#: found decides.
VERDICTS: dict[Trust, str] = {
    "exact": f"{_AWAY}, exactly: {{attack}}.",
    "close": f"{_AWAY}, with errors too small for the eye: {{attack}}.",
    "likely": f"{_AWAY}, very probably: {{attack}}. A condition of the attack failed, yet the picture fits.",
    "coarse": f"{_AWAY}, recognizable though with visible errors: {{attack}}. {NOT_SAFE}",
    "mixture": f"The closed forms return a mixture of pictures, or noise, and no photograph. {NOT_SAFE}",
    "contradicted": "A picture came out that should be right and yet does not give this update when played back: "
    f"check that the model has the weights and the mode the client used. {NOT_SAFE}",
}
UNRELIABLE = f"Pictures came out, but none whose error can be relied on: look at them yourself. {NOT_SAFE}"
NOTHING_APPLIES = f"No closed form applies to this update. {NOT_SAFE}"

#: Under a picture that is not to be taken for the private one.
BELOW_PICTURE: dict[Trust, str] = {
    "likely": "very probably, by its replay",
    "mixture": "a mixture, no photograph",
    "contradicted": "contradicted by its replay",
    "unverified": "a hint: a condition failed",
    "poor": "not to be trusted",
}
