"""Recipe: sentences of SST-2, with a bank of fine-tuned transformers.

    python examples/sst2.py --train-only --out sst2-report
    trak frontier examples/recipes/sst2.py --bank sst2-report/bank --out frontier-sst2
    trak attribute examples/recipes/sst2.py

2,000 sentences, the first three layers of MiniLM, and the models that examples/sst2.py trains: in sst2-report, or the folder that
TRAK_SST2 names. The sentences come from ../shared/data, or the folder that SST2_DATA names.
"""

import os
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from finetuning import find_weights  # noqa: E402
from sst2_task import CLASSES, Recipe, Task  # noqa: E402

from trak.evaluation import Bank  # noqa: E402

OUT = Path(os.environ.get("TRAK_SST2", "sst2-report"))
DATA = Path(os.environ.get("SST2_DATA", EXAMPLES.parents[1] / "shared" / "data"))

sentences = Task(DATA, find_weights(None), Recipe())
model = sentences.build()
train_set, targets = sentences.train_loader(), sentences.target_loader()
task = "text_classification"
checkpoints = list(Bank.load(OUT / "checkpoints").models)

title = "SST-2, 2,000 sentences"
class_names = CLASSES
train_labels, target_labels = sentences.train_set.labels, sentences.targets.labels
train_texts, target_texts = sentences.train_set.texts, sentences.targets.texts

passes_per_model = sentences.recipe.epochs / 2


def train_part():
    """A whole model, as one of the bank's."""
    rows = torch.randperm(sentences.recipe.num_train, generator=torch.Generator().manual_seed(0))
    sentences.train(rows[: sentences.recipe.num_train // 2].sort().values, seed=0)
