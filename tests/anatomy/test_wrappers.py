"""The ViT within whatever holds it: which one is read, where its head is, and what is said of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_vit
from torch import Tensor, nn
from vit_families import db, made, of_timm, of_torchvision, of_transformers, picture, shared

import aprillab as al
from aprillab.anatomy import UnknownModelError, dissect, playable

VIT = "vision_transformer.VisionTransformer"


class Holder(nn.Module):
    """Modules under names of the caller's; the last one is the model that runs."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.runs = name

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self, self.runs)(images)


class WithHead(nn.Module):
    """A backbone without a classifier, and one beside it."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        found = self.backbone(images)
        features = found if isinstance(found, Tensor) else found.last_hidden_state[:, 0]
        return self.head(features)


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


# --- Which one --------------------------------------------------------------------------------------------------


def test_of_teacher_and_student_the_trained_one_is_read_and_there_is_a_word() -> None:
    student = made(of_torchvision)
    model = Holder(teacher=frozen(student), student=student)
    anatomy = dissect(model)
    assert anatomy.patch_weight == "student.conv_proj.weight"
    assert anatomy.root == "student"
    assert anatomy.remark == "two ViTs in this model: 'teacher' (frozen) and 'student'; read is 'student'"
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    found = al.invert(model, shared(model, images), attack="embedding")
    assert db(found, anatomy, images) > 150
    # The order does not matter, and one ViT needs no word.
    assert dissect(Holder(student=student, teacher=frozen(student))).root == "student"
    assert dissect(student).remark == ""
    assert dissect(frozen(student)).root == ""


def test_of_two_trained_ones_the_caller_names_one() -> None:
    one, other = tiny_vit(), tiny_vit()
    model = Holder(first=one, second=Holder(inner=other))
    with pytest.raises(UnknownModelError, match=r"are trained, 'first', 'second.inner': .* vit='second.inner'\)"):
        dissect(model)
    assert dissect(model, vit="first").root == "first"
    assert dissect(model, vit="second").root == "second.inner"
    assert "read is 'second.inner'" in dissect(model, vit="second").remark
    assert dissect(model, patch_weight="first.patch_embedding.weight").root == "first"
    with pytest.raises(UnknownModelError, match=r"vit='third' is no module .* are at 'first', 'second.inner'"):
        dissect(model, vit="third")
    with pytest.raises(UnknownModelError, match=r"vit='' .*are at 'first', 'second.inner'"):
        dissect(model, vit="")
    with pytest.raises(UnknownModelError, match="3 Vision Transformers of this model are trained"):
        dissect(Holder(a=tiny_vit(), b=tiny_vit(), c=tiny_vit()))


def test_none_of_two_is_trained() -> None:
    model = Holder(a=frozen(tiny_vit()), b=frozen(tiny_vit()))
    assert dissect(model).remark == "two ViTs in this model: 'a' (frozen) and 'b' (frozen); read is 'a'"


# --- Where it stands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "root"),
    [
        (lambda vit: nn.Sequential(nn.Identity(), vit), "1"),
        (lambda vit: nn.DataParallel(vit), "module"),
        (lambda vit: Holder(_module=vit), "_module"),
        (lambda vit: Holder(model=Holder(net=vit)), "model.net"),
    ],
)
def test_the_root_runs_on_model_input(wrap: Callable[[nn.Module], nn.Module], root: str) -> None:
    vit = tiny_vit()
    model = wrap(vit)
    anatomy = dissect(model)
    assert anatomy.root == root
    assert model.get_submodule(anatomy.root) is vit
    assert anatomy.head_weight == f"{root}.head.weight"


def test_a_compiled_model_keeps_its_prefix() -> None:
    vit = tiny_vit()
    compiled = torch.compile(vit)  # nothing is compiled before it runs
    anatomy = dissect(compiled)
    assert anatomy.patch_weight == "_orig_mod.patch_embedding.weight"
    assert anatomy.patch_weight in al.tensors_of(compiled)
    assert compiled.get_submodule(anatomy.root) is vit


# --- The head ---------------------------------------------------------------------------------------------------


def test_an_mlp_head_is_read_at_its_last_layer() -> None:
    model = made(lambda: of_torchvision(representation_size=20))
    anatomy = dissect(model)
    assert (anatomy.head_weight, anatomy.head_bias) == ("heads.head.weight", "heads.head.bias")
    model.heads = nn.Sequential(nn.Dropout(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    assert dissect(model).head_bias == "heads.3.bias"
    hugging = of_transformers("ViTForImageClassification")
    hugging.classifier = nn.Sequential(nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 5))
    assert dissect(hugging).head_weight == "classifier.2.weight"


def test_a_head_beside_the_backbone_is_found_and_the_root_runs_both() -> None:
    def build() -> nn.Module:
        student = WithHead(of_timm(VIT, num_classes=0), nn.Sequential(nn.Linear(96, 20), nn.GELU(), nn.Linear(20, 5)))
        teacher = WithHead(of_timm(VIT, num_classes=0), nn.Linear(96, 5)).requires_grad_(False)
        return Holder(teacher=teacher, student=student)

    model = made(build)
    anatomy = dissect(model)
    assert anatomy.head_bias == "student.head.2.bias"
    assert anatomy.root == "student"
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    assert model.get_submodule(anatomy.root)(images).shape == (1, 5)
    assert al.recover_labels(model, shared(model, images)).labels.tolist() == [3]


def test_a_teachers_own_head_is_not_the_students() -> None:
    student = WithHead(of_timm(VIT, num_classes=0), nn.Linear(96, 5))
    student.teacher = frozen(of_timm(VIT))  # with a classifier, and beside the student's
    assert dissect(student).head_weight == "head.weight"


def test_a_backbone_of_transformers_is_read_within_its_wrapper() -> None:
    model = made(lambda: WithHead(of_transformers("ViTModel", num_labels=2), nn.Linear(96, 5)))
    anatomy = dissect(model)
    assert (anatomy.head_weight, anatomy.root) == ("head.weight", "")
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    assert db(al.invert(model, shared(model, images), attack="embedding"), anatomy, images) > 150


def test_a_normalization_in_front_of_a_backbone_is_stepped_over_in_the_replay() -> None:
    class Normalize(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return al.HALF.to_input(pixels)

    backbone = made(lambda: of_timm(VIT, num_classes=0))
    model = nn.Sequential(Normalize(), backbone, nn.Linear(96, 5).double())
    anatomy = dissect(model)
    assert (anatomy.root, anatomy.vit, anatomy.head_bias) == ("", "1", "2.bias")
    pixels = picture(model, anatomy)
    images = al.HALF.to_input(pixels)
    update = shared(model, pixels)
    found = al.invert(model, update, attack="embedding")
    assert db(found, anatomy, images) > 150
    assert found.exact, found.reason
    with playable(model, anatomy):
        torch.testing.assert_close(model(images), model[2](backbone(images)))
    assert not torch.allclose(model(images), model[2](backbone(images)))


def test_searches_look_for_model_input_behind_a_normalization() -> None:
    class Normalize(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return al.HALF.to_input(pixels)

    model = nn.Sequential(Normalize(), made(lambda: of_timm(VIT)))
    anatomy = dissect(model)
    pixels = (255 * picture(model, anatomy)).round() / 255
    images, update = al.HALF.to_input(pixels), shared(model, pixels)
    found = al.match_gradients(
        model, update, recipe="april", anatomy=anatomy, start=images, max_evaluations=1, dtype=torch.float64
    )
    assert found.diagnostics["residual"] < 1e-9
    frozen = al.ClientUpdate(
        {name: g for name, g in update.gradients.items() if name != anatomy.position},
        withheld=(anatomy.position or "",),
    )
    found = al.span_then_round(model, frozen, anatomy=anatomy, max_evaluations=0, progress=False)
    assert found.exact, found.reason
    assert db(found, anatomy, images) > 100


def test_two_heads_beside_the_backbone_are_not_guessed_from() -> None:
    model = WithHead(of_timm(VIT, num_classes=0), nn.Linear(96, 5))
    model.projector = nn.Linear(96, 16)
    assert dissect(model).head_weight is None
    assert dissect(model, head_weight="head.weight").head_weight == "head.weight"
    assert dissect(of_timm(VIT, num_classes=0)).head_weight is None


# --- No ViT -----------------------------------------------------------------------------------------------------


def test_the_owner_of_a_cnn_is_sent_to_gradient_matching() -> None:
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 3)).double()
    with pytest.raises(UnknownModelError, match=r"no attention.*match_gradients\(model, update, image_shape="):
        dissect(cnn)
    cut = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(64, 3))  # as a patch embedding is, too
    with pytest.raises(UnknownModelError, match=r"0.weight \(4, 3, 2, 2\)\. .* If it is a CNN, al\.match_gradients"):
        dissect(cut)
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    update = shared(cnn, images, label=1)
    found = al.match_gradients(cnn, update, recipe="dlg", image_shape=(3, 8, 8), max_evaluations=3)
    assert found.images.shape == images.shape


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: pytest.importorskip("torchvision").models.swin_t(), "windows merge patches"),
        (lambda: pytest.importorskip("timm").create_model("swin_tiny_patch4_window7_224"), "windows merge patches"),
        (
            lambda: pytest.importorskip("timm").create_model("vit_relpos_small_patch16_224"),
            "positions are relative: it has no absolute position embedding",
        ),
    ],
)
def test_no_absolute_position_is_the_reason(build: Callable[[], nn.Module], words: str) -> None:
    with torch.device("meta"):
        model = build()
    with pytest.raises(UnknownModelError, match=words):
        dissect(model)


@pytest.mark.parametrize(
    "build",
    [
        lambda: of_timm("eva.Eva", use_rot_pos_emb=True, use_abs_pos_emb=False),
        lambda: of_timm("beit.Beit", use_rel_pos_bias=True, use_abs_pos_emb=False),
        lambda: of_transformers("BeitForImageClassification", use_relative_position_bias=True),
    ],
)
def test_relative_and_rotary_positions_are_refused_by_the_attacks(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    anatomy = dissect(model)
    assert anatomy.position is None
    assert "no absolute position embedding" in anatomy.remark
    update = shared(model, anatomy.preprocessing.to_input(picture(model, anatomy)))
    for attack, words in (("embedding", "has no position embedding"), ("span", "nothing tells the patches apart")):
        with pytest.raises(al.AttackNotApplicable, match=words):
            al.invert(model, update, anatomy=anatomy, attack=attack)
