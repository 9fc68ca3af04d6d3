"""Silenced clients and class fishing through Flower's own SecAgg+: `python -m
studies.cheating.secure`.

Three clients, one round, played three ways: by an honest server, by one that silences all but the
first client, and by one that fishes for a class. Prints what each client saw and what the server
got, and writes silenced.png. The protocol is Flower's (pip install "aprillab[federation]"), the
photographs the project's, server and clients functions of this process: nothing is sent anywhere.
It takes less than a minute.

    python -m studies.cheating.secure --out runs/silenced
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.commands.files import writable_folder
from aprillab.commands.messages import RESPONSIBLE_USE, CommandError
from aprillab.dishonest.sent import head_of
from aprillab.federation import FlowerMissing, LocalTraining
from aprillab.federation.flower import need_flower

from .._rows import StudyError, fill, made
from .._rows import read as rows_of
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .clients import batch_of, best_psnr, loaded, model_of, read

if TYPE_CHECKING:
    from .secure_sum import Owner, Round

FILE = "cheating_secure.csv"
HONEST, SILENCED, FOR_GOOD, FISHED = "honest", "silenced", "silenced for good", "fished"
DEFAULT, FINE = 8.0, 1.0  # clipping ranges: Flower's, and one that the embeddings are well within


class Case(NamedTuple):
    """``others`` is how many pictures each other client has, and of fishing the first, too."""

    way: str
    model: str
    clipping: float
    max_weight: float
    rate: float
    steps: int
    others: int
    victim: int
    seed: int


@dataclass(frozen=True)
class Row:
    """``psnr`` of the first client's first picture, of an honest round the best of all pictures.

    ``unrounded`` is the same from the plain average of the replies; ``floor`` the r.m.s. error of
    the average's weights below the head, ``foretold`` what follows from the quantization;
    ``others`` how much the other two moved below the head, relative to the first.
    """

    way: str
    model: str
    clipping: float
    max_weight: float
    rate: float
    steps: int
    others: int
    victim: int
    seed: int
    psnr: float | None = None
    predicted: float | None = None
    unrounded: float | None = None
    floor: float | None = None
    foretold: float | None = None
    moved: float | None = None
    one_image: str = ""


def cases(quick: bool) -> Iterator[Case]:
    seeds = [(victim, seed) for victim in range(1 if quick else 4) for seed in range(1 if quick else 2)]
    settings = [(weight, rate) for weight in (1000.0, 10.0, 1.0) for rate in (0.1, 1.0)]
    for model in ("random", "digits"):
        for way, others in {HONEST: 1, SILENCED: 1, FISHED: 4}.items():
            few = settings[4:5] if quick else settings[:1] + settings[4:5] if way == HONEST else settings
            yield from (Case(way, model, DEFAULT, w, r, 1, others, *seed) for w, r in few for seed in seeds)
        yield from () if quick else (
            Case(way, model, FINE, float(others), 0.1, 1, others, *seed)
            for way, others in {SILENCED: 1, FISHED: 4}.items() for seed in seeds
        )  # fmt: skip
    for way in (SILENCED, FOR_GOOD, FISHED):
        yield from (Case(way, "random", DEFAULT, 1.0, 0.1, 5, 4, *seed) for seed in seeds)


# --- Measuring ----------------------------------------------------------------------------------------------------


def owners(case: Case) -> tuple[list[Owner], int]:
    """The clients, of whom the first has the wanted picture, and its class, which no
    other picture has.
    """
    from .secure_sum import CLIENTS, Owner

    images, labels, wanted = batch_of(case.model, 8, case.victim, "repeated", case.victim)
    own = images[case.victim : case.victim + 1], labels[case.victim : case.victim + 1]
    images, labels, _ = batch_of(case.model, CLIENTS * case.others, case.victim, "repeated", 0, client=1 + case.seed)
    first = case.others if case.way == FISHED else 1
    everyone = [Owner(*(torch.cat([o, x[1:first]]) for o, x in zip(own, (images, labels), strict=True)))]
    rest = zip(images[case.others :].split(case.others), labels[case.others :].split(case.others), strict=True)
    return [*everyone, *(Owner(x, y) for x, y in rest)], wanted


def sent_to(model: nn.Module, way: str, wanted: int, count: int) -> list[dict[str, Tensor]]:
    """What each client is sent."""
    if way == FISHED:
        return [al.dishonest.class_fishing(model, wanted)] * count
    honest = model.state_dict()
    quiet = honest if way == HONEST else al.dishonest.silenced(model, for_good=way == FOR_GOOD)
    return [honest, *[quiet] * (count - 1)]


def measured(case: Case) -> Iterator[Row]:
    from .secure_sum import Precision, foretold, picture_of, play

    model, (everyone, wanted) = model_of(case.model), owners(case)
    how, told = LocalTraining(learning_rate=case.rate, steps=case.steps), Precision(case.max_weight, case.clipping)
    sent = sent_to(model, case.way, wanted, len(everyone))
    played = play(model, sent, everyone, how, precision=told, seed=case.seed)
    result = picture_of(model, played)
    own = everyone if case.way == HONEST else everyone[:1]
    truth = al.HALF.to_pixels(torch.cat([owner.images[:1] for owner in own])).to(result.pixels)
    one = next(condition for condition in result.conditions if condition.name == "one image")
    yield Row(
        *case, psnr=float(best_psnr([result.pixels[0]], truth).max()), predicted=result.predicted_psnr,
        foretold=foretold(played), one_image=one.state, **of_replies(model, played, everyone, truth),
    )  # fmt: skip


def of_replies(model: nn.Module, played: Round, everyone: Sequence[Owner], truth: Tensor) -> dict[str, Any]:
    """What only who has the replies can tell."""
    from .secure_sum import update_of

    replies = [owner.trained(model, s, played.how) for owner, s in zip(everyone, played.sent, strict=True)]
    weights = list(played.weights().values())
    average = {
        name: sum(w * r[name].double() for w, r in zip(weights, replies, strict=True)) / sum(weights)
        for name in played.average
    }
    body = [name for name in average if name not in head_of(model).names]
    moves = [_rms({n: r[n].double() - s[n] for n in body}) for r, s in zip(replies, played.sent, strict=True)]
    sent = loaded(model, dict(played.sent[0]))
    whole = read(sent, update_of(model, replace(played, average=average)), preprocessing=al.HALF, strict=False)
    return {
        "unrounded": float(best_psnr([whole.pixels[0]], truth).max()), "moved": max(moves[1:]) / moves[0],
        "floor": _rms({n: played.average[n] - average[n] for n in body}),
    }  # fmt: skip


def _rms(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).square().mean().sqrt())


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Where Flower is missing, what was measured before is described."""
    try:
        need_flower()
    except FlowerMissing as error:
        if not (folder / FILE).is_file():
            raise StudyError(str(error)) from error
        return
    settings, found = {"flwr": version("flwr")}, cases(options.quick)
    fill(folder / FILE, Row, found, measured, key=Case._fields, settings=settings, workers=options.workers)


# --- Its share of the page ----------------------------------------------------------------------------------------

SETTING = ("way", "model", "max_weight", "rate")


def _of_rounds(group: pd.DataFrame) -> dict[str, str]:
    told = group.moved.max() < 1e-6  # what is foretold is of one picture
    return {
        "rounds": str(len(group)), "median dB": f"{group.psnr.median():.1f}", "least": f"{group.psnr.min():.1f}",
        "most": f"{group.psnr.max():.1f}", "predicted": f"{group.predicted.median():.1f}" if told else "–",
        "unrounded": f"{group.unrounded.median():.1f}", "off": f"{group.floor.median():.2g}",
        "foretold": f"{group.foretold.median():.2g}",
        "one image by the system": f"{group.one_image.eq('shown').sum()} of {len(group)}",
    }  # fmt: skip


def _table(rows: pd.DataFrame, names: Sequence[str] = SETTING) -> str:
    texts = rows.assign(**{name: rows[name].map("{:g}".format) for name in ("max_weight", "rate", "clipping")})
    return markdown(grouped(texts, names, _of_rounds)) if len(rows) else "–"


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = rows_of(folder / FILE, Row)
    once, coarse, five = rows.steps == 1, rows.clipping == DEFAULT, rows[rows.steps > 1]
    plain, fine = rows[once & coarse], rows[once & ~coarse]
    read_ones = plain[plain.way != HONEST]
    random, digits = (read_ones[read_ones.model == name] for name in ("random", "digits"))
    honest = plain[(plain.way == HONEST) & (plain.model == "random")]
    sharp = random[random.max_weight == 1]
    settings = random.groupby(list(SETTING))
    medians, rough = settings.psnr.median(), random[random.max_weight == 1000].groupby(list(SETTING)).psnr.median()
    apart = (medians - settings.predicted.median()).abs().max()
    off = (100 * (plain.floor / plain.foretold - 1).abs()).groupby([plain[name] for name in SETTING]).median().max()

    def middle(frame: pd.DataFrame, way: str, rate: float = 0.1, weight: float = 1.0) -> float:
        chosen = (frame.way == way) & (frame.rate == rate) & (frame.max_weight == weight)
        return float(frame[chosen].psnr.median())

    both = [(way, rate) for way in (SILENCED, FISHED) for rate in (0.1, 1.0)]
    ten = [middle(random, *one) - middle(random, *one, 10.0) for one in both]
    gain = middle(fine[fine.model == "random"], SILENCED) - middle(random, SILENCED)
    quiet = rows[once & (rows.way == SILENCED)].moved
    for_good, for_once = middle(five, FOR_GOOD), middle(five, SILENCED)
    fields = {
        "secure_made": made(folder / FILE), "secure": _table(plain), "secure_fine": _table(fine),
        "secure_steps": _table(five, ("way", "model", "steps", "rate")),
        "secure_honest": honest.psnr.max(), "secure_least": sharp.psnr.min(), "secure_default_least": rough.min(),
        "secure_default_most": rough.max(), "secure_off": off, "secure_apart": apart,
        "secure_unrounded": random.unrounded.median(), "secure_gain": gain,
        "secure_digits_unrounded": digits[(digits.way == SILENCED) & (digits.rate == 0.1)].unrounded.median(),
        "secure_digits": middle(digits, SILENCED), "secure_digits_fished": middle(digits, FISHED),
        "secure_digits_faster": middle(digits, FISHED, 1.0),
    }  # fmt: skip
    return fields, [
        between("the honest sum gives at most {secure_honest:.0f} dB", honest.psnr.max(), most=15),
        between("came back with at least {secure_least:.0f} dB", sharp.psnr.min(), 60),
        between("at Flower's default of 1000", rough.max(), most=45),
        Claim("a silenced client's u_k is zero below the head", quiet.max(), bool(quiet.eq(0).all())),
        between("to {secure_off:.1f} % in the median of each setting", off, most=3),
        between("within {secure_apart:.0f} dB in the median of each setting with random weights", apart, most=3.5),
        between("is 20 dB", max(abs(gained - 20) for gained in ten), most=3),
        between("with random weights it gains {secure_gain:.0f} dB", gain, 10),
        between("Fishing makes the class improbable", middle(digits, FISHED) - middle(digits, SILENCED), 5),
        between("Silence lasts one step", for_once, most=40),
        between("a head of zeros stays one", for_good, 60),
        between("A fished head moves as well", middle(five, FISHED), most=40),
    ]


# --- By one command -----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Play the three rounds, print what was seen, write the picture."""
    parser = parser_of()
    options = parser.parse_args(argv)
    if len(set(options.clients)) != 3 or not set(options.clients) <= set(al.victims()):
        parser.error(f"--clients takes three different photographs of {', '.join(al.victims())}")
    if options.max_weight is not None and not 1 <= options.max_weight <= 1e4:
        parser.error(f"--max-weight {options.max_weight:g} is not between 1 and 10000")
    try:
        need_flower()
        folder = writable_folder(options.out)
        LocalTraining(learning_rate=options.learning_rate)
    except (FlowerMissing, CommandError, al.UpdateError) as error:
        raise SystemExit(f"secure: {error}") from None
    show(options, folder)


def parser_of() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m studies.cheating.secure", description=__doc__, formatter_class=raw, epilog=RESPONSIBLE_USE
    )
    three = ["astronaut", "coffee", "chelsea"]
    parser.add_argument("--out", type=Path, default=Path("runs/silenced"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument(
        "--clients", nargs=3, default=three, metavar="PHOTOGRAPH", help=f"one of each ({' '.join(three)})"
    )
    parser.add_argument("--learning-rate", type=float, default=0.1, metavar="RATE", help="asked for (%(default)s)")
    help = "of the protocol: Flower's default is 1000; here it is, if not given, how many pictures a client has"
    parser.add_argument("--max-weight", type=float, metavar="WEIGHT", help=help)
    return parser


def show(options: argparse.Namespace, folder: Path) -> None:
    from aprillab import viz

    from . import secure_shown

    print(f"Flower {version('flwr')}'s SecAgg+, three clients of a ViT of 32×32: one round, three ways.")
    print("Server, clients and protocol run in this process: nothing is sent anywhere.\n")
    print(secure_shown.heading())
    shown = []
    for one in secure_shown.rounds(options.clients, options.learning_rate, options.max_weight):
        print(*one.clients, sep="\n", flush=True)
        shown.append(one)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "silenced.png"
    picture.write_bytes(viz.to_png(secure_shown.figure(shown, options.clients), dpi=110))
    print("\nfingerprint: of the model that this client was sent, and whether most clients have the same")
    print("dB: PSNR of the one picture that the server makes of the sum, and this client's photograph")
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
