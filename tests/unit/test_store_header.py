"""Headers: what is compared, and what the refusal says."""

from __future__ import annotations

import json

import pytest

from trak.errors import FingerprintError, InputError, StoreError
from trak.store import Header, open_store
from trak.testing.store import make_header


def test_comes_back_from_json_equal():
    header = make_header(
        extra={"versions": (1, 2), "nested": {"a": None}}, columns=(("w", 0, 3), ("b", 3, 7))
    )
    back = Header.from_json(json.loads(json.dumps(header.to_json())))
    assert back == header
    assert back.digest() == header.digest()
    assert header.difference(back) == []
    assert hash(back) == hash(header)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_rows": 54}, [("num_rows", 53, 54)]),
        ({"compute_dtype": "float64"}, [("compute_dtype", "float32", "float64")]),
        ({"feature_dtype": "float16"}, [("feature_dtype", "float32", "float16")]),
        ({"columns": [("w", 0, 7)]}, [("columns", [["all", 0, 7]], [["w", 0, 7]])]),
        (
            {"projection": {"kind": "rademacher", "version": 1, "seed": 1, "dim": 7}},
            [("projection.seed", 0, 1)],
        ),
        (
            {"projection": {"kind": "sparse", "version": 1, "seed": 0, "dim": 7, "nonzeros": 2}},
            [("projection.kind", "rademacher", "sparse"), ("projection.nonzeros", "(absent)", 2)],
        ),
        ({"task": {}}, [("task.task", "regression", "(absent)")]),
        ({"extra": {"a": {"b": True}}}, [("extra.a", "(absent)", {"b": True})]),
        (
            {"parameters": {"weight": (3, 5), "bias": (3,)}},
            [("parameters.weight", [3, 4], [3, 5])],
        ),
        (
            {"parameters": {"bias": (3,), "weight": (3, 4)}},
            [("parameters (order)", ["weight", "bias"], ["bias", "weight"])],
        ),
    ],
)
def test_differences(changes, expected):
    assert make_header().difference(make_header(**changes)) == expected


def test_true_is_not_one_but_one_is_one_point_zero():
    one, true, float_one = (make_header(extra={"a": value}) for value in (1, True, 1.0))
    assert one.difference(true) == [("extra.a", 1, True)]
    assert one.difference(float_one) == []


def test_refusal_lists_each_field_and_says_what_to_do(tmp_path):
    open_store(tmp_path, make_header())
    projection = {"kind": "rademacher", "version": 1, "seed": 1, "dim": 7}
    parameters = {f"layer{i}": (i,) for i in range(9)}
    with pytest.raises(FingerprintError) as caught:
        open_store(tmp_path, make_header(num_rows=99, projection=projection, parameters=parameters))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n  num_rows: stored 53, asked for 99\n" in message
    assert "\n  projection.seed: stored 0, asked for 1\n" in message
    assert message.count("\n  parameters.") == 5
    assert "... and 6 more parameters" in message
    assert "Give another save_dir" in message
    assert "kind" not in message


def test_long_values_are_cut(tmp_path):
    open_store(tmp_path, make_header())
    with pytest.raises(FingerprintError) as caught:
        open_store(tmp_path, make_header(extra={"long": "x" * 10_000}))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": -1}, "num_rows must be an integer of at least 0; got -1"),
        ({"num_rows": 3.0}, "num_rows"),
        ({"dim": 0}, "dim must be an integer of at least 1"),
        ({"dim": True}, "dim"),
        ({"feature_dtype": "int8"}, "feature_dtype must be one of float64, float32, bfloat16, float16"),
        ({"compute_dtype": None}, "compute_dtype"),
        ({"extra": {"a": object()}}, "extra must hold only finite JSON values"),
        ({"extra": {"a": float("nan")}}, "extra must hold only finite JSON values"),
        ({"task": [1]}, "task must be a mapping"),
        ({"columns": [("all", 0)]}, "columns must be"),
        ({"parameters": ["weight"]}, "columns must be"),
    ],
)
def test_impossible_fields(changes, message):
    with pytest.raises(InputError, match=message):
        make_header(**changes)


def test_header_is_not_changed_through_what_it_was_made_of():
    extra = {"a": [1]}
    header = make_header(extra=extra)
    extra["a"].append(2)
    assert header.extra == {"a": [1]}


@pytest.mark.parametrize(
    "values", [{}, [], {**make_header().to_json(), "dim": 0}, {**make_header().to_json(), "new": 1}]
)
def test_damaged_json_is_refused(values):
    with pytest.raises(StoreError, match="header"):
        Header.from_json(values)


def test_values_are_float64_where_anything_is():
    assert make_header().value_dtype == "float32"
    assert make_header(feature_dtype="float64").value_dtype == "float64"
    assert make_header(feature_dtype="float16", compute_dtype="float64").value_dtype == "float64"
