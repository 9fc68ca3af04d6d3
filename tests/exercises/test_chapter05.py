"""Chapter 05's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import csv

import notebook_tools as tools
import torch
from exercise_tests import exercise_tests
from matplotlib.figure import Figure
from PIL import Image

import aprillab as al
from aprillab import viz
from aprillab.exercises import chapter05

NOTEBOOK = tools.read("05")
RESULTS = tools.ROOT / "data" / "results"

COS = "1 - a @ b / (a.norm() * b.norm())"
TERM = "(1 - cosines).mean()"
SUM = "(rows @ shared.T).numpy(), maximize=True"
MUTANTS = [
    ("check_cosine_distance", COS, "a @ b / (a.norm() * b.norm())", "1 minus"),
    ("check_cosine_distance", COS, "-a @ b / (a.norm() * b.norm())", "add 1"),
    ("check_cosine_distance", COS, "1 - a @ b", "both lengths"),
    ("check_cosine_distance", COS, "1 - (a @ b / (a.norm() * b.norm())).abs()", "has a sign"),
    ("check_cosine_distance", COS, "1 - a.detach() @ b / (a.detach().norm() * b.norm())", "graph"),
    ("check_cosine_distance", f"return {COS}",
     "return sum(1 - (g * t).sum() / (g.norm() * t.norm()) for g, t in zip(gradients, targets)) / len(targets)",
     "one long vector"),
    ("check_cosine_distance", f"return {COS}",
     "return 1 - sum((g * t).sum() / (g.norm() * t.norm()) for g, t in zip(gradients, targets))", "was summed"),
    ("check_cosine_distance", "for t in targets", "for t in gradients", "opposite"),
    ("check_cosine_distance", f"return {COS}",
     "return (a @ b / (a.norm() * b.norm())).clamp(-1, 1).arccos() * 2 / torch.pi", "angle"),
    ("check_position_term", "(1 - dot / lengths).mean()", "(dot / lengths).mean()", "1 minus"),
    ("check_position_term", "(1 - dot / lengths).mean()", "-(dot / lengths).mean()", "add 1"),
    ("check_position_term", "(1 - dot / lengths).mean()", "(1 - dot / lengths).sum()", "summed"),
    ("check_position_term", "(1 - dot / lengths).mean()", "(1 - dot / lengths)[:, 1:].mean()", "class token"),
    ("check_position_term", "(1 - dot / lengths).mean()", "(1 - dot / lengths)[:, :-1].mean()", "last token"),
    ("check_position_term", "(1 - dot / lengths).mean()", "1 - dot.sum() / (gradient.norm() * target.norm())",
     "each token"),
    ("check_position_term", "gradient.norm(dim=-1) * target.norm(dim=-1)",
     "gradient.square().sum(-1) * target.square().sum(-1)", "squared norms"),
    ("check_position_term", "gradient.norm(dim=-1) * target.norm(dim=-1)",
     "(gradient.norm(dim=-1) * target.norm(dim=-1)).sqrt()", "roots of the norms"),
    ("check_position_term", " * target.norm(dim=-1)", "", "target's norm"),
    ("check_position_term", "gradient.norm(dim=-1) * ", "", "own norm"),
    ("check_position_term", "dot / lengths", "dot", "Nothing is normalized"),
    ("check_position_term", "dim=-1", "dim=-2", "Error"),
    ("check_position_term", "dot = (gradient", "dot = (gradient.detach()", "wrong derivative"),
    ("check_dlg_step", "images - step * slope", "images + step * slope", "uphill"),
    ("check_dlg_step", "images - step * slope", "images - 2 * step * slope", "twice"),
    ("check_dlg_step", "images - step * slope", "images - step * slope.sign()", "sign"),
    ("check_dlg_step", "(images - step * slope)", "images", "not moved"),
    ("check_dlg_step", ", create_graph=True", "", "create_graph"),
    ("check_dlg_step", "images.detach().requires_grad_()", "images.detach()", "require"),
    ("check_dlg_step", "torch.autograd.grad(distance, images)", "torch.autograd.grad(loss, images)", "cross-entropy"),
    ("check_dlg_step", "    (slope,) = torch.autograd.grad(distance, images)",
     "    slope = -torch.autograd.grad(loss, images)[0]", "cross-entropy, and uphill"),
    ("check_dlg_step", "distance.item()", "distance.item() ** 0.5", "root"),
    ("check_dlg_step", ".square().sum()", ".square().mean()", "means over entries"),
    ("check_dlg_step", "distance.item()", "loss.item()", "loss"),
    ("check_dlg_step", ".detach(), distance", ", distance", "detach"),
    ("check_dlg_step", "(slope,) = torch.autograd.grad(distance, images)", "distance.backward(); slope = images.grad",
     ".grad is filled"),
    ("check_dlg_step", "    return (images - step * slope).detach(), distance.item()",
     "    return (images - step * slope).detach()", "two things"),
    ("check_with_position_term", "weight * term", "term", "no weight"),
    ("check_with_position_term", " + weight * term", "", "The term is missing"),
    ("check_with_position_term", "distance + weight * term", "weight * distance + term", "multiplies the distance"),
    ("check_with_position_term", "distance + weight * term", "weight * (distance + term)", "multiplies both"),
    ("check_with_position_term", "distance + weight * term", "distance - weight * term", "taken off"),
    ("check_with_position_term", "gradients[place], targets[place], dim=-1",
     "gradients[place].flatten(), targets[place].flatten(), dim=0", "one cosine of the whole embedding"),
    ("check_with_position_term", "gradients[place], targets[place]", "gradients[0], targets[0]", "first tensor"),
    ("check_with_position_term", TERM, "(1 - cosines).sum()", "summed"),
    ("check_with_position_term", TERM, "(1 - cosines)[:, 1:].mean()", "class token"),
    ("check_with_position_term", "for x in tensors]", "for k, x in enumerate(tensors) if k != place]",
     "missing in the distance"),
    ("check_with_position_term", "distance = 1 - a @ b / (a.norm() * b.norm())", "distance = (a - b).square().sum()",
     "DLG"),
    ("check_with_position_term", "gradients[place], targets", "gradients[place].detach(), targets",
     "wrong derivative"),
    ("check_places", "maximize=True", "maximize=False", "fits worst"),
    ("check_places", "torch.from_numpy(place)", "torch.from_numpy(place).argsort()", "inverse"),
    ("check_places", f"_, place = linear_sum_assignment({SUM})", "place = (rows @ shared.T).argmax(1).numpy()",
     "two patches at one place"),
    ("check_places", "x / x.norm(dim=-1, keepdim=True)", "x", "longest rows"),
    ("check_places", "torch.from_numpy(place)", "torch.arange(len(rows))", "where it is"),
]  # fmt: skip

TERMS = "1 - torch.nn.functional.cosine_similarity(gradients[place], targets[place], dim=-1)"
RIGHT = [
    ("check_position_term", "return (1 - torch.nn.functional.cosine_similarity(gradient, target, dim=-1)).mean()"),
    ("check_with_position_term",
     "g, t = (torch.cat([x.flatten() for x in y]) for y in (gradients, targets)); "
     f"return 1 - torch.nn.functional.cosine_similarity(g, t, dim=0) + weight * ({TERMS}).mean()"),
    ("check_places",
     "import itertools; n = len(rows); "
     "cos = torch.nn.functional.cosine_similarity(rows[:, None], shared[None], dim=-1); "
     "return list(max(itertools.permutations(range(n)), key=lambda o: sum(cos[i, j] for i, j in enumerate(o))))"),
]  # fmt: skip

TestExercises = exercise_tests(chapter05, MUTANTS, RIGHT)


# --- The recordings and the interactive figure ----------------------------------------------------------------


def test_recordings_are_whole_and_small() -> None:
    rows = list(csv.DictReader((RESULTS / "matching_scrub.csv").read_text().splitlines()))
    marked = [int(row["frame"]) for row in rows if row["frame"]]
    assert [int(row["evaluation"]) for row in rows] == list(range(1, len(rows) + 1))
    with Image.open(RESULTS / "matching_scrub.png") as strip:
        assert strip.size == (32 * len(marked), 32)
    assert marked == list(range(len(marked)))
    twins = list(csv.DictReader((RESULTS / "matching_twins.csv").read_text().splitlines()))
    with Image.open(RESULTS / "matching_twins.png") as strip:
        assert strip.size == (28 * len(twins), 28)
    assert sum(path.stat().st_size for path in RESULTS.glob("matching_*")) < 1_500_000


def test_recorded_pictures_are_those_of_their_rows() -> None:
    private = al.load_victim("astronaut", 32, dtype=torch.float64)
    rows = csv.DictReader((RESULTS / "matching_scrub.csv").read_text().splitlines())
    marked = [row for row in rows if row["frame"]]
    with Image.open(RESULTS / "matching_scrub.png") as strip:
        for k in (0, 10, len(marked) - 1):
            data = torch.tensor(list(strip.crop((32 * k, 0, 32 * k + 32, 32)).tobytes()), dtype=torch.float64)
            picture = data.reshape(32, 32, 3).permute(2, 0, 1) / 255
            quality, noted = float(al.psnr(picture, private)), float(marked[k]["psnr"])
            # Rounding does not show in a bad picture, and makes a very good one better: the victim
            # has 8 bits itself.
            assert quality >= noted - 0.5
            assert quality <= noted + 0.5 or noted > 40


def test_the_callbacks_of_the_interactive_figure_without_a_kernel() -> None:
    (cell,) = tools.tagged(NOTEBOOK, "interactive-callback")
    frames = [({"psnr": "9.00", "loss": "1.0", "evaluation": "1", "frame": "0"}, torch.full((3, 32, 32), 0.5))] * 2

    def attack(update, model, max_evaluations, **options):  # type: ignore[no-untyped-def]
        assert max_evaluations == 50
        return al.match_gradients(model, update, max_evaluations=3, progress=False, **options)

    names = {
        "torch": torch, "al": al, "viz": viz, "frames": frames, "recorded": [row for row, _ in frames],
        "attack": attack,
    }  # fmt: skip
    exec(compile(cell.source, "<interactive>", "exec"), names)
    assert isinstance(names["scrub"](1), Figure)
    more = names["fifty_more"](1)
    assert more.images.shape == (1, 3, 32, 32)
    assert more.diagnostics["loss"] < more.history[0]["loss"]
    assert isinstance(names["scrub"](0, more.pixels[0], "live"), Figure)
