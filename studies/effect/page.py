"""The page of the study: its tables, its fields, its claims."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from aprillab import EXACT_TO_8_BITS_DB
from aprillab.attacks import CLOSED_FORMS
from aprillab.comparison.records import read_curves

from .._rows import read
from .._runner import Claim, Description, between
from .._tables import comparison_frame, comparison_made, formatted, markdown
from .measure import (
    DTYPES,
    FACTORS,
    MODELS,
    OTHERS,
    POSITIONS,
    TWINS,
    Head,
    Reordered,
    Study,
    Weights,
    plan,
    study_of,
)

COMPARED = (*CLOSED_FORMS, "span_then_round", "span_then_match", "match:april")
NAMES = {"none": "no embedding", "sinusoidal": "sinusoidal 1-D", "sinusoidal-2d": "sinusoidal 2-D"}


# --- Rows ---------------------------------------------------------------------------------------------------------


def rows_of(path: Path, study: Study) -> pd.DataFrame:
    """The rows of the plan, the moment of their weights, and whether the attack was refused."""
    rows = comparison_frame(path, {part.name: part.cases for part in plan(study)})
    moments = {study.weights(when): when for when in study.moments}
    return rows.assign(when=rows.weights.map(moments), refused=rows.exact.isna())


def chosen(rows: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Rows that have these values, or one of these."""
    for name, value in wanted.items():
        rows = rows[rows[name].isin(value if isinstance(value, tuple) else (value,))]
    return rows


def scores(rows: pd.DataFrame) -> pd.Series:
    """PSNR in dB of the attacks not refused, ascending; NaN, a picture that is none, is −∞."""
    return rows.psnr[~rows.refused].astype(float).fillna(-math.inf).sort_values()


def twins(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The searches of the twin study with the loss and PSNR of their first guess."""
    points = read_curves(path)
    runs = rows[(rows.part == "twins") & ~rows.refused]
    first = [points[row.update, row.attack, row.labels][0] for row in runs.itertuples()]
    return runs.assign(first_loss=[point.loss for point in first], first_psnr=[point.psnr for point in first])


# --- Tables -------------------------------------------------------------------------------------------------------


def cell(rows: pd.DataFrame) -> str:
    """Median and least PSNR in dB, number of runs; or that the attack was refused, or not run."""
    found = scores(rows)
    if rows.empty:
        return "not run"
    if found.empty:
        return f"refused ×{len(rows)}"
    refused = f", {len(rows) - len(found)} refused" if len(found) < len(rows) else ""
    return f"{found.median():.0f} ({found.min():.0f}) ×{len(found)}{refused}"


Heads = dict[str, dict[str, str]]


def grid(rows: pd.DataFrame, heads: Heads, places: Sequence[tuple[str, str]]) -> str:
    """Embedding and weights down; across, by their heads, the columns' values that choose rows."""
    lines = []
    for position, when in places:
        here = chosen(rows, position=position, when=when)
        cells = {head: cell(chosen(here, **wanted)) for head, wanted in heads.items()}
        lines.append({"embedding": NAMES.get(position, position), "weights": when} | cells)
    return markdown(pd.DataFrame(lines))


def architecture(rows: pd.DataFrame, study: Study, model: str) -> str:
    """The Markdown table of an architecture: attacks and precisions across."""
    heads: Heads = {
        f"{attack} {dtype}": {"attack": attack, "dtype": dtype} for attack in COMPARED for dtype in DTYPES
    }
    return grid(chosen(rows, model=model), heads, [(p, when) for p in POSITIONS for when in study.moments])


def presets(rows: pd.DataFrame, study: Study) -> str:
    """The Markdown table of the other presets, where the plan has them."""
    asked = {(c.position, c.weights) for part in plan(study) for c in part.cases if c.attack == OTHERS[0]}
    places = [(p, when) for p in POSITIONS for when in study.moments if (p, study.weights(when)) in asked]
    return grid(rows, {attack: {"attack": attack} for attack in OTHERS}, places)


def twin_table(found: pd.DataFrame, reordered: pd.Series) -> str:
    lines = []
    for position in TWINS:
        runs, name = chosen(found, position=position), NAMES.get(position, position)
        line: dict[str, Any] = {"embedding": name, "runs": len(runs)}
        if runs.empty:
            lines.append(line)
            continue
        psnr, pieces = scores(runs), reordered.get(position, math.nan)
        lines.append(line | {
            "first loss": f"{runs.first_loss.median():.2g}", "last loss": f"{runs.loss.median():.2g}",
            "fell by a factor of": f"{(runs.first_loss / runs.loss).median():.2g}",
            "relative residual": f"{runs.residual.median():.2g}",
            "PSNR dB (least to greatest)": f"{psnr.median():.1f} ({psnr.min():.1f} to {psnr.max():.1f})",
            "30 dB or more": str((psnr >= 30).sum()),
            "patches reordered, dB": "equal to 8 bits" if math.isinf(pieces) else f"{pieces:.1f}",
        })  # fmt: skip
    return markdown(pd.DataFrame(lines))


def weights_table(kinds: pd.DataFrame) -> str:
    """Test accuracy of the weights, and how far from zero the victims' ‖p − y‖ is."""
    whole = dict.fromkeys(("accuracy", "accuracy_least", "accuracy_most"), ".0f")
    shown = formatted(kinds, **whole, loss=".2g", miss=".1g", miss_least=".1g")
    return markdown(pd.DataFrame({
        "architecture": kinds.model.map(MODELS), "embedding": kinds.position.map(lambda name: NAMES.get(name, name)),
        "weights": kinds.weights,
        "test accuracy % (least to greatest)":
            shown.accuracy + " (" + shown.accuracy_least + " to " + shown.accuracy_most + ")",
        "training loss": shown.loss,
        "‖p − y‖ of the victims, median (least)": shown.miss + " (" + shown.miss_least + ")",
    }))  # fmt: skip


def heads_table(heads: pd.DataFrame) -> str:
    """Median PSNR by the size of p − y."""
    shown = formatted(heads, psnr=".0f", psnr_least=".0f", updates="d")
    cells = (shown.psnr + " (" + shown.psnr_least + ") ×" + shown.updates).where(heads.updates > 0)
    wide = heads.assign(cell=cells).pivot(index="band", columns="attack", values="cell")
    wide = wide.loc[list(dict.fromkeys(heads.band)), ["embedding", "span"]].reset_index()
    return markdown(wide, ["‖p − y‖", "embedding on learned, dB", "span on frozen, dB"])


def done_table(rows: pd.DataFrame, study: Study) -> str:
    """How much of each part of the plan is done."""
    heads, lines = ["part", "attacks planned", "run", "evaluations a search"], []
    for part in plan(study):
        search = any(case.attack not in CLOSED_FORMS for case in part.cases)
        lines.append((part.name, len(part.cases), (rows.part == part.name).sum(), part.budget if search else None))
    return markdown(pd.DataFrame(lines, columns=heads, dtype=object))


# --- The page -----------------------------------------------------------------------------------------------------


def spread(values: pd.Series) -> str:
    return f"{values.median():.0f} dB (median of {len(values)}; {values.min():.0f} to {values.max():.0f})"


def shares(values: pd.Series) -> str:
    sharp, exact = (f"{(values >= bound).sum()}" for bound in (30, EXACT_TO_8_BITS_DB))
    middle = f"{values.median():.0f} dB in the median"
    return f"{middle}, {sharp} of {len(values)} at 30 dB or more, {exact} exact to 8 bits"


def search_end(runs: pd.DataFrame) -> str:
    """Median PSNR and relative residual."""
    return f"{scores(runs).median():.0f} dB ({runs.residual.median():.0e})"


def of_the_span(rows: pd.DataFrame) -> dict[str, Any]:
    """What the closed forms and the attacks that go on from the span make of each embedding."""
    single = chosen(rows, dtype="float32")
    closed = chosen(rows, attack=("embedding", "april"))
    shared, withheld = closed[closed.position == "learned"], closed[closed.position != "learned"]
    fields = {
        "frozen": spread(scores(chosen(single, attack="span", position="frozen"))),
        "restored": (scores(shared) >= 60).sum(), "shared": len(scores(shared)),
        "refused": withheld.refused.sum(), "withheld": len(withheld),
        "flat": spread(scores(chosen(rows, attack="span", position="sinusoidal-2d"))),
    }  # fmt: skip
    for dtype in DTYPES:
        fields[f"wave_{dtype}"] = spread(scores(chosen(rows, attack="span", position="sinusoidal", dtype=dtype)))
    for name, position in (("wave", "sinusoidal"), ("flat", "sinusoidal-2d")):
        here = chosen(single, position=position)
        fields[f"{name}_matched"] = shares(scores(chosen(here, attack="span_then_match")))
        for when in ("init", "late"):
            rounded = chosen(here, attack="span_then_round", when=when)
            fields[f"{name}_rounded_{when}"] = f"{rounded.exact.eq(True).sum()} of {len(rounded)}"
            for model in MODELS:
                runs = chosen(here, attack="span_then_match", when=when, model=model)
                fields[f"{name}_{model}_{when}"] = search_end(runs)
    return fields


def closed_medians(rows: pd.DataFrame) -> dict[str, float]:
    """Median PSNR in float32 of two closed forms on both architectures, first and late."""
    pairs = (("embedding", "learned"), ("span", "frozen"))
    return {
        f"{attack}_{model}_{when}": scores(
            chosen(rows, attack=attack, position=position, model=model, dtype="float32", when=when)
        ).median()
        for attack, position in pairs for model in MODELS for when in ("init", "late")
    }  # fmt: skip


def of_the_twins(found: pd.DataFrame, pieces: pd.Series) -> dict[str, Any]:
    fields: dict[str, Any] = {f"{position}_pieces": pieces.get(position, math.nan) for position in TWINS}
    for position in TWINS:
        runs = chosen(found, position=position)
        fields |= {f"{position}_fell": (runs.first_loss / runs.loss).median(), f"{position}_runs": len(runs)}
        fields |= {f"{position}_middle": scores(runs).median(), f"{position}_home": (scores(runs) >= 30).sum()}
    return fields


def describe(folder: Path, options: argparse.Namespace) -> Description:
    study, path = study_of(folder, options), folder / "effect.csv"
    rows = rows_of(path, study)
    found, pieces = twins(rows, path), read(folder / "effect_twins.csv", Reordered).set_index("position").psnr
    kinds, heads = read(folder / "effect_weights.csv", Weights), read(folder / "effect_heads.csv", Head)
    medians, of_twins = closed_medians(rows), of_the_twins(found, pieces)
    names = ("images", "epochs", "few")
    fields = of_the_span(rows) | medians | of_twins | study.shape | {name: getattr(study, name) for name in names} | {
        "table_a": architecture(rows, study, "april"), "table_b": architecture(rows, study, "prenorm"),
        "presets": presets(rows, study), "twins": twin_table(found, pieces), "weights": weights_table(kinds),
        "heads": heads_table(heads),
        "heads_of_attention": study.shape["heads"], "factors": ", ".join(map(str, FACTORS)),
        "done": done_table(rows, study),
        "attacks": len(rows), "victims": ", ".join(study.victims), "seeds": ", ".join(map(str, study.seeds)),
        "made": comparison_made(rows),
    }  # fmt: skip
    claims = [*claims_of_the_span(rows), *claims_of_training(rows, medians, kinds, heads), *claims_of_twins(of_twins)]
    return fields, claims


def claims_of_the_span(rows: pd.DataFrame) -> list[Claim]:
    closed, span = chosen(rows, attack=("embedding", "april")), chosen(rows, attack="span")

    def db(position: str, dtype: str) -> pd.Series:
        return scores(chosen(span, position=position, dtype=dtype))

    learned, withheld = scores(closed[closed.position == "learned"]), closed[closed.position != "learned"]
    none = chosen(rows, position="none", attack=tuple(CLOSED_FORMS))
    both = scores(chosen(span, position="sinusoidal-2d"))
    medians = chosen(rows, position="learned", attack=tuple(CLOSED_FORMS)).groupby("dtype").psnr.median()
    return [
        between("it does not stop the span attack", db("frozen", "float32").min(), least=60),
        between("updates to 60 dB or more", (learned >= 60).mean(), least=0.95),
        between("the closed forms lose their input, as the defence intends", withheld.refused.mean(), least=0.99),
        between("The 1-D table holds the span attack", db("sinusoidal", "float32").max(), most=30),
        between("and gives {wave_float64} in float64", db("sinusoidal", "float64").min(), least=100),
        between("The 2-D table holds it", both.max(), most=30),
        between("Without an embedding no closed form applies", none.refused.mean(), least=0.99),
        between("the span attack has every picture", db("frozen", "float64").min(), least=60),
        between("Learned: closed forms near 270 dB in float64", medians.get("float64", math.nan), 255, 285),
        between("and 110 in float32", medians.get("float32", math.nan), 95, 125),
        between("the span attack at 160 dB in float64", db("sinusoidal", "float64").median(), 150, 170),
        between("and 15 in float32", db("sinusoidal", "float32").median(), 12, 18),
        between("Sinusoidal 2-D: near 12", both.median(), 10.5, 13.5),
    ]


def claims_of_training(
    rows: pd.DataFrame, medians: dict[str, float], kinds: pd.DataFrame, heads: pd.DataFrame
) -> list[Claim]:
    late = min(value for name, value in medians.items() if name.endswith("late"))
    searched = chosen(rows, attack="span_then_match", dtype="float32", position=("sinusoidal", "sinusoidal-2d"))
    ends = searched.groupby(["position", "model", "when"])[["psnr", "residual"]].median().unstack()
    by_band = heads.set_index(["attack", "band"]).psnr.unstack("attack")
    lost = (by_band.loc["above 1e-01"] - by_band.loc["below 1e-09"]).max()
    return [
        between("Training does not help the client against closed forms", late, least=60),
        between("to 1e-9 and below, they lose nothing", lost, most=1),
        between("leave it above 0.001", kinds.miss_least.min(), least=0.00095),
        between("Searches do feel it", (ends.psnr.init - ends.psnr.late).min(), least=0),
        between("The late ones end at larger residuals", (ends.residual.late / ends.residual.init).min(), least=1),
    ]


def claims_of_twins(twins: dict[str, Any]) -> list[Claim]:
    others = twins["frozen_middle"], twins["sinusoidal_middle"]
    fell = min(twins["frozen_fell"], twins["sinusoidal_fell"])
    return [
        between("With a learned embedding most runs end", twins["learned_home"] / max(twins["learned_runs"], 1), 0.5),
        between("where this one finds twins", twins["frozen_home"], most=1),
        between("the loss falls by orders of magnitude all the same", fell, least=30),
        between("the private patches in other places", twins["frozen_pieces"] - twins["frozen_middle"], least=10),
        Claim("with other pictures near 6 dB", others, all(4 < value < 10 for value in others)),
    ]
