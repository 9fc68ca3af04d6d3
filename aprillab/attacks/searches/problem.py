"""What stays fixed during gradient matching: the loss of pictures on trial, and its slope.

:func:`pose` makes a :class:`Problem` of model, update and recipe. The optimizers see nothing of them but
``problem.evaluate``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...anatomy import Anatomy, UnknownModelError, dissect
from ...models import patchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, logits_of
from ..labels import assumed_batch_size, recover_labels
from ..result import AttackNotApplicable
from . import objectives
from .coordinates import Coordinates, row_space_of
from .objectives import position_cosine
from .rearrange import places_of, rearranged
from .recipes import Adam, PositionTerm, Recipe
from .slopes import Matcher, matcher

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The loss of R restarts (R, B, C, H, W) that run together, and what comes with it.

    Attributes
    ----------
    images : Tensor of shape (R, B, C, H, W)
    loss : scalar Tensor
    slopes : tuple of Tensor
        ∂loss/∂unknowns and, where labels are unknown, ∂loss/∂logits.
    terms : dict
        The parts of the loss before their weights.
    distances, residuals : Tensor of shape (R,)
        D, and the relative residual ‖g' − g‖ / ‖g‖, of each restart.
    token_gradients : Tensor of shape (R, …, tokens, d) or None
        ∂l/∂E'_pos of each restart; None where the position embedding's gradient is not shared or not looked at.
    """

    images: Tensor
    loss: Tensor
    slopes: tuple[Tensor, ...]
    terms: dict[str, float]
    distances: Tensor
    residuals: Tensor
    token_gradients: Tensor | None = None


@dataclass(frozen=True)
class _Restart:
    """One restart's distance, residual and position term, scalars, and the slopes of its pictures and logits.

    Where there is a position term, ``token_gradients`` is the position embedding's gradient.
    """

    distance: Tensor
    residual: Tensor
    position: Tensor
    token_gradients: Tensor | None
    slopes: tuple[Tensor, ...]


@dataclass(frozen=True)
class Position:
    """The position embedding among the targets.

    Attributes
    ----------
    index : int
        Its place among them.
    term : PositionTerm
        On its gradient.
    prefix : int
        Its rows before the first patch's.
    patch_size : int, in pixels
    """

    index: int
    term: PositionTerm
    prefix: int
    patch_size: int


@dataclass(frozen=True)
class Problem:
    """What stays fixed during a search.

    Attributes
    ----------
    model : nn.Module
        A copy, in the dtype and on the device of the search.
    parameters, targets : list of Tensor
        Those of the model whose gradients were shared, and these gradients.
    position : Position or None
        Which of them is the position embedding, and the term on its gradient.
    recipe : Recipe
    match : callable
        How far gradients are from the targets, by the recipe's distance.
    shape : (B, C, H, W)
    labels : Tensor of shape (B,) or None
        None where they are unknowns.
    labels_how : str
        A word on where they come from.
    classes : int or None
        How many there are, where the labels are unknown.
    loss : callable
        The client's, (logits, labels) to a scalar.
    preprocessing : Preprocessing
    coordinates : Coordinates or None
        Of the patches; None where the unknowns are the pixels.
    seed : int
    """

    model: nn.Module
    parameters: list[Tensor]
    targets: list[Tensor]
    position: Position | None
    recipe: Recipe
    match: Matcher
    shape: tuple[int, ...]
    labels: Tensor | None
    labels_how: str
    classes: int | None
    loss: Loss
    preprocessing: Preprocessing
    coordinates: Coordinates | None
    seed: int

    @property
    def device(self) -> torch.device:
        return self.targets[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.targets[0].dtype

    @property
    def rearrange(self) -> int | None:
        """Evaluations without progress until patches are moved; None where they never are.

        They are not in a batch, where the position embedding's gradient is a sum over images, and not among
        restarts that run together.
        """
        if self.position is None or self.shape[0] > 1 or self.recipe.together:
            return None
        return self.position.term.rearrange

    # --- Pictures and unknowns ------------------------------------------------------------------------------------

    def images_of(self, unknowns: Tensor) -> Tensor:
        """Pictures (R, B, C, H, W) of unknowns: pixels, or coefficients (R, B, n, k) of patches."""
        return unknowns if self.coordinates is None else self.coordinates.images_of(unknowns)

    def unknowns_of(self, images: Tensor) -> Tensor:
        """The nearest unknowns to pictures (R, B, C, H, W)."""
        return images.clone() if self.coordinates is None else self.coordinates.coefficients_of(images)

    def noisy(self, images: Tensor, noise: Tensor) -> Tensor:
        """Unknowns near pictures (R, B, C, H, W), with noise of that shape added."""
        if self.coordinates is None:
            return images + noise
        return self.coordinates.coefficients_of(images) + self.coordinates.coefficients_of_noise(noise)

    def in_their_places(self, images: Tensor, token_gradients: Tensor) -> Tensor | None:
        """The picture (1, C, H, W) with its patches where their tokens' gradients fit the shared ones.

        None where they fit best as they stand.
        """
        if self.position is None:
            return None
        prefix, shared = self.position.prefix, self.targets[self.position.index]
        places = places_of(*(rows.flatten(0, -2)[prefix:] for rows in (token_gradients, shared)))
        if torch.equal(places, torch.arange(len(places), device=places.device)):
            return None
        return rearranged(images, places, self.position.patch_size)

    # --- The loss -------------------------------------------------------------------------------------------------

    def gradients(self, images: Tensor, logits: Tensor | None) -> tuple[Tensor, ...]:
        """What the client would share, had it these images (B, C, H, W) and labels."""
        if self.model.training:
            _seed(self.seed, self.device)  # dropout draws the same mask at every evaluation
        labels = self.labels if logits is None else logits.softmax(-1)
        value = self.loss(logits_of(self.model, images), labels)  # type: ignore[arg-type]
        return torch.autograd.grad(value, self.parameters, create_graph=True, materialize_grads=True)

    def evaluate(self, unknowns: Tensor, logits: Tensor | None) -> Evaluation:
        """The loss at unknowns (R, …) and label logits (R, B, classes), and its slope."""
        images = self.images_of(unknowns)  # (R, B, C, H, W)
        restarts = [self._restart(x, None if logits is None else logits[r]) for r, x in enumerate(images)]
        distances = torch.stack([restart.distance for restart in restarts])
        # The terms, means over the restarts, and their sum
        terms = {"distance": distances.mean()}
        loss = terms["distance"]
        if self.position is not None:
            terms["position"] = torch.stack([restart.position for restart in restarts]).mean()
            loss = loss + self.position.term.weight * terms["position"]
        slopes = [torch.stack(parts) / len(restarts) for parts in zip(*[r.slopes for r in restarts], strict=True)]
        # The priors, whose slope on the pictures is direct
        pixels = images.detach().requires_grad_()
        for name, weight, prior in self._priors(pixels):
            terms[name] = prior.detach()
            loss = loss + weight * terms[name]
            slopes[0] = slopes[0] + weight * torch.autograd.grad(prior, pixels)[0]
        # ∂loss/∂unknowns
        if self.coordinates is not None:
            slopes[0] = torch.autograd.grad(images, unknowns, slopes[0])[0]
        values = {name: term.item() for name, term in terms.items()}
        residuals = torch.stack([restart.residual for restart in restarts])
        rows = [restart.token_gradients for restart in restarts if restart.token_gradients is not None]
        token_gradients = torch.stack(rows) if rows else None
        return Evaluation(images.detach(), loss, tuple(slopes), values, distances, residuals, token_gradients)

    def _restart(self, images: Tensor, logits: Tensor | None) -> _Restart:
        """One restart's pictures (B, C, H, W) and label logits (B, classes): the chain rule link by link."""
        leaves = [leaf.detach().requires_grad_() for leaf in (images, logits) if leaf is not None]
        # g' = ∇w(x'), still a function of x' (5.1)
        gradients = self.gradients(leaves[0], None if logits is None else leaves[1])
        # D and ∂D/∂g'; the position term and its slope (5.3)
        with torch.no_grad():
            match = self.match(gradients)
        slopes, position, mine = list(match.slopes), match.distance.new_zeros(()), None
        if self.position is not None:
            k, term = self.position.index, self.position.term
            mine = gradients[k].detach().requires_grad_()
            position = position_cosine(mine, self.targets[k], per_token=term.per_token)
            slopes[k] = slopes[k] + (term.weight / match.scale) * torch.autograd.grad(position, mine)[0]
        # ∂loss/∂x' = Jᵀ ∂loss/∂g' (5.2)
        live = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]
        pulled = torch.autograd.grad([gradients[k] for k in live], leaves, [slopes[k] for k in live])
        return _Restart(
            match.distance, match.residual, position.detach(), None if mine is None else mine.detach(),
            tuple(match.scale * slope for slope in pulled),
        )  # fmt: skip

    def _priors(self, images: Tensor) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each prior on pictures (R, B, C, H, W)."""
        priors = self.recipe.priors
        flat = images.flatten(0, 1)  # (R·B, C, H, W)
        if priors.total_variation:
            yield "total_variation", priors.total_variation, objectives.total_variation(flat)
        if priors.image_norm:
            yield "image_norm", priors.image_norm, objectives.image_norm(flat)
        if priors.box:
            yield "box", priors.box, objectives.outside_box(flat, self.preprocessing)
        if priors.group_consistency:
            yield "group_consistency", priors.group_consistency, objectives.group_spread(images)


# --- Model, update and recipe as a problem ------------------------------------------------------------------------


def pose(
    model: nn.Module,
    update: ClientUpdate,
    recipe: Recipe,
    *,
    labels: Tensor | str | None,
    batch_size: int | None,
    image_shape: tuple[int, int, int] | None,
    coordinates: Coordinates | None,
    loss: Loss,
    dtype: torch.dtype,
    device: torch.device | str | None,
    anatomy: Anatomy | None,
    preprocessing: Preprocessing | None,
    seed: int,
) -> Problem:
    """The problem behind a call of :func:`~aprillab.match_gradients`, whose arguments these are."""
    anatomy = anatomy or _anatomy_of(model, image_shape)
    batch_size = assumed_batch_size(update, labels, batch_size)
    shape = (batch_size, *(image_shape or (_channels(model, anatomy), *anatomy.image_size)))
    asked = recipe.labels if labels is None else labels
    known, labels_how = _labels(model, update, anatomy, asked, batch_size)
    names = list(update.gradients)
    k = names.index(anatomy.position) if anatomy.position in names else None
    like = torch.zeros((), device=device or update.gradients[names[0]].device, dtype=dtype)
    targets = [update.gradients[name].detach().to(like) for name in names]
    # A copy to search on: as a rule in another dtype, and models may keep things of their last pass.
    copied = _with_linear_patches(copy.deepcopy(model), anatomy).to(like.device, dtype).requires_grad_(False)
    parameters = dict(copied.named_parameters())
    coordinates = coordinates or _row_space(update, anatomy, batch_size, recipe)
    if coordinates is not None and isinstance(recipe.optimizer, Adam) and recipe.optimizer.clamp:
        raise ValueError("clamp=True works on pixels, and the search has coordinates: choose one")
    return Problem(
        model=copied,
        parameters=[parameters[name].requires_grad_() for name in names],
        targets=targets,
        position=None
        if k is None or recipe.position_term is None
        else Position(k, recipe.position_term, anatomy.position_prefix, parameters[anatomy.patch_weight].shape[-1]),
        recipe=recipe,
        match=matcher(recipe.distance, targets, torch.finfo(update.dtype).eps),
        shape=shape,
        labels=None if known is None else known.to(like.device),
        labels_how=labels_how,
        classes=_count_classes(copied, like.expand(shape)) if known is None else None,
        loss=loss,
        preprocessing=preprocessing or anatomy.preprocessing,
        coordinates=None if coordinates is None else coordinates.to(like),
        seed=seed,
    )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """The caller's random state is kept, and attention has a second derivative (chapter 05, step 2)."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


class _PatchLinear(nn.Conv2d):
    """A convolution whose windows do not overlap, as what it is: a linear layer of patches."""

    def forward(self, images: Tensor) -> Tensor:
        size = self.kernel_size[0]
        patches = patchify(images, size)  # (B, n, p)
        tokens = nn.functional.linear(patches, self.weight.flatten(1), self.bias)  # (B, n, d)
        return tokens.transpose(1, 2).unflatten(2, (images.shape[-2] // size, images.shape[-1] // size))


def _with_linear_patches(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """A ViT's patch embedding as a linear layer, in place: a convolution's second derivative is slow.

    In float32 on one thread it takes a twentieth of an evaluation of a small ViT.
    """
    module = model.get_submodule(anatomy.patch_weight.rpartition(".")[0])
    if type(module) is nn.Conv2d and module.kernel_size == module.stride and module.groups == 1:
        height, width = module.kernel_size
        tiles = not (anatomy.image_size[0] % height or anatomy.image_size[1] % width)
        if height == width and tiles and module.padding == (0, 0) and module.dilation == (1, 1):
            module.__class__ = _PatchLinear
    return model


def _seed(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which takes half a millisecond where CUDA is there and unused."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _row_space(update: ClientUpdate, anatomy: Anatomy, batch_size: int, recipe: Recipe) -> Coordinates | None:
    gradient = update.gradients.get(anatomy.patch_weight)
    if not recipe.row_space or gradient is None:
        return None
    return row_space_of(gradient, batch_size, anatomy.image_size)


def _anatomy_of(model: nn.Module, image_shape: tuple[int, int, int] | None) -> Anatomy:
    """The ViT's anatomy, or of another classifier what the label recovery reads: its last linear layer."""
    try:
        return dissect(model)
    except UnknownModelError:
        if image_shape is None:
            raise AttackNotApplicable(
                "match_gradients",
                f"the shape of the images that {type(model).__name__} takes is unknown: give image_shape=(C, H, W)",
            ) from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {part: f"{linear[-1]}.{part}".lstrip(".") for part in ("weight", "bias")} if linear else {}
    return Anatomy(
        family="another classifier",
        image_size=image_shape[1:],
        patch_weight="",
        head_weight=names.get("weight"),
        head_bias=names.get("bias"),
    )


def _labels(
    model: nn.Module, update: ClientUpdate, anatomy: Anatomy, labels: Tensor | str, batch_size: int
) -> tuple[Tensor | None, str]:
    """Labels to match with, None where they are to be optimized, and a word on where they come from."""
    if isinstance(labels, Tensor):
        if labels.shape != (batch_size,) or labels.is_floating_point():
            raise ValueError(
                f"labels must be {batch_size} integers (batch_size={batch_size}), "
                f"not {tuple(labels.shape)} of {labels.dtype}"
            )
        return labels, "known to the attacker"
    if labels not in ("recover", "optimize"):
        raise ValueError(f"labels={labels!r} is neither a tensor nor one of 'recover', 'optimize'")
    if labels == "optimize":
        return None, "optimized along with the pictures"
    try:
        found = recover_labels(model, update, batch_size=batch_size, anatomy=anatomy)
    except AttackNotApplicable as refusal:
        return None, f"optimized along with the pictures, since they cannot be recovered: {refusal.reason}"
    return found.labels, f"recovered, {'exact' if found.exact else 'not certain'}: {found.reason}"


def _count_classes(model: nn.Module, images: Tensor) -> int:
    with undisturbed(images.device), torch.no_grad():
        return logits_of(model, images).shape[-1]


def _channels(model: nn.Module, anatomy: Anatomy) -> int:
    return dict(model.named_parameters())[anatomy.patch_weight].shape[1]
