"""A bank of retrained models as a value: what it holds, saves, reads and refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak import CorruptShardError, InputError, NonFiniteError, StoreError
from trak.evaluation import Bank, lds, load_packed_bank, random_subsets

N, S, R, T = 21, 6, 2, 4


def make(models=()):
    generator = torch.Generator().manual_seed(0)
    return Bank(
        masks=random_subsets(N, S, seed=3),
        outputs=torch.randn(S, R, T, generator=generator, dtype=torch.float64),
        target_rows=torch.tensor([3, 1, 8, 5]),
        models=models,
    )


def assert_equal(first, second):
    assert torch.equal(first.masks, second.masks)
    assert torch.equal(first.outputs, second.outputs)
    assert torch.equal(first.target_rows, second.target_rows)


def test_mean_and_masks_of_models():
    bank = make()
    torch.testing.assert_close(bank.mean_outputs, (bank.outputs[:, 0] + bank.outputs[:, 1]) / 2)
    assert bank.num_train == N
    assert torch.equal(bank.model_masks[3], bank.masks[1])


def test_arrays_and_lists_are_taken():
    bank = make()
    other = Bank(
        masks=bank.masks.int().tolist(), outputs=bank.outputs.numpy(), target_rows=bank.target_rows.tolist()
    )
    assert_equal(bank, other)
    assert other.masks.dtype == torch.bool
    assert Bank(masks=bank.masks, outputs=bank.outputs).target_rows.tolist() == [0, 1, 2, 3]


def test_lds_is_evaluations(tmp_path):
    bank = make()
    scores = np.random.default_rng(0).normal(size=(N, T))
    expected = lds(scores, bank.masks, bank.outputs, num_bootstrap=50, seed=4)
    got = bank.lds(scores, num_bootstrap=50, seed=4)
    assert (got.mean, got.low, got.high, got.num_models) == (expected.mean, expected.low, expected.high, R)


def test_a_part_of_subsets_and_targets():
    files = [f"model-{s}-{r}" for s in range(S) for r in range(R)]
    bank = make(files)
    part = bank.subset(subsets=[4, 0], targets=torch.tensor([True, False, False, True]))
    assert torch.equal(part.masks, bank.masks[[4, 0]])
    assert torch.equal(part.outputs, bank.outputs[[4, 0]][:, :, [0, 3]])
    assert part.target_rows.tolist() == [3, 5]
    assert [path.name for path in part.models] == ["model-4-0", "model-4-1", "model-0-0", "model-0-1"]
    assert bank.subset(subsets=slice(0, 3)).outputs.shape == (3, R, T)


@pytest.mark.parametrize(
    "options",
    [
        {"subsets": [6]},
        {"subsets": [-1]},
        {"subsets": [1, 1]},
        {"targets": []},
        {"targets": [True]},
        {"targets": [0.5]},
        {"subsets": slice(5, 5)},
    ],
)
def test_positions_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        make().subset(**options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outputs": torch.zeros(S, T)}, InputError, "S, R, T"),
        ({"outputs": torch.zeros(S - 1, R, T)}, InputError, "S \\(subsets\\)"),
        ({"outputs": torch.full((S, R, T), float("nan"))}, NonFiniteError, "outputs"),
        ({"target_rows": [1, 2]}, InputError, "T \\(targets\\)"),
        ({"target_rows": [0.5] * T}, InputError, "integers"),
        ({"models": ["only one"]}, InputError, "12"),
        ({"masks": torch.full((S, N), 2)}, InputError, "booleans"),
    ],
)
def test_impossible_banks_are_refused(changes, error, message):
    bank = make()
    fields = {"masks": bank.masks, "outputs": bank.outputs, "target_rows": bank.target_rows}
    with pytest.raises(error, match=message):
        Bank(**(fields | changes))


def test_frozen():
    with pytest.raises(AttributeError):
        make().outputs = torch.zeros(S, R, T)


@settings(max_examples=20)
@given(num_rows=st.integers(2, 40), num_subsets=st.integers(1, 5), seed=st.integers(0, 9))
def test_saved_and_loaded_is_the_same(tmp_path_factory, num_rows, num_subsets, seed):
    folder = tmp_path_factory.mktemp("bank")
    generator = torch.Generator().manual_seed(seed)
    bank = Bank(
        masks=random_subsets(num_rows, num_subsets, seed=seed),
        outputs=torch.randn(num_subsets, 1, 3, generator=generator, dtype=torch.float64),
    )
    file = bank.save(folder)
    for path in (folder, file, str(folder)):
        assert_equal(Bank.load(path), bank)
    with pytest.raises(InputError, match="num_train"):
        Bank.load(folder, num_train=num_rows + 1)


def test_paths_of_models_move_with_their_folder(tmp_path):
    inside = [tmp_path / "a" / f"{index}.safetensors" for index in range(S * R - 1)]
    outside = tmp_path / "elsewhere.safetensors"
    make([*inside, outside]).save(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = Bank.load(tmp_path / "b")
    assert loaded.models == (*(tmp_path / "b" / path.name for path in inside), outside)


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no bank"):
        Bank.load(tmp_path)
    with pytest.raises(StoreError, match="no bank"):
        Bank.load(tmp_path / "bank.npz")
    scores = tmp_path / "scores.npy"
    scores.write_bytes(b"another thing")
    with pytest.raises(StoreError, match=r"scores\.npy is no bank: give a folder"):
        Bank.load(scores)  # it is not damaged, and no one is to remove it
    file = make().save(tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CorruptShardError, match="damaged"):
        Bank.load(tmp_path)
    (tmp_path / "bank.npz").write_bytes(b"no archive")
    with pytest.raises(StoreError, match="npz"):
        load_packed_bank(tmp_path)
    np.savez(tmp_path / "bank.npz", masks=np.zeros((2, 2), np.uint8))
    with pytest.raises(StoreError, match="margins"):
        load_packed_bank(tmp_path)


def packed(path, bank, **more):
    np.savez(
        path,
        masks=np.packbits(bank.masks.numpy(), axis=1),
        margins=bank.outputs.numpy(),
        target_rows=bank.target_rows.numpy(),
        **more,
    )


def test_packed_banks(tmp_path):
    bank = make()
    packed(tmp_path / "bank.npz", bank)
    for read in (Bank.load(tmp_path, num_train=N), load_packed_bank(tmp_path / "bank.npz", N)):
        assert_equal(read, bank)
    with pytest.raises(InputError, match=r"17 to 24"):
        Bank.load(tmp_path)
    for wrong in (16, 25, 20):  # 20: row 20 is in some subset
        assert bank.masks[:, 20].any()
        with pytest.raises(InputError, match="does not fit"):
            load_packed_bank(tmp_path, wrong)
    packed(tmp_path / "bank.npz", bank, num_train=N)
    assert_equal(Bank.load(tmp_path / "bank.npz"), bank)


def test_one_model_per_subset_and_a_number_of_rows_that_the_bits_tell(tmp_path):
    masks = random_subsets(24, 8, seed=0)
    assert masks[:, -1].any()
    margins = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    np.savez(tmp_path / "bank.npz", masks=np.packbits(masks.numpy(), axis=1), margins=margins)
    bank = Bank.load(tmp_path)
    assert torch.equal(bank.masks, masks)
    np.testing.assert_array_equal(bank.outputs[:, 0], margins.astype(np.float64))
    assert bank.target_rows.tolist() == [0, 1, 2]


def test_the_development_bank(shared):
    path = shared / "banks" / "cifar2"
    if not (path / "bank.npz").is_file():
        pytest.skip("needs the CIFAR-2 bank")
    bank = Bank.load(path)
    assert bank.masks.shape == (50, 10_000)
    assert (bank.masks.sum(dim=1) == 5_000).all()
    assert bank.outputs.shape == (50, 1, 1000)
    assert len(bank.target_rows.unique()) == 1000
    assert_equal(bank, load_packed_bank(path, 10_000))
