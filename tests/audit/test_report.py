"""The report of an audit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from audited import update_of, vit

from aprillab.attacks.result import Condition, State
from aprillab.audit import audit, write_audit
from aprillab.audit.page import believed, images_words, markdown, predicted_psnr, predicted_words
from aprillab.audit.report import json_safe, report
from aprillab.audit.words import Trust


def test_json_safe() -> None:
    assert json_safe({1: math.inf, "a": [math.nan, -0.5], "b": torch.tensor([[1, 2]]), "c": (None, True)}) == {
        "1": None, "a": [None, -0.5], "b": [[1, 2]], "c": [None, True],
    }  # fmt: skip
    assert json_safe(torch.tensor([math.inf])) == [None]
    assert json_safe(torch.float16) == "torch.float16"


def test_an_audit_from_python_is_dated_too(tmp_path: Path) -> None:
    model = vit()
    files = write_audit(audit(model, update_of(model)), tmp_path / "new/found")
    assert {file.name for file in files} == {"report.json", "report.md", "overview.png", "embedding.png", "span.png"}
    facts = json.loads((tmp_path / "new/found/report.json").read_text(encoding="utf-8"))
    assert datetime.fromisoformat(facts["date"]).utcoffset() == timedelta(0)
    assert (facts["command"], facts["exit_code"], facts["update"]["sha256"]) == (None, None, None)
    words = (tmp_path / "new/found/report.md").read_text(encoding="utf-8")
    assert "- command" not in words
    assert "- result: `exact`\n" in words


@pytest.mark.parametrize(
    ("trust", "states", "predicted", "words"),
    [
        ("exact", ["shown"], 91.0, "91.0 dB"),
        ("poor", ["not checked"], 25.0, "25.0 dB, which cannot be relied on"),
        ("mixture", ["contradicted"], None, "none, for this is no photograph"),
        ("unverified", ["contradicted"], None, "none"),
    ],
)
def test_a_prediction_is_of_one_photograph(
    trust: Trust, states: list[State], predicted: float | None, words: str
) -> None:
    model = vit()
    finding = audit(model, update_of(model)).findings[0]
    conditions = tuple(Condition("one image", state, {}, "") for state in states)
    result = replace(finding.result, conditions=conditions, predicted_psnr=91.0 if trust == "exact" else 25.0)
    changed = replace(finding, result=result, trust=trust)
    assert predicted_psnr(changed) == predicted
    assert predicted_words(changed) == words
    assert believed(changed) == (trust == "exact")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("shown", "One image: so"),
        ("contradicted", "More than one image, or noise: so"),
        ("not checked", "Whether one image is behind the update was not checked: so"),
    ],
)
def test_number_of_images_in_three_states(state: State, words: str) -> None:
    model = vit()
    found = replace(audit(model, update_of(model)), one_image=Condition("one image", state, {}, "so"))
    assert images_words(found) == words
    assert words in markdown(found)
    assert report(found)["one_image"] == {"state": state, "evidence": "so"}


def test_the_report_says_what_less_would_give_away() -> None:
    found = audit(vit(), update_of(vit()))
    page = markdown(found)
    section = page.partition("## If you shared less")[2].partition("\n## ")[0]
    assert (
        "| position embedding withheld | span attack, one round | min(p, n) + tokens + 1 = 34 ≤ 64 = d |" in section
    )
    assert "| head only | no closed form | nothing shared is affine in the pixels |" in section
    assert " alone |" not in section
    assert len(section.splitlines()) < 16
    rows = {row["shared"]: row for row in json.loads(json.dumps(report(found)))["if_less_were_shared"]}
    assert rows["both embeddings frozen"]["attack"] is None
    assert rows["all"]["attack"] == "embedding"
    assert rows["first attention alone"]["kind"] == "group"
    assert "tensors" not in rows["all"]
    without = replace(found, sharing=None)
    assert "If you shared less" not in markdown(without)
    assert report(without)["if_less_were_shared"] is None
