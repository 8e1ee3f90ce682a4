"""Banks of retrained models: the ground truth of the linear datamodeling score.

def train(rows, seed): ...            # -> model trained on these rows
def outputs(model): ...               # -> [T], f of each target

bank = retrain(train, outputs, num_train=10_000, num_subsets=60, folder="bank", workers=4)
bank.lds(attribution.scores)
"""

from trak.evaluation.retrain.bank import Bank, load_packed_bank
from trak.evaluation.retrain.errors import RetrainError
from trak.evaluation.retrain.randomness import model_seed, seeded
from trak.evaluation.retrain.run import retrain
from trak.evaluation.retrain.stacked import retrain_stacked

__all__ = [
    "Bank",
    "RetrainError",
    "load_packed_bank",
    "model_seed",
    "retrain",
    "retrain_stacked",
    "seeded",
]
