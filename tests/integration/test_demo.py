"""`trak demo`: its data, its training, and a tiny run from end to end."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import trak
from trak import InputError
from trak.demo import DemoResult, Settings, bank, run
from trak.demo.content import choose_targets
from trak.demo.data import BUNDLED, CLASS_NAMES, DemoData, corrupt, load_data
from trak.demo.make_data import DEBIAN_SOURCE, draw, read_idx, source_hashes
from trak.demo.recipe import Recipe, build_model, learning_rate, margins, train, train_many
from trak.demo.settings import full_settings, quick_settings
from trak.evaluation import random_subsets

TINY = Settings(
    seed=3,
    num_checkpoints=2,
    num_subsets=5,
    models_per_subset=2,
    projection_dim=32,
    recipe=Recipe(channels=(4, 8), epochs=1),
)


@pytest.fixture(scope="module")
def data() -> DemoData:
    return load_data(corrupted_share=0.1, seed=1)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return run(settings=TINY, out=folder, progress=False), folder


def test_the_bundled_images_are_balanced_and_small(data: DemoData) -> None:
    assert BUNDLED.stat().st_size < 2.5e6
    assert data.images.shape == (3000, 1, 28, 28)
    assert data.test_images.shape == (500, 1, 28, 28)
    assert data.true_labels.bincount().tolist() == [300] * 10
    assert data.test_labels.bincount().tolist() == [50] * 10
    assert len(CLASS_NAMES) == 10
    assert data.images.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert data.images.double().std().item() == pytest.approx(1, abs=1e-4)


def test_licence_and_provenance_are_beside_the_images() -> None:
    licence = (BUNDLED.parent / "LICENSE-fashion-mnist").read_text(encoding="utf-8")
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in licence
    assert "MIT" in licence


def test_the_bundled_images_can_be_drawn_again() -> None:
    if not DEBIAN_SOURCE.is_dir():
        pytest.skip(
            f"Fashion-MNIST is not installed in {DEBIAN_SOURCE} (Debian's package dataset-fashion-mnist)"
        )
    drawn = draw(DEBIAN_SOURCE)
    with np.load(BUNDLED) as bundled:
        assert sorted(bundled.files) == sorted(drawn)
        for name, expected in drawn.items():
            np.testing.assert_array_equal(bundled[name], expected)
            assert bundled[name].dtype == expected.dtype
    readme = (BUNDLED.parent / "README.md").read_text(encoding="utf-8")
    for name, digest in source_hashes(DEBIAN_SOURCE).items():
        assert f"| `{digest}` | `{name}` |" in readme


def test_files_that_are_not_idx_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz")
    for content, message in (
        (b"nothing", "does not start like"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "holds 3 values"),
    ):
        path = tmp_path / "file.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(InputError, match=message):
            read_idx(path)


def test_missing_images_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the demo's images are missing"):
        load_data(corrupted_share=0.1, seed=0, path=tmp_path / "images.npz")


def test_corruption_changes_exactly_the_share(data: DemoData) -> None:
    assert int(data.corrupted.sum()) == 300
    labels = torch.arange(40) % 4
    changed = corrupt(labels, share=0.5, num_classes=4, seed=0)
    assert int((changed != labels).sum()) == 20
    assert changed.min() >= 0
    assert changed.max() <= 3
    assert torch.equal(changed, corrupt(labels, share=0.5, num_classes=4, seed=0))
    assert torch.equal(labels, corrupt(labels, share=0, num_classes=4, seed=0))
    with pytest.raises(InputError, match="share"):
        corrupt(labels, share=1.0, num_classes=4, seed=0)


def test_the_learning_rate_is_one_cycle() -> None:
    recipe = Recipe(learning_rate=0.4, warmup=0.25)
    rates = [learning_rate(recipe, progress) for progress in (0, 0.125, 0.25, 0.625, 1)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])


def test_training_does_not_depend_on_threads_or_company(data: DemoData) -> None:
    images, labels = data.images[:120], data.labels[:120]
    masks = random_subsets(120, 3, seed=0)
    threads, generator_state = torch.get_num_threads(), torch.random.get_rng_state()
    together = list(train_many(images, labels, masks, [5, 6, 7], recipe=TINY.recipe))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), generator_state)
    alone = [
        train(images, labels, mask.nonzero()[:, 0], recipe=TINY.recipe, seed=seed)
        for mask, seed in zip(masks, (5, 6, 7))
    ]
    for first, second in zip(together, alone):
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5)
    again = list(train_many(images, labels, masks[1:], [6, 7], recipe=TINY.recipe))
    for first, second in zip(together[1:], again):
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_margins_are_the_tasks_model_output(data: DemoData) -> None:
    images, labels = data.images[:50], data.labels[:50]
    state = train(images, labels, torch.arange(50), recipe=TINY.recipe, seed=0)
    model = build_model(TINY.recipe)
    model.load_state_dict(state)
    expected = trak.ImageClassification().output(model, (images, labels)).detach()
    torch.testing.assert_close(margins(state, images, labels, recipe=TINY.recipe), expected)


def test_the_tiny_run_reports_its_figures(tiny_run: tuple[DemoResult, Path]) -> None:
    result, folder = tiny_run
    page = result.report.read_text(encoding="utf-8")
    assert Path(os.fspath(result)) == folder / "report.html"
    assert "Which training images made the model say this?" in page
    assert "Zalando" in page
    assert set(result.lds) == {"TRAK", "gradient cosine", "random"}
    assert result.mislabels["random order"].auc == 0.5
    assert result.mislabels["TRAK self-influence"].num_corrupted == 300
    assert result.lds["TRAK"].num_models == 2
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert stored["lds"]["TRAK"]["mean"] == result.lds["TRAK"].mean
    assert f"{result.lds['TRAK'].mean:.3f}" in str(result)


def test_a_second_run_resumes_and_gives_the_same(
    tiny_run: tuple[DemoResult, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, folder = tiny_run
    report = first.report.read_bytes()
    models = sorted(folder.glob("models-*/*.safetensors"))
    assert len(models) == 2 + 5 * 2
    lost = next(path for path in models if path.stem == "subset-002-model-1")
    content = lost.read_bytes()
    lost.unlink()

    trained: list[int] = []

    def counting(images, labels, masks, seeds, *, recipe):
        trained.extend(seeds)
        return train_many(images, labels, masks, seeds, recipe=recipe)

    monkeypatch.setattr(bank, "train_many", counting)
    second = run(settings=TINY, out=folder, progress=False)
    assert trained == [TINY.derived_seed("model subset-002-model-1")]
    assert lost.read_bytes() == content
    assert {name: one.mean for name, one in second.lds.items()} == {
        name: one.mean for name, one in first.lds.items()
    }
    assert second.report.read_bytes() == report


def test_other_settings_train_other_models(data: DemoData) -> None:
    fingerprint = TINY.training_fingerprint(data)
    assert Settings(**{**vars(TINY), "seed": 4}).training_fingerprint(data) != fingerprint
    assert Settings(**{**vars(TINY), "recipe": Recipe()}).training_fingerprint(data) != fingerprint
    assert Settings(**{**vars(TINY), "num_subsets": 99}).training_fingerprint(data) == fingerprint
    # A full run after a quick one goes on with its models.
    assert full_settings(2).training_fingerprint(data) == quick_settings(2).training_fingerprint(data)


def test_shown_targets_are_half_mistakes_of_different_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    predictions = torch.tensor([1, 1, 0, 1, 2, 2, 2, 3, 0])
    outputs = torch.tensor([-1.0, -5.0, -3.0, 2.0, 1.0, 9.0, 4.0, 5.0, -0.5])
    # Mistakes: class 0 at row 1 (−5), class 1 at row 2 (−3), class 3 at row 8 (−0.5): the two lowest. Then classes 2, 3.
    assert choose_targets(outputs, predictions, labels, 4) == [1, 2, 6, 7]
    assert choose_targets(outputs, labels, labels, 2) == [0]


@pytest.mark.slow
def test_trak_beats_the_baselines(tmp_path: Path) -> None:
    result = run(quick=True, out=tmp_path, progress=False)
    scores = result.lds
    assert scores["TRAK"].low > 0.2
    assert scores["TRAK"].low > scores["gradient cosine"].high
    assert scores["TRAK"].low > scores["random"].high
    assert result.mislabels["TRAK self-influence"].low > 0.85
    assert result.accuracy > 0.75
