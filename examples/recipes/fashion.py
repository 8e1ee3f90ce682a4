"""Recipe: the demo's images, models and bank.

    trak frontier examples/recipes/fashion.py --bank demo-report/bank --out frontier-fashion
    trak attribute examples/recipes/fashion.py

3,000 images of Fashion-MNIST, a tenth of them with wrong labels; a ConvNet with 20,490 parameters; ten checkpoints; a bank of 40 random
halves with two models each and 500 targets. Trains the demo's models where they are not there yet (a few minutes), in demo-report or
the folder that TRAK_DEMO names, and writes the bank beside them.
"""

import os
from pathlib import Path

from trak.demo.bank import train_bank
from trak.demo.data import CLASS_NAMES, load_data
from trak.demo.recipe import build_model
from trak.demo.recipe import train as train_model
from trak.demo.settings import full_settings
from trak.evaluation import Bank

SETTINGS = full_settings(0)
OUT = Path(os.environ.get("TRAK_DEMO", "demo-report"))

data = load_data(corrupted_share=SETTINGS.corrupted_share, seed=SETTINGS.derived_seed("corruption"))
OUT.mkdir(parents=True, exist_ok=True)
trained = train_bank(data, SETTINGS, OUT)
if not (OUT / "bank" / "bank.safetensors").is_file():
    Bank(masks=trained.subset_masks, outputs=trained.subset_outputs).save(OUT / "bank")

model = build_model(SETTINGS.recipe)
train_set = (data.images, data.labels)
targets = (data.test_images, data.test_labels)
task = "image_classification"
checkpoints = list(trained.checkpoint_files)
batch_size = 100

title = "Fashion-MNIST, 3,000 images"
class_names = CLASS_NAMES
train_labels = data.labels
target_labels = data.test_labels

passes_per_model = SETTINGS.recipe.epochs * SETTINGS.subset_fraction


def train_part():
    """A whole model, as one of the bank's."""
    rows = trained.checkpoint_masks[0].nonzero()[:, 0]
    train_model(data.images, data.labels, rows, recipe=SETTINGS.recipe, seed=0)
