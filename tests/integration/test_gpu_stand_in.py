"""The tests for a GPU, on a stand-in: CUDA tensors in the CPU's memory, Triton's kernels in its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
STAND_IN = TESTS / "stand_in"


def run(*arguments):
    """A process in which the stand-in comes before PyTorch."""
    path = os.pathsep.join([str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "STAND_IN_TRITON": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def stand_in():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, or a stand-in already")
    found = run("-c", "import stand_in")
    if found.returncode == 3:
        pytest.skip(f"no stand-in for a GPU: {found.stderr.strip()}")
    assert found.returncode == 0, found.stderr


def test_the_tests_for_a_gpu(stand_in):
    found = run(
        "-m", "pytest", "-p", "stand_in", "-m", "gpu and not slow", "-q", "tests/gpu", "-p", "no:xdist"
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert "passed" in found.stdout and "skipped" not in found.stdout


CHECKS = """
import stand_in, pytest, torch

x = torch.randn(4, 5)
on_gpu = x.to("cuda")
assert str(on_gpu.device) == "cuda:0" and torch.equal(on_gpu.cpu(), x)
weight = torch.randn(5, 3, device="cuda", requires_grad=True)
(on_gpu @ weight).square().sum().backward()
twin = weight.detach().cpu().requires_grad_()
(x @ twin).square().sum().backward()
torch.testing.assert_close(weight.grad.cpu(), twin.grad)
view = on_gpu[1:]
view += 1
assert torch.equal(on_gpu.cpu()[1:], x[1:] + 1)
with pytest.raises(RuntimeError, match="same device"):
    on_gpu @ twin
with pytest.raises(RuntimeError, match="same device"):
    on_gpu + x

arriving = torch.empty(4, 5).copy_(on_gpu, non_blocking=True)
assert arriving.isnan().all()
event = torch.cuda.Event()
event.record()
event.synchronize()
assert torch.equal(arriving, on_gpu.cpu())

torch.cuda.set_sync_debug_mode("error")
on_gpu.sum(), on_gpu[on_gpu.argmax(0) % 4], x.to("cuda", non_blocking=True)
for waits in (
    lambda: on_gpu.cpu(),
    lambda: x.to("cuda"),
    lambda: torch.tensor([1, 2], device="cuda"),
    lambda: on_gpu[0, 0].item(),
    lambda: on_gpu[on_gpu > 0],
    lambda: bool((on_gpu > 0).any()),
    lambda: on_gpu.nonzero(),
    lambda: on_gpu.unique(),
):
    with pytest.raises(RuntimeError, match="synchronizing"):
        waits()
"""


def test_the_stand_in_does_what_a_gpu_does(stand_in):
    found = run("-c", CHECKS)
    assert found.returncode == 0, found.stderr
