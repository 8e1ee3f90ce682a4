import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trak
from trak.cli.options import parse_damping, parse_projection
from trak.cli.recipe import load_recipe
from trak.errors import InputError

GOOD = "model = train_set = targets = 1\ntask = 'regression'\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kronecker:4096", trak.Kronecker(dim=4096)),
        ("sparse:2048", trak.Sparse(dim=2048)),
        ("sparse:2048,nonzeros=4,seed=1", trak.Sparse(dim=2048, nonzeros=4, seed=1)),
        ("sparse:seed=1,dim=8", trak.Sparse(dim=8, seed=1)),
        ("rademacher:16", trak.Rademacher(dim=16)),
        ("gaussian:16,seed=3", trak.Gaussian(dim=16, seed=3)),
        ("sparse:64,per_layer,seed=2", trak.Sparse(dim=64, per_layer=True, seed=2)),
        ("sparse:64,per_layer=0", trak.Sparse(dim=64)),
        ("identity", trak.Identity()),
        ("eigenbasis:512", trak.Eigenbasis(512)),
        (
            "eigenbasis:512,whitening=none,factors=kfac,sample=none,largest_side=64",
            trak.Eigenbasis(512, whitening=None, factors="kfac", sample=None, largest_side=64),
        ),
        ("whitened:identity", trak.Whitened(trak.Identity())),
        ("whitened:sparse:64,whitening=0.5,seed=3", trak.Whitened(trak.Sparse(64, seed=3), whitening=0.5)),
    ],
)
def test_projections(words, expected):
    assert parse_projection(words) == expected


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("", "KIND:DIM"),
        ("fast:4", "kind of gaussian"),
        ("sparse", "needs its dimension, such as sparse:4096"),
        ("sparse:many", "whole numbers; got 'many'"),
        ("sparse:64,speed=1", "takes dim, .*got 'speed=1'"),
        ("sparse:64,3", "got '3'"),
        ("sparse:64,cache_bytes=3", "takes dim, "),
        ("identity:4", "got '4'"),
        ("eigenbasis", "needs its dimension, such as eigenbasis:4096"),
        ("eigenbasis:4,whitening=much", "takes a number for whitening; got 'much'"),
        ("eigenbasis:4,inner=3", "takes dim, "),
        ("eigenbasis:4,factors=shampoo", "shampoo"),
        ("whitened", "needs another projection, such as whitened:sparse:4096"),
        ("whitened:fast:4", "kind of gaussian"),
    ],
)
def test_wrong_projections(words, match):
    with pytest.raises(trak.TrakError, match=match):
        parse_projection(words)


def test_impossible_dimensions_are_the_projections_own_error():
    with pytest.raises(trak.TrakError):
        parse_projection("sparse:0")


@given(st.integers(1, 10_000), st.integers(0, 1000))
def test_every_dimension_and_seed_arrives(dim, seed):
    assert dataclasses.replace(parse_projection(f"rademacher:{dim}"), seed=seed) == parse_projection(
        f"rademacher:{dim},seed={seed}"
    )


def test_dampings():
    assert parse_damping("auto") == "auto"
    assert parse_damping("0.1") == 0.1
    assert parse_damping("relative:1e-3") == trak.RelativeDamping(1e-3)


@pytest.mark.parametrize(
    "words", ["", "-1", "nan", "inf", "relative", "relative:", "relative:-1", "absolute:1"]
)
def test_wrong_dampings(words):
    with pytest.raises(InputError, match="--damping is auto"):
        parse_damping(words)


def test_a_recipe_is_split_into_arguments_and_showing(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(GOOD + "class_names = ['a']\nhelper = 3\nbatch_size = 4\n")
    recipe = load_recipe(str(path))
    assert dict(recipe.arguments) == {
        "model": 1,
        "train_set": 1,
        "targets": 1,
        "task": "regression",
        "batch_size": 4,
    }
    assert dict(recipe.showing) == {"class_names": ["a"]}


def test_a_recipe_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_recipe.py").write_text(GOOD)
    path = tmp_path / "recipe.py"
    path.write_text("from beside_the_recipe import *\n")
    assert load_recipe(str(path)).arguments["task"] == "regression"


@pytest.mark.parametrize(
    ("text", "place", "match"),
    [
        ("task = 1\n", "", "does not define model, train_set, targets"),
        ("x = 1\ny = x +\n", "", "line 2: SyntaxError"),
        ("x = 1\n\nundefined\n", "", "line 3: NameError"),
        ("def make(): return {'modle': 1}\n", ":make", "'modle'.*did you mean 'model'"),
        ("def make(): return {'zzzzzz': 1}\n", ":make", "known are model, train_set"),
        ("def make(): return 3\n", ":make", "returns int; expected a mapping"),
        ("make = 3\n", ":make", "no function 'make'"),
    ],
)
def test_wrong_recipes(tmp_path, text, place, match):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(InputError, match=match):
        load_recipe(f"{path}{place}")


def test_traks_own_errors_pass_through_a_recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("import trak\nraise trak.CheckpointError('no such run')\n")
    with pytest.raises(trak.CheckpointError, match="no such run"):
        load_recipe(str(path))


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_says_what_to_install(missing):
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)\n"
        "from trak.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"needs {missing}" in done.stderr
    assert "pip install 'trak-attribution[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_encodings_without_a_minus_sign(encoding):
    code = (
        "import typer\n"
        "from trak.cli import main, root\n"
        "from trak.cli.output import print_json\n"
        "root.app = typer.Typer()\n"
        "@root.app.command()\n"
        "def show(): print('f = \u22120.5'); print_json({'class': '\u732b'})\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    minus, _, values = done.stdout.decode("ascii").partition("\n")
    assert minus.strip() == "f = -0.5"
    assert json.loads(values) == {"class": "\u732b"}


def test_unknown_attributes_of_the_package_are_none():
    import trak.cli

    with pytest.raises(AttributeError, match="no attribute 'apps'"):
        _ = trak.cli.apps
