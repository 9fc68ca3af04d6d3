"""Chapter 07's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter07

CENTRING = "        columns = columns - columns.mean(0)\n"
BOUND = "p + n + prefix + 1 > d"
BEYOND = "torch.linalg.svd(M).Vh[k:] "
NOISE = "(M @ beyond.T).square().mean(1, keepdim=True).sqrt()"
MUTANTS = [
    ("check_directions", "(u - beta) / gamma", "u / gamma", "β is still in it"),
    ("check_directions", "(u - beta) / gamma", "(u + beta) / gamma", "wrong sign"),
    ("check_directions", "(u - beta) / gamma", "(u - beta) * gamma", "division"),
    ("check_directions", "(u - beta) / gamma", "u - beta", "γ is still in it"),
    ("check_directions", "(u - beta) / gamma", "u - u.mean(1, keepdim=True)", "adds β last"),
    ("check_directions", "x / x.norm(dim=1, keepdim=True)", "x", "lengths"),
    ("check_directions", "x / x.norm(dim=1, keepdim=True)", "-x / x.norm(dim=1, keepdim=True)", "wrong sign"),
    ("check_width_needed", "min(pixels_per_patch, patches)", "pixels_per_patch", "row space"),
    ("check_width_needed", "min(pixels_per_patch, patches)", "patches", "at most p unknowns"),
    ("check_width_needed", "min(pixels_per_patch, patches)", "max(pixels_per_patch, patches)", "row space"),
    ("check_width_needed", "min(pixels_per_patch, patches) + ", "", "pay for"),
    ("check_width_needed", " + prefix", "", "before the patches"),
    ("check_width_needed", " + prefix", " + 1", "more or less than one"),
    ("check_width_needed", " + int(layernorm)", "", "mean takes one dimension"),
    ("check_width_needed", " + int(layernorm)", " + 1", "no mean to lose"),
    ("check_width_needed", " + int(layernorm)", " + 2 * int(layernorm)", "β/γ is not centred"),
    ("check_width_needed", " + int(layernorm)", " + 0.0", "not a float"),
    ("check_without_rows", "-outside(places.T)", "outside(places.T)", "right side's sign"),
    ("check_without_rows", CENTRING, "", "centring"),
    ("check_without_rows", "[: n + prefix] ", "[: n + prefix - 1] ", "A direction is missing"),
    ("check_without_rows", BOUND, "False", "47 independent equations for the 48 pixels"),
    ("check_without_rows", BOUND, "min(p, n) + n + prefix + 1 > d", "None is asked"),
    ("check_without_rows", BOUND, "p + n + prefix > d", "None is asked"),
    ("check_without_rows", BOUND, "p + n + 2 + 1 > d", "fix the 48 pixels"),
    ("check_without_rows", ".solution.T", ".solution", "transpose"),
    ("check_equal_noise", "return M / noise", "return M", "have length 1"),
    ("check_equal_noise", "M = M / M.norm(dim=1, keepdim=True) ", "return M ", "the same factor"),
    ("check_equal_noise", "M / noise", "M * noise", "multiplied"),
    ("check_equal_noise", BEYOND, "torch.linalg.svd(M).Vh[:k] ", "along the strongest"),
    ("check_equal_noise", NOISE, "(M @ beyond.T).square().mean().sqrt()", "have length 1"),
    ("check_equal_noise", NOISE, "(M @ beyond.T).square().mean(1, keepdim=True)", "not equal yet"),
    ("check_equal_noise", "return M / noise", "return M @ beyond.T @ beyond / noise", "scaled and not turned"),
    ("check_equal_noise", "M / noise", "-M / noise", "turned around"),
    ("check_how_many", "(directions - prefix) // patches", "directions // (patches + prefix)", "count once"),
    ("check_how_many", "(directions - prefix) // patches", "directions // patches", "come off first"),
    ("check_how_many", "(directions - prefix) // patches", "directions", "number of directions"),
    ("check_how_many", "(directions - prefix) // patches", "-(-directions // patches)", "come off first"),
    ("check_how_many", "D.shape[1] - 1:", "D.shape[1]:", "the span is full"),
    ("check_how_many", "D.shape[1] - 1:", "0:", "can be told"),
    ("check_how_many", "//", "/", "not a float"),
]  # fmt: skip

# The two projections commute for γ = 1 and β = 0, and the bound can be read off the rank.
SPAN_FIRST = """import torch
    n = len(places)
    V = torch.linalg.svd(D).Vh[: n + prefix]
    def outside(columns):
        columns = columns - V.T @ (V @ columns)
        return columns - columns.mean(0)
    left = outside(W_e)
    if torch.linalg.matrix_rank(left, rtol=1e-10) < W_e.shape[1]:
        return None
    return torch.linalg.lstsq(left, -outside(places.T)).solution.T"""
# Without the first scaling, and up to a common factor: the noise is equal all the same.
UNSCALED = """import torch
    beyond = torch.linalg.svd(M).Vh[k:]
    return 7 * M / (M @ beyond.T).norm(dim=1, keepdim=True)"""
RANK = """import torch
    directions = int(torch.linalg.matrix_rank(D, rtol=1e-10))
    return None if directions >= D.shape[1] - 1 else round((directions - prefix) / patches)"""
RIGHT = [("check_without_rows", SPAN_FIRST), ("check_equal_noise", UNSCALED), ("check_how_many", RANK)]

TestExercises = exercise_tests(chapter07, MUTANTS, RIGHT)
