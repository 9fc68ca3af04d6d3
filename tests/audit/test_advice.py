"""What to do about it: each situation gets the advice that is true of it, and none that is not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audited import POSITION, SIZE, photograph, update_of, vit

import aprillab as al
from aprillab.audit import Audit, audit
from aprillab.audit.advice import Advice, advice, introduction, reading, situation
from aprillab.audit.page import ends_words, markdown
from aprillab.audit.report import report
from aprillab.data import load_victim
from aprillab.defenses import clip, gaussian_noise
from aprillab.zoo import build_model

ROOT = Path(__file__).resolve().parents[2]

BITS, STEPS = "half precision, quantization, pruning", "more local steps, momentum, weight decay"
ADAM, IMAGES = "Adam, of two local steps or more in a round", "more images in each step"
POSITION_ALONE = "freeze or withhold the position embedding alone"
FIRST_ATTENTION = "freeze or withhold the first attention"
EMBEDDINGS = "freeze or withhold both embeddings"
POSITION_AND_ATTENTION = "freeze or withhold the position embedding and the first attention"
GO_ON, ZEROS = "go on sharing no more than this", "count on the head's zeros"
SUMS, LORA = "secure aggregation, under an honest server", "freeze all but the head and LoRA of rank 8 on q, v"
HEAD, NOISE = "share the head alone", "clip each image's gradient and add noise"


def one_picture() -> Audit:
    return audit(vit(), update_of(vit()))


def a_batch() -> Audit:
    pictures = torch.stack([photograph(), *(load_victim(name, SIZE) for name in ("chelsea", "astronaut", "rocket"))])
    return audit(vit(), update_of(vit(), pictures))


def strong_noise() -> Audit:
    return audit(vit(), gaussian_noise(clip(update_of(vit()), 1.0), 0.5, seed=0))


def half_precision() -> Audit:
    return audit(vit(), update_of(vit()).to(dtype=torch.bfloat16))


def position_withheld() -> Audit:
    return audit(vit(), update_of(vit(), withhold=[POSITION]))


def wide() -> Audit:
    """66 directions are enough without both embeddings, and there are 96."""
    return audit(vit(width=96), update_of(vit(width=96)))


def narrow() -> Audit:
    """34 directions are missing for the span attack, and there are 28: two rounds."""
    model = vit(width=28, heads=2)
    return audit(model, update_of(model))


def head_alone() -> Audit:
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return audit(model, update_of(model))


def zero_head() -> Audit:
    model = vit()
    torch.nn.init.zeros_(model.head.weight)
    return audit(model, update_of(model))


def sinusoids() -> Audit:
    model = build_model("prenorm", image_size=32, position="sinusoidal")
    return audit(model, update_of(model, load_victim("coffee", 32)[None]))


def federation() -> Audit:
    found = one_picture()
    update = replace(found.update, source="fedavg", local_steps=5, learning_rate=0.1)
    return replace(found, update=update, rounds=3, recording=True)


def adapters() -> Audit:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["head"])
    model = peft.get_peft_model(vit(width=96), config).eval()
    return audit(model, update_of(model))


SITUATIONS: list[tuple[Callable[[], Audit], str, dict[str, str]]] = [
    (one_picture, "picture", {
        BITS: "in part", STEPS: "no", IMAGES: "in part", POSITION_ALONE: "no", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (half_precision, "picture", {
        BITS: "in part", STEPS: "no", IMAGES: "in part", POSITION_ALONE: "no", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (a_batch, "mixture", {
        f"still {IMAGES}": "in part", POSITION_ALONE: "no", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (strong_noise, "noise", {
        IMAGES: "in part", POSITION_ALONE: "no", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (position_withheld, "picture", {
        BITS: "in part", STEPS: "no", IMAGES: "in part", POSITION_ALONE: "no", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (wide, "picture", {
        BITS: "in part", STEPS: "no", IMAGES: "in part", POSITION_ALONE: "no", EMBEDDINGS: "no",
        FIRST_ATTENTION: "no", POSITION_AND_ATTENTION: "yes", SUMS: "in part", LORA: "in part", HEAD: "yes",
        NOISE: "yes",
    }),
    (narrow, "picture", {
        BITS: "in part", STEPS: "no", IMAGES: "in part", POSITION_ALONE: "in part", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (head_alone, "nothing", {GO_ON: "yes", SUMS: "in part", NOISE: "yes"}),
    (zero_head, "nothing", {ZEROS: "no", SUMS: "in part", NOISE: "yes"}),
    (sinusoids, "unclear", {
        BITS: "in part", STEPS: "no", IMAGES: "in part", GO_ON: "in part", EMBEDDINGS: "in part",
        FIRST_ATTENTION: "yes", SUMS: "in part", LORA: "in part", HEAD: "yes", NOISE: "yes",
    }),
    (federation, "picture", {
        BITS: "in part", STEPS: "no", ADAM: "not known", IMAGES: "in part", POSITION_ALONE: "no", EMBEDDINGS: "yes",
        SUMS: "in part", LORA: "yes", HEAD: "yes", NOISE: "yes",
    }),
    (adapters, "nothing", {
        f"{FIRST_ATTENTION}'s adapters": "yes", SUMS: "in part", HEAD: "yes", NOISE: "yes",
    }),
]  # fmt: skip
NAMES = [build.__name__ for build, _, _ in SITUATIONS]


def named(found: Audit, change: str) -> Advice:
    return next(one for one in advice(found) if one.change == change)


@pytest.mark.parametrize(("build", "kind", "expected"), SITUATIONS, ids=NAMES)
def test_each_situation_has_its_advice_in_order_of_cost(
    build: Callable[[], Audit], kind: str, expected: dict[str, str]
) -> None:
    found = build()
    given = advice(found)
    assert situation(found) == kind
    assert [(one.change, one.ends) for one in given] == list(expected.items())
    assert [one.change for one in given if one.by == "guarantee"] == [NOISE]
    assert all(one.by == "count" for one in given if one.ends == "yes" and one.change != NOISE)
    text = " ".join([introduction(found), *(f"{one.change} {one.cost} {one.words}" for one in given)])
    section = markdown(found).partition("## What to do about it")[2].partition("\n## ")[0]
    for said in (text, section):
        words = re.findall(r"[a-z]+", said.lower().replace("secure aggregation", ""))
        assert not {"safe", "safely", "safety", "secure", "secured", "private", "privately"} & {*words}
        assert not any(word.startswith("promise") for word in words)
        for chapter in set(re.findall(r"chapter (\d\d)", said)):
            notebooks = list((ROOT / "notebooks").glob(f"{chapter}_*.ipynb"))
            assert notebooks, f"there is no chapter {chapter}"
    for one in given:
        assert (ROOT / f"notebooks/{one.chapter}.ipynb").is_file()
    files = reading(found)
    assert all((ROOT / name).is_file() for name in files)
    assert all(f"`{name}`" in section for name in files)


# --- It is true ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 96])
def test_what_the_counts_say_of_an_update_the_attacks_bear_out(width: int) -> None:
    model = vit(width=width)
    update = update_of(model)
    found = audit(model, update)
    tried = [one for one in advice(found) if one.tensors]
    assert len(tried) == (3 if width == 64 else 5)
    for one in tried:
        left = audit(model, update.without(one.tensors), strict=True)
        assert (left.leak == "none") == (one.ends == "yes"), one.change
        assert left.leak in ("none", "exact")
        kept = {"kept": set(update.gradients) - set(one.tensors)}
        assert (al.leak_map(model, shared=kept)["kept"].attack is None) == (one.ends == "yes")
        assert all(f"`{name}`" in one.words for name in one.tensors[:6]) or one.change == HEAD


def test_both_embeddings_are_named_to_the_tensor() -> None:
    tensors = {"class_token", POSITION, "patch_embedding.weight", "patch_embedding.bias"}
    found = one_picture()
    both = named(found, EMBEDDINGS)
    assert {*both.tensors} == tensors
    assert "p + tokens + 1 = 66 > 64 = d" in both.words
    sizes = {name: g.numel() for name, g in found.update.gradients.items()}
    share = 100 * sum(sizes[name] for name in tensors) / sum(sizes.values())
    assert both.cost.startswith(f"{share:.2g} % of the numbers")
    assert ends_words(both) == "no closed form is left"


def test_noise_has_its_numbers() -> None:
    found = one_picture()
    words = named(found, NOISE).words
    for epsilon in (8.0, 3.0):
        sigma = al.privacy.noise_multiplier(epsilon, delta=1e-5)
        assert al.privacy.epsilon(sigma) == pytest.approx(epsilon, rel=1e-3)
        assert f"σ = {sigma:.2f} for ε = {epsilon:g}" in words
        hundred = al.privacy.noise_multiplier(epsilon, rounds=100, delta=1e-5)
        assert f"σ = {hundred:.2f} for ε = {epsilon:g}" in words
        assert f"{100 * al.privacy.success_bound(1 / 256, sigma):.0f} %" in words
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.update.gradients.values()))
    entries = sum(g.numel() for g in found.update.gradients.values())
    assert f"own norm is {norm:.3g}" in words
    assert f"{0.6002290723 * norm:.3g} and {1.3905934569 * norm:.3g} in each of {entries:,} entries" in words
    assert f"{0.6002290723 * math.sqrt(entries):.0f} and" in words
    assert "of this client" not in words  # one round


def test_rounds_and_local_steps_count_together() -> None:
    words = named(federation(), NOISE).words
    sigma = al.privacy.noise_multiplier(3.0, rounds=15, delta=1e-5)
    assert f"3 rounds of 5 local steps of this client together: σ = 2.32 for ε = 8 and σ = {sigma:.2f} for" in words
    assert "norm of this update as a gradient" in words


def test_a_noisy_update_is_not_told_that_it_has_an_epsilon() -> None:
    words = named(strong_noise(), NOISE).words
    assert "This update has noise in it" in words
    assert "No ε can be read off that" in words
    assert "with its noise, is" in words
    assert "noise in it" not in named(one_picture(), NOISE).words


def test_numbers_beyond_all_bounds_have_no_norm() -> None:
    found = one_picture()
    endless = replace(found.update, gradients={n: 1e200 * g.double() for n, g in found.update.gradients.items()})
    words = named(replace(found, update=endless), NOISE).words
    assert "norm is" not in words
    assert "σ = 0.60" in words


# --- It hangs on what was found -----------------------------------------------------------------------------------


def test_words_know_what_the_update_has_already() -> None:
    assert "came in bfloat16, and a picture came out all the same" in named(half_precision(), BITS).words
    assert "bfloat16, and" not in named(one_picture(), BITS).words
    assert "is of 4 images" in named(a_batch(), f"still {IMAGES}").words
    held = named(position_withheld(), POSITION_ALONE)
    assert (held.cost, "keeps its position embedding back" in held.words) == ("paid already", True)
    assert "5 of them" in named(federation(), STEPS).words
    assert "takes 2 rounds with the same picture" in named(narrow(), POSITION_ALONE).words
    adam = replace(federation().update, optimizer="adamw")
    assert named(replace(federation(), update=adam), ADAM).words.startswith("This update is of Adam's")


def test_two_rounds_do_what_one_does_not() -> None:
    assert named(replace(narrow(), rounds=2), POSITION_ALONE).ends == "no"


def test_where_nothing_is_left_more_would_open_it_again() -> None:
    words = named(head_alone(), GO_ON).words
    assert "all (patch-embedding system, one round)" in words
    assert "the label; the features" in words


def test_a_picture_that_the_counts_do_not_see_refutes_them() -> None:
    """As from sinusoids in float64: the same reason cannot be what another choice ends it by."""
    found = sinusoids()
    best = replace(found.findings[-1], trust="coarse")
    read = replace(found, findings=(*found.findings[:-1], best))
    assert situation(read) == "picture"
    assert GO_ON not in [one.change for one in advice(read)]
    assert named(read, POSITION_ALONE).ends == "no"
    assert "has a fixed position embedding" in named(read, POSITION_ALONE).words
    assert named(read, EMBEDDINGS).ends == "no"
    assert named(read, FIRST_ATTENTION).ends == "yes"


def test_reading_begins_with_the_chapter_of_the_case() -> None:
    assert reading(federation())[0] == "notebooks/09_a_real_federation.ipynb"
    assert "data/results/a_round.md" in reading(federation())
    assert reading(adapters())[0] == "notebooks/10_sharing_less.ipynb"
    assert "data/results/a_round.md" not in reading(one_picture())
    assert "data/results/effect.md" in reading(position_withheld())


def test_without_a_map_what_needs_none_is_said() -> None:
    given = advice(replace(one_picture(), sharing=None))
    assert [one.change for one in given] == [BITS, STEPS, IMAGES, SUMS, NOISE]


def test_advice_is_data_too() -> None:
    found = one_picture()
    entries = report(found)["what_to_do"]
    assert [entry["change"] for entry in entries] == [one.change for one in advice(found)]
    assert set(entries[0]) == {"change", "ends", "cost", "chapter", "words", "by", "tensors"}
    assert POSITION in next(entry for entry in entries if entry["change"] == EMBEDDINGS)["tensors"]
    assert advice(found) == advice(found)


# --- What it is doing ---------------------------------------------------------------------------------------------


def test_each_step_is_said_as_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    audit(vit(), update_of(vit()), progress=said.append)
    names = ["reading the update", "patch-embedding system", "APRIL's closed form", "span attack", "labels"]
    assert [name in words for name, words in zip(names, said, strict=True)] == [True] * 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_a_bar_is_shown_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], progress: bool | None, shown: bool
) -> None:
    audit(vit(), update_of(vit()), progress=progress)
    assert ("span attack" in capsys.readouterr().err) is shown
