"""Chapter 00's check against the notebook's own stub and solution, and against the
mistakes people make.
"""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter00

MUTANTS = [
    ("check_grey_levels", "255 * ", "", "full range, from 0 to 1"),
    ("check_grey_levels", "/ 20", "/ 10", "not yet its root"),
    ("check_grey_levels", "255 * 10 ** (-decibels / 20)", "10 ** (-decibels / 10)", "full range, not yet its root"),
    ("check_grey_levels", "255 * 10 ** (-decibels / 20)", "255**2 * 10 ** (-decibels / 10)", "squared grey levels"),
    (
        "check_grey_levels",
        "255 * 10 ** (-decibels / 20)",
        "(255 * 10 ** (-decibels / 10)) ** 0.5",
        "root comes first",
    ),
    ("check_grey_levels", "255 * 10 ** (-decibels / 20)", "round(255 * 10 ** (-decibels / 20))", "Do not round"),
    ("check_grey_levels", "255", "256", "level 255"),
    ("check_grey_levels", "-decibels", "decibels", "wrong sign"),
    ("check_grey_levels", "10 **", "2.718281828459045 **", "powers of ten"),
    ("check_grey_levels", "return", "decibels =", "a return at the end"),
]
RIGHT = [("check_grey_levels", "return torch.tensor(65025 * 10 ** (-decibels / 10), dtype=torch.float64).sqrt()")]

TestExercises = exercise_tests(chapter00, MUTANTS, RIGHT)
