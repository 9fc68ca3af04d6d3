"""Models that no reader knows, described by the caller: patches that a linear layer reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from vit_families import db, made, picture, shared

import aprillab as al
from aprillab.anatomy import Tiling, UnknownModelError, dissect
from aprillab.anatomy.stem import flattening

PATCH, SIZE, WIDTH = (4, 6), (12, 18), 96


class Mine(nn.Module):
    """A ViT whose patch embedding is a linear layer of patches that are flattened by
    row, column, channel.
    """

    def __init__(self, *before: nn.Module, behind: tuple[nn.Module, ...] = (), order: str = "h w c") -> None:
        super().__init__()
        self.tiling = Tiling(PATCH, SIZE, order)
        self.embed = nn.Sequential(*before, nn.Linear(PATCH[0] * PATCH[1] * 3, WIDTH), *behind)
        self.where = nn.Parameter(torch.randn(self.tiling.count, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 3, 64, dropout=0, batch_first=True, norm_first=True)
        self.classify = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(self.tiling.patches(images)) + self.where
        return self.classify(self.block(tokens).mean(1))


PARTS = {
    "patch_weight": "embed.0.weight", "patch_bias": "embed.0.bias", "position": "where", "image_size": SIZE,
    "query": "block.self_attn.in_proj_weight[0:96]", "key": "block.self_attn.in_proj_weight[96:192]",
    "value": "block.self_attn.in_proj_weight[192:288]", "norm_weight": "block.norm1.weight",
    "norm_bias": "block.norm1.bias", "first_block": "prenorm", "patch_size": PATCH,
}  # fmt: skip


@pytest.mark.parametrize("order", ["h w c", "c h w", "w h c"])
def test_flattened_patches_in_the_order_that_the_caller_names(order: str) -> None:
    model = made(lambda: Mine(order=order))
    anatomy = dissect(model, **PARTS, pixel_order=order)
    assert (anatomy.channels, anatomy.head_weight) == (3, "classify.1.weight")
    images = picture(model, anatomy)
    update = shared(model, images)
    assert db(al.invert(model, update, anatomy=anatomy, attack="embedding"), anatomy, images) > 150
    frozen = {name: g for name, g in update.gradients.items() if name != "where"}
    found = al.invert(model, al.ClientUpdate(frozen, withheld=("where",)), anatomy=anatomy, attack="span")
    assert db(found, anatomy, images) > 100
    other = dissect(model, **PARTS, pixel_order="c h w" if order != "c h w" else "h w c")
    assert db(al.invert(model, update, anatomy=other, attack="embedding"), anatomy, images) < 30


class Rearrange(nn.Module):
    """What einops' layer shows of itself, and does."""

    def __init__(self, pattern: str, tiling: Tiling, **axes_lengths: int) -> None:
        super().__init__()
        self.pattern, self.axes_lengths, self.tiling = pattern, axes_lengths, tiling

    def forward(self, patches: Tensor) -> Tensor:
        return patches  # Mine has cut the picture


def test_a_rearrange_in_front_says_size_and_order() -> None:
    layer = Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", Tiling(PATCH, SIZE, "h w c"), p1=4, p2=6)
    model = made(lambda: Mine(layer))
    parts = {k: v for k, v in PARTS.items() if k != "patch_size"} | {"patch_weight": "embed.1.weight"}
    anatomy = dissect(model, **{**parts, "patch_bias": "embed.1.bias"})
    assert (anatomy.patch_size, anatomy.pixel_order, anatomy.channels) == (PATCH, "h w c", 3)
    images = picture(model, anatomy)
    assert db(al.invert(model, shared(model, images), anatomy=anatomy, attack="embedding"), anatomy, images) > 150


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("b c (h p1) (w p2) -> b (h w) (c p1 p2)", ((4, 6), "c h w")),
        ("b c (h y) (w x) -> b (h w) (x y c)", None),  # without lengths of x and y
        ("b c (h p1) (w p2) -> b (w h) (p1 p2 c)", None),  # columns of patches
        ("b (h p1) (w p2) c -> b (h w) (p1 p2 c)", None),
        ("b c h w -> b (h w) c", None),
        ("b c", None),
    ],
)
def test_patterns(pattern: str, found: tuple[tuple[int, int], str] | None) -> None:
    model = nn.Sequential(Rearrange(pattern, Tiling(PATCH, SIZE), p1=4, p2=6), nn.Linear(72, 8))
    assert flattening(model, "1.weight") == found


def test_gradient_matching_reads_the_picture_by_its_parts_too() -> None:
    model = made(Mine)
    anatomy = dissect(model, **PARTS, pixel_order="h w c")
    update = shared(model, picture(model, anatomy))
    found = al.match_gradients(model, update, anatomy=anatomy, recipe="april", max_evaluations=2)
    assert found.images.shape == (1, 3, *SIZE)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (Mine(), {"patch_size": None}, r"\(96, 72\) is a linear map of flattened patches: give patch_size"),
        (Mine(), {"patch_size": 5}, "reads 72 numbers a patch, and patches of 5×5 pixels have 25 a channel"),
        (Mine(), {"channels": 4}, "patches of 4×6 pixels have 24 a channel, of 4"),
        (
            Mine(nn.LayerNorm(72)),
            {"patch_weight": "embed.1.weight", "patch_bias": None},
            "LayerNorm reads the flattened patch before embed.1: the linear systems would give normalized patches",
        ),
        (
            Mine(nn.Linear(72, 72)),
            {"patch_weight": "embed.1.weight", "patch_bias": None},
            "embed.1 reads what a Linear makes of the picture",
        ),
        (Mine(behind=(nn.LayerNorm(WIDTH),)), {}, "a token is not linear in its patch"),
    ],
)
def test_what_cannot_be_read_is_refused(model: nn.Module, changes: dict[str, object], message: str) -> None:
    parts = {name: value for name, value in {**PARTS, **changes}.items() if value is not None}
    with pytest.raises((UnknownModelError, ValueError), match=message):
        dissect(model, **parts, pixel_order="h w c")


def test_a_head_is_guessed_where_it_is_the_last_layer() -> None:
    model = Mine()
    assert dissect(model, **PARTS, pixel_order="h w c").head_bias == "classify.1.bias"
    model.classify = nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5))
    assert dissect(model, **PARTS, pixel_order="h w c").head_weight is None
    model.classify = nn.Sequential(nn.Linear(WIDTH, WIDTH))  # as wide as the tokens: it may be a projection
    assert dissect(model, **PARTS, pixel_order="h w c").head_weight is None


# --- Classes of one's own under timm's names ---------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, u: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.qkv(u).chunk(3, -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attn(self.norm1(z))
        return z + self.mlp(self.norm2(z)).sigmoid()


class DinoLike(nn.Module):
    """The names of DINOv2's own code: registers without a position, an embedding that is
    always interpolated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.img_size = 16
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(WIDTH)

    def interpolate_pos_encoding(self, x: Tensor, first: int, second: int) -> Tensor:
        if (first, second) == (16, 16):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(first // 4, second // 4), mode="bilinear")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, *images.shape[2:])
        tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(len(tokens), -1, -1), tokens[:, 1:]], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


@pytest.mark.parametrize("size", [None, 12, (12, 8)])
def test_a_class_of_ones_own_under_timms_names(size: int | tuple[int, int] | None) -> None:
    model = made(lambda: nn.Sequential(DinoLike(), nn.Linear(WIDTH, 5)))
    anatomy = dissect(model) if size is None else dissect(model, image_size=size)
    assert anatomy.remark == "DinoLike is read like timm's VisionTransformer, for it has the same names"
    assert (anatomy.first_block, anatomy.position_prefix, anatomy.resizes) == ("prenorm", 1, True)
    assert (anatomy.prefix, anatomy.head_weight) == (("0.cls_token", "0.register_tokens"), "1.weight")
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = shared(model, images)
    assert db(al.invert(model, update, anatomy=anatomy, attack="embedding"), anatomy, images) > 150
    frozen = {name: g for name, g in update.gradients.items() if name != "0.pos_embed"}
    found = al.invert(model, al.ClientUpdate(frozen, withheld=("0.pos_embed",)), anatomy=anatomy, attack="span")
    assert db(found, anatomy, images) > 60


# --- Tilings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["c h w", "h w c", "w c h"])
def test_patches_go_back_into_their_picture(order: str) -> None:
    tiling = Tiling((2, 3), (4, 9), order)
    images = torch.arange(2 * 3 * 36.0).reshape(2, 3, 4, 9)
    patches = tiling.patches(images)
    assert patches.shape == (2, tiling.count, 18)
    assert torch.equal(tiling.images(patches), images)
    place, row, column, channel = 4, 1, 2, 1  # the second row of patches, its second column
    at = {"c": (channel, 3), "h": (row, 2), "w": (column, 3)}
    flat = 0
    for axis in order.split():
        flat = flat * at[axis][1] + at[axis][0]
    assert patches[1, place, flat] == images[1, channel, 2 + row, 3 + column]
    assert torch.equal(tiling.boxes(patches)[1, place], images[1, :, 2:4, 3:6])
