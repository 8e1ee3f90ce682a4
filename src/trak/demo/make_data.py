"""Draw the demo's images from Fashion-MNIST: `python -m trak.demo.make_data --source FOLDER --out FILE`.

The source folder holds the four original files as Debian's package `dataset-fashion-mnist` installs them. The
draw is class-balanced, without replacement, and a function of the seed alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trak import InputError

DEBIAN_SOURCE = Path("/usr/share/datasets/fashion-mnist")
BUNDLED = Path(__file__).parent / "fashion_mnist" / "images.npz"
NUM_CLASSES = 10
TRAIN_PER_CLASS = 300
TEST_PER_CLASS = 50
SEED = 2017
PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes.

    Args:
        path: the file, of the layout described at http://yann.lecun.com/exdb/mnist/.

    Returns:
        The array, uint8, in the file's own shape.

    Raises:
        InputError: the file is missing, or is no IDX file of unsigned bytes.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing. Expected the four Fashion-MNIST files (*-images-idx3-ubyte.gz and "
            f"*-labels-idx1-ubyte.gz); Debian's package dataset-fashion-mnist puts them in {DEBIAN_SOURCE}."
        )
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise InputError(f"{path} does not start like an IDX file of unsigned bytes: got {content[:4]!r}.")
    rank = content[3]
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">i4", count=rank, offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise InputError(f"{path} holds {values.size} values, its header says shape {shape}.")
    return values.reshape(shape)


def balanced_rows(
    labels: NDArray[np.uint8], per_class: int, generator: np.random.Generator
) -> NDArray[np.int32]:
    """`per_class` rows of every class without replacement, in random order: [per_class · C] int32."""
    rows = [
        generator.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in range(NUM_CLASSES)
    ]
    return generator.permutation(np.concatenate(rows)).astype(np.int32)


def draw(source: Path, *, seed: int = SEED) -> dict[str, NDArray[np.generic]]:
    """The arrays of the bundled file, drawn from the full data set.

    Args:
        source: folder of the four original files.
        seed: of the draw.

    Returns:
        For each split in ("train", "test"): `{split}_images` [n, 28, 28] uint8, `{split}_labels` [n] uint8
        and `{split}_rows` [n] int32, the row in the original file.

    Raises:
        InputError: a file is missing or is not an IDX file.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    arrays: dict[str, NDArray[np.generic]] = {}
    for split, per_class in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        images = read_idx(source / f"{PREFIXES[split]}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{PREFIXES[split]}-labels-idx1-ubyte.gz")
        rows = balanced_rows(labels, per_class, generator)
        arrays[f"{split}_images"] = images[rows]
        arrays[f"{split}_labels"] = labels[rows]
        arrays[f"{split}_rows"] = rows
    return arrays


def source_hashes(source: Path) -> dict[str, str]:
    """SHA-256 of each original file by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(source.glob("*-ubyte.gz"))
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundled file and say what it was made from."""
    parser = argparse.ArgumentParser(description="Draw the demo's images from Fashion-MNIST.")
    parser.add_argument(
        "--source", type=Path, default=DEBIAN_SOURCE, help="folder of the four original files"
    )
    parser.add_argument("--out", type=Path, default=BUNDLED, help="the .npz file to write")
    options = parser.parse_args(arguments)
    np.savez_compressed(options.out, **draw(options.source))  # type: ignore[arg-type]
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    for name, digest in source_hashes(options.source).items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()
