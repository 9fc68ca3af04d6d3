"""Gradient matching: look for pictures whose gradient is the one that was shared.

    minimize over x'    D(∇w(x'), ∇w)  +  α·(1 − cos(∇E'_pos, ∇E_pos))  +  priors(x')

Chapter 05 builds it part by part. D and the priors are in objectives.py, the optimizers in search.py; here are the
published recipes (:data:`PRESETS`) and what a caller calls. A small loss is no proof: other pictures can have almost
the same gradient (twin data), so no result is ever marked exact.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ...anatomy import Anatomy, UnknownModelError, dissect
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, check_update
from ..labels import assumed_batch_size, recover_labels
from ..result import AttackNotApplicable, Reconstruction
from .coordinates import Coordinates
from .objectives import DISTANCES, Distance, l2_l1, relative_l2
from .search import Problem, Search

Optimizer = Literal["lbfgs", "adam", "signed_adam"]
PositionTerm = Literal["per_token", "whole"]

PRESETS: dict[str, dict[str, Any]] = {
    # Zhu et al., NeurIPS 2019: squared distance, L-BFGS, labels unknown and optimized along with the pictures.
    # Published: 300 steps of torch's L-BFGS without a line search; here with one.
    "dlg": {"objective": "l2", "optimizer": "lbfgs", "labels": "optimize"},
    # Zhao et al., 2020: DLG with the label read off the head's gradient first (from its bias: see chapter 01).
    "idlg": {"objective": "l2", "optimizer": "lbfgs"},
    # Geiping et al., NeurIPS 2020: cosine distance and total variation, Adam on the sign of the gradient, step size
    # cut to a tenth after 3/8, 5/8 and 7/8 of the way, pixels kept in range. Published: 4 800 to 24 000 steps and
    # several restarts; set max_evaluations and restarts.
    "inverting_gradients": {
        "objective": "cosine",
        "total_variation": 1e-4,
        "optimizer": "signed_adam",
        "learning_rate": 0.1,
        "schedule": True,
        "clamp": True,
    },
    # Deng et al., Findings of EMNLP 2021: squared plus absolute distance. Left out: a weight for the absolute part
    # that decays with depth, and AdamW or BERT's token space, which have no counterpart for pixels.
    "tag": {"objective": "l2_l1", "l1_weight": 0.01, "optimizer": "adam", "learning_rate": 0.1, "schedule": True},
    # Yin et al., CVPR 2021: squared distance, total variation, norm, and agreement of several runs. Left out: the
    # term on BatchNorm statistics, its strongest prior, since a ViT has no BatchNorm; the registration of the runs'
    # pictures; the noise added at each step.
    "gradinversion": {
        "objective": "l2",
        "total_variation": 1e-4,
        "image_norm": 1e-6,
        "group_consistency": 1e-2,
        "restarts": 3,
        "optimizer": "adam",
        "learning_rate": 0.1,
        "schedule": True,
    },
    # Lu et al., CVPR 2022, as we make it strong: every tensor's distance relative to its size, the position embedding
    # term token by token (position_term="whole" is the paper's), patches in the row space of ∂l/∂W_e, and L-BFGS with
    # a line search, another start where the loss stops falling. No prior: the minimum is the picture itself.
    "april": {
        "objective": "relative_l2",
        "alpha": 1.0,
        "row_space": True,
        "optimizer": "lbfgs",
        "restarts": 5,
        "patience": 200,
    },
}
"""Published recipes by name: keywords of :func:`match_gradients`, each of which can be overridden."""

_DEFAULTS: dict[str, Any] = {
    "objective": "relative_l2",
    "l1_weight": 0.01,
    "alpha": 0.0,
    "position_term": "per_token",
    "row_space": False,
    "coordinates": None,
    "total_variation": 0.0,
    "image_norm": 0.0,
    "box": 0.0,
    "group_consistency": 0.0,
    "optimizer": "lbfgs",
    "learning_rate": 1.0,
    "schedule": False,
    "clamp": False,
    "history_size": 100,
    "init": "noise",
    "restarts": 1,
    "patience": None,
    "labels": "recover",
}

_ENDS = {"interrupted": "was interrupted", "diverged": "diverged again and again"}


def match_gradients(
    model: nn.Module,
    update: ClientUpdate,
    *,
    preset: str | None = "april",
    labels: Tensor | Literal["recover", "optimize"] | None = None,
    batch_size: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    objective: str | Distance | None = None,
    l1_weight: float | None = None,
    alpha: float | None = None,
    position_term: PositionTerm | None = None,
    row_space: bool | None = None,
    coordinates: Coordinates | None = None,
    total_variation: float | None = None,
    image_norm: float | None = None,
    box: float | None = None,
    group_consistency: float | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: float | None = None,
    schedule: bool | None = None,
    clamp: bool | None = None,
    history_size: int | None = None,
    init: str | Tensor | None = None,
    restarts: int | None = None,
    patience: int | None = None,
    resume: Reconstruction | None = None,
    seed: int = 0,
    max_evaluations: int | None = 2000,
    max_seconds: float | None = None,
    tolerance: float | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    snapshots: int = 0,
    callback: Callable[[dict[str, Any], Tensor], None] | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Search for pictures whose gradient matches the update's.

    Works for any model that classifies images; gradients that are not in the update are not matched. Options
    left at None are the preset's, and what a preset does not say has the default given here.

    Parameters
    ----------
    model : nn.Module
        Copied; the caller's is left as it is. Train or eval mode as the client had it.
    update : ClientUpdate
    preset : key of :data:`PRESETS`, or None for none
    labels : int64 Tensor of shape (B,), or "recover" (default) or "optimize"
        Known to the attacker; read off the head's gradient (:func:`recover_labels`); or unknowns of their own, as in
        DLG. Where "recover" finds no head gradient, they are optimized, and ``diagnostics["labels"]`` says so.
    batch_size : int, optional
        B; default is the number of labels, else what the client says, else 1.
    image_shape : (C, H, W), optional
        Needed for models :func:`dissect` does not know.
    objective : {"relative_l2", "l2", "l2_l1", "cosine"} or callable
        The gradient distance, or a function of (gradients, targets), two lists of tensors in one order.
    l1_weight : float, default 0.01, of the absolute part of "l2_l1"
    alpha : float, default 0
        Weight of APRIL's position-embedding term. Without effect where that gradient is not shared.
    position_term : {"per_token", "whole"}
        The mean of the tokens' cosines, or one cosine of the whole embedding gradient, as the paper has it
        (:func:`position_cosine`).
    row_space : bool, default False
        Look for the patches in the row space of ∂l/∂W_e = Σ_i (∂l/∂z_i) x_iᵀ, which holds them: B·n coefficients a
        patch in place of p pixels. Without effect where B·n ≥ p, or that gradient is not shared. Not for gradients
        with noise added, whose row space is another.
    coordinates : Coordinates, optional
        Where to look for the patches instead: what another attack knows of them. Overrides ``row_space``.
    total_variation, image_norm, box : float, default 0
        Weights of priors: :func:`total_variation`, :func:`image_norm`, :func:`outside_box`.
    group_consistency : float, default 0
        If positive, all restarts run together and are drawn to their mean with this weight.
    optimizer : {"lbfgs", "adam", "signed_adam"}
        L-BFGS has a strong-Wolfe line search. Signed Adam steps by Adam on the sign of the gradient.
    learning_rate : float, default 1 for L-BFGS and 0.1 for the others
    schedule : bool
        For the Adams: cut the step to a tenth after 3/8, 5/8 and 7/8 of ``max_evaluations``.
    clamp : bool
        For the Adams: put pixels back into [0, 1] after every step.
    history_size : int, default 100, the curvature pairs L-BFGS keeps
    init : {"noise", "grey"} or Tensor (B, C, H, W) in model-input space
        Normal noise of standard deviation 1/4, in pixels, around mid-grey; mid-grey with noise of 1/1000 of that
        (equal patches would stay equal); or a warm start such as a closed form's ``images``.
    restarts : int, default 1
        Runs from different noise; the one with the lowest loss is returned. A warm start is used by the first run,
        and perturbed by a hundredth of the noise above in the others. The budget is shared out equally.
    patience : int, optional
        Give a restart up when its loss has not halved in so many evaluations, and spend what is left of the budget
        on the next, in the end on the best of them. Without effect for one restart or with group consistency.
    resume : Reconstruction, optional
        An earlier result of this function, with the same options: the search goes on from its pictures, and
        evaluations, seconds and ``history`` go on counting, so budgets are those of both together.
    seed : int
        The same seed gives the same result on one machine, unless ``max_seconds`` ends the run.
    max_evaluations, max_seconds : budget over all restarts; None for no limit
        An evaluation is one loss with its gradient, line search included.
    tolerance : float, optional
        Stop when ‖g' − g‖ / ‖g‖ falls below; default is the update's ε times 10.
    loss : the client's loss, (logits, labels) to a scalar
    dtype : torch.dtype, default float64
        To match in, whatever the update's precision.
    device : where to search; default is where the update lies
    anatomy : Anatomy, optional; default is ``dissect(model)``
    preprocessing : Preprocessing, optional; default is the model family's own
    snapshots : int
        Keep the pictures in ``history`` every so many evaluations; 0 for never.
    callback : (history entry, images) to None, called at every evaluation
        It may raise KeyboardInterrupt to end the search.
    progress : bool, show a progress bar

    Returns
    -------
    Reconstruction
        The pictures of lowest loss seen. ``history`` has for every evaluation: ``evaluation``, ``restart``, ``loss``,
        ``terms`` (before weights), ``seconds``, and ``images`` where a snapshot was taken. ``exact`` is always False.
        ``diagnostics["stopped"]`` is "evaluations", "seconds", "tolerance", "stalled" or "interrupted".

    Raises
    ------
    ValueError
        If an option is unknown or makes no sense, or the search to resume has used up the budget.
    AttackNotApplicable
        If the image shape cannot be known, or the search yields no finite loss.
    UpdateError
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in _DEFAULTS and value is not None}
    options = _options(preset, given)
    if max_evaluations is None and (max_seconds is None or options["schedule"]):
        raise ValueError("max_evaluations: a limit is needed, by the schedule or since max_seconds gives none")
    # With patience a later restart begins only if the ones before leave it something.
    least = 1 if options["patience"] and not options["group_consistency"] else options["restarts"]
    if max_evaluations is not None and max_evaluations < least:
        raise ValueError(
            f"max_evaluations={max_evaluations} is less than one for each of {options['restarts']} restarts"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: match in torch.float64 or torch.float32")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    check_update(model, update)
    anatomy = anatomy or _anatomy_of(model, image_shape)
    preprocessing = preprocessing or anatomy.preprocessing
    device = torch.device(device) if device is not None else next(iter(update.gradients.values())).device
    labels = options["labels"]
    batch_size = assumed_batch_size(update, labels, batch_size)
    known, labels_how = _labels(model, update, anatomy, labels, batch_size)
    shape = (batch_size, *(image_shape or (_channels(model, anatomy), *anatomy.image_size)))
    if isinstance(options["init"], Tensor) and options["init"].shape != shape:
        raise ValueError(f"init has shape {tuple(options['init'].shape)}, the pictures {shape}")
    notes = []
    names = list(update.gradients)
    if options["alpha"] and anatomy.position not in names:
        notes.append("the position embedding's gradient is not shared, so α has no effect")

    copied = copy.deepcopy(model).to(device, dtype)
    parameters = dict(copied.named_parameters())
    coordinates = options["coordinates"] or _row_space(update, anatomy, batch_size, options)
    problem = Problem(
        model=copied,
        parameters=[parameters[name].requires_grad_() for name in names],
        targets=[g.detach().to(device, dtype) for g in update.gradients.values()],
        position=names.index(anatomy.position) if anatomy.position in names else None,
        labels=None if known is None else known.to(device),
        loss=loss,
        preprocessing=preprocessing,
        distance=_distance(options, torch.finfo(update.dtype).eps),
        options=options,
        seed=seed,
        coordinates=None if coordinates is None else coordinates.to(torch.zeros(0, device=device, dtype=dtype)),
    )
    # The copy may draw random numbers (dropout) and the fused attention kernels have no second derivative.
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        tqdm(total=max_evaluations, desc=preset or "matching", unit=" eval", disable=not progress) as bar,
    ):
        if known is None:
            problem.classes = problem.count_classes(shape)
        search = Search(
            problem=problem,
            shape=shape,
            max_evaluations=max_evaluations,
            max_seconds=max_seconds,
            tolerance=10 * torch.finfo(update.dtype).eps if tolerance is None else tolerance,
            snapshots=snapshots,
            callback=callback,
            bar=bar,
            start=start,
        )
        if resume is not None:
            _go_on(search, resume)
        stopped = search.run()
    best = search.best
    if best.images is None or best.distances is None or best.residuals is None:
        raise AttackNotApplicable(
            "match_gradients",
            f"no picture with a finite loss was found ({search.divergences} divergences, ended by: {stopped})",
        )
    chosen = int(best.distances.argmin())  # of the restarts that ran together
    residual = float(best.residuals[chosen])
    images = best.images[chosen].double()
    if known is None and best.logits is not None:
        known = best.logits[chosen].argmax(-1)
    rounding = f"rounding in {_short(update.dtype)}: {torch.finfo(update.dtype).eps:.1e}"
    notes += [
        f"gradients agree up to a relative residual of {residual:.1e} ({rounding})",
        "other pictures can have nearly this gradient (twin data), so a match proves nothing about the pictures",
    ]
    if stopped in _ENDS:
        notes.append(f"the search {_ENDS[stopped]}, and this is the best it saw")
    seconds = search.seconds
    return Reconstruction(
        attack=f"match_gradients({preset or 'custom'})",
        images=images,
        pixels=preprocessing.to_pixels(images),
        labels=known,
        exact=False,
        reason="; ".join(notes),
        diagnostics={
            "stopped": stopped,
            "loss": best.loss,
            "terms": best.terms,
            "residual": residual,
            "evaluations": search.evaluations,
            "evaluations_per_second": search.evaluations / seconds,
            "best_evaluation": best.evaluation,
            "best_restart": best.restart + chosen,
            "restarts": search.restarts,
            "divergences": search.divergences,
            "labels": labels_how,
            "batch_size": batch_size,
            "matched": len(names),
            "directions": None if coordinates is None else len(coordinates.basis),
            "options": {k: "given" if isinstance(v, (Tensor, Coordinates)) else v for k, v in options.items()},
            "seed": seed,
            "precision": _short(update.dtype),
            "dtype": _short(dtype),
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        seconds=seconds,
        history=search.history,
    )


# --- What the caller says, checked ----------------------------------------------------------------


def _options(preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the preset, overridden by what was given; checked."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is none of {', '.join(PRESETS)}, and not None")
    recipe = {**(PRESETS[preset] if preset else {}), **given}
    options = {**_DEFAULTS, **recipe}
    for name, allowed in (
        ("optimizer", get_args(Optimizer)),
        ("position_term", get_args(PositionTerm)),
        ("objective", tuple(DISTANCES)),
        ("init", ("noise", "grey")),
        ("labels", ("recover", "optimize")),
    ):
        value = options[name]
        free = (name == "objective" and callable(value)) or (name in ("init", "labels") and isinstance(value, Tensor))
        if not free and value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
    weights = ("l1_weight", "alpha", "total_variation", "image_norm", "box", "group_consistency")
    for name in weights:
        if not (math.isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name}={options[name]} must be a number ≥ 0")
    for name in ("restarts", "history_size", "patience"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{name}={options[name]} must be at least 1")
    if options["optimizer"] == "lbfgs":
        if wrong := [name for name in ("schedule", "clamp") if given.get(name)]:
            raise ValueError(f"{wrong[0]}=True is for the Adams; L-BFGS has a line search (and box= for the pixels)")
        options["schedule"] = options["clamp"] = False  # a preset's, made for another optimizer
    # A step size belongs to the optimizer it was chosen for.
    if "learning_rate" not in given and ("learning_rate" not in recipe or "optimizer" in given):
        options["learning_rate"] = 1.0 if options["optimizer"] == "lbfgs" else 0.1
    if options["row_space"] and options["clamp"]:
        raise ValueError("clamp=True works on pixels and row_space=True on coefficients: choose one")
    if not options["learning_rate"] > 0:
        raise ValueError(f"learning_rate={options['learning_rate']} must be positive")
    return options


def _distance(options: dict[str, Any], eps: float) -> Distance:
    objective = options["objective"]
    if objective == "relative_l2":
        return partial(relative_l2, eps=eps)
    if objective == "l2_l1":
        return partial(l2_l1, l1_weight=options["l1_weight"])
    return objective if callable(objective) else DISTANCES[objective]


def _row_space(
    update: ClientUpdate, anatomy: Anatomy, batch_size: int, options: dict[str, Any]
) -> Coordinates | None:
    """Orthonormal basis (k, p) of the row space of ∂l/∂W_e, k ≤ B·n < p; None where it restricts nothing."""
    gradient = update.gradients.get(anatomy.patch_weight)
    if not options["row_space"] or gradient is None:
        return None
    height, width = anatomy.image_size
    size = gradient.shape[-1]
    tokens = batch_size * (height // size) * (width // size)  # B·n
    s, Vt = torch.linalg.svd(gradient.double().flatten(1), full_matrices=False)[1:]
    # Well above rounding: directions of pure rounding noise would differ from run to run.
    rank = min(tokens, int((s > 100 * torch.finfo(gradient.dtype).eps * s[0]).sum()))
    if not 0 < rank < gradient[0].numel():
        return None
    return Coordinates(torch.zeros_like(Vt[:1]), Vt[:rank], size, anatomy.image_size)


def _go_on(search: Search, earlier: Reconstruction) -> None:
    """Put a new search where an earlier one ended."""
    problem, numbers = search.problem, earlier.diagnostics
    if tuple(earlier.images.shape) != search.shape or "best_restart" not in numbers:
        raise ValueError(
            f"resume: {earlier.attack} with pictures {tuple(earlier.images.shape)} is no earlier search for "
            f"pictures {search.shape}"
        )
    for name, limit, used in (
        ("max_evaluations", search.max_evaluations, numbers["evaluations"]),
        ("max_seconds", search.max_seconds, earlier.seconds),
    ):
        if limit is not None and used >= limit:
            raise ValueError(
                f"{name}={limit} is the budget of both searches together, and the one to resume has used {used:.6g}: "
                "give more"
            )
    like = problem.targets[0]
    logits = None
    if problem.classes is not None and earlier.labels is not None:
        logits = 10 * nn.functional.one_hot(earlier.labels, problem.classes)[None].to(like)
    search.resumed = problem.unknowns_of(earlier.images[None].to(like)), logits
    search.history, search.restarts = list(earlier.history), list(numbers["restarts"])
    search.evaluations, search.restart = numbers["evaluations"], numbers["best_restart"]
    search.divergences = numbers["divergences"]
    search.start -= earlier.seconds


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
    if labels == "optimize":
        return None, "optimized along with the pictures"
    try:
        found = recover_labels(model, update, batch_size=batch_size, anatomy=anatomy)
    except AttackNotApplicable as refusal:
        return None, f"optimized along with the pictures, since they cannot be recovered: {refusal.reason}"
    return found.labels, f"recovered, {'exact' if found.exact else 'not certain'}: {found.reason}"


def _channels(model: nn.Module, anatomy: Anatomy) -> int:
    return dict(model.named_parameters())[anatomy.patch_weight].shape[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
