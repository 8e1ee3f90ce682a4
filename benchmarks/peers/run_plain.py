"""The floor: one forward and backward pass over the examples, as in training, without an optimiser's step."""

from protocol import Job, Prepared, serve


def plain(job: Job) -> Prepared:
    def one_round() -> None:
        for inputs, labels in job.batches():
            job.case.losses(job.model(inputs), labels).sum().backward()
            job.model.zero_grad(set_to_none=True)

    return Prepared(one_round, {"parameters": sum(p.numel() for p in job.model.parameters())})


if __name__ == "__main__":
    serve({"plain": plain})
