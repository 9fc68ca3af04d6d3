"""Chapter 00's check against the notebook's own stub and solution, and against the mistakes people make."""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter00

MUTANTS = [
    ("check_psnr", "-10 *", "10 *", "wrong sign"),
    ("check_psnr", "-10 *", "-20 *", "twice too large"),
    ("check_psnr", "-10 *", "-1 *", "factor is 10"),
    ("check_psnr", "torch.log10", "torch.log", "natural logarithm"),
    ("check_psnr", ".square().mean()", ".square().sum()", "sum of the squares"),
    ("check_psnr", ".square().mean()", ".abs().mean()", "mean absolute error"),
    ("check_psnr", "-10 * torch.log10(mean_square).item()", "mean_square.item()", "not yet its logarithm"),
    ("check_psnr", "-10 * torch.log10(mean_square).item()", "(reconstruction - original) ** 2", "mean missing"),
]  # fmt: skip
RIGHT = [("check_psnr", "return 20 * torch.log10(1 / (reconstruction - original).square().mean().sqrt())")]

TestExercises = exercise_tests(chapter00, MUTANTS, RIGHT)
