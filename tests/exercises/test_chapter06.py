"""Chapter 06's checks against the notebook's own stubs and solutions, and against the mistakes people make."""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter06

ONE_FLAG = "dict(model.named_parameters())[name].requires_grad_(False)"
CLIPPED = "factor * g + multiplier * norm * torch.randn(g.shape, generator=generator, dtype=g.dtype)"
FACTOR = "norm / total if total > norm else 1.0"
MEAN = "torch.stack([u.gradients[name].double() for u in updates]).mean(0)"
RESULT = "al.ClientUpdate(gradients, withheld=first.withheld, batch_size=first.batch_size)"
HALF = "float(stats.t.ppf(0.975, len(gaps) - 1)) * error"

MUTANTS = [
    ("check_freeze", ONE_FLAG, "pass", "Nothing is frozen"),
    ("check_freeze", ONE_FLAG, "model.requires_grad_(False)", "Everything is frozen"),
    ("check_freeze", ONE_FLAG, "dict(model.named_parameters())[name].data.zero_()", "values changed"),
    (
        "check_freeze",
        ONE_FLAG,
        "[p.requires_grad_(False) for key, p in model.named_parameters() if key.startswith(name)]",
        "whole name",
    ),
    ("check_freeze", ONE_FLAG, "model.head.weight.requires_grad_(False)", "still trained"),
    ("check_freeze", ONE_FLAG, "model.position_embedding = None", "no parameter of the model any more"),
    ("check_sinusoids", "table[:, 0::2] = angle.sin()", "table[:, 0::2] = angle.cos()", "not right"),
    (
        "check_sinusoids",
        "table[:, 0::2] = angle.sin()\n    table[:, 1::2] = angle.cos()",
        "table[:, 1::2] = angle.sin()\n    table[:, 0::2] = angle.cos()",
        "swapped",
    ),
    (
        "check_sinusoids",
        "table[:, 0::2] = angle.sin()\n    table[:, 1::2] = angle.cos()",
        "table = torch.cat([angle.sin(), angle.cos()], 1)",
        "alternate",
    ),
    ("check_sinusoids", "torch.arange(tokens, dtype", "torch.arange(1, tokens + 1, dtype", "start at 0"),
    ("check_sinusoids", "/ width  ", "/ (2 * width)  ", "too slowly"),
    ("check_sinusoids", "/ width  ", "* 2 / width  ", "too fast"),
    ("check_sinusoids", "(-exponent)", "exponent", "negative power"),
    ("check_sinusoids", "position * base", "torch.pi / 180 * position * base", "radians"),
    ("check_sinusoids", "return table", "return table.T", "should have shape"),
    ("check_clip_and_noise", FACTOR, "norm / total", "scaled up"),
    ("check_clip_and_noise", "factor * g", "min(1.0, norm / float(g.norm())) * g", "by itself"),
    ("check_clip_and_noise", "factor * g", "g", "not clipped"),
    ("check_clip_and_noise", FACTOR, "1 / total if total > norm else 1.0", "not multiplied"),
    ("check_clip_and_noise", "factor * g", "g.clamp(-norm, norm)", "one by one"),
    ("check_clip_and_noise", "multiplier * norm * torch", "multiplier * torch", "deviation `multiplier`"),
    ("check_clip_and_noise", "multiplier * norm * torch", "norm * torch", "not right"),
    ("check_clip_and_noise", "multiplier * norm * torch", "multiplier * total * torch", "No noise"),
    ("check_clip_and_noise", "multiplier * norm * torch", "multiplier * max(total, norm) * torch", "public"),
    ("check_clip_and_noise", CLIPPED, f"factor * (g + {CLIPPED.removeprefix('factor * g + ')})", "before clipping"),
    ("check_clip_and_noise", "torch.randn(", "torch.rand(", "torch.randn"),
    ("check_clip_and_noise", "torch.randn(g.shape, generator=generator,", "torch.randn(g.shape,", "global"),
    ("check_clip_and_noise", "generator=generator", "generator=generator.manual_seed(3)", "same noise"),
    ("check_clip_and_noise", "torch.randn(g.shape,", "torch.randn(1,", "one number for each entry"),
    ("check_paired_interval", "x - y", "y - x", "wrong sign"),
    ("check_paired_interval", HALF, "1.96 * error", "Student"),
    ("check_paired_interval", "len(gaps) ** 0.5", "1", "√n"),
    ("check_paired_interval", HALF, "error", "standard error"),
    ("check_paired_interval", HALF, f"2 * {HALF}", "whole width"),
    ("check_paired_interval", "stdev(gaps)", "pstdev(gaps)", "n − 1"),
    ("check_paired_interval", "len(gaps) - 1", "len(gaps)", "degrees of freedom"),
    ("check_paired_interval", "0.975", "0.95", "both tails"),
    (
        "check_paired_interval",
        "statistics.stdev(gaps)",
        "(statistics.variance(a) + statistics.variance(b)) ** 0.5",
        "seed by seed",
    ),
    ("check_average", "mean(0)", "sum(0)", "sum"),
    ("check_average", ".double() for", " for", "float64"),
    ("check_average", MEAN, "first.gradients[name]", "first update"),
    ("check_average", MEAN, "updates[-1].gradients[name]", "last update alone"),
    ("check_average", "mean(0)", "median(0).values", "median"),
    ("check_average", "for u in updates]", "for u in updates[:-1]]", "last update is missing"),
    ("check_average", RESULT, "gradients", "al.ClientUpdate"),
]

TestExercises = exercise_tests(chapter06, MUTANTS)
