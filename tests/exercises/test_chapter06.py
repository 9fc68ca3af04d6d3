"""Chapter 06's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter06

ONE_FLAG = "dict(model.named_parameters())[name].requires_grad_(False)"
CLIPPED = "factor * g + multiplier * norm * torch.randn(g.shape, generator=generator, dtype=g.dtype)"
FACTOR = "norm / total if total > norm else 1.0"
MEAN = "torch.stack([u.gradients[name].double() for u in updates]).mean(0)"
RESULT = "al.ClientUpdate(gradients, withheld=first.withheld, batch_size=first.batch_size)"
ENOUGH = "float(stats.t.ppf(0.975, m - 1)) * spread / m**0.5 > half"
NEEDED = '{"position_embedding"} | first'

MUTANTS = [
    ("check_who_is_left", 'if block == "april":', "if True:", "architecture A"),
    ("check_who_is_left", NEEDED, "first", "needs the gradient of position_embedding"),
    ("check_who_is_left", NEEDED, '{"position_embedding"}', "needs the gradient of blocks.0.attention.query.weight"),
    ("check_who_is_left", '("query", "key", "value")', '("query", "value")', "blocks.0.attention.key.weight"),
    ("check_who_is_left", NEEDED, '{"position_embedding", "patch_embedding.weight"} | first', "april still applies"),
    ("check_who_is_left", ', "patch_embedding.weight"}', "}", "needs the gradient of patch_embedding.weight"),
    ("check_who_is_left", "if not tensors & withheld", "if not withheld", "still applies"),
    ("check_who_is_left", "blocks.0", "blocks.1", "blocks.0.attention.query.weight"),
    ("check_who_is_left", 'needed["april"]', 'needed["span"]', "neither"),
    ("check_who_is_left", "if not tensors & withheld}", "if not tensors & withheld} and 'april'", "set of names"),
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
    ("check_seeds_needed", ENOUGH, "1.959964 * spread / m**0.5 > half", "1.96"),
    ("check_seeds_needed", "t.ppf(0.975, m - 1)", "t.ppf(0.975, len(a) - 1)", "pilot's t"),
    ("check_seeds_needed", "m - 1", "m", "not m"),
    ("check_seeds_needed", "0.975", "0.95", "both tails"),
    ("check_seeds_needed", "> half", "> half / 2", "whole width"),
    ("check_seeds_needed", "stdev(x", "pstdev(x", "n − 1"),
    (
        "check_seeds_needed",
        "statistics.stdev(x - y for x, y in zip(a, b))",
        "(statistics.variance(a) + statistics.variance(b)) ** 0.5",
        "Take the differences first",
    ),
    ("check_seeds_needed", "return m", "return max(m - 1, 2)", "too few"),
    ("check_seeds_needed", "return m", "return m + (m > 2)", "too many"),
    ("check_seeds_needed", "return m", "return float(m)", "int"),
    ("check_seeds_needed", "return m", "return max(m - len(a), 2)", "in all"),
    ("check_average", "mean(0)", "sum(0)", "sum"),
    ("check_average", ".double() for", " for", "float64"),
    ("check_average", MEAN, "first.gradients[name]", "first update"),
    ("check_average", MEAN, "updates[-1].gradients[name]", "last update alone"),
    ("check_average", "mean(0)", "median(0).values", "median"),
    ("check_average", "for u in updates]", "for u in updates[:-1]]", "last update is missing"),
    ("check_average", RESULT, "gradients", "al.ClientUpdate"),
]

TestExercises = exercise_tests(chapter06, MUTANTS)
