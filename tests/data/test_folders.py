"""Rows of the studies' tables by what is wanted of their columns."""

import pytest

from aprillab.data import recorded


def test_numbers_are_compared_as_numbers_and_words_as_they_stand():
    everything = recorded("cheating_secure.csv")
    rows = recorded("cheating_secure.csv", way="silenced", max_weight=1, rate=0.1)
    assert rows == [
        r for r in everything if r["way"] == "silenced" and float(r["max_weight"]) == 1 and r["rate"] == "0.1"
    ]
    assert 0 < len(rows) < len(everything)
    assert recorded("cheating_secure.csv", rate="0.10") == []  # a word


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(KeyError, match=r"no column sigma, seeed: there are way"):
        recorded("cheating_secure.csv", sigma=1, way="silenced", seeed=0)
    with pytest.raises(FileNotFoundError):
        recorded("nothing.csv").__len__()
