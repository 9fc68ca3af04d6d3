"""Checks for chapter 06: fixing the position embedding, and what else a client can do to its
update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from ..attacks.closed_forms.april import april_closed_form
from ..attacks.closed_forms.patch_embedding import embedding_closed_form
from ..attacks.result import AttackNotApplicable
from ..data import load_victim
from ..defenses.client import withhold
from ..metrics import psnr
from ..models import VisionTransformer
from ..preprocessing import HALF
from ..update import ClientUpdate, client_update
from .feedback import Feedback, expect_close, expect_tensor, expect_whole, run, stop

F64 = torch.float64


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _vit(size: int = 8, width: int = 16, seed: int = 0) -> VisionTransformer:
    return VisionTransformer(
        image_size=size, patch_size=4, width=width, depth=1, heads=2, classes=5, seed=seed
    ).double()


# --- 6.1 ------------------------------------------------------------------------------------------------------


def check_who_is_left(function: Callable[[set[str], str], Any]) -> Feedback:
    """Exercise 6.1: ``function(withheld, block)`` names the closed forms of chapters 03
    and 04 that apply.
    """

    def check() -> str:
        for block in ("april", "prenorm"):
            sizes = {"image_size": 8, "patch_size": 4, "width": 64, "depth": 2, "heads": 2, "classes": 5}
            model = VisionTransformer(**sizes, block=block, seed=0).double()  # type: ignore[arg-type]
            whole = client_update(model, _random(1, 3, 8, 8, seed=1), torch.tensor([2]))
            for withheld in _WITHHELD:
                named = _names(function(set(withheld), block))
                for name, attack in _CLOSED_FORMS.items():
                    applies = _applies(attack, model, withhold(whole, withheld))
                    if applies != (name in named):
                        case = f"block={block!r}, {_listed(withheld)}"
                        stop(f"{case}: {_why(name, withheld, block, applies)}")
        return "Right. On an ordinary ViT a frozen patch embedding takes both away. The next cells ask who is left."

    return run(check)


def _listed(withheld: Sequence[str]) -> str:
    return f"without {' and '.join(withheld)}" if withheld else "nothing withheld"


def _names(answer: Any) -> set[str]:
    if isinstance(answer, str) or not isinstance(answer, set | frozenset | list | tuple):
        stop(f"Return a set of names, such as {{'april'}}, not {type(answer).__name__}.")
    if unknown := [name for name in answer if name not in _CLOSED_FORMS]:
        stop(f"{unknown[0]} is neither 'april' nor 'embedding', the two names that are asked for.")
    return set(answer)


_PATCHES, _EMBEDDING = "patch_embedding.weight", "position_embedding"
_FIRST = tuple(f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value"))
_CLOSED_FORMS: dict[str, Callable[..., Any]] = {"april": april_closed_form, "embedding": embedding_closed_form}
_WITHHELD: tuple[tuple[str, ...], ...] = (
    (), (_EMBEDDING,), (_PATCHES,), *((name,) for name in _FIRST), ("blocks.1.attention.query.weight",),
    ("class_token", "head.weight"), ("patch_embedding.bias", "blocks.0.attention.query.bias"),
    (_PATCHES, _EMBEDDING), (_PATCHES, _FIRST[0]),
)  # fmt: skip


def _applies(attack: Callable[..., Any], model: nn.Module, update: ClientUpdate) -> bool:
    """Whether the package's own attack runs on that update."""
    try:
        attack(model, update)
    except AttackNotApplicable:
        return False
    return True


def _why(name: str, withheld: Sequence[str], block: str, applies: bool) -> str:
    """What was overlooked, for one attack and one update."""
    title = {"april": "APRIL's system", "embedding": "Chapter 04's system"}[name]
    if applies and not withheld:
        return f"{name} applies, since nothing is missing."
    if applies:
        return f"{name} still applies. {title} does without {' and '.join(withheld)}; look at (6.1)."
    if name == "april" and block != "april":
        return "april is refused. It needs architecture A; an ordinary block has a LayerNorm before its attention."
    needed = (_EMBEDDING, *_FIRST) if name == "april" else (_EMBEDDING, _PATCHES)
    return f"{name} is refused. {title} needs the gradient of {next(n for n in withheld if n in needed)}."


# --- 6.2 ------------------------------------------------------------------------------------------------------


def check_freeze(function: Callable[[nn.Module, str], Any]) -> Feedback:
    """Exercise 6.2: ``function(model, name)`` freezes the parameter of that name and nothing else,
    in place.
    """

    def check() -> str:
        for name in ("position_embedding", "blocks.0.attention.query.weight"):
            model = _vit()
            # A neighbour whose name begins alike: matching by prefix would freeze it, too.
            model.position_embedding_scale = nn.Parameter(torch.ones(1, dtype=F64))
            before = {key: p.detach().clone() for key, p in model.named_parameters()}
            function(model, name)
            parameters = dict(model.named_parameters())
            if missing := sorted(before.keys() - parameters.keys()):
                stop(f"{missing[0]} is no parameter of the model any more: keep it, only stop training it.")
            if any(not torch.equal(p, before[key]) for key, p in parameters.items()):
                stop("A parameter's values changed. To freeze is to keep the values and stop training them.")
            frozen = {key for key, p in parameters.items() if not p.requires_grad}
            if not frozen:
                stop("Nothing is frozen: every parameter still has requires_grad=True.")
            if frozen == parameters.keys():
                stop("Everything is frozen: the model would not learn at all. Freeze one parameter by its name.")
            if name not in frozen:
                stop(f"{name} is still trained; frozen is {', '.join(sorted(frozen))}.")
            if extra := sorted(frozen - {name}):
                stop(f"{extra[0]} is frozen too: compare the whole name, not its beginning.")
        update = client_update(_frozen(function), _random(1, 3, 8, 8, seed=1), torch.tensor([2]))
        assert "position_embedding" not in update.gradients
        return "Right. One flag, and no client has that gradient to share any more."

    return run(check)


def _frozen(function: Callable[[nn.Module, str], Any]) -> nn.Module:
    model = _vit()
    function(model, "position_embedding")
    return model


# --- 6.3 ------------------------------------------------------------------------------------------------------


def check_seeds_needed(function: Callable[[Sequence[float], Sequence[float], float], int]) -> Feedback:
    """Exercise 6.3: ``function(a, b, half)`` is the least number of seeds whose interval (6.4)
    is ± half or less.
    """

    def check() -> str:
        if expect_whole(function([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], 0.01), "The number of seeds") != 2:
            stop(
                "Where every pilot seed shows the same difference, two seeds are enough, the least number that has a "
                "spread. Take the differences first, then their spread."
            )
        cases = []
        for count, seed, half in ((5, 1, 0.5), (4, 2, 0.8), (8, 3, 0.25), (3, 4, 1.0)):
            a = _random(count, seed=seed)
            b = a + 0.7 * _random(count, seed=seed + 10) + 0.3 * _random(1, seed=seed + 20)
            cases.append((a, b, half))
        answers = [
            expect_whole(function(a.tolist(), b.tolist(), half), "The number of seeds") for a, b, half in cases
        ]
        wanted = [_seeds(float((a - b).std()), half) for a, b, half in cases]
        if answers != wanted:
            for words, mistake in _MISTAKEN_SEEDS.items():
                if answers == [mistake(a, b, half) for a, b, half in cases]:
                    stop(f"The number of seeds is not right yet. {words}")
            k = next(k for k, answer in enumerate(answers) if answer != wanted[k])
            pilot, half = len(cases[k][0]), cases[k][2]
            stop(f"{pilot} pilot seeds and half a width of {half} ask for {wanted[k]} seeds, not {answers[k]}.")
        return "Right: half the width costs about four times the seeds. Ask before you train, not after."

    return run(check)


def _seeds(spread: float, half: float, *, probability: float = 0.975, lost: int = 1) -> int:
    """The least m ≥ 2 with t · spread / √m ≤ half, by trying; t has m − ``lost``
    degrees of freedom.
    """
    m = 2
    while float(stdtrit(m - lost, probability)) * spread / math.sqrt(m) > half:
        m += 1
    return m


def _with_quantile(a: Tensor, b: Tensor, half: float, quantile: float) -> int:
    return max(2, math.ceil((quantile * float((a - b).std()) / half) ** 2))


_MISTAKEN_SEEDS: dict[str, Callable[[Tensor, Tensor, float], int]] = {
    "That is with the normal distribution's 1.96; with few seeds use Student's t.": lambda a, b, half: _with_quantile(
        a, b, half, 1.959964
    ),
    "That is with the pilot's t; t has m − 1 degrees of freedom for the m you are looking for.": lambda a, b, half: (
        _with_quantile(a, b, half, float(stdtrit(len(a) - 1, 0.975)))
    ),
    "The seeds are not paired: take the differences first.": lambda a, b, half: _seeds(
        float((a.var() + b.var()).sqrt()), half
    ),
    "The spread is divided by n; an estimate from n values divides by n − 1.": lambda a, b, half: _seeds(
        float((a - b).std(correction=0)), half
    ),
    "That is for the whole width; `half` is half of it.": lambda a, b, half: _seeds(float((a - b).std()), half / 2),
    "That is the quantile 0.95, which leaves 10 % outside; both tails together get 5 %.": lambda a, b, half: _seeds(
        float((a - b).std()), half, probability=0.95
    ),
    "Student's t has m − 1 degrees of freedom, not m.": lambda a, b, half: _seeds(float((a - b).std()), half, lost=0),
    "One seed too few: the last one that is still too wide.": lambda a, b, half: (
        _seeds(float((a - b).std()), half) - 1
    ),
    "One seed too many: the first that is narrow enough is asked.": lambda a, b, half: (
        _seeds(float((a - b).std()), half) + 1
    ),
    "It is the number of seeds in all, the pilot's included.": lambda a, b, half: max(
        2, _seeds(float((a - b).std()), half) - len(a)
    ),
}


# --- 6.4 ------------------------------------------------------------------------------------------------------


def check_clip_and_noise(
    function: Callable[[dict[str, Tensor], float, float, torch.Generator], dict[str, Tensor]],
) -> Feedback:
    """Exercise 6.4: ``function(gradients, norm, multiplier, generator)`` clips all together, then
    adds noise.
    """

    def check() -> str:
        gradients = {"a": _random(3, 4, seed=1), "b": 2 * _random(7, seed=2)}
        total = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        generator = torch.Generator().manual_seed(0)
        # Without noise first: the clipping alone.
        for norm in (2 * total, total / 8):
            answer = _gradients(
                function({k: g.clone() for k, g in gradients.items()}, norm, 0.0, generator), gradients
            )
            factor = min(1.0, norm / total)
            for name, g in gradients.items():
                alone = min(1.0, norm / float(g.norm()))
                expect_close(
                    answer[name],
                    factor * g,
                    f"{name}, clipped to {'more than' if factor == 1 else 'an eighth of'} the norm",
                    mistakes={
                        "It was scaled up: an update below the norm stays as it is.": g * norm / total,
                        "Every tensor was clipped by itself; the norm is that of all of them together.": alone * g,
                        "Entries were cut one by one: that changes the direction.": g.clamp(-norm, norm),
                        "It was not clipped.": g,
                        "It is divided by the norm that was measured, but not multiplied by the one allowed.": g
                        / total,
                    },
                )
        _check_noise(function)
        return "Right: bounded first, then noise in proportion to the bound. The order is the whole point."

    return run(check)


def _check_noise(function: Callable[..., dict[str, Tensor]]) -> None:
    """Noise alone, on gradients that are zero: deviation multiplier · norm, independent entries."""
    zeros = {"a": torch.zeros(60, 60, dtype=F64), "b": torch.zeros(60, 60, dtype=F64)}
    norm, multiplier = 0.5, 3.0
    answer = _gradients(function(zeros, norm, multiplier, torch.Generator().manual_seed(1)), zeros)
    noise = torch.stack([answer["a"].flatten(), answer["b"].flatten()])
    if not noise.any():
        stop("No noise was added to an update that is zero.")
    if torch.equal(noise[0], noise[1]):
        stop("Both tensors got the same noise: draw anew for each, from the one generator.")
    if float((noise == noise[:, :1]).double().mean()) > 0.5:
        stop("Every entry of a tensor got the same noise: draw one number for each entry.")
    if abs(float(noise.mean())) > 0.2 * float(noise.std()):
        stop("The noise has a mean that is not zero: torch.randn, not torch.rand.")
    ratio = float(noise.std()) / (multiplier * norm)
    if abs(ratio - 1 / norm) < 0.05 / norm:
        stop(
            "The noise has the deviation `multiplier`; it is multiplier · norm: noise is measured against the bound."
        )
    if abs(ratio - 1 / multiplier) < 0.05 / multiplier:
        stop("The noise has the deviation `norm`; the multiplier is missing.")
    if abs(ratio - 1) > 0.05:
        stop(f"The noise has {ratio:.3g} times the deviation that is asked, multiplier · norm.")
    again = _gradients(function(zeros, norm, multiplier, torch.Generator().manual_seed(1)), zeros)
    if not torch.equal(again["a"], answer["a"]):
        stop("The same generator state gave other noise: draw from the generator that comes in, not the global one.")
    # Large gradients: the noise must not be clipped away with them.
    large = {"a": torch.full((60, 60), 100.0, dtype=F64), "b": torch.zeros(60, 60, dtype=F64)}
    answer = _gradients(function(large, norm, multiplier, torch.Generator().manual_seed(2)), large)
    if float(answer["b"].std()) < 0.5 * multiplier * norm:
        stop("The noise is too small where gradients are large: was it added before clipping?")
    if float(answer["b"].std()) > 2 * multiplier * norm:
        stop("The noise grows with the gradient: it should be measured against `norm`, which is public.")


def _gradients(answer: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(answer, dict) or answer.keys() != like.keys():
        stop(f"Return a dict of tensors with the same names, {', '.join(like)}.")
    return {name: expect_tensor(answer[name], tuple(g.shape), name) for name, g in like.items()}


# --- 6.5 ------------------------------------------------------------------------------------------------------


def check_average(function: Callable[[list[ClientUpdate]], ClientUpdate]) -> Feedback:
    """Exercise 6.5: ``function(updates)`` is one update, the mean of many of the same image, in
    float64.
    """

    def check() -> str:
        made = [ClientUpdate({"a": torch.tensor([float(i**2), 2.0], dtype=F64)}, batch_size=1) for i in range(4)]
        answer = _update(function(list(made)))
        if answer.keys() != {"a"}:
            stop(f"The mean should have the updates' names, ['a'], not {sorted(answer)}.")
        expect_close(
            expect_tensor(answer["a"], (2,), "The mean"),
            torch.tensor([3.5, 2.0], dtype=F64),
            "The mean",
            mistakes={
                "It is the sum: divide by the number of updates.": torch.tensor([14.0, 8.0], dtype=F64),
                "It is the first update alone.": torch.tensor([0.0, 2.0], dtype=F64),
                "It is the last update alone.": torch.tensor([9.0, 2.0], dtype=F64),
                "It is the lower median.": torch.tensor([1.0, 2.0], dtype=F64),
                "The last update is missing.": torch.tensor([5 / 3, 2.0], dtype=F64),
            },
        )
        # 1 + 1/256 is no bfloat16 number; the mean of 1 and 1 + 2/256 is, in float64.
        coarse = [ClientUpdate({"a": torch.tensor([v], dtype=torch.bfloat16)}) for v in (1.0, 1.0078125)]
        mean = _update(function(coarse))["a"]
        if mean.dtype != F64 or float(mean) != 1.00390625:
            stop(
                f"The mean of coarse updates is finer than they are: average in float64 (yours is {mean.dtype}, "
                f"{float(mean):.8g} where 1.00390625 is asked)."
            )
        _attack_with(function)
        return "Right: the noise fell with the square root of the rounds, and the picture came out of it."

    return run(check)


def _update(answer: Any) -> dict[str, Tensor]:
    if not isinstance(answer, ClientUpdate):
        stop(f"Return an al.ClientUpdate with the mean gradients, not a {type(answer).__name__}.")
    return dict(answer.gradients)


def _attack_with(function: Callable[[list[ClientUpdate]], ClientUpdate]) -> None:
    """Thirty-two noisy updates of one picture: the attack on their mean must gain what √32 gives,
    about 15 dB.
    """
    model = _vit(size=16, width=64)
    pixels = load_victim("astronaut", 16, dtype=F64)[None]
    clean = client_update(model, HALF.to_input(pixels), torch.tensor([1]))
    generator = torch.Generator().manual_seed(0)
    noisy = [
        ClientUpdate(
            {k: g + 1e-5 * torch.randn(g.shape, generator=generator, dtype=F64) for k, g in clean.gradients.items()},
            batch_size=1,
        )
        for _ in range(32)
    ]
    one = float(psnr(embedding_closed_form(model, noisy[0]).pixels, pixels))
    mean = float(psnr(embedding_closed_form(model, function(noisy)).pixels, pixels))
    if mean < one + 8:
        stop(
            f"The attack on the mean of 32 updates reaches {mean:.1f} dB, on one {one:.1f}: √32 should give 15 more."
        )
