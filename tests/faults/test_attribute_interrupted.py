"""attribute() killed at random moments, then called again: the same scores, to the last bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import trak

N, T = 4500, 5
RUN = """
import sys
sys.path.insert(0, {here!r})
from test_attribute_interrupted import run
print("ready", flush=True)
run({save_dir!r})
print("done", flush=True)
"""


def run(save_dir):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    train = (torch.randn(N, 8), torch.randint(3, (N,)))
    targets = (torch.randn(T, 8), torch.randint(3, (T,)))
    checkpoints = [
        {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(2)
    ]
    return trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        checkpoints=checkpoints,
        projection=trak.Rademacher(dim=64),
        save_dir=save_dir,
        batch_size=30,
    ).scores.tensor()


def killed(save_dir, after):
    """(whether a process finished, the seconds until it did or was killed), of one that is killed `after` seconds."""
    code = RUN.format(here=os.path.dirname(__file__), save_dir=str(save_dir))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    start = time.perf_counter()
    if after is not None:
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
    done = child.stdout.readline() == "done\n"
    seconds = time.perf_counter() - start
    child.stdout.close()
    child.wait()
    return done, seconds


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(tmp_path):
    expected = run(None)
    generator = random.Random(0)
    _, whole = killed(tmp_path / "whole", after=None)
    kills = 0
    for _ in range(8):
        done, _ = killed(tmp_path / "store", after=generator.uniform(0, 0.4) * whole)
        kills += not done
    assert kills, f"no run of {whole:.2f} s was interrupted: make it longer"
    assert trak.store.verify(tmp_path / "store").corrupt == ()
    assert torch.equal(run(tmp_path / "store"), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 20, 36, 70, 151, 200, 302])
def test_interrupted_in_the_middle_of_a_checkpoint(tmp_path, monkeypatch, after):
    expected = run(None)
    compute = trak.projector.Projector.start
    calls = []

    def stopping(self, *args, **options):
        calls.append(1)
        if len(calls) == after:
            raise Stop
        return compute(self, *args, **options)

    monkeypatch.setattr(trak.projector.Projector, "start", stopping)
    with pytest.raises(Stop):
        run(tmp_path)
    assert torch.equal(run(tmp_path), expected)
    # An exception loses nothing that was computed: only batches cut by it are done again.
    batches = 2 * (N // 30) + 1 * 2
    assert len(calls) <= batches + 2
