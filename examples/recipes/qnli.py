"""Recipe: question-sentence pairs of QNLI, with a bank of fine-tuned transformers.

    python examples/qnli.py --train-only --out qnli-report
    trak frontier examples/recipes/qnli.py --bank qnli-report/bank --out frontier-qnli
    trak attribute examples/recipes/qnli.py

The pairs, the model and the checkpoints of examples/qnli.py with its defaults: in qnli-report, or the folder that TRAK_QNLI names. The
pairs come from ../shared/data, or the file that QNLI_DATA names.
"""

import os
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from finetuning import find_weights  # noqa: E402
from qnli_task import CLASSES, Recipe, Task, load_pretrained, read_pairs  # noqa: E402

from trak.evaluation import Bank  # noqa: E402

OUT = Path(os.environ.get("TRAK_QNLI", "qnli-report"))
DATA = Path(os.environ.get("QNLI_DATA", EXAMPLES.parents[1] / "shared" / "data" / "qnli_dev.tsv.xz"))

pairs = Task(read_pairs(DATA), None, load_pretrained(str(find_weights(None))), Recipe(), folder=OUT)
model = pairs.build()
train_set, targets = pairs.train_loader(), pairs.target_loader()
task = "text_classification"
checkpoints = list(Bank.load(OUT / "checkpoints").models)

title = f"QNLI, {pairs.recipe.num_train:,} pairs"
class_names = CLASSES
train_labels, target_labels = pairs.train_set.labels, pairs.targets.labels
train_texts, target_texts = pairs.train_set.texts, pairs.targets.texts

passes_per_model = pairs.recipe.epochs / 2


def train_part():
    """A whole model, as one of the bank's."""
    rows = torch.randperm(pairs.recipe.num_train, generator=torch.Generator().manual_seed(0))
    pairs.train(rows[: pairs.recipe.num_train // 2].sort().values, seed=0)
