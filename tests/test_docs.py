"""Every block of README and docs runs, or says why not.

Python blocks of a page run in order in one namespace, in an empty folder. A comment before a block changes that:

    <!-- skip: reason -->    the block is not run
    <!-- given: NAME -->     the names of that fixture below are there beforehand (a model the reader is said to have)
    <!-- raises: ERROR -->   the block must raise that trak error

Shell blocks are read: `make` targets must exist, `trak` commands and `python` scripts too.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

import trak

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:<!--\s*(?P<directive>\w+):\s*(?P<value>[^>]*?)\s*-->\s*\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.M | re.S,
)


def blocks(page: Path, language: str):
    for match in BLOCK.finditer(page.read_text()):
        if match["language"] == language:
            line = page.read_text()[: match.start("code")].count("\n")
            yield match["directive"], match["value"], match["code"], line


def given(name: str) -> dict:
    """What the reader of a page already has."""
    torch.manual_seed(0)
    if name == "classifier":
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        )
        train_set = torch.utils.data.TensorDataset(torch.rand(120, 1, 8, 8), torch.randint(3, (120,)))
        targets = torch.utils.data.TensorDataset(torch.rand(6, 1, 8, 8), torch.randint(3, (6,)))
        states = [{k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(2)]
        for index, state in enumerate(states):
            torch.save(state, f"run{index + 1}.pt")
        return {
            "model": model,
            "train_set": train_set,
            "targets": targets,
            "checkpoints": ["run1.pt", "run2.pt"],
            "torch": torch,
            "trak": trak,
        }
    raise AssertionError(f"no fixture {name!r}")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if list(blocks(page, "python"))], ids=lambda page: page.name
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__docs__"}
    for directive, value, code, line in blocks(page, "python"):
        if directive == "skip":
            assert value, f"{page}:{line}: say why the block is not run"
            continue
        if directive == "given":
            namespace |= given(value)
        compiled = compile("\n" * line + code, str(page), "exec")
        if directive == "raises":
            with pytest.raises(getattr(trak, value)):
                exec(compiled, namespace)
        else:
            exec(compiled, namespace)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if list(blocks(page, "bash"))], ids=lambda page: page.name
)
def test_shell_blocks_name_things_that_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for _, _, code, line in blocks(page, "bash"):
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if not words:
                continue
            where = f"{page.name}:{line}: {command}"
            if words[0] == "make":
                assert set(words[1:]) <= targets, where
            elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), where
            elif words[0] == "trak":
                check_trak_command(words[1:], where)
            else:
                assert words[0] in {"pip", "git", "cd", "python"}, where


def check_trak_command(words, where):
    from typer.testing import CliRunner

    from trak.cli import app

    verbs = []
    for word in words:
        if word.startswith("-") or not re.fullmatch(r"[a-z-]+", word):
            break
        verbs.append(word)
    shown = CliRunner().invoke(app, [*verbs[: 2 if verbs[:1] == ["store"] else 1], "--help"])
    assert shown.exit_code == 0, where
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in shown.output, f"{where}: no option {word}"


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, *(ROOT / "design").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_public_api_is_exact():
    import types

    public = {
        name
        for name, value in vars(trak).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(trak.__all__), f"not in __all__: {sorted(public - set(trak.__all__))}"
    assert len(trak.__all__) == len(set(trak.__all__))
    documented = (ROOT / "docs" / "api.md").read_text()
    missing = [
        name for name in trak.__all__ if f"`{name}`" not in documented and f"`{name}(" not in documented
    ]
    assert not missing, f"docs/api.md says nothing of {missing}"
    for name in trak.__all__:
        assert hasattr(trak, name)
