import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from trak.errors import InputError, MissingDependencyError
from trak.report import dependencies
from trak.report.images import data_uri, size, to_uint8

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def decoded(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize(
    "image",
    [
        PIXELS,
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        np.moveaxis(PIXELS, -1, 0),
        PIXELS.astype(np.int64),
        Image.fromarray(PIXELS),
    ],
    ids=["HWC", "HWC tensor", "CHW tensor", "CHW", "int64", "PIL"],
)
def test_every_layout_gives_the_same_pixels(image):
    np.testing.assert_array_equal(decoded(data_uri(image)), PIXELS)
    assert size(image) == (9, 6)


def test_grey_images_and_alpha():
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(decoded(data_uri(grey)), grey)
    np.testing.assert_array_equal(decoded(data_uri(grey[None])), grey)
    assert decoded(data_uri(np.zeros((4, 5, 4), np.uint8))).shape == (4, 5, 4)


def test_an_ambiguous_shape_is_channels_first_for_tensors_only():
    pixels = np.arange(3 * 8 * 3, dtype=np.uint8).reshape(3, 8, 3)
    assert size(torch.from_numpy(pixels)) == (3, 8)
    assert size(pixels) == (8, 3)


def test_floats_within_0_and_1_are_taken_as_they_are():
    image = np.array([[0.0, 0.5], [0.25, 0.75]])
    np.testing.assert_array_equal(to_uint8(image)[..., 0], [[0, 128], [64, 191]])


def test_other_floats_are_stretched_and_ranges_obeyed():
    image = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(to_uint8(image)[..., 0], [[0, 128], [255, 191]])
    np.testing.assert_array_equal(to_uint8(image, (0.0, 1.0))[..., 0], [[0, 0], [255, 255]])


def test_constant_and_boolean_images():
    assert to_uint8(np.full((3, 3), 7.0)).std() == 0
    np.testing.assert_array_equal(to_uint8(np.eye(2, dtype=bool))[..., 0], [[255, 0], [0, 255]])


def test_large_images_are_reduced_and_small_ones_kept():
    assert decoded(data_uri(np.zeros((100, 50), np.uint8), longest_side=20)).shape == (20, 10)
    assert decoded(data_uri(np.zeros((8, 8), np.uint8))).shape == (8, 8)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.zeros(5), r"\[H, W\].*got \[5\]"),
        (np.zeros((7, 8, 9)), r"1, 3 or 4 channels; got \[7, 8, 9\]"),
        (np.zeros((0, 4)), "got"),
        (np.full((2, 2), 300), "0 to 255; got 300"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.array([["a", "b"]]), "dtype"),
    ],
)
def test_what_is_no_image_is_refused(image, match):
    with pytest.raises(InputError, match=match):
        data_uri(image)


def test_a_range_must_be_one():
    with pytest.raises(InputError, match="black < white"):
        to_uint8(np.zeros((2, 2)), (1.0, 1.0))


def test_missing_pillow_is_named(monkeypatch):
    monkeypatch.setattr(dependencies, "_installed", lambda module: module != "PIL")
    with pytest.raises(MissingDependencyError, match=r"pillow.*pip install 'trak-attribution\[report\]'"):
        data_uri(PIXELS)
