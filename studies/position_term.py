"""Does the position term help? `python -m studies.position_term` writes position_term.csv, .md and .png.

APRIL (Lu et al., CVPR 2022) adds α · (1 − cos) of the position embedding's gradients to what gradient matching
minimizes. Here the same search, from the same noise, on the same update, for several α: how many runs end at 30 dB or
more, and after how many evaluations is the picture that good for the first time? The attack never learns its PSNR: it
runs to the end of its budget, and its best picture so far is scored from outside, every ten evaluations.

MNIST-5k test digits, 28×28 pixels in 16 patches of 7×7; pre-norm ViT of width 128 with 4 blocks and 4 heads, random
weights, learned position embedding whose gradient is shared, float64. Rows are written as they come, and `--resume`
skips what is there.

    python -m studies.position_term            # about twenty minutes on one thread
    python -m studies.position_term --quick    # one victim, one seed, two settings, 40 evaluations; prints only
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm.auto import tqdm

import aprillab as al
from aprillab import viz

RESULTS = Path(__file__).parent.parent / "data" / "results"
GOOD = 30.0  # dB: the digit is there, a few grey levels off
EVERY = 10  # evaluations between two scores


# --- What is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Weight of the position term, and whether it is the mean of the tokens' cosines or one cosine of the whole."""

    alpha: float
    term: str = "per_token"

    @property
    def label(self) -> str:
        return f"{self.alpha:g}" + (", whole" if self.term == "whole" else "")


@dataclass(frozen=True)
class Study:
    """How much is measured."""

    settings: tuple[Setting, ...] = (*map(Setting, (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)), Setting(1.0, "whole"))
    digits: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    seeds: tuple[int, ...] = (0,)
    evaluations: int = 400
    width: int = 128
    depth: int = 4


SMALLEST = Study(settings=(Setting(0.0), Setting(1.0)), digits=(3,), seeds=(0,), evaluations=40)


@dataclass(frozen=True)
class Row:
    """One search. The columns are explained in :data:`COLUMNS`."""

    alpha: float
    term: str
    victim: str
    seed: int
    psnr: float
    psnr_rearranged: float
    distance: float
    evaluations_to_30: int | None
    evaluations: int
    seconds: float

    @property
    def key(self) -> tuple[float, str, str, int]:
        return (self.alpha, self.term, self.victim, self.seed)

    @property
    def good(self) -> bool:
        return self.psnr >= GOOD


COLUMNS = """\
- `alpha`, `term`: weight of the position term; "per_token" is the mean of the tokens' 1 − cos, "whole" is 1 − cos of
  the whole embedding's gradient. `seed`: of the model's weights and of the noise the search starts from.
- `psnr`: dB, of the picture of lowest loss, clamped to [0, 1]; `psnr_rearranged`: of its patches, moved to
  where they fit best. `distance`: its gradient distance, without the position term, so that it can be compared
  over α.
- `evaluations_to_30`: the first scored evaluation (every tenth) at which the picture of lowest loss so far has 30 dB;
  empty where there is none. `evaluations`, `seconds`: of the whole run, scoring included."""


def rearranged(picture: Tensor, pixels: Tensor, patch_size: int) -> Tensor:
    """The picture (C, H, W) with its patches moved to where they fit ``pixels`` best, each place used once."""
    patches, truth = (al.patchify(x[None], patch_size)[0] for x in (picture, pixels))  # (n, p)
    moved, places = linear_sum_assignment((patches[:, None] - truth).square().sum(-1).numpy())
    return al.unpatchify(patches[moved[places.argsort()]][None], patch_size, tuple(pixels.shape[1:]))[0]


def attack(
    model: nn.Module, update: al.ClientUpdate, pixels: Tensor, setting: Setting, *, seed: int, evaluations: int
) -> dict[str, Any]:
    """One search and its score against the victim's ``pixels`` (C, H, W): the measured columns of a row."""
    anatomy = al.dissect(model)
    preprocessing, patch_size = anatomy.preprocessing, al.tensors_of(model)[anatomy.patch_weight].shape[-1]
    reached: list[int] = []

    def score(entry: dict[str, Any], images: Tensor) -> None:
        if entry["evaluation"] % EVERY or reached:
            return
        if float(al.psnr(preprocessing.to_pixels(images)[0], pixels)) >= GOOD:
            reached.append(entry["evaluation"])

    term = al.PositionTerm(weight=setting.alpha, per_token=setting.term == "per_token") if setting.alpha else None
    result = al.match_gradients(
        model, update, seed=seed, max_evaluations=evaluations, callback=score, progress=False,
        recipe=replace(al.RECIPES["april"], distance="relative_l2", position_term=term, restarts=1),
    )  # fmt: skip
    return {
        "psnr": float(al.psnr(result.pixels[0], pixels)),
        "psnr_rearranged": float(al.psnr(rearranged(result.pixels[0], pixels, patch_size), pixels)),
        "distance": result.diagnostics["terms"]["distance"],
        "evaluations_to_30": reached[0] if reached else None,
        "evaluations": result.diagnostics["evaluations"],
        "seconds": result.seconds,
    }


def measure(study: Study, rows: list[Row], write: Callable[[], None]) -> None:
    """Append what is missing to ``rows``, all settings of one victim and seed in turn; writes after each."""
    done = {row.key for row in rows}
    cases = [(seed, digit, setting) for seed in study.seeds for digit in study.digits for setting in study.settings]
    pictures, labels = al.mnist5k("test", dtype=torch.float64)
    for seed, digit, setting in tqdm(cases, desc="position term", unit=" search"):
        if (setting.alpha, setting.term, f"digit {digit}", seed) in done:
            continue
        model = al.VisionTransformer(
            image_size=28, patch_size=7, channels=1, width=study.width, depth=study.depth, heads=4, classes=10,
            seed=seed,
        ).double()  # fmt: skip
        pixels = pictures[labels == digit][0]
        update = al.client_update(model, al.HALF.to_input(pixels[None]), torch.tensor([digit]))
        found = attack(model, update, pixels, setting, seed=seed, evaluations=study.evaluations)
        rows.append(Row(**asdict(setting), victim=f"digit {digit}", seed=seed, **found))
        write()


# --- Rows -----------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; an empty list where there is none."""
    if not path.is_file():
        return []
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str, "int": int, "float": float, "int | None": lambda text: int(text) if text else None,
    }  # fmt: skip
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in rows
        )


# --- What is reported -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The runs of one setting. Evaluations are to 30 dB for the first time; infinite where a run never gets there.

    ``earlier`` and ``later`` count the victims and seeds at which it gets there before, or after, α = 0 does (neither
    where both or none do at once); ``p`` is the two-sided sign test of the two, 1 where there is nothing to compare.
    """

    runs: int
    good: int
    interval: tuple[float, float]
    evaluations: float
    evaluations_of_good: float
    psnr: float
    psnr_rearranged: float
    distance: float
    earlier: int
    later: int
    p: float


def reach(row: Row) -> float:
    return math.inf if row.evaluations_to_30 is None else row.evaluations_to_30


def by_setting(rows: list[Row]) -> dict[Setting, list[Row]]:
    """Rows by setting, "per_token" first and by α."""
    settings = sorted({Setting(row.alpha, row.term) for row in rows}, key=lambda s: (s.term, s.alpha))
    return {s: [row for row in rows if (row.alpha, row.term) == (s.alpha, s.term)] for s in settings}


def summarize(runs: list[Row], without: list[Row]) -> Summary:
    """One setting against the runs ``without`` the term, on the same victims and seeds."""
    good = sum(row.good for row in runs)
    interval = binomtest(good, len(runs)).proportion_ci(method="wilson")
    other = {(row.victim, row.seed): reach(row) for row in without}
    pairs = [(reach(row), other[row.victim, row.seed]) for row in runs if (row.victim, row.seed) in other]
    earlier, later = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return Summary(
        runs=len(runs),
        good=good,
        interval=(float(interval.low), float(interval.high)),
        evaluations=statistics.median(map(reach, runs)),
        evaluations_of_good=statistics.median([reach(row) for row in runs if row.good] or [math.inf]),
        psnr=statistics.median(row.psnr for row in runs),
        psnr_rearranged=statistics.median(row.psnr_rearranged for row in runs),
        distance=statistics.median(row.distance for row in runs),
        earlier=earlier,
        later=later,
        p=float(binomtest(earlier, earlier + later).pvalue) if earlier + later else 1.0,
    )


def summaries(rows: list[Row]) -> dict[Setting, Summary]:
    groups = by_setting(rows)
    return {setting: summarize(runs, groups.get(Setting(0.0), [])) for setting, runs in groups.items()}


def number(evaluations: float) -> str:
    return "never" if math.isinf(evaluations) else f"{evaluations:.0f}"


def table_of(rows: list[Row]) -> str:
    lines = [
        "| α | ≥ 30 dB | 95 % interval | evaluations to 30 dB: of those | of all | median dB | rearranged "
        "| median distance | earlier · later than α = 0 | p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, s in summaries(rows).items():
        versus = "–" if setting == Setting(0.0) else f"{s.earlier} · {s.later}"
        p = "–" if setting == Setting(0.0) else f"{s.p:.2g}"
        low, high = (f"{100 * bound:.0f}" for bound in s.interval)
        lines.append(
            f"| {setting.label} | {s.good} of {s.runs} | {low} to {high} % | {number(s.evaluations_of_good)} | "
            f"{number(s.evaluations)} | {s.psnr:.1f} | {s.psnr_rearranged:.1f} | {s.distance:.1g} | {versus} | {p} |"
        )
    return "\n".join(lines)


def chart(rows: list[Row], evaluations: int) -> Figure:
    """Success rate, and evaluations to 30 dB of every run, against α."""
    found = summaries(rows)
    fig, axes = viz.figure(1, 2, size=(9.0, 3.8))
    rate, speed = axes[0]
    alphas = sorted({setting.alpha for setting in found})
    never = 1.12 * evaluations
    for term, colour, marker, shift in (("per_token", "blue", "o", 0.0), ("whole", "red", "s", 0.28)):
        mine = {setting: s for setting, s in found.items() if setting.term == term}
        if not mine:
            continue
        x = [alphas.index(setting.alpha) + shift for setting in mine]
        y = [100 * s.good / s.runs for s in mine.values()]
        bars = [[v - 100 * s.interval[0] for v, s in zip(y, mine.values(), strict=True)],
                [100 * s.interval[1] - v for v, s in zip(y, mine.values(), strict=True)]]  # fmt: skip
        label = "token by token" if term == "per_token" else "whole embedding"
        rate.errorbar(
            x, y, yerr=bars, fmt=marker, color=viz.COLOURS[colour], ecolor="0.6", elinewidth=1, capsize=3,
            label=label,
        )  # fmt: skip
        for place, (setting, s) in zip(x, mine.items(), strict=True):
            runs = [row for row in rows if (row.alpha, row.term) == (setting.alpha, term)]
            spread = [place + 0.16 * (i / max(len(runs) - 1, 1) - 0.5) for i in range(len(runs))]
            ys = [min(reach(row), never) for row in runs]
            speed.scatter(spread, ys, s=20, marker=marker, color=viz.COLOURS[colour], alpha=0.55, linewidths=0)
            median = min(s.evaluations, never)
            speed.plot([place - 0.13, place + 0.13], [median, median], color="black", linewidth=1.6)
    rate.set_ylim(-4, 104)
    rate.set_ylabel("runs that end at 30 dB or more, %")
    rate.legend(loc="upper left", fontsize=10, frameon=False)
    speed.axhline(1.05 * evaluations, color="0.8", linewidth=1)
    speed.set_ylim(0, 1.2 * evaluations)
    speed.set_yticks([*range(0, evaluations + 1, max(evaluations // 4, 1)), never])
    speed.set_yticklabels([*(str(v) for v in range(0, evaluations + 1, max(evaluations // 4, 1))), "never"])
    speed.set_ylabel("evaluations to 30 dB")
    for ax in (rate, speed):
        ax.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas])
        ax.set_xlim(-0.5, len(alphas) - 0.4)
        ax.set_xlabel("weight α of the position term")
    return fig


CAPTION = (
    "Left: share of the searches that end at 30 dB or more, with Wilson's 95 % interval. Right: evaluations until "
    "the best picture so far has 30 dB, each point one victim and seed, the bar their median; “never” within the "
    "budget. Blue: the term token by token; red: one cosine of the whole embedding's gradient, at α = 1."
)


def reading(rows: list[Row], study: Study) -> str:
    """What the table shows and what not, with its own numbers."""
    found = summaries(rows)
    tokens = {setting: s for setting, s in found.items() if setting.term == "per_token"}
    without, whole = found.get(Setting(0.0)), found.get(Setting(1.0, "whole"))
    if not tokens or without is None or whole is None or len(tokens) < 3:
        return "Interrupted: the study is not complete."
    best, b = min(tokens.items(), key=lambda item: (-item[1].good, item[1].evaluations))
    most, m = max(tokens.items(), key=lambda item: item[0].alpha)
    missed = [row for row in rows if row.alpha == 0 and not row.good]
    stuck = (
        f"In the {len(missed)} that miss, the gradient distance has fallen to a median of "
        f"{statistics.median(row.distance for row in missed):.0e}, with a picture of "
        f"{statistics.median(row.psnr for row in missed):.0f} dB: a low loss and another picture. Move "
        "each of its patches to where it fits best, and it has "
        f"{statistics.median(row.psnr_rearranged for row in missed):.0f}: the patches are nearly right, their places "
        "wrong. (Rearranging lifts any picture a little: see the table.)"
        if missed else "None of them ends in a bad minimum."
    )  # fmt: skip
    listed = "; ".join(f"α = {s.label}: {v.good} of {v.runs}" for s, v in tokens.items())
    return (
        f"Searches that end at {GOOD:.0f} dB or more within {study.evaluations} evaluations, the term taken token by "
        f"token: {listed}.\n\n"
        "Does the term converge faster and avoid bad minima? "
        f"Best is α = {best.label}, with {b.good} of {b.runs} and {number(b.evaluations)} evaluations to 30 dB "
        f"(median of all runs); it gets there before α = 0 in {b.earlier} of the {b.runs} pairs of the same victim, "
        f"weights and first guess, and after it in {b.later} (sign test p = {b.p:.2g}). Without the term "
        f"{without.good} of "
        f"{without.runs} succeed. {stuck}\n\n"
        f"Too much hurts: at α = {most.label} {m.good} of {m.runs} succeed, and the median distance is "
        f"{m.distance:.1g} (at α = {best.label}: {b.distance:.0e}). The term is then nearly the whole loss, and the "
        "other gradients wait.\n\n"
        "How the cosine is taken decides as much as its weight. One cosine of the whole embedding's gradient, as the "
        f"paper writes it, has {whole.good} of {whole.runs} at α = 1, where token by token it has "
        f"{found[Setting(1.0)].good}: this head reads the class token, whose row outweighs those of the patches.\n\n"
        f"Caution. {b.runs} searches a setting are few: two settings whose intervals overlap are not told apart. The "
        "pairs share victims and weights, so they are not independent, as the sign test takes them to be. α = 0 does "
        "not hide the position embedding's gradient: it is then one tensor among many in the distance. One start "
        "each: with restarts or a longer budget α = 0 may succeed too. Random weights, digits, one model size."
    )


def report(rows: list[Row], study: Study) -> str:
    alt = "Two panels over α from 0 to 100. " + " ".join(
        f"α = {setting.label}: {s.good} of {s.runs} succeed, median {number(s.evaluations)} evaluations."
        for setting, s in summaries(rows).items()
    )
    return (
        f"# Does the position term help?\n\n{reading(rows, study)}\n\n![{alt}](position_term.png)\n\n{CAPTION}\n\n"
        f"## By weight\n\n{table_of(rows)}\n\nMedians over victims and seeds; “never” within the budget. “whole”: "
        "one cosine of the whole embedding's gradient. “rearranged”: median dB after moving every patch to where it "
        "fits best. p: sign test of earlier against later, two-sided.\n\n"
        f"## Columns of position_term.csv\n\n{COLUMNS}\n\n## How it was measured\n\n{provenance(rows, study)}\n"
    )


def provenance(rows: list[Row], study: Study) -> str:
    return (
        f'{len(rows)} searches: `match_gradients` with preset "april" (relative L2 distance, patches in the row '
        f"space of ∂l/∂W_e, L-BFGS), one start, {study.evaluations} evaluations, label read off the head's gradient. "
        f"Victims: {', '.join(sorted({row.victim for row in rows}))} of MNIST-5k's test part (the first of each "
        f"class); seeds {', '.join(str(seed) for seed in sorted({row.seed for row in rows}))} for weights and first "
        f"guess. Pre-norm ViT of patch 7, width {study.width}, {study.depth} blocks, 4 heads, learned position "
        f"embedding, random weights, float64. Seconds were measured on a machine with other work and say little. "
        f"aprillab {al.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s). Made by `python -m studies.position_term`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one victim, one seed, two settings")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in the table")
    parser.add_argument("--output", type=Path, help="folder for the results; --quick without it writes nowhere")
    arguments = parser.parse_args()
    folder = arguments.output or (None if arguments.quick else RESULTS)
    table = folder / "position_term.csv" if folder else None
    rows = read_rows(table) if table and arguments.resume else []

    def write() -> None:
        if table:
            table.parent.mkdir(parents=True, exist_ok=True)
            write_rows(table, rows)

    study = SMALLEST if arguments.quick else Study()
    try:
        measure(study, rows, write)
    except KeyboardInterrupt:
        print("interrupted: what is done is in the table; --resume goes on")
    if table and rows:
        rows = read_rows(table)  # the report says what the table says, rounded
        table.with_suffix(".md").write_text(report(rows, study), encoding="utf-8")
        table.with_suffix(".png").write_bytes(viz.to_png(chart(rows, study.evaluations), dpi=150))
    print(table_of(rows))


if __name__ == "__main__":
    main()
