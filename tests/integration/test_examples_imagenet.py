"""The ImageNet example: its reader and network, and a small sample in one process and in two."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trak

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "--sample-size 40 --size 32 --width 4 --epochs 1 --targets 3 --dim 32 --batch-size 16 --top 3"


@pytest.fixture
def imagenet(monkeypatch):
    for package in ("matplotlib", "PIL"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("imagenet")


def published_names():
    """Of ResNet-18's weights, as torchvision and timm give them."""

    def norm(name):
        return [
            f"{name}.{part}"
            for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]

    names = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for stage in range(1, 5):
        for block in range(2):
            for part in (1, 2):
                names += [
                    f"layer{stage}.{block}.conv{part}.weight",
                    *norm(f"layer{stage}.{block}.bn{part}"),
                ]
        if stage > 1:
            names += [f"layer{stage}.0.downsample.0.weight", *norm(f"layer{stage}.0.downsample.1")]
    return names


def test_the_network_takes_published_weights(imagenet):
    with torch.device("meta"):
        network = imagenet.ResNet18()
    state = network.state_dict()
    assert set(state) == set(published_names())
    assert len(state) == 122
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_689_512
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "layer3.0.conv1.weight": (256, 128, 3, 3),
        "layer4.0.downsample.0.weight": (512, 256, 1, 1),
        "fc.weight": (1000, 512),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert imagenet.ResNet18(7, width=4)(torch.randn(2, 3, 64, 48)).shape == (2, 7)


def write(path, width, height, colour):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def test_the_reader_numbers_classes_by_name_and_cuts_the_centre(imagenet, tmp_path):
    from PIL import Image

    write(tmp_path / "b" / "2.png", 100, 300, (255, 0, 0))
    write(tmp_path / "b" / "1.JPEG", 70, 70, (0, 255, 0))
    wide = np.zeros((80, 240, 3), np.uint8)
    wide[:, 80:160] = 255  # the middle third is white: after scaling and cutting nothing else is left
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    images = imagenet.ImageFolder(tmp_path, 70)
    assert images.classes == ("a", "b")
    assert [(path.name, label) for path, label in images.files] == [("x.png", 0), ("1.JPEG", 1), ("2.png", 1)]
    row, pixels, label = images[0]
    assert (row, label, pixels.shape, pixels.dtype) == (0, 0, (3, 70, 70), torch.float32)
    module = importlib.import_module("image_folder")
    white = (1 - module.MEAN) / module.STD
    assert torch.allclose(pixels[:, :, 2:-2], white.expand(3, 70, 66), atol=1e-6)
    assert images[2][1].shape == (3, 70, 70)
    assert len(imagenet.ImageFolder(tmp_path, 70, every=2)) == 2
    assert len(list(iter(images))) == 3
    with pytest.raises(SystemExit, match="has no images in folders"):
        imagenet.ImageFolder(tmp_path / "a", 70)
    with pytest.raises(SystemExit, match="there is no folder"):
        imagenet.ImageFolder(tmp_path / "c", 70)


@given(
    rows=st.integers(1, 5000),
    world=st.integers(1, 9),
    stored=st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
)
def test_processes_share_the_missing_rows(rows, world, stored):
    sys.path.insert(0, str(EXAMPLES))
    try:
        imagenet = importlib.import_module("imagenet")
    finally:
        sys.path.remove(str(EXAMPLES))
    missing = [
        (start, stop) for start, stop in [tuple(sorted(min(one, rows) for one in stored))] if start < stop
    ]
    taken = torch.zeros(rows, dtype=torch.int64)
    for rank in range(world):
        for start, stop in imagenet.missing(missing, imagenet.Process(rank, world, "cpu").share(rows)):
            taken[start:stop] += 1
    expected = torch.zeros(rows, dtype=torch.int64)
    for start, stop in missing:
        expected[start:stop] = 1
    assert torch.equal(taken, expected)


def test_a_small_sample_gives_the_scores_of_the_one_call_and_goes_on(imagenet, tmp_path, capsys):
    command = ["--make-sample", "fashion", "--out", str(tmp_path), *SMALL.split(), "--device", "cpu"]
    imagenet.main(command)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["num_train"], result["num_targets"], result["num_checkpoints"]) == (40, 3, 2)
    assert result["targets"][0]["target"] in capsys.readouterr().out
    assert (tmp_path / "proponents.png").read_bytes()[:4] == b"\x89PNG"

    images = imagenet.ImageFolder(tmp_path / "sample" / "train", 32)
    targets = imagenet.draw_targets(imagenet.ImageFolder(tmp_path / "sample" / "val", 32), 3, 0)

    def tensors(data):
        rows = [data[number] for number in range(len(data))]
        return torch.stack([pixels for _, pixels, _ in rows]), torch.tensor([label for *_, label in rows])

    attribution = trak.attribute(
        imagenet.ResNet18(10, 4),
        tensors(images),
        tensors(targets),
        task="image_classification",
        checkpoints=sorted((tmp_path / "checkpoints").iterdir()),
        projection=trak.Sparse(32),
        device="cpu",
    )
    top = attribution.top(3)
    for found, rows, scores in zip(result["targets"], top.rows.tolist(), top.scores.tolist()):
        assert [one["row"] for one in found["raise"]] == rows
        assert [one["score"] for one in found["raise"]] == pytest.approx(scores, rel=1e-4)

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}
    imagenet.main(command)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")} == files
    assert json.loads((tmp_path / "result.json").read_text())["targets"] == result["targets"]
    with pytest.raises(SystemExit, match="has features of other images"):
        imagenet.main([*command, "--every", "2"])


def test_what_is_missing_is_said(imagenet, tmp_path, capsys):
    with pytest.raises(SystemExit):
        imagenet.main(["--out", str(tmp_path)])
    assert "say which images" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--make-sample fashion"):
        imagenet.main(["--make-sample", "cifar10", "--data", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(imagenet, tmp_path):
    script = str(EXAMPLES / "imagenet.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    options = ["--make-sample", "fashion", *SMALL.split(), "--device", "cpu"]
    subprocess.run([*command, *options, "--out", str(tmp_path / "two")], check=True)
    imagenet.main([*options, "--out", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for alone, together in zip(one["targets"], two["targets"]):
        assert [found["row"] for found in alone["raise"]] == [found["row"] for found in together["raise"]]
        scores = [found["score"] for found in alone["raise"]]
        assert [found["score"] for found in together["raise"]] == pytest.approx(scores, rel=1e-3)
