"""The ablations on CIFAR-2, on a bank of a few random images: every curve is measured, and nothing is measured twice."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import trak

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def ablations(monkeypatch):
    for package in ("matplotlib", "PIL"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("cifar2_ablations")


@pytest.fixture
def bank(ablations, tmp_path):
    """60 images, 3 targets, 6 subsets, and untrained checkpoints under the names that the real bank gives them."""
    for seed, epoch in ((0, 8), (0, 24), (1, 24), (2, 24)):
        torch.manual_seed(100 * seed + epoch)
        save_file(ablations.ResNet9().state_dict(), tmp_path / f"seed{seed:02d}_epoch{epoch:02d}.safetensors")
    labels = torch.arange(60) % 2
    generator = np.random.default_rng(0)
    return ablations.Bank(
        (torch.randn(60, 3, 32, 32), labels),
        (torch.randn(3, 3, 32, 32), labels[:3]),
        [tmp_path / f"seed{seed:02d}_epoch24.safetensors" for seed in range(3)],
        generator.random((6, 60)) < 0.5,
        generator.normal(size=(6, 3)),
    )


def test_all_curves_are_measured_once(ablations, bank, tmp_path, monkeypatch):
    plan = ablations.Plan(
        dim=16,
        dims=(8, 16),
        sizes=(1, 2),
        dim_sizes=(1,),
        seeds=(0,),
        epochs=(8, 24),
        parameters=("narrow.*", "head.*"),
    )
    measurements = ablations.Measurements(bank, plan, tmp_path / "out")
    found = ablations.measure_all(measurements)
    monkeypatch.setattr(ablations.Measurements, "_measure", lambda *_: pytest.fail("measured again"))
    assert ablations.measure_all(measurements) == found

    # A point is the mean over its ensembles of what the one call gives.
    (point,) = (one for one in found if (one["curve"], one["x"], one["formula"]) == ("ensemble", 1, "paper"))
    expected = []
    for checkpoint in bank.checkpoints:
        attribution = trak.attribute(
            ablations.ResNet9(),
            bank.train_set,
            bank.targets,
            task="image_classification",
            checkpoints=[checkpoint],
            projection=trak.Sparse(dim=16),
            parameters=["narrow.*", "head.*"],
            save_dir=tmp_path / "out" / "features-16",
            **ablations.FORMULAS["paper"],
        )
        expected.append(trak.evaluation.lds(attribution.scores, bank.masks, bank.margins).mean)
    assert point["each"] == pytest.approx(expected)
    assert point["lds"] == pytest.approx(np.mean(expected))

    result = {
        "plan": {"dim": 16},
        "machine": {"processor": "P", "torch": "T", "trak": "V", "date": "D"},
        "num_subsets": 6,
        "num_targets": 3,
        "points": found,
    }
    text = ablations.section(result)
    assert text.count(f"{point['lds']:.3f} [{point['low']:.3f}, {point['high']:.3f}]") >= 1
    ablations.draw(result, tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plan_asks_for_checkpoints_that_the_bank_has_and_for_disjoint_ensembles(ablations):
    for plan in (ablations.Plan(), ablations.QUICK):
        for point in ablations.points(plan):
            members = [member for ensemble in point.ensembles for member in ensemble]
            assert len(members) == len(set(members))
            assert all(epoch == 24 or (seed in (0, 1) and epoch in (4, 8, 16)) for seed, epoch in members)
            assert all(seed < 10 for seed, _ in members)
            assert {len(ensemble) for ensemble in point.ensembles} == {len(point.ensembles[0])}


def test_missing_data_are_said(ablations, tmp_path):
    with pytest.raises(SystemExit, match="pass --data FOLDER"):
        ablations.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_page_has_the_recorded_result(ablations):
    page = importlib.import_module("experiment_page")
    text = (page.PAGES / "cifar.md").read_text(encoding="utf-8")
    result = json.loads((page.RESULTS / "experiments-cifar.json").read_text())
    assert page.with_section(text, "cifar", ablations.section(result)) == text
    assert (page.ASSETS / "experiments-cifar-ablations.png").stat().st_size < 200_000
