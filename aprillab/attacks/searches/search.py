"""The search behind :func:`~aprillab.attacks.searches.match.match_gradients`: loss, budgets, restarts, optimizers.

A :class:`Problem` is what stays fixed, a :class:`Search` what changes; an optimizer calls ``search.evaluate`` until
it raises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...preprocessing import Preprocessing
from ...update import logits_of
from . import objectives
from .coordinates import Coordinates
from .objectives import Distance, position_cosine

# --- The problem: loss and gradient for pictures on trial -----------------------------------------


@dataclass
class Problem:
    """What stays fixed during a search: the optimizers see nothing of the model but ``evaluate``."""

    model: nn.Module
    parameters: list[Tensor]
    targets: list[Tensor]
    position: int | None  # index of the position embedding among them
    labels: Tensor | None
    loss: Callable[[Tensor, Tensor], Tensor]
    preprocessing: Preprocessing
    distance: Distance
    options: dict[str, Any]
    seed: int
    coordinates: Coordinates | None = None  # of the patches; None: the unknowns are the pixels
    classes: int | None = None  # where the labels are unknowns

    def images_of(self, unknowns: Tensor) -> Tensor:
        """Pictures (R, B, C, H, W) of the optimizer's unknowns: pixels, or coefficients (R, B, n, k) of patches."""
        return unknowns if self.coordinates is None else self.coordinates.images_of(unknowns)

    def unknowns_of(self, images: Tensor) -> Tensor:
        """The nearest unknowns to pictures (R, B, C, H, W)."""
        return images.clone() if self.coordinates is None else self.coordinates.coefficients_of(images)

    def noisy(self, images: Tensor, noise: Tensor) -> Tensor:
        """Unknowns near pictures (R, B, C, H, W), with noise of that shape added."""
        if self.coordinates is None:
            return images + noise
        return self.coordinates.coefficients_of(images) + self.coordinates.coefficients_of_noise(noise)

    def count_classes(self, shape: tuple[int, ...]) -> int:
        with torch.no_grad():
            return logits_of(self.model, torch.zeros(shape).to(self.targets[0])).shape[-1]

    def gradients(self, images: Tensor, logits: Tensor | None) -> tuple[Tensor, ...]:
        """What the client would share, had it these images (B, C, H, W) and labels."""
        if self.model.training:
            torch.manual_seed(self.seed)  # dropout draws the same mask at every evaluation
        labels = self.labels if logits is None else logits.softmax(-1)
        value = self.loss(logits_of(self.model, images), labels)  # type: ignore[arg-type]
        return torch.autograd.grad(value, self.parameters, create_graph=True, materialize_grads=True)

    def evaluate(self, images: Tensor, logits: Tensor | None) -> tuple[Tensor, dict[str, float], Tensor, Tensor]:
        """Loss of the restarts (R, B, C, H, W) that run together, and its terms before weights.

        Also the gradient distance and the relative residual ‖g' − g‖ / ‖g‖ of each restart, (R,).
        """
        options = self.options
        distances, positions, residuals = [], [], []
        for r, batch in enumerate(images):
            gradients = self.gradients(batch, None if logits is None else logits[r])
            distances.append(self.distance(gradients, self.targets))
            if self.position is not None:
                per_token = options["position_term"] == "per_token"
                mine, shared = gradients[self.position], self.targets[self.position]
                positions.append(position_cosine(mine, shared, per_token=per_token))
            residuals.append(_residual(gradients, self.targets))
        flat = images.flatten(0, 1)  # (R·B, C, H, W)
        terms = {"distance": torch.stack(distances).mean()}
        if positions:
            terms["alpha"] = torch.stack(positions).mean()
        if options["total_variation"]:
            terms["total_variation"] = objectives.total_variation(flat)
        if options["image_norm"]:
            terms["image_norm"] = objectives.image_norm(flat)
        if options["box"]:
            terms["box"] = objectives.outside_box(flat, self.preprocessing)
        if options["group_consistency"]:
            terms["group_consistency"] = objectives.group_spread(images)
        loss = terms["distance"]
        for name, term in terms.items():
            if name != "distance" and options[name]:
                loss = loss + options[name] * term
        values = {name: term.item() for name, term in terms.items()}
        return loss, values, torch.stack(distances).detach(), torch.stack(residuals)


def _residual(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        difference = torch.stack([(g - t).norm() for g, t in zip(gradients, targets, strict=True)]).norm()
        return difference / torch.stack([t.norm() for t in targets]).norm()


# --- The search: budgets, restarts, the best so far -----------------------------------------------


class _Stop(Exception):
    """Ends the search, or only the present restart: a budget is spent or the tolerance reached."""


class _Diverged(Exception):
    """Loss or gradient is not finite."""


_STREAM = 20_220_307  # added to every seed
_DIVERGENCES = 6  # a restart is given up after so many
_MATCHED = 1e-3  # relative residual from which another restart is not worth its time

Variables = tuple[Tensor, Tensor | None]  # Problem.unknowns_of R restarts, and their label logits (R, B, classes)


@dataclass
class _Best:
    """The lowest loss seen, and what belongs to it."""

    loss: float = math.inf
    images: Tensor | None = None
    logits: Tensor | None = None
    distances: Tensor | None = None
    residuals: Tensor | None = None
    terms: dict[str, float] = field(default_factory=dict)
    evaluation: int = 0
    restart: int = 0


@dataclass
class Search:
    """What changes during a search: counters, the best pictures, the history."""

    problem: Problem
    shape: tuple[int, ...]
    max_evaluations: int | None
    max_seconds: float | None
    tolerance: float
    snapshots: int
    callback: Callable[[dict[str, Any], Tensor], None] | None
    bar: Any
    start: float = field(default_factory=time.perf_counter)
    evaluations: int = 0
    restart: int = 0
    limits: tuple[float, float] = (math.inf, math.inf)  # evaluations and seconds at which this restart ends
    patience: float = math.inf  # evaluations in which the loss must halve, or this restart is given up
    milestone: tuple[float, int] = (math.inf, 0)  # the loss when it last halved, and the evaluation
    resumed: Variables | None = None  # where an earlier search ended
    divergences: int = 0
    best: _Best = field(default_factory=_Best)
    best_here: _Best = field(default_factory=_Best)
    history: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def run(self) -> str:
        """All restarts, together (group consistency) or one after the other. Returns why it ended."""
        count = self.problem.options["restarts"]
        together = count if self.problem.options["group_consistency"] else 1
        patient = together == count or not self.problem.options["patience"]
        stopped = "stalled"
        try:
            if self.resumed is not None:
                return self._run_one(lambda: self.resumed, 1.0)  # type: ignore[arg-type, return-value]
            self.patience = math.inf if patient else self.problem.options["patience"]
            for self.restart in range(0, count, together):
                # Each has its share of what is left, or all of it where patience ends those that lead nowhere.
                share = together / (count - self.restart) if patient else 1.0
                stopped = self._run_one(partial(self._begin, self.restart, together), share)
                if stopped == "tolerance" or (not patient and stopped in ("evaluations", "seconds")):
                    return stopped
                if not patient and self.best.residuals is not None and self.best.residuals.min() < _MATCHED:
                    break
            if not patient and self.best.images is not None:  # the best of them has what is left of the budget
                self.patience, self.restart = math.inf, self.best.restart
                stopped = self._run_one(self._best_again, 1.0)
        except KeyboardInterrupt:
            stopped = "interrupted"
        return stopped

    def _run_one(self, begin: Callable[[], Variables], share: float) -> str:
        """One restart, with a share of the budget that is left, entered into ``restarts``."""
        self.limits = (
            self.evaluations + _left(self.max_evaluations, self.evaluations) * share,
            self.seconds + _left(self.max_seconds, self.seconds) * share,
        )
        self.best_here = _Best()
        self.milestone = (math.inf, self.evaluations)
        first, stopped = self.evaluations, "interrupted"
        try:
            stopped = self._restart(begin)
        finally:
            self.restarts.append(
                {"loss": self.best_here.loss, "evaluations": self.evaluations - first, "ended": stopped}
            )
        return stopped

    def _restart(self, begin: Callable[[], Variables]) -> str:
        """One restart, begun again with a smaller step from its best point whenever it diverges."""
        options = self.problem.options
        minimize = _lbfgs if options["optimizer"] == "lbfgs" else _adam
        learning_rate = options["learning_rate"]
        variables = begin()
        for trial in range(_DIVERGENCES):
            try:
                minimize(self, variables, learning_rate)
                return "stalled"
            except _Stop as stop:
                return str(stop)
            except _Diverged:
                self.divergences += 1
                learning_rate /= 10
                if self.best_here.images is not None:
                    variables = self.problem.unknowns_of(self.best_here.images), _clone(self.best_here.logits)
                else:
                    variables = self._begin(1000 * (trial + 1) + self.restart, len(variables[0]))
        return "diverged"

    def _best_again(self) -> Variables:
        return self.problem.unknowns_of(self.best.images), _clone(self.best.logits)  # type: ignore[arg-type]

    def _begin(self, first: int, count: int) -> Variables:
        """Unknowns and label logits of ``count`` restarts, drawn from the seed and their numbers from ``first``."""
        problem, init = self.problem, self.problem.options["init"]
        like, zeros = problem.targets[0], torch.zeros(self.shape, dtype=torch.float64)
        to_input = problem.preprocessing.to_input
        centre = init.cpu().double() if isinstance(init, Tensor) else to_input(zeros + 0.5)
        unknowns, logits = [], []
        for offset in range(first, first + count):
            # A stream of our own: a victim drawn from the caller's seed must not resemble the first guess.
            generator = torch.Generator().manual_seed(_STREAM + problem.seed + offset)
            # Pixels of standard deviation 1/4, in model-input space.
            noise = torch.randn(self.shape, generator=generator, dtype=torch.float64) / 4
            noise = to_input(noise) - to_input(zeros)
            if isinstance(init, Tensor):
                noise *= 0.01 if offset else 0
            elif init == "grey":
                noise *= 0.001
            unknowns.append(problem.noisy(centre[None].to(like), noise[None].to(like))[0])
            if problem.classes is not None:
                drawn = torch.randn(self.shape[0], problem.classes, generator=generator, dtype=torch.float64)
                logits.append(drawn)
        return torch.stack(unknowns), torch.stack(logits).to(like) if logits else None

    def evaluate(self, unknowns: Tensor, logits: Tensor | None) -> Tensor:
        """One evaluation: loss and gradient (into ``.grad``), counted, recorded and checked against the budgets."""
        if self.evaluations + len(unknowns) > self.limits[0]:
            raise _Stop("evaluations")
        if self.seconds >= self.limits[1]:
            raise _Stop("seconds")
        images = self.problem.images_of(unknowns)
        loss, terms, distances, residuals = self.problem.evaluate(images, logits)
        variables = [unknowns] if logits is None else [unknowns, logits]
        gradients = torch.autograd.grad(loss, variables)
        self.evaluations += len(images)
        value = loss.item()
        if not (math.isfinite(value) and all(bool(g.isfinite().all()) for g in gradients)):
            raise _Diverged
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient.contiguous()  # L-BFGS takes views of it
        here = _Best(value, images.detach(), logits, distances, residuals, terms, self.evaluations, self.restart)
        self._record(here)
        if residuals.min() <= self.tolerance:
            raise _Stop("tolerance")
        if value < self.milestone[0] / 2:
            self.milestone = (value, self.evaluations)
        if self.evaluations - self.milestone[1] >= self.patience:
            raise _Stop("patience")
        return loss.detach()

    def _record(self, here: _Best) -> None:
        """Keep the best, write the history, tell the callback and the progress bar."""
        if here.loss < self.best_here.loss:
            here.images, here.logits = here.images.clone(), _clone(here.logits)  # type: ignore[union-attr]
            self.best_here = here
            if here.loss < self.best.loss:
                self.best = here
        entry: dict[str, Any] = {
            "evaluation": self.evaluations,
            "restart": self.restart,
            "loss": here.loss,
            "terms": here.terms,
            "seconds": self.seconds,
        }
        pictures = self.best_here.images[self.best_here.distances.argmin()]  # type: ignore[index, union-attr]
        if self.snapshots and len(self.history) % self.snapshots == 0:
            entry["images"] = pictures.detach().float().cpu().clone()
        self.history.append(entry)
        self.bar.update(self.evaluations - self.bar.n)
        self.bar.set_postfix(loss=f"{self.best.loss:.2e}", refresh=False)
        if self.callback is not None:
            self.callback(entry, pictures.detach())


def _left(limit: float | None, spent: float) -> float:
    return math.inf if limit is None else max(limit - spent, 0)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


# --- The optimizers: each calls search.evaluate until it raises or nothing moves any more ---------


def _lbfgs(search: Search, variables: Variables, learning_rate: float) -> None:
    """L-BFGS with a strong-Wolfe line search. Its memory is cleared when it stalls, as long as that helps."""
    unknowns = _require_grad(variables)
    while True:
        before = search.best_here.loss
        optimizer = torch.optim.LBFGS(
            unknowns,
            lr=learning_rate,
            max_iter=10**9,
            max_eval=10**9,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=search.problem.options["history_size"],
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: search.evaluate(*variables))
        if not search.best_here.loss < before * (1 - 1e-3):
            return


def _adam(search: Search, variables: Variables, learning_rate: float) -> None:
    """Adam, on the gradient or on its sign, with the step schedule of Inverting Gradients and a projection."""
    options, preprocessing = search.problem.options, search.problem.preprocessing
    unknowns = _require_grad(variables)
    optimizer = torch.optim.Adam(unknowns, lr=learning_rate)
    first, last = search.evaluations, search.limits[0]
    while True:
        if options["clamp"]:
            with torch.no_grad():
                unknowns[0].copy_(preprocessing.to_input(preprocessing.to_pixels(unknowns[0])))
        search.evaluate(*variables)
        done = (search.evaluations - first) / (last - first) if math.isfinite(last) else 0.0
        if options["schedule"]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.1 ** sum(done >= cut for cut in (3 / 8, 5 / 8, 7 / 8))
        if options["optimizer"] == "signed_adam":
            unknowns[0].grad.sign_()  # type: ignore[union-attr]
        optimizer.step()


def _require_grad(variables: Variables) -> list[Tensor]:
    return [v.requires_grad_() for v in variables if v is not None]
