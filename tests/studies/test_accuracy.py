"""The accuracy study: equal but for the embeddings, paired intervals, its smallest run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from aprillab import VisionTransformer
from studies import accuracy
from studies._rows import read
from studies.accuracy import EMBEDDINGS, Row

COMMAND = ["--seeds", "1", "--epochs", "1", "--width", "16", "--depth", "1"]


def digits(part: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = 30 if part == "train" else 20
    images = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))
    return images, torch.arange(count) % 10


def test_the_embeddings_differ_in_nothing_but_the_embedding() -> None:
    shape = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 2}
    found = {name: VisionTransformer(**shape, seed=3, **accuracy.options_of(name, 2, 16, seed=3))
             for name in EMBEDDINGS}  # fmt: skip
    states = {
        name: {key: tensor for key, tensor in model.state_dict().items() if key != "position_embedding"}
        for name, model in found.items()
    }
    for name, model in found.items():
        assert states[name].keys() == states["learned"].keys()
        assert all(torch.equal(tensor, states["learned"][key]) for key, tensor in states[name].items())
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert ("position_embedding" in trained) == (name == "learned")
    assert torch.equal(found["frozen"].position_embedding, found["learned"].position_embedding)
    assert 0.5 < float(found["frozen, scaled"].position_embedding.std()) < 0.9


def test_intervals_are_paired_by_seed() -> None:
    mean, half = accuracy.interval(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean == 3.0
    assert half == pytest.approx(2.7764451 * (2.5**0.5) / 5**0.5, rel=1e-6)
    rows = [
        Row("mnist5k", name, seed, value / 100, 0.1, 2, 10, 4, 4, 1.0)
        for seed in range(3)
        for name, value in (("learned", 80 + 5 * seed), ("none", 78 + 5 * seed))
    ]
    # The seeds differ by five points, the embeddings by two at each of them: the interval is
    # narrow.
    table = accuracy.summary(pd.DataFrame(rows))
    assert "| none | 3 | 83.0 ± 12.4 | -2.0 ± 0.0 | 78.0 to 88.0 | 1 |" in table
    assert "| learned | 3 | 85.0 ± 12.4 | – |" in table


def test_a_study_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy.al, "mnist5k", digits)
    command = [*COMMAND, "--out", str(tmp_path)]
    accuracy.main(command)
    path = tmp_path / "accuracy.csv"
    rows = read(path, Row)
    assert tuple(rows.embedding) == EMBEDDINGS
    assert rows.accuracy.between(0, 1).all()
    assert set(rows.train_images) == {30}
    # Two rows are missing and one has another number: it is not measured again.
    kept = path.read_text().splitlines()[:-2]
    kept[1] = ",".join([*kept[1].split(",")[:3], "0.123", *kept[1].split(",")[4:]])
    path.write_text("\n".join(kept) + "\n")
    accuracy.main(command)
    again = read(path, Row)
    assert again.accuracy[0] == 0.123
    assert list(again.accuracy[1:]) == list(rows.accuracy[1:])
    page = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    assert "| none | 1 |" in page
    assert "mnist5k: 30 training and 20 test images, pre-norm ViT of patch 7, width 16,\n1 blocks" in page
    with pytest.raises(SystemExit, match=r"'epochs': 1.*'epochs': 2"):
        accuracy.main([*command, "--epochs", "2"])


def test_a_run_that_ctrl_c_ended_early_is_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy.al, "mnist5k", digits)
    monkeypatch.setattr(accuracy, "train", lambda *_, **__: [])  # train returns the epochs it has done
    with pytest.raises(SystemExit, match="interrupted"):
        accuracy.main([*COMMAND, "--out", str(tmp_path)])
    assert read(tmp_path / "accuracy.csv", Row).empty


def test_the_page_of_another_data_set_needs_its_own_rows(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="accuracy_cifar10: there is no"):
        accuracy.main(["--data", "cifar10", "--root", "nowhere", "--report", "--out", str(tmp_path)])
