"""Recipe: cats and dogs of CIFAR-10, with a bank of retrained ResNets.

    trak frontier examples/recipes/cifar2.py --bank ../shared/banks/cifar2 --out frontier-cifar2
    trak attribute examples/recipes/cifar2.py

10,000 images, a ResNet-9 with 142,992 parameters, ten checkpoints, two runs with checkpoints from along training, a bank of 50 random
halves with one model each and 1,000 targets. Reads the data and the bank that examples/cifar2.py describes, from ../shared or the folder that
TRAK_SHARED names.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from cifar2 import ResNet9, load_bank  # noqa: E402

SHARED = Path(os.environ.get("TRAK_SHARED", EXAMPLES.parents[1] / "shared"))
EPOCHS, BATCH_SIZE, PEAK_RATE, PEAK_EPOCH, FIRST_RATE = 24, 250, 0.5, 5, 0.05

bank = load_bank(SHARED, None)
model = ResNet9()
train_set, targets, checkpoints = bank.train_set, bank.targets, bank.checkpoints
task = "image_classification"
batch_size = 100

title = "CIFAR-2, 10,000 images"
class_names = ("cat", "dog")
train_labels, target_labels = train_set[1], targets[1]


def rate(epoch):
    """The learning rate's triangle: from the first rate up to the peak, then down to 0."""
    return float(np.interp(epoch, [0, PEAK_EPOCH, EPOCHS], [FIRST_RATE, PEAK_RATE, 0]))


# At the end of training the rate is 0: nothing was learned there.
runs = [
    [
        SHARED / "banks/cifar2/checkpoints" / f"seed{seed:02d}_epoch{epoch:02d}.safetensors"
        for epoch in (4, 8, 16)
    ]
    for seed in (0, 1)
]
learning_rates = [rate(epoch) for epoch in (4, 8, 16)]
passes_per_model = EPOCHS / 2


def train_part():
    """A fifth of an epoch on a half of the images, in float32 as it is attributed."""
    images, labels = train_set
    generator = torch.Generator().manual_seed(0)
    half = torch.randperm(len(labels), generator=generator)[: len(labels) // 2]
    network = ResNet9().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=FIRST_RATE, momentum=0.9, weight_decay=5e-4)
    batches = half.split(BATCH_SIZE)
    for rows in batches[: len(batches) // 5]:
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        inputs = images[rows].roll(shift, dims=(2, 3))
        flipped = torch.rand(len(rows), generator=generator) < 0.5
        inputs[flipped] = inputs[flipped].flip(3)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels[rows]).backward()
        optimizer.step()
    return (len(batches) // 5) / (len(batches) * EPOCHS)
