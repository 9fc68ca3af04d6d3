"""A state of the playground, played: the client's round, the audit of what it shared, and
the truth beside it.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import defenses
from ..anatomy import Anatomy, dissect
from ..attacks.catalogue import ATTACKS, Attack
from ..attacks.result import Reconstruction
from ..audit import audit
from ..audit.choices import THIS
from ..audit.findings import Audit, Finding
from ..data import load_victim, victims
from ..federation.local import LocalTraining, train_locally, update_of
from ..metrics import psnr
from ..models import VisionTransformer, sinusoidal_2d
from ..sharing import LeakRow
from ..sharing.groups import ATTENTION, HEAD, PATCH, POSITION, groups_of, last_block
from ..update import ClientUpdate, UpdateError, client_update
from .state import CLASSES, DEPTH, HEADS, LEARNING_RATE, OWN, State

_FIRST_LABEL, _SEED = 3, 0  # a batch's labels count up from it, all different; of weights and of noise


@dataclass(frozen=True)
class Outcome:
    """What became of a state.

    Attributes
    ----------
    state : State
    private : Tensor of shape (B, 3, H, W)
        The client's pictures, pixels in [0, 1]. The server never has them.
    found : Audit or None
        All that the server can say; None where no update could be made.
    refused : str
        Why not, in words.
    seconds : float
        Wall-clock time of model, client and attacks.
    """

    state: State
    private: Tensor
    found: Audit | None
    refused: str
    seconds: float

    @property
    def best(self) -> Finding | None:
        """The attack to be believed most, if any returned a picture."""
        return None if self.found is None else self.found.best

    @property
    def result(self) -> Reconstruction | None:
        """What that attack returned."""
        return None if self.best is None else self.best.result

    @property
    def picture(self) -> Tensor | None:
        """The picture that came back, (3, H, W) with pixels in [0, 1]."""
        return None if self.result is None else self.result.pixels[0]

    @property
    def true_psnr(self) -> tuple[float, ...]:
        """Of that picture against each of the private ones, in dB: known here, and to no server."""
        picture = self.picture
        return () if picture is None else tuple(float(psnr(picture, private)) for private in self.private)

    @property
    def leak(self) -> LeakRow | None:
        """What the leak map counts for the tensors that were shared."""
        return None if self.found is None or self.found.sharing is None else self.found.sharing[THIS]

    @property
    def searches(self) -> tuple[Attack, ...]:
        """Attacks that have what they need and are not run here: they search, from
        seconds to minutes.
        """
        return () if self.found is None else _searches(self.found.anatomy, self.found.update)


def play(state: State, own: Tensor | None = None) -> Outcome:
    """Play the client, and audit what it shares as the server would.

    Parameters
    ----------
    state : State
    own : Tensor of shape (3, H, W), pixels in [0, 1], of the state's size
        The picture of ``picture="own"``.

    Returns
    -------
    Outcome

    Raises
    ------
    ValueError
        If ``picture="own"`` and none is given, or one of another size.

    Examples
    --------
    >>> outcome = play(State())
    >>> outcome.best.attack.title, outcome.best.trust, outcome.true_psnr[0] > 58.9
    ('patch-embedding system', 'exact', True)
    """
    start = time.perf_counter()
    private = private_pictures(state, own)
    found, refused = None, ""
    try:
        model = model_of(state)
        found = audit(model, shared_update(state, model, private), progress=False)
    except UpdateError as error:
        refused = str(error)
    return Outcome(state, private, found, refused, time.perf_counter() - start)


def private_pictures(state: State, own: Tensor | None = None) -> Tensor:
    """The client's batch, (B, 3, H, W): the chosen picture, and the course's next ones."""
    names = victims()
    if state.picture == OWN:
        if own is None or own.shape != (3, state.size, state.size):
            given = "none was given" if own is None else f"it has shape {tuple(own.shape)}"
            raise ValueError(f'picture="own" needs a picture of shape {(3, state.size, state.size)}, and {given}')
        first, others = own, names
    else:
        at = names.index(state.picture)
        first, others = load_victim(state.picture, state.size), (names[at + 1 :] + names[:at])
    return torch.stack([first, *(load_victim(name, state.size) for name in others[: state.batch - 1])])


def model_of(state: State) -> VisionTransformer:
    """The model that all clients are given: random weights, seed 0."""
    position, values, grid = state.position, None, state.size // state.patch
    if position == "sinusoidal 2-D":
        position, values = "sinusoidal", sinusoidal_2d((grid, grid), state.width)
    model = VisionTransformer(
        image_size=state.size, patch_size=state.patch, width=state.width, depth=DEPTH, heads=HEADS, classes=CLASSES,
        block=state.block, position=position, position_values=values, seed=_SEED,  # type: ignore[arg-type]
    )  # fmt: skip
    return model.double() if state.precision == "float64" else model


def shared_update(state: State, model: nn.Module, private: Tensor) -> ClientUpdate:
    """What the client sends: its gradient, or what its local steps changed, without what it keeps.

    Noise comes last but for a cast.
    """
    anatomy = dissect(model)
    images = anatomy.preprocessing.to_input(private).to(next(model.parameters()))
    labels = torch.arange(len(images)) + _FIRST_LABEL
    autocast = "bfloat16" if state.precision == "autocast" else None
    if state.steps > 1:
        how = LocalTraining(learning_rate=LEARNING_RATE, steps=state.steps, autocast=autocast)
        after = train_locally(model, images, labels, how)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        before = {name: p.detach() for name, p in model.named_parameters() if name in trained}
        update = update_of(before, {name: after[name] for name in trained}, how, batch_size=len(images))
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            update = client_update(model, images, labels)
    kept = kept_back(state.shared, model, anatomy) & update.gradients.keys()
    update = noisy(defenses.withhold(update, kept), state.noise)
    return defenses.to_precision(update, torch.bfloat16) if state.precision == "bfloat16" else update


def kept_back(shared: str, model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Names of the parameters whose gradients the client keeps to itself."""
    groups = groups_of(model, anatomy)
    names = {name for name, _ in model.named_parameters()}
    position = {name for name in names if name == anatomy.position}
    kept: dict[str, Collection[str]] = {
        "all": (),
        "no position": position,
        "no patch": groups[PATCH],
        "no embeddings": (*groups[PATCH], *groups.get(POSITION, ())),
        "no attention": groups[ATTENTION],
        "no position or attention": (*position, *groups[ATTENTION]),
        "last block": names - {*last_block(model, anatomy)},
        "head": names - {*groups[HEAD]},
    }
    return set(kept[shared])


def noisy(update: ClientUpdate, sigma: float) -> ClientUpdate:
    """Normal noise in each tensor, ``sigma`` times the tensor's root mean square."""
    if not sigma:
        return update
    generator = torch.Generator().manual_seed(_SEED)
    gradients: dict[str, Tensor] = {}
    for name, gradient in update.gradients.items():
        alone = ClientUpdate({name: gradient})
        gradients |= defenses.gaussian_noise(alone, sigma, relative=True, generator=generator).gradients
    return replace(update, gradients=gradients)


def _searches(anatomy: Anatomy, update: ClientUpdate) -> tuple[Attack, ...]:
    """Of the catalogue: those that search, and have one of the gradients that they need."""

    def there(need: str) -> bool:
        where = getattr(anatomy, need)
        return getattr(where, "name", where) in update.gradients

    found = [attack for attack in ATTACKS.values() if attack.searches]
    return tuple(attack for attack in found if not attack.needs or any(map(there, attack.needs)))
