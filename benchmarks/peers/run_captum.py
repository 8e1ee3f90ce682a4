"""Captum: gradients of every example by `TracInCP.self_influence`, and `TracInCPFastRandProj`, which sees the last layer alone.

The first computes the gradients of linear and convolutional layers with `sample_wise_grads_per_batch=True`, its fast way, and takes their
norms: nothing is projected or kept. The second keeps K numbers of the last layer's gradient.
"""

from captum.influence import TracInCP, TracInCPFastRandProj
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from cases import matrix_layers
from protocol import Job, Prepared, serve


class NoSearch(NearestNeighbors):
    """Its constructor would index the training set."""

    def get_nearest_neighbors(self, query, k):
        raise NotImplementedError

    def setup(self, data):
        pass


def summed_loss(job: Job):
    def loss(logits, labels):
        return job.case.losses(logits, labels).sum()

    loss.reduction = "sum"
    return loss


def gradients(job: Job) -> Prepared:
    layers = matrix_layers(job.model)
    method = TracInCP(
        *(job.model, job.loader(), ["weights"]),
        checkpoints_load_func=lambda model, checkpoint: 1.0,
        layers=list(layers),
        loss_fn=summed_loss(job),
        sample_wise_grads_per_batch=True,
    )
    parameters = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    return Prepared(lambda: method.self_influence(outer_loop_by_checkpoints=True), {"parameters": parameters})


def last_layer(job: Job) -> Prepared:
    head = job.model.lm_head if job.case.kind == "lm" else job.model.head
    loader = job.loader()
    method = TracInCPFastRandProj(
        *(job.model, head, loader, ["weights"]),
        checkpoints_load_func=lambda model, checkpoint: 1.0,
        loss_fn=summed_loss(job),
        nearest_neighbors=NoSearch(),
        projection_dim=job.dim,
    )
    facts = {"parameters": head.weight.numel(), "kept": min(job.dim, head.weight.numel())}
    return Prepared(lambda: method.compute_intermediate_quantities(loader), facts)


if __name__ == "__main__":
    serve({"gradients": gradients, "last-layer": last_layer})
