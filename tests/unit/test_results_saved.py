"""A saved attribution's folder: what is written, and what is said of one that is not whole."""

import json

import numpy as np
import pytest
import torch

import trak


@pytest.fixture
def saved(tmp_path):
    scores = trak.ArrayScores(torch.arange(6.0).reshape(3, 2))
    attribution = trak.Attribution(scores, weights=torch.ones(3), info={"method": "by hand"})
    return attribution.save(tmp_path / "saved")


def test_what_is_written_comes_back(saved):
    assert sorted(file.name for file in saved.iterdir()) == [
        "attribution.json",
        "scores.npy",
        "vectors.safetensors",
    ]
    back = trak.Attribution.load(saved)
    assert back.scores.tensor().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert back.info == {"method": "by hand"}
    assert torch.equal(back.weights, torch.ones(3))
    assert back.outputs is None
    assert not back.has_self_influence
    with pytest.raises(trak.InputError, match=r"no self-influence.*such as trak.TRAK"):
        back.self_influence()


def test_saving_again_replaces(saved):
    trak.Attribution(trak.ArrayScores(torch.zeros(4, 1))).save(saved)
    back = trak.Attribution.load(saved)
    assert back.scores.shape == (4, 1)
    assert back.weights is None


@pytest.mark.parametrize("entry", ["num_train", "num_targets", "info"])
def test_an_absent_entry_is_named(saved, entry):
    meta = json.loads((saved / "attribution.json").read_text())
    del meta[entry]
    (saved / "attribution.json").write_text(json.dumps(meta))
    with pytest.raises(
        trak.StoreError, match=f"attribution.json is damaged.*no entry '{entry}'.*Save the attribution again"
    ):
        trak.Attribution.load(saved)


def test_scores_of_another_size_are_refused(saved):
    np.save(saved / "scores.npy", np.zeros((3, 5), dtype=np.float32))
    with pytest.raises(
        trak.StoreError, match=r"scores.npy is damaged.*\[3, 5\].*\[3, 2\].*Save the attribution again"
    ):
        trak.Attribution.load(saved)


def test_a_half_written_folder_holds_none(saved):
    """The JSON is removed first and written last."""
    (saved / "attribution.json").unlink()
    with pytest.raises(trak.StoreError, match="holds no saved attribution"):
        trak.Attribution.load(saved)


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    attribution = trak.Attribution(trak.ArrayScores(torch.zeros(3, 2)))
    with pytest.raises(trak.StoreError, match=r"thesis.tex.*folder of its own"):
        attribution.save(tmp_path)
    with pytest.raises(trak.StoreError, match=r"is a file.*another path"):
        attribution.save(tmp_path / "thesis.tex")
