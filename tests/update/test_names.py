"""One tensor's names under different wrappers."""

from __future__ import annotations

import time

import pytest

from aprillab.update.names import bare, matched

NAMES = ["blocks.0.weight", "blocks.0.bias", "head.weight"]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("head.weight", "head.weight"),
        ("module.module.head.weight", "head.weight"),
        ("_orig_mod.blocks.0._orig_mod.weight", "blocks.0.weight"),
        ("_module.head.weight", "head.weight"),
        ("blocks._fsdp_wrapped_module.0._checkpoint_wrapped_module.weight", "blocks.0.weight"),
        ("model.model.head.weight", "head.weight"),
        ("head.model.weight", "head.model.weight"),
        ("base_model.model.head.modules_to_save.default.bias", "base_model.model.head.bias"),
        ("base_model.model.head.original_module.bias", "base_model.model.head.original_module.bias"),
        ("qkv.lora_B.second one.weight", "qkv.lora_B.weight"),
        ("qkv.lora_B.weight", "qkv.lora_B.weight"),
        ("qkv.lora_magnitude_vector.default.weight", "qkv.lora_magnitude_vector"),
        ("qkv.lora_magnitude_vector", "qkv.lora_magnitude_vector"),
        ("model", "model"),
        ("module", "module"),
        ("", ""),
    ],
)
def test_what_is_left_of_a_name(name: str, left: str) -> None:
    assert bare(name) == left


def test_one_rule_serves_all_names() -> None:
    assert matched(NAMES, NAMES) == {name: name for name in NAMES}
    assert matched([f"net.{n}" for n in NAMES], NAMES) == {f"net.{n}": n for n in NAMES}
    assert matched(NAMES, [f"net.{n}" for n in NAMES]) == {n: f"net.{n}" for n in NAMES}
    both = matched([f"net.module.{n}" for n in NAMES], [f"_orig_mod.{n}" for n in NAMES])
    assert both == {f"net.module.{n}": f"_orig_mod.{n}" for n in NAMES}
    part = matched(["a.head.weight", "b.blocks.0.weight", "b.blocks.0.bias"], NAMES)
    assert part == {"b.blocks.0.weight": "blocks.0.weight", "b.blocks.0.bias": "blocks.0.bias"}
    assert matched(["subhead.weight"], ["head.weight"]) == {}, "a first part ends with a dot"


def test_what_could_stand_for_two_stands_for_none() -> None:
    two = [f"{part}.{name}" for part in ("a", "b") for name in NAMES]
    assert matched(NAMES, two) == {}
    assert matched(NAMES, two, preferred=["b.head.weight"]) == {name: f"b.{name}" for name in NAMES}
    assert matched(two, NAMES) == {}
    assert matched(two, NAMES, preferred=["a.head.weight"]) == {f"a.{name}": name for name in NAMES}
    assert matched(["module.x", "_orig_mod.x", "module.y"], ["x", "y"]) == {"module.y": "y"}
    assert matched(["x", "module.x"], ["x", "y"]) == {"x": "x"}


def test_names_without_number_or_end_take_no_time() -> None:
    """They come from a client: no work may grow with their square."""
    many = [f"part{i}.head.weight" for i in range(20_000)]
    start = time.perf_counter()
    assert matched(many, NAMES) == {}
    assert matched(many, NAMES, preferred=["part7.head.weight"]) == {"part7.head.weight": "head.weight"}
    for long in ("model." * 100_000 + "head.weight", "x." * 100_000 + "head.weight"):
        assert matched([long], NAMES) == ({long: "head.weight"} if long.startswith("model") else {})
    assert time.perf_counter() - start < 30
