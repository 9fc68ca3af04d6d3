"""What the span attack reads of one round or several: rows that lie in the span of the tokens.

The gradients of W_Q, W_K and W_V have such rows, and so have those of LoRA's factors A beside them:
with y = W u + s B A u the gradient of A is s Bᵀ Σ_i δ_i u_iᵀ, (10.5). While all below the first
attention is frozen, the u_i stay from round to round: the rows of all rounds are of one matrix D.
Where the embedding or the norms are trained, each group of rounds with the same values has a
matrix, and token equations, of its own; their costs add up (10.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...anatomy import Anatomy, Rows
from ...update.tensors import is_zero
from ..result import AttackNotApplicable
from ..rounds import RoundRead, known
from .inputs import refuse_errors, shared_gradients
from .noisy_span import NoisySpan, noisy_span
from .probe import places_of, public_tokens
from .span_width import NAME
from .token_equations import TokenEquations, token_equations

NEEDS = ("query", "key", "value")
READABLE = ("april", "postnorm", "prenorm", "two norms", "rmsnorm")
#: Fields of the anatomy whose values the token equations have in them.
_VALUES = (
    "patch_weight", "patch_bias", "position", "norm_weight", "norm_bias", "embedding_norm_weight",
    "embedding_norm_bias",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SpanRound:
    """What one round adds.

    Attributes
    ----------
    read : RoundRead
    rows : tuple of str
        What gradients its rows are of: fields of the anatomy, or names of adapters.
    D : Tensor (m, d)
        All its rows, which lie in the tokens' span, float64; gradients that are all zero left out.
    zero : tuple of str
        What was left out.
    dW : Tensor (d, p) or None
        ∂l/∂W_e; None where it is not shared, or says nothing: the tokens do without.
    rounding : float
        What the weights' rounding leaves in the rows, relative to their size.
    """

    read: RoundRead
    rows: tuple[str, ...]
    D: Tensor
    zero: tuple[str, ...]
    dW: Tensor | None
    rounding: float = 0.0

    @property
    def coarser(self) -> Tensor | None:
        """By how much rounding of the weights is more, in each row (m,), than that of the update's format; None
        where it is not.
        """
        eps, D = torch.finfo(self.read.reading.update.dtype).eps, self.D
        if self.rounding <= eps:
            return None
        entry = self.rounding * D.norm() / len(D) ** 0.5  # of a row: the same for all, large or small
        lengths = D.norm(dim=1)
        return torch.where(lengths > 0, entry / lengths / eps, 1.0).clamp_min(1.0)  # of no length: says nothing

    @property
    def adapted(self) -> bool:
        """Whether adapters' rows are all there is."""
        return not set(self.rows) & set(NEEDS)


def check_model(anatomy: Anatomy) -> None:
    """Refuse a model whose tokens the equations cannot follow.

    Raises
    ------
    AttackNotApplicable
    """
    if anatomy.first_block not in READABLE:
        raise AttackNotApplicable(
            NAME,
            "what stands before the first attention is neither nothing (architecture A) nor one or two norms "
            f'(architecture B): first_block="{anatomy.first_block}"{f". {anatomy.remark}" if anatomy.remark else ""}',
        )
    if anatomy.position is None:
        raise AttackNotApplicable(
            NAME,
            "without a position embedding every patch obeys the same equations: nothing tells the patches apart, and "
            "x = 0 solves them all when there is no bias",
        )


def rows_of(read: RoundRead, anatomy: Anatomy, device: torch.device | str | None) -> SpanRound:
    """The rows that a round shares, of at least one projection or adapter.

    Raises
    ------
    AttackNotApplicable
        If it shares none.
    """
    refuse_errors(NAME, read.reading.update)
    gradients = read.reading.update.gradients
    found = {name: gradients[name] for name in anatomy.adapters if name in gradients}
    for part in NEEDS:
        where: Rows | None = getattr(anatomy, part)
        if where is not None and (rows := where.of(gradients)) is not None:
            found[part] = rows
    if not found:  # the refusal says what is missing
        shared_gradients(NAME, read.reading.update, anatomy, NEEDS, device=device)
    dW = gradients.get(anatomy.patch_weight)
    zero = tuple(part for part, g in found.items() if is_zero(g))
    some = {part: g for part, g in found.items() if part not in zero}
    return SpanRound(
        read,
        tuple(some),
        torch.cat([*some.values()] or [g[:0] for g in found.values()]).to(device, torch.float64),
        zero,
        None if dW is None or is_zero(dW) else dW.to(device, torch.float64).flatten(1),
        read.rounding({part if part in anatomy.adapters else getattr(anatomy, part).name for part in some}),
    )


def with_rows(rounds: Sequence[SpanRound]) -> tuple[list[SpanRound], str]:
    """The rounds with a row that is not zero, and a word on the others.

    Raises
    ------
    AttackNotApplicable
        If there is none.
    """
    some = [one for one in rounds if one.rows]
    adapters = [name for one in rounds for name in one.zero if name not in NEEDS]
    if not some and adapters:
        raise AttackNotApplicable(
            NAME,
            f"the gradient of {adapters[0]} is zero in {_rounds(len(rounds))}: LoRA's B is zero until its first "
            "step, and until then nothing arrives at A. A later round has it",
        )
    if not some:
        raise AttackNotApplicable(NAME, "the first attention's gradient is zero: the head passes nothing down")
    empty = [str(one.read.number) for one in rounds if not one.rows]
    words = f"nothing in round{'s' if len(empty) > 1 else ''} {', '.join(empty)}"
    words += ", where LoRA's B is still zero" if adapters else ", where nothing arrives below the head"
    return some, words if empty else ""


# --- Groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """Rounds in which W_e, the positions and the norms have the same values.

    Attributes
    ----------
    rounds : list of SpanRound
    equations : TokenEquations
        With the rows of all of these rounds in D.
    tokens : int
        How many directions they span: patches and prefix.
    public : int
        How many rows of D, the last, are no gradient's but tokens that the server knows.
    """

    rounds: list[SpanRound]
    equations: TokenEquations
    tokens: int
    public: int = 0

    def by_round(self, rows: Tensor) -> list[Tensor]:
        """What belongs to D's rows, (m, …), by rounds."""
        return list(rows[: len(rows) - self.public].split([len(one.D) for one in self.rounds]))

    @property
    def noise(self) -> float:
        """Of an entry, relative, as the sums of the updates tell it: that of the most precise round."""
        return min(one.read.reading.noise for one in self.rounds)

    @property
    def coarser(self) -> Tensor | None:
        """Of all rows of D, (m,); None where no round has any."""
        found = [one.coarser for one in self.rounds]
        if all(part is None for part in found):
            return None
        ones = [torch.ones(len(one.D)).to(one.D) for one in self.rounds]
        parts = [some if part is None else part for part, some in zip(found, ones, strict=True)]
        return torch.cat([*parts, torch.ones(self.public).to(parts[0])])

    def gains(self) -> list[float]:
        """By how much each round's relative noise is larger outside the tokens."""
        return [noise_gain(D, self.tokens) for D in self.by_round(self.equations.D)]

    @property
    def gain(self) -> float:
        """The same of all its rows: each round's noise is relative to its own size."""
        weighted = zip(self.rounds, self.gains(), strict=True)
        rows = len(self.equations.D) - self.public
        return (sum(len(one.D) * gain**2 for one, gain in weighted) / rows) ** 0.5

    def noise_seen(self, span: NoisySpan, gain: float) -> float:
        """Of an entry, relative: as the sums tell it, and no more than what is outside the span, over its ``gain``.

        The head's sums tell too much where the loss is nearly zero: they are mostly rounding then, and
        the same factor is in all that is below the head.
        """
        if len(self.equations.D) <= self.tokens:
            return self.noise
        return min(self.noise, max(self.eps, span.excess / max(gain, 1.0)))

    @property
    def eps(self) -> float:
        """Of the coarsest format among the updates'."""
        return max(torch.finfo(one.read.reading.update.dtype).eps for one in self.rounds)

    def span(self) -> NoisySpan:
        """Its noisy span. Rows beyond the tokens' number show their noise, which sums may exaggerate."""
        shown = len(self.equations.D) > self.tokens
        return noisy_span(self.equations.D, self.tokens, self.eps if shown else self.noise, self.coarser)


def pixel_span(rounds: Sequence[SpanRound], groups: Sequence[Group], patches: int) -> NoisySpan | None:
    """The noisy span of ∂l/∂W_e, rows of all rounds; None where it is not shared."""
    shared = [one.dW for one in rounds if one.dW is not None]
    if not shared:
        return None
    dW = torch.cat(shared).to(groups[0].equations.e)
    # As with tokens: rows beyond the patches' number show their own noise.
    shown = len(dW) > patches
    return noisy_span(dW, patches, max(g.eps for g in groups) if shown else min(g.noise for g in groups))


def seen_as_a_whole(groups: Sequence[Group]) -> list[Group]:
    """The groups with a row for each token, where there are any: others' rows span a part of their tokens."""
    return [group for group in groups if len(group.equations.D) >= group.tokens] or list(groups)


def grouped(
    rounds: Sequence[SpanRound], anatomy: Anatomy, tokens: int, device: torch.device | str | None
) -> list[Group]:
    """The rounds by the values that the token equations have in them.

    Raises
    ------
    AttackNotApplicable
        If such a value is trained and was not given.
    """
    names = [name for part in _VALUES if (name := getattr(anatomy, part)) is not None] + list(anatomy.prefix)
    together: list[list[SpanRound]] = []
    for one in rounds:
        weights = known(one.read, names, NAME)
        like = next((g for g in together if _same(weights, g[0].read.weights, names)), None)
        if like is None:
            together.append([one])
        else:
            like.append(one)
    return [_group(some, anatomy, tokens, device) for some in together]


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    return all(a[name] is b[name] or torch.equal(a[name], b[name]) for name in names)


def _group(rounds: list[SpanRound], anatomy: Anatomy, tokens: int, device: torch.device | str | None) -> Group:
    weights = {name: rounds[0].read.weights[name].to(device) for name in anatomy.tensor_names()}
    D = torch.cat([one.D for one in rounds]) if len(rounds) > 1 else rounds[0].D
    if all({*one.rows} & {"query", "value"} for one in rounds):
        return Group(rounds, equations_of(D, anatomy, weights), tokens)
    # Rows are few, or the keys', in which no token is alone: those of the tokens that are public count.
    known = as_attention_reads(public_tokens(anatomy, weights).to(D), anatomy, weights)
    return Group(rounds, equations_of(torch.cat([D, known]), anatomy, weights), tokens, len(known))


def as_attention_reads(z: Tensor, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Tensor:
    """u of tokens z (k, d): what the norms before the first attention make of them, float64."""

    def normed(z: Tensor, weight: str | None, bias: str | None) -> Tensor:
        if anatomy.first_block != "rmsnorm":
            z = z - z.mean(1, keepdim=True)
        z = z / z.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(z.dtype).tiny)
        z = z if weight is None else z * weights[weight].to(z)
        return z if bias is None else z + weights[bias].to(z)

    if anatomy.first_block in ("april", "postnorm"):
        return z
    if anatomy.first_block == "two norms":
        z = normed(z, anatomy.embedding_norm_weight, anatomy.embedding_norm_bias)
    return normed(z, anatomy.norm_weight, anatomy.norm_bias)


def equations_of(D: Tensor, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> TokenEquations:
    """The token equations of a model: its values of W_e, b_e + E_i, γ and β put in."""
    W_e = weights[anatomy.patch_weight].to(D.device).double().flatten(1)  # (d, p)
    places = places_of(anatomy, weights).to(D.device)  # (n, d)
    if anatomy.first_block in ("april", "postnorm"):
        return token_equations(D, W_e, places)

    def norm(weight: str | None, bias: str | None) -> tuple[Tensor, Tensor | None]:
        gamma = weights[weight].to(W_e) if weight else torch.ones_like(W_e[:, 0])
        return gamma, weights[bias].to(W_e) if bias else None

    gamma, beta = norm(anatomy.norm_weight, anatomy.norm_bias)
    if anatomy.first_block == "two norms":
        before = norm(anatomy.embedding_norm_weight, anatomy.embedding_norm_bias)
        return token_equations(D, W_e, places, gamma, beta, before=before)
    return token_equations(D, W_e, places, gamma, beta, centred=anatomy.first_block != "rmsnorm")


def refuse_one_place(e: Tensor) -> None:
    """A position embedding that is still zero, say, tells no patch from another.

    Raises
    ------
    AttackNotApplicable
    """
    apart = e - e.mean(1, keepdim=True)
    if float(apart.norm()) <= torch.finfo(torch.float64).eps * len(e) * float(e.norm()):
        raise AttackNotApplicable(
            NAME,
            "the position embedding is the same at every patch (zero as initialized?): every patch obeys the same "
            "equations, and nothing tells the patches apart",
        )


def refuse_rows(groups: Sequence[Group], anatomy: Anatomy, words: str = "") -> None:
    """Refuse rows that do not show the span as a whole: fewer than tokens, or those of the keys alone.

    A shift of all keys changes no attention, so Σ_i ∂l/∂k_i = 0: the keys' rows are combinations of the
    tokens' differences.

    Raises
    ------
    AttackNotApplicable
        With the number of rounds that would do.
    """
    parts = {part for group in groups for one in group.rounds for part in one.rows}
    if parts and all(of_the_keys(part, anatomy) for part in parts) and not any(group.public for group in groups):
        raise AttackNotApplicable(
            NAME,
            f"only {', '.join(sorted(parts))} is shared of the first attention: the keys' rows lie in the span "
            "of the tokens' differences (a shift of all keys changes no attention), and no token is public. "
            "The query's or the value's are needed",
        )
    rows, tokens = max((len(group.equations.D), group.tokens) for group in groups)
    if rows >= tokens:
        return
    if len(groups) > 1:
        raise AttackNotApplicable(
            NAME,
            f"at most {rows} rows for {tokens} tokens in one state of the model, and {len(groups)} states: what is "
            "trained below the first attention (the embedding, a norm) changes its inputs from round to round, so "
            "that their rows are of different spans",
            rows=rows,
            tokens=tokens,
        )
    largest = max(groups, key=lambda group: len(group.equations.D))
    each = max(len(one.D) for one in largest.rounds)
    # So many rounds are missing, (10.6).
    more, remark = -(-(tokens - rows) // each), f" ({words})" if words else ""
    known = f", {largest.public} of them public," if largest.public else ""
    raise AttackNotApplicable(
        NAME,
        f"{rows} rows that read the first attention's input{known} for {tokens} tokens: their span is not seen yet. "
        f"A round adds {each}, so {more} more round{'s' if more > 1 else ''} of this picture would do{remark}. "
        "strict=False returns the best picture so far",
        rows=rows,
        tokens=tokens,
        more_rounds=more,
    )


def _rounds(number: int) -> str:
    return "this round" if number == 1 else f"all {number} rounds"


def of_the_keys(part: str, anatomy: Anatomy) -> bool:
    """Whether rows are of the keys' gradient, or of an adapter on the keys alone."""
    if part == "key" or anatomy.key is None:
        return part == "key"
    layer = anatomy.key.name.removesuffix("base_layer.weight")
    return anatomy.key.start is None and layer != anatomy.key.name and part.startswith(layer)


def noise_gain(D: Tensor, tokens: int) -> float:
    """By how much noise, relative to an entry's r.m.s., is larger outside the tokens in rows of length 1."""
    squares = D.norm(dim=1).square()
    squares = squares[squares > 0]
    entry = float(squares.sum()) / D.numel()
    return max(D.shape[1] - tokens, 0) ** 0.5 * (entry * float((1 / squares).mean())) ** 0.5
