"""This library, by its public `TRAKer`: gradients, projection, model outputs, and features kept in memory."""

from functools import partial

from cases import matrix_layers
from protocol import Contender, Job, Prepared, serve

import trak
from trak.gradients import select_parameters

MAX_ROUNDS = 1000


def featurize(job: Job, *, kind: str, layers_only: bool = False) -> Prepared:
    is_lm = job.case.kind == "lm"
    names = [f"{name}.*" for name in matrix_layers(job.model)] if layers_only else None
    traker = trak.TRAKer(
        *(job.model, "causal_lm" if is_lm else "image_classification", MAX_ROUNDS * len(job.inputs)),
        save_dir=None,
        device=job.device,
        projector=getattr(trak, kind)(job.dim),
        grad_wrt=names,
    )
    traker.load_checkpoint(job.model.state_dict(), model_id=0)

    def one_round() -> None:
        for inputs, labels in job.batches():
            batch = {"input_ids": inputs, "labels": labels} if is_lm else (inputs, labels)
            traker.featurize(batch, num_samples=len(inputs))

    shapes = select_parameters(job.model, names)
    named = dict(job.model.named_parameters())
    return Prepared(one_round, {"parameters": sum(named[name].numel() for name in shapes), "kept": job.dim})


CONTENDERS: dict[str, Contender] = {
    "kronecker": partial(featurize, kind="Kronecker"),
    "sparse": partial(featurize, kind="Sparse"),
    "rademacher": partial(featurize, kind="Rademacher"),
    "kronecker-layers": partial(featurize, kind="Kronecker", layers_only=True),
}

if __name__ == "__main__":
    serve(CONTENDERS)
