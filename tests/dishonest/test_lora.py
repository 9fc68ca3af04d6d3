"""A server that chooses LoRA's B: one round spans the tokens, and the model computes what it did."""

import pytest
import torch

import aprillab as al
from aprillab.dishonest import CannotCheat, lora_spanning

peft = pytest.importorskip("peft")

# p + n + 2 ≤ d: 48 + 4 + 2 ≤ 64, and 8 rows a round for 4 patches.
SHAPE = {"image_size": 8, "patch_size": 4, "width": 64, "depth": 2, "heads": 4, "classes": 10}


def adapted(targets=("query", "value"), rank=4, head=True):
    base = al.VisionTransformer(**SHAPE)
    saved = {"modules_to_save": ["head"]} if head else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=list(targets), **saved)).eval()


def picture(seed=0):
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def played(model, states, pixels):
    rounds = []
    for state in states:
        model.load_state_dict(state)
        update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
        rounds.append(al.Round(state, update))
    return al.span_closed_form(model, rounds, preprocessing=al.HALF, verify=False).pixels[0]


def test_one_round_spans_the_tokens():
    model, pixels = adapted(), picture()
    assert al.psnr(played(model, [lora_spanning(model)], pixels), pixels[0]) > 60


def test_an_honest_first_round_gives_no_row():
    model, pixels = adapted(), picture()
    with pytest.raises(al.AttackNotApplicable):
        played(model, [model.state_dict()], pixels)


def test_too_few_rows_take_another_round():
    model, pixels = adapted(rank=1), picture()
    with pytest.raises(al.AttackNotApplicable):
        played(model, [lora_spanning(model)], pixels)
    assert al.psnr(played(model, [lora_spanning(model, seed=s) for s in range(3)], pixels), pixels[0]) > 60


def test_the_size_does_not_matter_to_a_gradient():
    model, pixels = adapted(), picture()
    assert al.psnr(played(model, [lora_spanning(model, size=1e-4)], pixels), pixels[0]) > 60


def test_the_model_computes_what_it_did():
    model, images = adapted(), al.HALF.to_input(picture())
    before = model(images)
    changed = lora_spanning(model)
    own = model.state_dict()
    names = {name for name in own if not torch.equal(own[name], changed[name])}
    assert names == {name for name in own if "blocks.0" in name and "lora_" in name}
    model.load_state_dict(changed)
    assert torch.equal(model(images), before)


def test_a_client_sees_b_where_it_should_be_zero():
    model = adapted()
    assert not al.inspect_model(model).suspicious
    state = lora_spanning(model)
    model.load_state_dict(state)
    assert al.inspect_model(model)["adapters"].suspicious


def test_what_is_refused():
    with pytest.raises(CannotCheat, match="no adapter"):
        lora_spanning(al.VisionTransformer(**SHAPE))
    with pytest.raises(CannotCheat, match="no adapter"):
        lora_spanning(adapted(targets=("mlp.0",)))
    with pytest.raises(CannotCheat, match="size=0 must be positive"):
        lora_spanning(adapted(), size=0)
