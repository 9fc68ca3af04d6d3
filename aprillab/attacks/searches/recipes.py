"""Recipes of gradient matching: what is compared, what pictures are like, how to minimize.

    minimize over x'    D(∇w(x'), ∇w)  +  α·(1 − cos(∇E'_pos, ∇E_pos))  +  priors(x')

A :class:`Recipe` holds D, the position term, the priors and the optimizer with its own settings.
The published attacks stand below, each with its paper and with what was left out of it. To change
one part of a recipe: ``dataclasses.replace(APRIL, row_space=False)``. Chapter 05 takes APRIL's
apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .objectives import DISTANCES, Distance


def _check_weights(record: object, *names: str) -> None:
    """Raise where a weight is negative, infinite or no number."""
    for name in names:
        value = getattr(record, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a number ≥ 0")


@dataclass(frozen=True, kw_only=True)
class PositionTerm:
    """APRIL's term on the position embedding's gradient, α·(1 − cos), equation (5.3).

    Without effect where that gradient is not shared.

    Attributes
    ----------
    weight : float > 0
        α.
    per_token : bool
        The mean of the tokens' own 1 − cos. False takes one cosine of the whole embedding's
        gradient, as the paper has it.
    rearrange : int ≥ 1 or None
        When the loss has not halved in so many evaluations, put the patches where their tokens'
        gradients fit (:func:`~aprillab.attacks.searches.rearrange.places_of`), if that lowers the
        loss. For one image: in a batch the embedding's gradient is a sum over images.

    Raises
    ------
    ValueError
        If the weight is not a positive number, or ``rearrange`` less than 1.
    """

    weight: float = 1.0
    per_token: bool = True
    rearrange: int | None = None

    def __post_init__(self) -> None:
        if self.rearrange is not None and self.rearrange < 1:
            raise ValueError(f"rearrange={self.rearrange} must be at least 1, or None")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight} of the position term must be > 0; None leaves the term out")


@dataclass(frozen=True, kw_only=True)
class Priors:
    """Weights of what is believed of pictures; 0 leaves a prior out.

    Attributes
    ----------
    total_variation, image_norm, box : float ≥ 0
        Of :func:`total_variation`, :func:`image_norm` and :func:`outside_box` in objectives.py.
    seams : float ≥ 0
        Of :func:`patch_seams`: pictures go on smoothly from patch to patch. For a ViT.
    group_consistency : float ≥ 0
        If positive, all restarts run together and are drawn to their mean (:func:`group_spread`).

    Raises
    ------
    ValueError
        If a weight is not a number ≥ 0.
    """

    total_variation: float = 0.0
    image_norm: float = 0.0
    box: float = 0.0
    seams: float = 0.0
    group_consistency: float = 0.0

    def __post_init__(self) -> None:
        _check_weights(self, "total_variation", "image_norm", "box", "seams", "group_consistency")


@dataclass(frozen=True, kw_only=True)
class LBFGS:
    """L-BFGS with a strong-Wolfe line search.

    Attributes
    ----------
    learning_rate : float > 0
        The step that the line search tries first.
    history_size : int ≥ 1
        The curvature pairs it keeps.

    Raises
    ------
    ValueError
        If one of them is out of range.
    """

    learning_rate: float = 1.0
    history_size: int = 100

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0")
        if self.history_size < 1:
            raise ValueError(f"history_size={self.history_size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam, on the gradient or on its sign.

    Attributes
    ----------
    learning_rate : float > 0
    signed : bool
        Step by Adam on the sign of the gradient, as Inverting Gradients does.
    schedule : bool
        Cut the step to a tenth after 3/8, 5/8 and 7/8 of the restart's share of the evaluations.
    clamp : bool
        Put pixels back into [0, 1] before every evaluation. For unknowns that are pixels: not with
        ``row_space``.
    beta2 : float, 0 ≤ β₂ < 1
        How slowly Adam forgets squared slopes. At its usual 0.999 it remembers a thousand steps,
        and where the slopes shrink by orders of magnitude on the way, its steps become too small
        (data/results/fair_matching.md).

    Raises
    ------
    ValueError
        If the learning rate is not a positive number, or β₂ not in its range.
    """

    learning_rate: float = 0.1
    signed: bool = False
    schedule: bool = False
    clamp: bool = False
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2} must be at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way of gradient matching.

    Attributes
    ----------
    distance : {"l2", "relative_l2", "balanced_l2", "l2_l1", "cosine"} or callable
        D: a function of objectives.py by name, or any differentiable function of (gradients,
        targets), two lists of tensors in one order, that returns a scalar tensor. Another weight in
        TAG's distance is ``functools.partial(objectives.l2_l1, l1_weight=…)``.
    position_term : PositionTerm or None
    priors : Priors
    optimizer : LBFGS or Adam
    row_space : bool
        Look for the patches in the row space of ∂l/∂W_e = Σ_i (∂l/∂z_i) x_iᵀ, equation (3.5), which
        holds them: B·n coefficients a patch in place of p pixels. Without effect where B·n ≥ p, or
        where that gradient is not shared. Not for gradients with noise added, whose row space is
        another.
    restarts : int ≥ 1
        Runs from different noise; the one with the lowest loss is returned. The budget is shared
        out equally.
    patience : int ≥ 1 or None
        Give a restart up when its loss has not halved in so many evaluations, and spend what is
        left of the budget on the next, in the end on the best of them. Without effect for one
        restart or with group consistency.
    labels : {"recover", "optimize"}
        What becomes of labels that nobody hands over: read off the head's gradient, or optimized
        along with the pictures. It is all that iDLG changed in DLG.

    Raises
    ------
    ValueError
        If a field is unknown or out of range, or ``row_space`` meets an optimizer that clamps
        pixels.

    Examples
    --------
    >>> from dataclasses import replace
    >>> APRIL.restarts, replace(APRIL, restarts=1).restarts
    (5, 1)
    >>> Recipe(distance="l3")
    Traceback (most recent call last):
    ...
    ValueError: distance='l3' is neither callable nor one of 'l2', 'relative_l2', 'balanced_l2', 'l2_l1', 'cosine'
    """

    distance: str | Distance = "relative_l2"
    position_term: PositionTerm | None = None
    priors: Priors = field(default_factory=Priors)
    optimizer: LBFGS | Adam = field(default_factory=LBFGS)
    row_space: bool = False
    restarts: int = 1
    patience: int | None = None
    labels: Literal["recover", "optimize"] = "recover"

    def __post_init__(self) -> None:
        if not callable(self.distance) and self.distance not in DISTANCES:
            raise ValueError(
                f"distance={self.distance!r} is neither callable nor one of {', '.join(map(repr, DISTANCES))}"
            )
        for name, value, kinds in (
            ("position_term", self.position_term, (PositionTerm, type(None))),
            ("priors", self.priors, (Priors,)),
            ("optimizer", self.optimizer, (LBFGS, Adam)),
        ):
            if not isinstance(value, kinds):
                allowed = " or ".join("None" if kind is type(None) else f"{kind.__name__}(…)" for kind in kinds)
                raise ValueError(f"{name}={value!r} must be {allowed}")
        if self.labels not in ("recover", "optimize"):
            raise ValueError(f"labels={self.labels!r} of a recipe is none of 'recover', 'optimize'")
        if self.restarts < 1:
            raise ValueError(f"restarts={self.restarts} must be at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience} must be at least 1, or None")
        if self.row_space and isinstance(self.optimizer, Adam) and self.optimizer.clamp:
            raise ValueError("clamp=True works on pixels and row_space=True on coefficients: choose one")

    @property
    def together(self) -> bool:
        """Whether all restarts run at the same time."""
        return self.priors.group_consistency > 0

    @property
    def impatient(self) -> bool:
        """Whether a restart may be given up for another."""
        return self.patience is not None and self.restarts > 1 and not self.together

    @property
    def name(self) -> str:
        """Its key in :data:`RECIPES`, or "custom"."""
        return next((name for name, known in RECIPES.items() if known == self), "custom")


# --- The published attacks ----------------------------------------------------------------------------------------

DLG = Recipe(distance="l2", labels="optimize")
"""Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019: L2, L-BFGS, labels unknown.

Published: 300 steps of torch's L-BFGS without a line search; here with one.
"""

IDLG = Recipe(distance="l2")
"""Zhao et al., "iDLG", 2020: DLG with the label read off the head first (chapter 01)."""

INVERTING_GRADIENTS = Recipe(
    distance="cosine",
    priors=Priors(total_variation=1e-4),
    optimizer=Adam(learning_rate=0.1, signed=True, schedule=True, clamp=True),
)
"""Geiping et al., "Inverting Gradients", NeurIPS 2020: cosine, total variation, Adam on the sign.

Published: 4 800 to 24 000 steps and several restarts; set ``max_evaluations`` and ``restarts``.
"""

TAG = Recipe(distance="l2_l1", optimizer=Adam(learning_rate=0.1, schedule=True))
"""Deng et al., "TAG", Findings of EMNLP 2021: squared plus absolute distance.

Left out: a weight for the absolute part that decays with depth, and AdamW or BERT's token space,
which have no counterpart for pixels.
"""

GRADINVERSION = Recipe(
    distance="l2",
    priors=Priors(total_variation=1e-4, image_norm=1e-6, group_consistency=1e-2),
    optimizer=Adam(learning_rate=0.1, schedule=True),
    restarts=3,
)
"""Yin et al., GradInversion, CVPR 2021: L2, priors, agreement of several runs.

Left out: the term on BatchNorm statistics, its strongest prior, since a ViT has no BatchNorm; the
registration of the runs' pictures; the noise added at each step.
"""

APRIL = Recipe(
    distance="balanced_l2",
    position_term=PositionTerm(weight=1.0, rearrange=30),
    row_space=True,
    optimizer=LBFGS(),
    restarts=5,
    patience=100,
)
"""Lu et al., "APRIL", CVPR 2022, as we make it strong.

Every tensor's distance is relative to its size and to the size of the gradient on trial. The
position term is taken token by token (the paper's is ``per_token=False``); where the loss stops
falling, it says which patches stand in the wrong place. Patches lie in the row space of ∂l/∂W_e;
L-BFGS has a line search, and another start where moving patches does not help. There is no prior:
the minimum is the picture itself. What distance and rearranging are worth, and both numbers of
evaluations: data/results/digits.md.
"""

RECIPES: dict[str, Recipe] = {
    "dlg": DLG,
    "idlg": IDLG,
    "inverting_gradients": INVERTING_GRADIENTS,
    "tag": TAG,
    "gradinversion": GRADINVERSION,
    "april": APRIL,
}
"""The published attacks by the name that :func:`~aprillab.match_gradients` takes."""


def recipe_of(recipe: str | Recipe) -> Recipe:
    """A recipe, given itself or its name.

    Raises
    ------
    ValueError
        If no recipe has this name.

    Examples
    --------
    >>> recipe_of("idlg").distance
    'l2'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is neither a Recipe nor one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
