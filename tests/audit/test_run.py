"""The audit of somebody's own federated system: what leaked, and how far to trust it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from audited import LABEL, POSITION, SIZE, photograph, update_of, vit
from torch import Tensor, nn

from aprillab.audit import Audit, audit, run
from aprillab.audit.report import markdown, report
from aprillab.data import load_victim, recorded
from aprillab.defenses import clip, gaussian_noise
from aprillab.metrics import psnr
from aprillab.update import Round
from aprillab.zoo import build_model


def by_attack(found: Audit) -> dict[str, str]:
    return {finding.attack.name: finding.trust for finding in found.findings}


# --- What it concludes ----------------------------------------------------------------------------------------


def test_exact_pictures_are_called_so() -> None:
    model = vit(block="april")
    found = audit(model, update_of(model))
    assert by_attack(found) == {"embedding": "exact", "april": "exact", "span": "exact"}
    for finding in found.findings:
        assert psnr(finding.result.pixels[0], photograph(torch.float64)) > 60
        assert finding.replay < 1e-3
    assert found.verdict == "This update gives the private picture away, exactly: patch-embedding system."
    assert found.labels.labels.tolist() == [LABEL]
    assert found.one_image.holds
    assert [part.state for part in found.parts] == ["shared"] * 7
    assert not found.notes


def test_what_is_withheld_or_fixed_is_told_apart() -> None:
    model = vit()
    withheld = audit(model, update_of(model, withhold=[POSITION]))
    model.position_embedding.requires_grad_(False)
    fixed = audit(model, update_of(model))
    for found, state in ((withheld, "withheld"), (fixed, "fixed")):
        assert [part.state for part in found.parts] == [state, *["shared"] * 6]
        assert by_attack(found) == {"embedding": "none", "april": "none", "span": "exact"}
        assert found.verdict.endswith("exactly: span attack.")


def test_batch_is_a_mixture_whether_the_client_says_so_or_not() -> None:
    model = vit()
    pictures = torch.stack([photograph(), load_victim("chelsea", SIZE)])
    shared = update_of(model, pictures)
    for update in (shared, replace(shared, batch_size=None), replace(shared, batch_size=1)):
        found = audit(model, update)
        assert not found.one_image.holds
        assert by_attack(found) == {"embedding": "mixture", "april": "none", "span": "mixture"}
        assert "no photograph" in found.verdict
        facts = report(found)
        assert not any(entry["exact"] for entry in facts["attacks"].values())
        assert facts["attacks"]["embedding"]["picture"] == "embedding_mixture.png"
    assert audit(model, replace(shared, batch_size=None)).labels.labels.tolist() == [LABEL, LABEL + 1]


def test_noise_is_not_taken_for_a_batch() -> None:
    model = build_model("prenorm", image_size=32, position="frozen")
    pixels = load_victim("coffee", 32)
    clean = update_of(model, pixels[None])
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: g + 1e-4 * g.std() * torch.randn(g.shape, generator=generator) for name, g in clean.gradients.items()
    }
    found = audit(model, replace(clean, gradients=noisy))
    assert found.one_image.holds
    assert by_attack(found)["span"] in ("likely", "close")
    assert any("noise" in note for note in found.notes)
    assert psnr(found.applied[0].result.pixels[0], pixels.double()) > 35


def test_a_picture_no_better_than_grey_is_called_noise() -> None:
    model = vit()
    found = audit(model, gaussian_noise(clip(update_of(model), 1.0), 1.0, seed=0))
    assert set(by_attack(found).values()) <= {"noise", "none"}
    assert found.verdict.startswith("Nothing but noise came out")
    assert found.leak == "unclear"


def test_replay_catches_an_optimistic_prediction() -> None:
    model = build_model("prenorm", image_size=32, position="sinusoidal")
    pixels = load_victim("coffee", 32)
    found = audit(model, update_of(model, pixels[None]))
    (finding,) = found.applied
    assert psnr(finding.result.pixels[0], pixels.double()) < 20
    assert finding.replay > 0.1
    assert finding.result.predicted_psnr < 30  # 26 dB by its own residual
    assert finding.trust == "poor"
    assert "gives the private picture away" not in found.verdict


def test_other_weights_than_the_clients_are_noticed() -> None:
    found = audit(vit(seed=2), update_of(vit(seed=1)))
    assert by_attack(found)["embedding"] == "contradicted"
    assert "weights" in found.verdict
    assert report(found)["attacks"]["embedding"]["exact"] is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_believed_less(dtype: torch.dtype) -> None:
    model = vit()
    found = audit(model, update_of(model).to(dtype=dtype))
    assert "exact" not in by_attack(found).values()
    assert any(str(dtype).removeprefix("torch.") in note for note in found.notes)
    # Whatever is called close, likely or coarse really is a picture one recognizes.
    for finding in found.applied:
        if finding.trust in ("close", "likely", "coarse"):
            assert psnr(finding.result.pixels[0], photograph(torch.float64)) > 20


def test_trust_hangs_on_conditions_and_not_on_words() -> None:
    model = vit()
    half = audit(model, update_of(model).to(dtype=torch.float16))
    assert half.applied
    for finding in half.applied:
        failed = [condition for condition in finding.result.conditions if not condition.holds]
        assert finding.result.conditions_hold is not bool(failed)
        assert all(condition.text in finding.reason for condition in failed)
        if failed:
            assert finding.trust not in ("exact", "close", "coarse")
    entry = report(half)["attacks"][half.applied[0].attack.name]
    assert [c["name"] for c in entry["conditions"]] == [c.name for c in half.applied[0].result.conditions]


def test_without_the_head_nothing_is_played_back() -> None:
    model = vit()
    found = audit(model, update_of(model, withhold=["head.weight", "head.bias"]))
    assert found.labels is None
    assert by_attack(found)["embedding"] == "close"  # fixed by its equations, but not played back
    assert found.applied[0].result.determined
    assert all(finding.replay is None for finding in found.findings)
    assert any("no label was read" in note for note in found.notes)
    assert "gradient residual: not computed" in markdown(found)


def test_notes_name_dropout_several_steps_and_a_forward_pass_that_fails() -> None:
    class Moody(type(vit())):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs a mask")

    inner = vit()
    update = update_of(inner)
    inner.__class__ = Moody
    model = nn.Sequential(inner, nn.Dropout(0.1))
    renamed = {f"0.{name}": g for name, g in update.gradients.items()}
    found = audit(model, replace(update, gradients=renamed, source="fedavg"))
    assert by_attack(found)["embedding"] == "close"
    text = " ".join(found.notes)
    assert all(word in text for word in ("dropout", "local step", "RuntimeError: needs a mask"))
    assert len(found.notes) == 3


def test_numbers_beyond_all_bounds_break_nothing() -> None:
    model = vit().double()
    update = update_of(model)
    found = audit(model, replace(update, gradients={name: 1e200 * g for name, g in update.gradients.items()}))
    json.dumps(report(found), allow_nan=False)
    assert markdown(found)


def test_model_and_generator_are_left_alone() -> None:
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update, state = update_of(model), torch.get_rng_state()
    audit(model, update)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_adapters_are_among_the_parts_and_their_rounds_are_read_together() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = vit(width=96).double()
    config = peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["head"])
    model = peft.get_peft_model(base, config).eval()
    rounds = []
    for _ in range(4):
        update = update_of(model)
        rounds.append(Round(model, update))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in update.gradients:
                    p -= 0.1 * update.gradients[name]
    first, all_of_them = audit(model, rounds[0]), audit(model, rounds)
    states = [part.state for part in first.parts if part.part == "first attention, adapter"]
    assert states == ["zero", "zero"]  # B is zero until its first step
    assert first.leak == "none"
    assert all_of_them.leak in ("exact", "close")
    assert any("4 rounds of one client" in note for note in all_of_them.notes)


def test_the_limits_of_a_replay_are_those_of_the_fuzz_study() -> None:
    rows = [row for row in recorded("fuzz.csv", images=1) if row["attack"] != "invert"]
    played = [(float(row["residual"]), float(row["psnr"])) for row in rows if row["residual"] and row["psnr"]]

    def share_below(decibels: float, least: float, most: float) -> float:
        found = [psnr < decibels for residual, psnr in played if least <= residual < most]
        return sum(found) / len(found)

    assert share_below(38, 0, run._GOOD_REPLAY) < 0.05
    assert share_below(22, 0, run._BAD_REPLAY) < 0.05
    assert share_below(18, run._BAD_REPLAY, float("inf")) > 0.5
