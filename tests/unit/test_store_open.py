"""Opening stores: what is made, what is refused, and what the files are."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch
from safetensors import safe_open

from trak.errors import FingerprintError, InputError, StoreError
from trak.store import load_store, open_store
from trak.testing.store import make_header, make_values, write


def test_open_again_keeps_header_and_shard_rows(tmp_path):
    header = make_header(extra={"pair": (1, 2)})
    first = open_store(tmp_path / "a" / "b", header, shard_rows=8)
    first.add_checkpoint(0, "hash")
    again = open_store(str(tmp_path / "a" / "b"), header, shard_rows=100)
    loaded = load_store(tmp_path / "a" / "b")
    assert again.shard_rows == loaded.shard_rows == 8
    assert again.header == loaded.header == header
    assert loaded.checkpoints() == [0]
    assert "53 rows, 1 checkpoints" in repr(loaded)


def test_files_are_where_the_format_says(tmp_path):
    store = open_store(tmp_path, make_header(feature_dtype="float16"), shard_rows=32)
    store.add_checkpoint(7, "hash")
    store.add_experiment("val", 4)
    write(store.rows(7), [torch.arange(53)], make_values())
    write(store.rows(7, "val"), [torch.arange(3)], make_values())
    store.rows(7).save_derived("gram", {"gram": torch.eye(2)})
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    fragment = next(name for name in names if "fragment" in name)
    assert names == [
        "checkpoints/7/checkpoint.json",
        "checkpoints/7/train/derived-gram.safetensors",
        "checkpoints/7/train/rows-000000000-000000032.safetensors",
        "checkpoints/7/train/rows-000000032-000000053.safetensors",
        fragment,
        "experiments/val/experiment.json",
        "manifest.json",
    ]
    assert fragment.startswith("experiments/val/7/fragment-")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("format", "version", "shard_rows")} == {
        "format": "trak-store",
        "version": 1,
        "shard_rows": 32,
    }
    assert manifest["header"]["parameters"] == {"weight": [3, 4], "bias": [3]}
    with safe_open(tmp_path / names[3], framework="pt") as file:
        assert sorted(file.keys()) == ["features", "outputs", "scale", "weights"]
        about = json.loads(file.metadata()["trak"])
        assert (about["kind"], about["start"], about["stop"], about["rows_of"]) == (
            "shard",
            32,
            53,
            "checkpoints/7/train",
        )


def test_equal_rows_are_equal_files(tmp_path):
    contents = []
    for name in "ab":
        store = open_store(tmp_path / name, make_header(), shard_rows=32)
        store.add_checkpoint(0, "hash")
        write(
            store.rows(0),
            torch.randperm(53, generator=torch.Generator().manual_seed(ord(name))).split(6),
            make_values(),
        )
        files = sorted((tmp_path / name).rglob("rows-*"))
        contents.append([file.read_bytes() for file in files])
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


def test_load_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="does not exist; expected the folder of a store"):
        load_store(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        load_store(tmp_path / "file")
    with pytest.raises(StoreError, match=r"not a store: it has no manifest.json \(found: file\)"):
        load_store(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        open_store(tmp_path / "file", make_header())
    with pytest.raises(InputError, match="must be a path"):
        load_store(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shard_rows"):
        open_store(tmp_path, make_header(), shard_rows=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged: no JSON"),
        ('{"format": "trak-sto', "damaged: no JSON"),
        ("[]", "damaged: no JSON object"),
        ("null", "damaged: no JSON object"),
        ("{}", "its format is None, not 'trak-store'"),
        (
            '{"format": "trak-store", "version": 2}',
            "has format version 2; this trak reads up to 1. Use a newer trak",
        ),
        ('{"format": "trak-store", "version": 1}', "must have version, shard_rows and header"),
        ('{"format": "trak-store", "version": 1, "shard_rows": 8, "header": {}}', "exactly the fields"),
        ('{"format": "trak-store", "version": "1", "shard_rows": 8, "header": {}}', "must have version"),
    ],
)
def test_damaged_manifests(tmp_path, text, message):
    open_store(tmp_path, make_header())
    (tmp_path / "manifest.json").write_text(text)
    for opened in (lambda: load_store(tmp_path), lambda: open_store(tmp_path, make_header())):
        with pytest.raises(StoreError, match=message):
            opened()


def test_damaged_checkpoint_file(tmp_path):
    store = open_store(tmp_path, make_header())
    store.add_checkpoint(0, "hash")
    (tmp_path / "checkpoints" / "0" / "checkpoint.json").write_text('{"checkpoint": 0}')
    with pytest.raises(StoreError, match="'fingerprint' is None"):
        store.rows(0)


def test_checkpoints_without_manifest_are_not_adopted(tmp_path):
    store = open_store(tmp_path, make_header())
    store.add_checkpoint(0, "hash")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"holds checkpoints and no manifest.json"):
        open_store(tmp_path, make_header())


def test_a_newer_format_cannot_be_made(tmp_path):
    with pytest.raises(InputError, match="format version 1 can be made; the header asks for 2"):
        open_store(tmp_path, make_header(format_version=2))


def test_memory_stores_are_apart():
    first, second = (open_store(None, make_header(num_rows=n)) for n in (3, 4))
    first.add_checkpoint(0, "hash")
    assert second.checkpoints() == []
    assert first.where == "memory"


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_several_that_create_one_wins(tmp_path, monkeypatch, hard_links):
    """Threads with two headers meet at one folder: one header is kept, the others are refused."""
    if not hard_links:

        def refuse(source, target):
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr("os.link", refuse)
    for attempt in range(10):
        path = tmp_path / str(attempt)
        barrier = threading.Barrier(4)
        outcomes = [None] * 4

        def create(number, path=path, barrier=barrier, outcomes=outcomes):
            header = make_header(num_rows=10 + number % 2)
            barrier.wait()
            try:
                outcomes[number] = open_store(path, header).header.num_rows
            except FingerprintError:
                outcomes[number] = "refused"

        threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = load_store(path).header.num_rows
        assert outcomes == [10 + number % 2 if 10 + number % 2 == kept else "refused" for number in range(4)]
        assert [file.name for file in path.iterdir()] == ["manifest.json"]
