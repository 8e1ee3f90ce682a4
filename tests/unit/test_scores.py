import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trak.errors import InputError
from trak.scores import ArrayScores, KernelScores, Member, extreme_rows


class Features:
    def __init__(self, features):
        self.features, self.num_rows = features, len(features)

    def read(self, start, stop):
        return Features(self.features[start:stop])


def kernel(n=50, t=4, k=6, members=2):
    parts = tuple(
        Member(Features(torch.randn(n, k, dtype=torch.float64)), torch.randn(t, k, dtype=torch.float64))
        for _ in range(members)
    )
    return KernelScores(parts, torch.rand(n, dtype=torch.float64), torch.device("cpu"))


def dense(scores):
    total = sum(member.rows.features @ member.solved_TK.T for member in scores.members)
    return total / len(scores.members) * scores.weights[:, None]


def test_kernel_scores_are_mean_of_kernels_times_mean_of_weights():
    scores = kernel()
    torch.testing.assert_close(scores.tensor(), dense(scores))
    torch.testing.assert_close(torch.cat([block for _, block in scores.blocks(7)]), dense(scores))
    assert np.asarray(scores).shape == scores.shape == (50, 4)


@pytest.mark.parametrize(
    "key",
    [
        np.s_[3],
        np.s_[-1],
        np.s_[3, 2],
        np.s_[:, 1],
        np.s_[5:20:3, [2, 0]],
        np.s_[[7, 7, 3], :],
        np.s_[::-1],
        np.s_[:0],
        np.s_[np.array([4, 1]), -1],
    ],
    ids=str,
)
def test_indexing_is_numpys(key):
    scores = kernel()
    np.testing.assert_allclose(scores[key], dense(scores).numpy()[key], rtol=1e-12)


def test_boolean_and_tensor_indices():
    scores = kernel()
    mask = torch.rand(50) < 0.4
    torch.testing.assert_close(scores[mask], dense(scores)[mask])
    torch.testing.assert_close(scores[torch.tensor([9, 2])], dense(scores)[[9, 2]])


@pytest.mark.parametrize("key", [50, -51, np.s_[:, 4], np.s_[[0, 99]], np.s_[torch.ones(3).bool()]])
def test_indices_outside(key):
    with pytest.raises(IndexError):
        kernel()[key]


@pytest.mark.parametrize("key", [1.5, [0.0, 1.0], None, "a", np.s_[0, 2.0], torch.tensor([[0, 1]])], ids=str)
def test_what_is_no_index(key):
    with pytest.raises(IndexError, match="whole number"):
        kernel()[key]


def test_an_ellipsis_takes_all():
    scores = kernel()
    torch.testing.assert_close(scores[..., 1], dense(scores)[:, 1])


@settings(max_examples=50)
@given(
    values=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.integers(-3, 3)
    ),
    k=st.integers(1, 35),
    block=st.integers(1, 31),
)
def test_top_and_bottom_with_ties_for_every_block_size(values, k, block):
    scores = ArrayScores(values)
    scores_blocks = scores.blocks
    object.__setattr__(scores, "blocks", lambda: scores_blocks(block))
    for largest in (True, False):
        ranking = extreme_rows(scores, k, largest=largest)
        for t in range(values.shape[1]):
            order = np.argsort(-values[:, t] if largest else values[:, t], kind="stable")[:k]
            assert ranking.rows[t].tolist() == order.tolist()
            assert ranking.scores[t].tolist() == values[order, t].tolist()


@pytest.mark.parametrize("order", ["rising", "falling", "random", "equal"])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_many_rows_give_the_same_as_sorting_all(order, k, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-500, 500, (1000, 5), generator=generator).float()
    if order in ("rising", "falling"):
        values = values.sort(dim=0, descending=order == "falling").values
    if order == "equal":
        values = torch.zeros(1000, 5)
    values[700, 3] = float("nan")
    scores = ArrayScores(values)
    scores_blocks = scores.blocks
    object.__setattr__(scores, "blocks", lambda: scores_blocks(90))
    monkeypatch.setattr("trak.ranking.FIRST_ROWS", 16)
    top, bottom = scores.extremes(k)
    for ranking, largest in ((top, True), (bottom, False)):
        expected = values.sort(dim=0, descending=largest, stable=True).indices[:k].T
        assert torch.equal(ranking.rows, expected)
        assert torch.equal(ranking.rows, extreme_rows(scores, k, largest=largest).rows)
        torch.testing.assert_close(ranking.scores, values.T.gather(1, expected), equal_nan=True)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_more_nan_than_room_for_come_in_row_order(k):
    values = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    values[7:170:3] = float("nan")
    expected = values.sort(dim=0, descending=True, stable=True).indices[:k].T
    assert torch.equal(ArrayScores(values).top(k).rows, expected)


def test_integers_are_ranked_too():
    values = np.arange(600).reshape(300, 2) % 37
    top = ArrayScores(values).top(3)
    assert top.rows[0].tolist() == np.argsort(-values[:, 0], kind="stable")[:3].tolist()


def test_features_are_read_ahead_in_pieces_and_in_order(monkeypatch):
    scores = kernel(n=50, k=6, members=2)
    monkeypatch.setattr("trak.products.PIECE_BYTES", 4 * 6 * 8)
    asked = []
    plain = Features.read
    monkeypatch.setattr(
        Features, "read", lambda self, start, stop: asked.append((start, stop)) or plain(self, start, stop)
    )
    torch.testing.assert_close(scores.tensor(), dense(scores))
    assert asked[:4] == [(0, 8), (0, 8), (8, 16), (8, 16)] and asked[-1] == (48, 50)
    monkeypatch.setattr(
        Features, "read", lambda self, start, stop: 1 / 0 if start == 16 else plain(self, start, stop)
    )
    with pytest.raises(ZeroDivisionError):
        scores.read(8, 30)


def test_soft_threshold():
    scores = kernel()
    values = dense(scores)
    expected = values.sign() * (values.abs() - 0.5).clamp_min(0)
    torch.testing.assert_close(scores.soft_threshold(0.5).tensor(), expected)
    per_target = torch.tensor([0.0, 0.1, 0.2, 100.0])
    thresholded = scores.soft_threshold(per_target)
    assert (thresholded[:, 3] == 0).all()
    torch.testing.assert_close(thresholded[:, 2], thresholded.tensor()[:, 2])
    with pytest.raises(InputError, match="threshold"):
        scores.soft_threshold(torch.zeros(3))


def test_save_is_readable_and_atomic(tmp_path, monkeypatch):
    scores = kernel()
    path = scores.save(tmp_path / "deep" / "scores.npy", block_rows=9)
    np.testing.assert_allclose(np.load(path, mmap_mode="r"), dense(scores), rtol=1e-6)
    monkeypatch.setattr(Features, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores.save(path)
    np.testing.assert_allclose(np.load(path), dense(scores), rtol=1e-6)
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.npy"]


def test_a_matrix_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("trak.scores.available_memory", lambda: 100)
    with pytest.raises(InputError, match=r"scores.top\(k\)"):
        kernel().tensor()


def test_bad_k_and_bad_arrays():
    with pytest.raises(InputError, match="k must be"):
        kernel().top(0)
    with pytest.raises(InputError, match="matrix"):
        ArrayScores(np.zeros(3))
