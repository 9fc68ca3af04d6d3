"""One row an attack: names, families and needs are what the rest of the package takes them for."""

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest

from aprillab.anatomy import Anatomy
from aprillab.attacks.catalogue import ATTACKS, CLOSED_FORMS, Attack, Family

#: Options of every attack, which ``invert`` hands on, and of every search, which the
#: command line does.
COMMON, BUDGET = {"anatomy", "preprocessing", "labels", "device"}, {"seed", "max_evaluations", "callback", "progress"}


def parameters_of(attack: Attack) -> dict[str, inspect.Parameter]:
    """Options by name, those of ``match_gradients`` included where an attack hands the rest on to
    it.
    """
    found = dict(inspect.signature(attack.function).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
        found = {**inspect.signature(ATTACKS["match:april"].function).parameters, **found}
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_a_row_fits_its_function(name: str) -> None:
    attack = ATTACKS[name]
    assert attack.name == name
    assert attack.title.strip()
    assert attack.family in get_args(Family)
    parameters = parameters_of(attack)
    assert list(inspect.signature(attack.function).parameters)[:2] == ["model", "update"]
    assert parameters.keys() >= COMMON
    assert (parameters.keys() >= BUDGET) == attack.searches
    assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in COMMON)
    with pytest.raises(FrozenInstanceError):
        attack.name = "another"  # type: ignore[misc]


@pytest.mark.parametrize("name", ATTACKS)
def test_needs_are_parts_of_the_anatomy(name: str) -> None:
    assert set(ATTACKS[name].needs) <= {field.name for field in fields(Anatomy)}
    assert len(set(ATTACKS[name].needs)) == len(ATTACKS[name].needs)


def test_closed_forms_are_those_without_a_budget_in_the_catalogues_order() -> None:
    assert list(CLOSED_FORMS) == [name for name, attack in ATTACKS.items() if attack.family == "closed form"]
    assert list(ATTACKS)[: len(CLOSED_FORMS)] == list(CLOSED_FORMS)
    assert all(attack.needs for attack in CLOSED_FORMS.values())


def test_titles_tell_attacks_apart() -> None:
    assert len({attack.title for attack in ATTACKS.values()}) == len(ATTACKS)
