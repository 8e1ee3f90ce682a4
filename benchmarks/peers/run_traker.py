"""The released package `traker`: `TRAKer.featurize`, float32, its default projector for the device, features in its memory-mapped store.

Its fast projector needs the CUDA extension `fast_jl`; without it the package takes its `BasicProjector`, which draws the whole matrix again
for every batch. Batches are therefore as large as memory comfortably holds.
"""

import logging

import torch
from protocol import Job, Prepared, serve
from torch.func import functional_call
from trak.modelout_functions import AbstractModelOutput

from trak import TRAKer

MAX_ROUNDS = 50


class CausalOutput(AbstractModelOutput):
    """The log-likelihood of a sequence, whose gradient is a training example's: the package has no task for language models."""

    def __init__(self, losses):
        self.losses = losses

    def get_output(self, model, weights, buffers, ids, labels):
        logits = functional_call(model, (weights, buffers), ids.unsqueeze(0), tie_weights=True)
        return -self.losses(logits, labels.unsqueeze(0)).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


def featurize(job: Job) -> Prepared:
    rows = len(job.inputs)
    traker = TRAKer(
        model=job.model,
        task=CausalOutput(job.case.losses) if job.case.kind == "lm" else "image_classification",
        train_set_size=MAX_ROUNDS * rows,
        save_dir=str(job.folder),
        load_from_save_dir=False,
        device=job.device,
        proj_dim=job.dim,
        use_half_precision=False,
        logging_level=logging.WARNING,
    )
    traker.load_checkpoint(job.model.state_dict(), model_id=0)

    def one_round() -> None:
        for inputs, labels in job.batches():
            traker.featurize(batch=[inputs, labels], num_samples=len(inputs))

    parameters = sum(p.numel() for p in job.model.parameters())
    facts = {"parameters": parameters, "kept": job.dim, "projector": type(traker.projector).__name__}
    return Prepared(one_round, facts)


if __name__ == "__main__":
    serve({"featurize": featurize})
