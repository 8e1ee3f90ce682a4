"""Scores that other tools wrote: formats, orientation, and what is refused."""

import io
import json

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import save_file

import trak
from trak import InputError, NonFiniteError, StoreError
from trak.evaluation import lds, load_scores, random_subsets

N, T = 7, 3


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(N, T)).astype(np.float32)


def table(values, drop=()):
    rows = [
        (i, t, values[i, t])
        for t in range(values.shape[1])
        for i in range(values.shape[0])
        if (i, t) not in drop
    ]
    return pandas.DataFrame(rows, columns=["train", "target", "score"]).sample(frac=1, random_state=1)


def npy(values):
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


WRITERS = {
    "a.npy": lambda path, values: np.save(path, values),
    "a.npz": lambda path, values: np.savez(path, scores=values),
    "a.pt": lambda path, values: torch.save(torch.from_numpy(values), path),
    "a.pth": lambda path, values: torch.save({"scores": torch.from_numpy(values)}, path),
    "a.safetensors": lambda path, values: save_file({"scores": torch.from_numpy(values)}, path),
    "A.NPY": lambda path, values: path.write_bytes(npy(values)),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("turned", [False, True])
def test_every_format_in_either_orientation(tmp_path, values, name, turned):
    path = tmp_path / name
    WRITERS[name](path, np.ascontiguousarray(values.T) if turned else values)
    for options in (
        {"orientation": "TN" if turned else "NT"},
        {"num_train": N},
        {"num_targets": T},
        {"num_train": N, "num_targets": T},
    ):
        scores = load_scores(path, **options)
        assert scores.shape == (N, T)
        np.testing.assert_array_equal(scores.tensor(), values)
        np.testing.assert_array_equal(scores[2:4, [1]], values[2:4, 1:2])
    np.testing.assert_array_equal(load_scores(path, num_train=N, negate=True).tensor(), -values)


def test_a_npy_file_stays_on_disk(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    assert isinstance(load_scores(tmp_path / "a.npy", num_train=N).values, np.memmap)


def test_small_unsigned_numbers_are_negated_and_bfloat16_is_read(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint8).reshape(3, 2))
    negated = load_scores(tmp_path / "a.npy", orientation="NT", negate=True)
    assert negated.tensor().tolist() == [[0, -1], [-2, -3], [-4, -5]]
    half = torch.randn(4, 3).bfloat16()
    save_file({"scores": half}, tmp_path / "b.safetensors")
    scores = load_scores(tmp_path / "b.safetensors", orientation="NT")
    assert torch.equal(scores.tensor(), half)
    masks = random_subsets(4, 6, seed=0)
    outputs = masks.double() @ half.double()
    assert lds(scores, masks, outputs).mean == pytest.approx(1)


def test_orientation_must_be_known(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "square.npy", values[:T])
    with pytest.raises(InputError, match=r"\[7, 3\], and nothing says which axis is the training set"):
        load_scores(tmp_path / "a.npy")
    with pytest.raises(InputError, match="nothing says"):
        load_scores(tmp_path / "square.npy", num_train=T, num_targets=T)
    turned = load_scores(tmp_path / "square.npy", num_train=T, orientation="TN")
    np.testing.assert_array_equal(turned.tensor(), values[:T].T)


@pytest.mark.parametrize(
    "options",
    [
        {"num_train": 8},
        {"num_targets": 5},
        {"num_train": T, "num_targets": T},
        {"num_train": N, "orientation": "TN"},
        {"num_targets": T, "orientation": "TN"},
    ],
)
def test_sizes_that_do_not_fit(tmp_path, values, options):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match=r"holds \[7, 3\], which does not fit"):
        load_scores(tmp_path / "a.npy", **options)


def test_bad_arguments(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match='orientation must be "NT", "TN"'):
        load_scores(tmp_path / "a.npy", orientation="rows")
    with pytest.raises(InputError, match="num_train must be an integer"):
        load_scores(tmp_path / "a.npy", num_train=0)
    with pytest.raises(StoreError, match="no such file"):
        load_scores(tmp_path / "b.npy")
    (tmp_path / "a.txt").write_text("1 2")
    with pytest.raises(InputError, match=r"read from \.npy.*got '.txt'"):
        load_scores(tmp_path / "a.txt")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_names_file_and_place(tmp_path, values, bad):
    values[4, 1] = bad
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(NonFiniteError, match=r"a\.npy .*\[4, 1\]"):
        load_scores(tmp_path / "a.npy", num_train=N)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(3),
        np.zeros((2, 2, 2)),
        np.zeros((2, 2), complex),
        np.zeros((2, 2), bool),
        np.array([["a"]]),
        np.zeros((0, 3)),
    ],
)
def test_what_is_no_matrix_of_real_numbers(tmp_path, wrong):
    np.save(tmp_path / "a.npy", wrong)
    with pytest.raises(InputError, match="must hold a matrix of real numbers"):
        load_scores(tmp_path / "a.npy", orientation="NT")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.pt", "a.safetensors"])
def test_truncated_files(tmp_path, values, name):
    WRITERS[name](tmp_path / name, values)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="not readable"):
        load_scores(tmp_path / name, orientation="NT")


def test_pickled_objects_are_not_run(tmp_path):
    torch.save({"scores": pandas.DataFrame()}, tmp_path / "a.pt")
    with pytest.raises(StoreError, match="not unpickled"):
        load_scores(tmp_path / "a.pt", orientation="NT")
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object))
    with pytest.raises(StoreError, match="not readable"):
        load_scores(tmp_path / "a.npy", orientation="NT")


def test_a_kronfluence_file(tmp_path, values):
    """Kronfluence names the sum over modules all_modules, [queries, training examples]."""
    path = tmp_path / "pairwise_scores.safetensors"
    save_file({"all_modules": torch.from_numpy(values.T.copy())}, path)
    np.testing.assert_array_equal(load_scores(path).tensor(), values)
    with pytest.raises(InputError, match="does not fit num_train = 3"):
        load_scores(path, num_train=T)


def test_scores_per_module_are_summed_by_a_pattern(tmp_path, values):
    path = tmp_path / "pairwise_scores.safetensors"
    parts = {
        "layers.0": torch.from_numpy(values.T.copy()),
        "layers.1": torch.ones(T, N),
        "head": torch.full((T, N), 10.0),
    }
    save_file(parts, path)
    with pytest.raises(InputError, match=r"3 arrays: head, layers\.0, layers\.1"):
        load_scores(path, num_train=N)
    for key, expected in (
        ("*", values + 11),
        ("layers.*", values + 1),
        ("head", np.full((N, T), 10.0)),
    ):
        np.testing.assert_allclose(load_scores(path, num_train=N, key=key).tensor(), expected, rtol=1e-6)
    with pytest.raises(InputError, match="holds no 'tail'; it holds head"):
        load_scores(path, num_train=N, key="tail")
    save_file({**parts, "bias": torch.ones(T, 2)}, path)
    with pytest.raises(InputError, match="one shape"):
        load_scores(path, num_train=N, key="*")


def test_float64_sums_stay_float64(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.full((3, 2), 1e-12), b=np.ones((3, 2)))
    assert (load_scores(tmp_path / "a.npz", orientation="NT", key="*").tensor() == 1 + 1e-12).all()


@pytest.fixture
def released(tmp_path, values):
    """A folder as the released package leaves it: .npy files that are called .mmap."""
    folder = tmp_path / "trak_results"
    (folder / "scores").mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"JL dimension": 8, "train set size": N}))
    for name, content in (("val", values), ("other", values + 1)):
        out = np.lib.format.open_memmap(
            folder / "scores" / f"{name}.mmap", mode="w+", dtype=np.float32, shape=(N, T)
        )
        out[:] = content
        out.flush()
    return folder


def test_a_folder_of_the_released_package(released, values):
    np.testing.assert_array_equal(load_scores(released, key="val").tensor(), values)
    np.testing.assert_array_equal(load_scores(released / "scores" / "other.mmap").tensor(), values + 1)
    with pytest.raises(InputError, match="2 experiments: other, val"):
        load_scores(released)
    with pytest.raises(InputError, match="holds no 'test'"):
        load_scores(released, key="test")
    with pytest.raises(InputError, match="does not fit num_train = 8"):
        load_scores(released, key="val", num_train=8)


def test_a_folder_of_the_released_package_that_was_not_finished(released, values):
    (released / "scores" / "val.mmap").write_bytes(npy(np.zeros((N, T), np.float32)))
    with pytest.raises(StoreError, match="zeros only"):
        load_scores(released, key="val")
    (released / "metadata.json").write_text(json.dumps({"train set size": 9}))
    with pytest.raises(StoreError, match="says that the training set has 9"):
        load_scores(released, key="other")


def test_a_saved_attribution(tmp_path, values):
    folder = trak.Attribution(trak.ArrayScores(values)).save(tmp_path / "saved")
    np.testing.assert_array_equal(load_scores(folder).tensor(), values)
    with pytest.raises(StoreError, match="holds no scores"):
        load_scores(tmp_path)


def test_long_tables(tmp_path, values):
    path = tmp_path / "a.csv"
    table(values).to_csv(path, index=False)
    np.testing.assert_allclose(load_scores(path).tensor(), values, rtol=1e-6)
    np.testing.assert_allclose(load_scores(path, num_train=N, num_targets=T).tensor(), values, rtol=1e-6)
    table(values).rename(columns={"train": "row"}).to_csv(path, index=False)
    with pytest.raises(InputError, match="no column 'train'; it has row, target, score"):
        load_scores(path)
    assert load_scores(path, columns=("row", "target", "score")).shape == (N, T)
    with pytest.raises(InputError, match="three names"):
        load_scores(path, columns=("row", "target"))


def test_tables_with_missing_pairs(tmp_path, values):
    path = tmp_path / "a.csv"
    table(values, drop=[(2, 1)]).to_csv(path, index=False)
    with pytest.raises(InputError, match="20 pairs; 7 training rows and 3 targets make 21"):
        load_scores(path)
    with pytest.raises(InputError, match="needs num_train= and num_targets="):
        load_scores(path, fill=0.0)
    expected = np.zeros((N + 1, T))
    expected[:N] = values
    expected[2, 1] = 0
    filled = load_scores(path, fill=0.0, num_train=N + 1, num_targets=T)
    np.testing.assert_allclose(filled.tensor(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: pandas.concat([frame, frame.iloc[:2]]), "2 rows for pairs"),
        (lambda frame: frame.assign(train=frame.train - 1), r"must lie in \[0, …\), got -1"),
        (lambda frame: frame.assign(train="cat"), "must hold row numbers"),
        (lambda frame: frame.assign(train=frame.train + 0.5), "must hold row numbers"),
        (lambda frame: frame.assign(score="high"), "must hold numbers"),
        (lambda frame: frame.iloc[:0], "has no rows"),
    ],
)
def test_tables_that_are_refused(tmp_path, values, change, message):
    change(table(values)).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match=message):
        load_scores(tmp_path / "a.csv")


def test_tables_of_more_rows_than_said(tmp_path, values):
    table(values).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match=r"'train' must lie in \[0, 6\), got 0 to 6"):
        load_scores(tmp_path / "a.csv", num_train=6)


def test_parquet(tmp_path, values):
    pytest.importorskip("pyarrow")
    table(values).to_parquet(tmp_path / "a.parquet")
    np.testing.assert_allclose(load_scores(tmp_path / "a.parquet").tensor(), values, rtol=1e-6)
