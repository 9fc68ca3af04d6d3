"""The conditioning study: ranks of constructions with known answers; its smallest run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import aprillab as al
from studies._rows import read
from studies._runner import RESULTS
from studies.conditioning import measure as conditioning
from studies.conditioning.__main__ import main
from studies.conditioning.independence import (
    PRECISIONS,
    Embedding,
    Independence,
    independence,
    sinusoids,
    values,
    with_position,
)
from studies.conditioning.measure import FULL, Case, Row, Study, cases
from studies.conditioning.page import line

WIDTH, SIDE, P = 96, 4, 48  # 4 patches of 48 pixels: 48 + 4 + 1 ≤ 96


def vit(**options: Any) -> al.VisionTransformer:
    settings = {
        "image_size": 8, "patch_size": 4, "width": WIDTH, "depth": 1, "heads": 3, "classes": 3, "position": "frozen",
        "bias": False,
    }  # fmt: skip
    return al.VisionTransformer(**(settings | options)).double()


def embedding_matrix(model: al.VisionTransformer) -> Tensor:
    return model.patch_embedding.weight.detach().flatten(1)  # (d, p)


def outside_directions(model: al.VisionTransformer, k: int) -> Tensor:
    """k orthonormal rows (k, d), without mean and orthogonal to the image of C W_e."""
    W = embedding_matrix(model)
    known = torch.cat([W - W.mean(0), torch.ones(WIDTH, 1, dtype=W.dtype)], dim=1)  # (d, p + 1)
    return torch.linalg.qr(known, mode="complete").Q[:, P + 1 : P + 1 + k].T


def with_rows(model: al.VisionTransformer, rows: Tensor, first: float = 0.0) -> al.VisionTransformer:
    """The patches' positions set to ``rows`` (n, d), the class token's to a constant."""
    with_position(model, torch.cat([torch.full((1, WIDTH), first, dtype=rows.dtype), rows]))
    return model


SINGULAR = torch.tensor([3.0, 1.0, 1e-3, 1e-9], dtype=torch.float64)


def known(model: al.VisionTransformer) -> Tensor:
    """Four mixed position vectors with singular values SINGULAR, all outside the image."""
    mix = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    return mix @ (SINGULAR[:, None] * outside_directions(model, 4))


def test_singular_values_and_ranks_of_a_construction_are_found() -> None:
    model = vit()
    found = independence(with_rows(model, known(model), first=7.0))  # the class token's row must not matter
    assert torch.allclose(found.modulo, SINGULAR, rtol=1e-5, atol=1e-14)
    assert torch.allclose(found.positions, SINGULAR, rtol=1e-5, atol=1e-14)
    assert [found.rank(eps) for eps in (0.5, 1e-2, 1e-7, 1e-12)] == [1, 2, 3, 4]
    assert found.rank(2.9e-10) == 4  # 1e-9 is 3.3e-10 of the largest
    assert found.rank(4e-10) == 3
    assert found.condition == pytest.approx(3e9, rel=1e-5)
    assert found.digits(1e-12) == pytest.approx(3, abs=1e-4)


def test_what_lies_in_the_image_of_the_patches_or_in_the_mean_does_not_count() -> None:
    model = vit()
    rows = known(model)
    pixels = torch.randn(4, P, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = independence(with_rows(model, rows + pixels @ embedding_matrix(model).T + 5.0))
    assert torch.allclose(found.modulo, SINGULAR, rtol=1e-4, atol=1e-12)
    assert found.positions[0] > 2 * SINGULAR[0]  # which it does before the image is projected out
    inside = independence(with_rows(model, pixels @ embedding_matrix(model).T))
    assert inside.rank(1e-12) == 0


def test_a_rank_deficient_table_has_its_rank_at_every_precision() -> None:
    model = vit()
    a, b = torch.randn(2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = independence(with_rows(model, torch.stack([a, b, a + b, a - 2 * b])))
    assert [found.rank(eps) for eps in (1e-12, 1e-7, 1e-3)] == [2, 2, 2]
    assert found.least < 1e-13
    assert found.digits(1e-7) < -5  # clamped at the rounding of the computation, not at minus infinity


def test_scaling_moves_the_values_and_the_digits_but_no_rank() -> None:
    model = vit()
    rows = known(model)
    once, ten = (independence(with_rows(model, scale * rows)) for scale in (1.0, 10.0))
    assert torch.allclose(ten.modulo, 10 * once.modulo, rtol=1e-4, atol=1e-13)
    assert ten.rank(1e-7) == once.rank(1e-7) == 3
    assert ten.digits(1e-12) - once.digits(1e-12) == pytest.approx(1, abs=1e-3)
    assert ten.mean_digits(1e-12) - once.mean_digits(1e-12) == pytest.approx(1, abs=1e-3)
    # One of four directions holds all of the mean of 1/σ², so the mean is half a power of four
    # better.
    assert once.mean_digits(1e-12) - once.digits(1e-12) == pytest.approx(math.log10(2), abs=1e-3)


def test_the_bias_counts_and_a_known_pixel_space_frees_directions() -> None:
    model = vit(bias=True)
    rows = known(model)
    with torch.no_grad():
        model.patch_embedding.bias.copy_(-rows[0])
    assert independence(with_rows(model, rows)).least < 1e-12  # b_e + E_1 = 0

    model = vit()
    pixels = torch.eye(P, dtype=torch.float64)[:4]  # positions that look like the first four pixels
    with_rows(model, pixels @ embedding_matrix(model).T)
    assert independence(model).rank(1e-12) == 0
    elsewhere = torch.eye(P, dtype=torch.float64)[:, 4:8]  # but the patches are known to lie in the next four
    assert independence(model, elsewhere).rank(1e-6) == 4


def test_without_a_layernorm_the_mean_counts() -> None:
    rows = torch.ones(4, WIDTH, dtype=torch.float64) * torch.arange(1, 5)[:, None]  # nothing but a mean
    assert independence(with_rows(vit(block="prenorm"), rows)).positions[0] < 1e-10
    assert independence(with_rows(vit(block="april"), rows)).positions[0] > 1
    with pytest.raises(ValueError, match="no position embedding"):
        independence(vit(position="none"))


def test_the_tables_are_the_packages_own() -> None:
    assert torch.allclose(values(sinusoids("1-D"), 4, 192, 0), al.sinusoidal_1d(17, 192))
    assert torch.allclose(values(sinusoids("1-D", 50.0), 4, 192, 0), al.sinusoidal_1d(17, 192, base=50.0))
    assert torch.allclose(values(sinusoids("2-D", 1e3, scale=3.0), 4, 192, 0), 3 * al.sinusoidal_2d((4, 4), 192, 1e3))
    model, other = vit(image_size=16), vit(image_size=16)
    al.defenses.use_sinusoidal(model, "2d", base=100.0, scale=0.5)
    with_position(other, values(sinusoids("2-D", 100.0, scale=0.5), 4, WIDTH, 0))
    assert torch.allclose(model.position_embedding, other.position_embedding, atol=1e-15)
    assert not other.position_embedding.requires_grad
    fast = values(sinusoids("1-D", speed=2.0), 2, 192, 0)  # (5, 192)
    assert torch.allclose(fast, al.sinusoidal_1d(9, 192)[::2])
    random = values(Embedding("random", 0.02), 8, 384, 0)
    assert random.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(random, values(Embedding("random", 0.02), 8, 384, 1))


def test_rounding_a_1d_table_makes_it_independent_and_a_2d_table_never() -> None:
    def least(kind: str, table: str) -> Independence:
        model = al.VisionTransformer(
            image_size=32, patch_size=4, width=192, depth=1, heads=3, classes=3, position="frozen"
        ).double()  # fmt: skip
        with_position(model, values(sinusoids(kind, table=table), 8, 192, 0))
        return independence(model)

    eps = torch.finfo(torch.float64).eps
    assert least("1-D", "").rank(eps) < 50
    assert least("1-D", "float32").rank(eps) == 64
    assert least("1-D", "bfloat16").least > 1e3 * least("1-D", "float32").least
    for table in ("", "float32", "bfloat16"):
        assert least("2-D", table).rank(100 * eps) <= 15  # 8 + 8 − 1


def test_the_line_is_twenty_decibels_a_digit_and_says_how_far_off_the_rows_are() -> None:
    deviations = [0.0, 0.0, 0.0, 4.0, -9.0, 1.0, -1.0]
    digits = pd.Series(range(2, 9), dtype=float)
    rows = pd.DataFrame({"digits": digits, "psnr": 20 * digits + 12 + pd.Series(deviations)})
    spent = pd.DataFrame({"digits": [-3.0, 0.0, 1.0], "psnr": 15.0})  # nothing left: not part of the line
    found = line(pd.concat([rows, spent]), "digits")
    assert (found.rows, found.offset, found.spread, found.largest) == (7, 12, 1, 9)
    clean = line(pd.DataFrame({"digits": digits, "psnr": 17 * digits}), "digits")
    assert clean.slope == pytest.approx(17)
    assert clean.largest > 5


def test_the_cases_are_those_of_the_committed_table() -> None:
    expected = [case._replace(embedding=str(case.embedding)) for case in cases(Study())]
    found = read(RESULTS / "conditioning.csv", Row)[list(Case._fields)].itertuples(index=False, name=None)
    assert list(found) == expected


@pytest.mark.slow
def test_the_smallest_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--quick", "--out", str(tmp_path)])
    table = tmp_path / "conditioning.csv"
    rows = read(table, Row)
    assert not rows.duplicated(list(Case._fields)).any()
    random = rows[(rows.weights == "random") & (rows.section.str[0] == "3")]
    found = {(row.patches, row.kind, row.table, row.precision): row for row in random.itertuples()}

    for patches in (64, 16):
        for precision in FULL:
            frozen = found[patches, "random", "", precision]
            assert frozen.psnr > 40
            assert frozen.rank == patches
            flat = found[patches, "2-D", "", precision]
            assert flat.psnr < 30
            assert flat.rank == flat.rank_bound == 2 * patches**0.5 - 1
        assert found[patches, "1-D", "float32", "float64"].psnr > 100
    one_d = {p: found[16, "1-D", "", p] for p in PRECISIONS}
    assert one_d["float32"].psnr < one_d["float64"].psnr - 20
    assert one_d["float64"].rank == 16 > one_d["float32"].rank > one_d["bfloat16"].rank
    assert found[64, "1-D", "", "float64"].psnr < 30  # float64 is not enough for 64 patches: it is for 16
    assert found[64, "1-D", "", "float64"].rank < 64

    trained = rows[(rows.weights == "trained") & (rows.kind == "learned")]
    assert set(trained.precision) == set(PRECISIONS)
    assert (trained.psnr[trained.precision.isin(FULL)] > 40).all()

    assert (tmp_path / "conditioning.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "conditioning.md").read_text(encoding="utf-8")
    assert all(embedding in text for embedding in rows.embedding)
    assert "| 7 of 16 |" in text

    def nothing(*arguments: object) -> None:
        raise AssertionError("a row that was there was measured again")

    before = table.read_text(encoding="utf-8")
    monkeypatch.setattr(conditioning, "attacked", nothing)
    main(["--quick", "--out", str(tmp_path)])
    assert table.read_text(encoding="utf-8") == before
