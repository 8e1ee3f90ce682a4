"""dattri: the gradients and projections of its TRAK, and its LoGra.

TRAK: the loop of `TRAKAttributor.cache` with the library's own pieces (`AttributionTask.get_grad_loss_func`, `random_project`), without the
linear solve at its end, which is no part of featurizing. On a CPU only its dense projections run, and they are drawn again for every batch;
on a GPU its `sjlt` projection is taken, its fastest there.

LoGra: `LoGraAttributor.cache` with the identity for its Hessian: hooks on all linear layers, one backward pass, factored projections.
"""

import torch
from cases import matrix_layers, side
from dattri.algorithm import LoGraAttributor
from dattri.func.projection import random_project
from dattri.func.utils import _unflatten_params
from dattri.task import AttributionTask
from protocol import Job, Prepared, serve
from torch import nn
from torch.func import functional_call, vmap


class Named(nn.Module):
    """The model for batches that are mappings: of tuples LoGra takes the first example without its batch dimension."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs, labels=None):
        return self.model(inputs)


def trak(job: Job) -> Prepared:
    model, losses = job.model, job.case.losses

    def loss(parameters, example):
        inputs, labels = (part.unsqueeze(0) for part in example)
        return losses(functional_call(model, parameters, inputs, tie_weights=True), labels).sum()

    def probability(parameters, example):
        return torch.exp(-loss(parameters, example))

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    parameters, _ = task.get_param(ckpt_idx=0)
    gradients = task.get_grad_loss_func(in_dims=(None, 0))
    probabilities = vmap(probability, in_dims=(None, 0), randomness="different")
    size = sum(p.numel() for p in model.parameters())
    kind = "normal" if job.device == "cpu" else "sjlt"

    def one_round() -> None:
        for batch in job.batches():
            gradient = torch.nan_to_num(gradients(parameters, batch))
            gradient /= size**0.5
            count = len(batch[0])
            project = random_project(
                *(gradient, count),
                proj_dim=job.dim,
                proj_max_batch_size=32,
                proj_seed=0,
                proj_type=kind,
                device=job.device,
            )
            project(gradient, ensemble_id=0)
            1 - probabilities(_unflatten_params(parameters, model), batch)

    return Prepared(one_round, {"parameters": size, "kept": job.dim, "projector": kind})


def logra(job: Job) -> Prepared:
    model = Named(job.model)
    layers = {name: layer for name, layer in matrix_layers(model).items() if isinstance(layer, nn.Linear)}
    width = side(job.dim, [job.dim] * len(layers))

    def loss(model, batch, device):
        inputs, labels = batch["inputs"].to(device), batch["labels"].to(device)
        return job.case.losses(model(inputs), labels).sum()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = LoGraAttributor(
        task=task,
        layer_names=list(layers),
        hessian="Identity",
        device=job.device,
        proj_dim=width**2,
        offload="none",
        cache_dir=str(job.folder),
    )
    rows = [{"inputs": inputs, "labels": labels} for inputs, labels in zip(job.inputs, job.labels)]
    loader = torch.utils.data.DataLoader(rows, batch_size=job.batch_size, shuffle=False)
    parameters = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    facts = {"parameters": parameters, "kept": width**2 * len(layers)}
    return Prepared(lambda: attributor.cache(loader), facts)


if __name__ == "__main__":
    serve({"trak": trak, "logra": logra})
