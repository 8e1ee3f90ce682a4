"""Fixtures and settings shared by all tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("trak", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("trak")
# Small tensors: more threads cost more than they gain.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data that lies beside the checkout in development; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the development data in ../shared")
    return folder
