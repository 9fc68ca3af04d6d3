"""What stays fixed during gradient matching: the loss of pictures on trial, and its slope.

:func:`pose` makes a :class:`Problem` of model, update and recipe. The optimizers see nothing of
them but ``problem.evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...anatomy import Tiling
from ...preprocessing import Preprocessing
from ...update import logits_of
from . import objectives
from .coordinates import Coordinates
from .objectives import position_cosine
from .rearrange import places_of, rearranged
from .recipes import PositionTerm, Recipe
from .recorded import EvaluationGraph
from .slopes import Matcher

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
        ∂l/∂E'_pos of each restart; None where the position embedding's gradient is not
        shared or not looked at.
    """

    images: Tensor
    loss: Tensor
    slopes: tuple[Tensor, ...]
    terms: dict[str, float]
    distances: Tensor
    residuals: Tensor
    token_gradients: Tensor | None = None


@dataclass(frozen=True)
class Restart:
    """One restart's distance, residual and position term, scalars, and the slopes of its
    pictures and logits.

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
    tiling : how a picture is cut into patches
    """

    index: int
    term: PositionTerm
    prefix: int
    tiling: Tiling


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
    patch_size : (height, width) or None
        Of a ViT's patches; None where the prior on their seams is not asked for.
    seed : int
    draws : bool
        Whether the model draws at random, as dropout does.
    recording : EvaluationGraph or None
        Of a restart's evaluation, where evaluations may be recorded.
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
    patch_size: tuple[int, int] | None
    seed: int
    draws: bool = False
    recording: EvaluationGraph | None = None

    @property
    def device(self) -> torch.device:
        return self.targets[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.targets[0].dtype

    @property
    def rearrange(self) -> int | None:
        """Evaluations without progress until patches are moved; None where they never are.

        They are not in a batch, where the position embedding's gradient is a sum over images, and
        not among restarts that run together.
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
        """The picture (1, C, H, W) with its patches where their tokens' gradients fit the shared
        ones.

        None where they fit best as they stand.
        """
        if self.position is None:
            return None
        prefix, shared = self.position.prefix, self.targets[self.position.index]
        places = places_of(*(rows.flatten(0, -2)[prefix:] for rows in (token_gradients, shared)))
        if torch.equal(places, torch.arange(len(places), device=places.device)):
            return None
        return rearranged(images, places, self.position.tiling)

    # --- The loss -------------------------------------------------------------------------------------------------

    def gradients(self, images: Tensor, logits: Tensor | None) -> tuple[Tensor, ...]:
        """What the client would share, had it these images (B, C, H, W) and labels."""
        if self.draws:
            _seed(self.seed, self.device)  # dropout draws the same mask at every evaluation
        labels = self.labels if logits is None else logits.softmax(-1)
        value = self.loss(logits_of(self.model, images), labels)  # type: ignore[arg-type]
        return torch.autograd.grad(value, self.parameters, create_graph=True, materialize_grads=True)

    def evaluate(self, unknowns: Tensor, logits: Tensor | None) -> Evaluation:
        """The loss at unknowns (R, …) and label logits (R, B, classes), and its slope."""
        images = self.images_of(unknowns)  # (R, B, C, H, W)
        one = self.restart if self.recording is None else self.recording
        restarts = [one(x, *(() if logits is None else (logits[r],))) for r, x in enumerate(images)]
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

    def restart(self, images: Tensor, logits: Tensor | None = None) -> Restart:
        """One restart of pictures (B, C, H, W) and logits (B, classes), link by link."""
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
        return Restart(
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
        if self.patch_size is not None:
            yield "seams", priors.seams, objectives.patch_seams(flat, self.patch_size)
        if priors.group_consistency:
            yield "group_consistency", priors.group_consistency, objectives.group_spread(images)


def _seed(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which takes half a millisecond where CUDA is there and unused."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
