"""The playground's controls and their states."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from aprillab.data import victims
from aprillab.playground import CONTROLS, OWN, State
from aprillab.playground.state import MOST_PATCHES, patch_sizes


def test_each_field_has_its_control_and_its_words() -> None:
    assert {field.name for field in fields(State)} == set(CONTROLS)
    for name, control in CONTROLS.items():
        assert control.field == name
        assert control.label.strip()
        assert control.help.endswith(".")
        assert len(set(map(str, control.choices.values()))) == len(control.choices)
    assert len({control.label for control in CONTROLS.values()}) == len(CONTROLS)


def test_what_the_issue_asks_for_is_offered() -> None:
    assert {*CONTROLS["picture"].choices.values()} == {*victims(), OWN}
    assert {*CONTROLS["size"].choices.values()} == {32, 64}
    assert {*CONTROLS["position"].choices.values()} >= {"learned", "frozen", "sinusoidal", "sinusoidal 2-D", "none"}
    assert {*CONTROLS["precision"].choices.values()} == {"float64", "float32", "bfloat16", "autocast"}
    assert {*CONTROLS["batch"].choices.values()} == {1, 2, 4}
    assert {*CONTROLS["steps"].choices.values()} == {1, 2, 5}


@pytest.mark.parametrize("name", CONTROLS)
def test_every_choice_is_a_state_and_has_its_words(name: str) -> None:
    for words, value in CONTROLS[name].choices.items():
        assert replace(State(), **{name: value}).in_words()[CONTROLS[name].label] == words


@pytest.mark.parametrize(
    ("name", "value"), [("width", 100), ("shared", "nothing"), ("picture", "mona lisa"), ("noise", -1)]
)
def test_another_value_is_refused_with_what_there_is(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r} is not offered here: choose one of "):
        replace(State(), **{name: value})


def test_a_size_offers_the_patches_that_stay_quick() -> None:
    for size in (32, 64):
        assert patch_sizes(size)
        assert all((size // patch) ** 2 <= MOST_PATCHES for patch in patch_sizes(size))
    with pytest.raises(ValueError, match=r"patch=4 makes 256 patches .* choose 8, 16"):
        State(size=64, patch=4)
