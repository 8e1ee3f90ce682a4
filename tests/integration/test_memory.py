"""Memory of featurizing does not grow with N, and scoring's does not grow with N × T."""

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
import torch
import trak

torch.set_num_threads(1)
num_rows, num_targets, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return num_rows

    def __getitem__(self, row):
        x = torch.sin(torch.arange(8) * (row + 1.0))
        return x, row % 3


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
targets = (torch.randn(num_targets, 8), torch.randint(3, (num_targets,)))
attribution = trak.attribute(
    model, Rows(), targets, task="image_classification", projection=trak.Sparse(dim=512), save_dir=folder, batch_size=256
)
attribution.top(5)
attribution.self_influence()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_mib(num_rows, num_targets, folder):
    command = [sys.executable, "-c", CHILD, str(num_rows), str(num_targets), str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_training_rows(tmp_path):
    few, many, targets = 10_000, 60_000, 1_000
    growth = peak_mib(many, targets, tmp_path / "many") - peak_mib(few, targets, tmp_path / "few")
    features, scores = many * 512 * 4 / 2**20, many * targets * 4 / 2**20
    assert features > 100 and scores > 200
    # What may grow is a few numbers for each row (which rows are stored, weights, self-influence).
    assert growth < 60, f"{growth} MiB more for {many} rows than for {few}"
