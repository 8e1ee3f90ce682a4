"""Stored precision: what is lost, and what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trak.errors import NonFiniteError
from trak.store.encoding import Encoding, Piece, powers_of_two, scale_exponents


def roundtrip(features, feature_dtype="float16", value_dtype="float32"):
    encoding = Encoding(features.shape[1], feature_dtype, value_dtype)
    zeros = torch.zeros(len(features))
    piece = encoding.encode(np.arange(len(features)), features, zeros, zeros, "checkpoint 0")
    return encoding.decode(piece.tensors, encoding.empty_decoded(len(features))), piece.tensors


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert powers_of_two(exponents).tolist() == [2.0**e for e in exponents.tolist()]


def test_rows_are_scaled_into_the_top_of_float16():
    magnitude = torch.tensor([1.0, 0.999, 65504.0, 3.4e38, 1e-30, 2.0**-149, 0.0])
    scaled = magnitude.double() / powers_of_two(scale_exponents(magnitude)).double()
    assert ((scaled[:5] >= 2**14) & (scaled[:5] < 2**15)).all()
    assert scaled[5] == 2.0**-23
    assert scaled[6] == 0


@pytest.mark.parametrize("size", [2.0**-149, 1e-45, 1e-38, 1e-30, 1.0, 6e4, 1e5, 1e30, 3.4e38])
def test_float16_keeps_rows_of_any_size(size):
    features = (torch.rand(4, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1).double() * size
    features[:, 0] = size
    features = features.float()
    back, tensors = roundtrip(features)
    assert tensors["features"].dtype == torch.float16
    error = (back.double() - features.double()).abs().amax(1)
    assert (error <= 2.0**-11 * features.double().abs().amax(1)).all()


def test_float16_rows_of_very_different_sizes_do_not_disturb_each_other():
    features = torch.tensor([[1e30, 2e30], [1e-30, 3e-30], [0.0, 0.0], [-1e30, 1e3]])
    back, _ = roundtrip(features)
    assert torch.allclose(back[:2], features[:2], rtol=1e-3, atol=0)
    assert torch.equal(back[2], features[2])
    assert back[3, 1] == 0  # 27 orders of magnitude below its row's largest


@pytest.mark.parametrize("feature_dtype", ["float16", "bfloat16"])
def test_halves_are_decoded_exactly(feature_dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 20, (50, 1), generator=generator)
    stored = torch.randn(50, 9, generator=generator).to(getattr(torch, feature_dtype)).double()
    features = (stored * 2.0**exponents).float()
    back, _ = roundtrip(features, feature_dtype)
    assert torch.equal(back, features)


def test_float64_is_kept_whole():
    features = torch.randn(3, 5, dtype=torch.float64) * 1e200
    back, _ = roundtrip(features, "float64", "float64")
    assert torch.equal(back, features)


@pytest.mark.parametrize("feature_dtype", ["float32", "bfloat16", "float16"])
def test_numbers_beyond_the_stored_dtype_are_told_from_infinity(feature_dtype):
    features = torch.ones(7, 2, dtype=torch.float64)
    features[5, 1] = -1e39
    with pytest.raises(NonFiniteError, match=r"Numbers too large for \w+: features of checkpoint 0, row 5\."):
        roundtrip(features, feature_dtype)
    features[5, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in features of checkpoint 0, row 5\."):
        roundtrip(features, feature_dtype)


@pytest.mark.parametrize("feature_dtype", ["bfloat16", "float16"])
def test_the_largest_float32_would_be_rounded_to_infinity(feature_dtype):
    with pytest.raises(NonFiniteError, match="too large"):
        roundtrip(torch.tensor([[torch.finfo(torch.float32).max]]), feature_dtype)


def test_only_the_first_bad_rows_are_named():
    with pytest.raises(NonFiniteError, match=r"rows 0, 1, 2, 3, 4 and 15 more\."):
        roundtrip(torch.full((20, 1), torch.inf))


def test_join_sorts_and_keeps_the_first_of_equal_rows():
    def piece(rows, values):
        return Piece(np.array(rows), {"outputs": torch.tensor(values)})

    joined = Piece.join([piece([4, 2], [1.0, 2.0]), piece([2, 3], [3.0, 4.0])])
    assert joined.rows.tolist() == [2, 3, 4]
    assert joined.tensors["outputs"].tolist() == [2.0, 4.0, 1.0]
