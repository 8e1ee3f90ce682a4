"""kronfluence: EK-FAC influence scores of a few queries against the examples, the factors being fitted beforehand.

Other work than featurizing: nothing is kept of an example, and every later query needs a pass over the training set again. The time counts
training examples and queries alike.
"""

import time

import torch
from cases import matrix_layers
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from protocol import Job, Prepared, serve
from torch.utils.data import Subset, TensorDataset

QUERIES = 4


class CaseTask(Task):
    def __init__(self, case, names):
        self.case, self.names = case, names

    def compute_train_loss(self, batch, model, sample=False):
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            with torch.no_grad():
                chosen = torch.distributions.Categorical(logits=logits.detach()).sample()
            # A language model's labels are one place further on.
            labels = torch.roll(chosen, 1, 1) if self.case.kind == "lm" else chosen
        return self.case.losses(logits, labels).sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.names


def scores(job: Job) -> Prepared:
    layers = matrix_layers(job.model)
    task = CaseTask(job.case, list(layers))
    model = prepare_model(job.model, task)
    analyzer = Analyzer(
        *("bench", model, task),
        cpu=job.device == "cpu",
        disable_tqdm=True,
        output_dir=str(job.folder),
    )
    data = TensorDataset(job.inputs.cpu(), job.labels.cpu())
    arguments = FactorArguments(strategy="ekfac", has_shared_parameters=job.case.kind == "lm")
    settings = {"factor_args": arguments, "overwrite_output_dir": True}
    seconds = {}
    for step, run in (
        (
            "covariances",
            lambda: analyzer.fit_covariance_matrices(
                "factors", data, per_device_batch_size=job.batch_size, **settings
            ),
        ),
        ("eigenvectors", lambda: analyzer.perform_eigendecomposition("factors", **settings)),
        (
            "eigenvalues",
            lambda: analyzer.fit_lambda_matrices(
                "factors", data, per_device_batch_size=job.batch_size, **settings
            ),
        ),
    ):
        start = time.perf_counter()
        run()
        seconds[step] = time.perf_counter() - start
    queries = Subset(data, range(min(QUERIES, len(data))))

    def one_round() -> None:
        analyzer.compute_pairwise_scores(
            *("scores", "factors", queries, data),
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=job.batch_size,
            overwrite_output_dir=True,
        )

    parameters = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    facts = {"parameters": parameters, "examples": len(data) + len(queries), "fit_seconds": seconds}
    return Prepared(one_round, facts)


if __name__ == "__main__":
    serve({"scores": scores})
