"""This library, by its public `TRAKer`: gradients, projection, model outputs, and features kept in memory."""

from functools import partial

from cases import matrix_layers
from protocol import Contender, Job, Prepared, serve
from torch.utils.data import DataLoader, Dataset

import trak
from trak.gradients import select_parameters

MAX_ROUNDS = 1000
FITTED_ROWS = 64
PROJECTIONS = {
    "Kronecker": trak.Kronecker,
    "Eigenbasis": partial(trak.Eigenbasis, sample=FITTED_ROWS),
    "Sparse": trak.Sparse,
    "Rademacher": trak.Rademacher,
}


class Repeated(Dataset):
    """The examples of a round, over and over: the training set."""

    def __init__(self, job: Job, is_lm: bool) -> None:
        self.job, self.is_lm = job, is_lm

    def __len__(self) -> int:
        return MAX_ROUNDS * len(self.job.inputs)

    def __getitem__(self, row: int) -> dict | tuple:
        inputs, labels = (part[row % len(self.job.inputs)] for part in (self.job.inputs, self.job.labels))
        return {"input_ids": inputs, "labels": labels} if self.is_lm else (inputs, labels)


def featurize(job: Job, *, kind: str, layers_only: bool = False) -> Prepared:
    is_lm = job.case.kind == "lm"
    names = [f"{name}.*" for name in matrix_layers(job.model)] if layers_only else None
    traker = trak.TRAKer(
        *(job.model, "causal_lm" if is_lm else "image_classification", MAX_ROUNDS * len(job.inputs)),
        save_dir=None,
        device=job.device,
        projector=PROJECTIONS[kind](job.dim),
        grad_wrt=names,
    )
    traker.load_checkpoint(job.model.state_dict(), model_id=0)
    if kind == "Eigenbasis":
        traker.fit_factors(DataLoader(Repeated(job, is_lm), batch_size=job.batch_size))

    def one_round() -> None:
        for inputs, labels in job.batches():
            batch = {"input_ids": inputs, "labels": labels} if is_lm else (inputs, labels)
            traker.featurize(batch, num_samples=len(inputs))

    shapes = select_parameters(job.model, names)
    named = dict(job.model.named_parameters())
    return Prepared(one_round, {"parameters": sum(named[name].numel() for name in shapes), "kept": job.dim})


CONTENDERS: dict[str, Contender] = {
    "kronecker": partial(featurize, kind="Kronecker"),
    "eigenbasis": partial(featurize, kind="Eigenbasis"),
    "sparse": partial(featurize, kind="Sparse"),
    "rademacher": partial(featurize, kind="Rademacher"),
    "kronecker-layers": partial(featurize, kind="Kronecker", layers_only=True),
}

if __name__ == "__main__":
    serve(CONTENDERS)
