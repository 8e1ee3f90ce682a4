"""Problems made smaller, and known by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from trak import batches
from trak.checkpoints import checkpoint_hash, load_checkpoint
from trak.datasets import DatasetRows, RowSource, TensorRows, as_rows, content_hash
from trak.errors import InputError
from trak.evaluation import Bank
from trak.frontier.values import Problem
from trak.gradients import select_parameters
from trak.tasks import resolve_task


def check_problem(problem: Problem, bank: Bank) -> Problem:
    """The problem with rows counted, and equal to the bank's.

    Raises:
        InputError: other numbers of training examples, targets or texts than the bank has, no checkpoints, or options that the frontier
            sets itself.
    """
    rows = {name: as_rows(getattr(problem, name), what=name) for name in ("train_set", "targets")}
    for name, expected in (("train_set", bank.num_train), ("targets", bank.outputs.shape[2])):
        if rows[name].num_rows != expected:
            raise InputError(
                f"{name} has {rows[name].num_rows} rows and the bank {expected}: give the bank's examples in its order (for targets, "
                "the rows that bank.target_rows names)"
            )
    for texts, name in ((problem.train_texts, "train_set"), (problem.target_texts, "targets")):
        if texts is not None and len(texts) != rows[name].num_rows:
            raise InputError(f"there are {len(texts)} texts for {rows[name].num_rows} rows of {name}")
    if (problem.train_texts is None) != (problem.target_texts is None):
        raise InputError("train_texts and target_texts belong together: give both or none")
    if not problem.checkpoints:
        raise InputError("checkpoints is empty: a frontier needs models to attribute")
    refused = {"projection", "damping", "preconditioner", "save_dir", "feature_dtype", "check"} & set(
        problem.options
    )
    if refused:
        raise InputError(f"{', '.join(sorted(refused))} are the contenders' own settings; leave them out")
    if any(len(run) != len(problem.runs[0]) for run in problem.runs):
        counts = ", ".join(str(len(run)) for run in problem.runs)
        raise InputError(
            f"every run needs the same number of checkpoints; got {counts}: leave out what only some of them have"
        )
    return problem


def first_targets(problem: Problem, count: int) -> Problem:
    """The problem with its first `count` targets.

    Raises:
        InputError: targets that can only be read as a whole.
    """
    source = as_rows(problem.targets, what="targets")
    if count == source.num_rows:
        return problem
    texts = problem.target_texts
    return replace(
        problem,
        targets=_first_rows(source, count),
        target_texts=None if texts is None else list(texts[:count]),
    )


def _first_rows(source: RowSource, count: int) -> RowSource:
    if isinstance(source, TensorRows):
        return replace(source, data=batches.take(source.data, slice(0, count)))
    if isinstance(source, DatasetRows):
        return replace(source, dataset=Subset(source.dataset, range(count)))
    raise InputError(
        "some of the targets can be taken of tensors and of datasets with __getitem__ and __len__ only; these can only be read "
        "from the front: leave out the limit on targets, or give a dataset"
    )


def problem_digest(problem: Problem) -> str:
    """A hash of model, task, attributed parameters, training sample and targets."""
    options = problem.options
    shapes = select_parameters(problem.model, options.get("parameters"))
    train = as_rows(problem.train_set, what="train_set")
    targets = as_rows(problem.targets, what="targets")
    facts = {
        "model": type(problem.model).__name__,
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "task": dict(resolve_task(problem.task).fingerprint()),
        "dtype": str(options.get("dtype")),
        "num_train": train.num_rows,
        "train_sample": train.sample_hash(),
        "targets": content_hash(batch for _, batch in targets.batches()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checkpoint_digests(checkpoints: Sequence[Any], *, trust_pickle: bool = False) -> list[str]:
    """The hash of each checkpoint's content."""
    return [checkpoint_hash(load_checkpoint(source, trust_pickle=trust_pickle)) for source in checkpoints]


def bank_digest(bank: Bank) -> str:
    """A hash of subsets and outputs."""
    digest = hashlib.sha256(np.packbits(bank.masks.numpy(), axis=1).tobytes())
    digest.update(str(tuple(bank.outputs.shape)).encode())
    digest.update(bank.outputs.contiguous().numpy().tobytes())
    digest.update(bank.target_rows.numpy().tobytes())
    return digest.hexdigest()


def split_bank(bank: Bank, *, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the subsets to estimate from and of those to judge by: a random split, ascending each.

    Raises:
        InputError: a share that leaves fewer than three subsets to judge by, or none to estimate from.
    """
    count = len(bank.masks)
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(count))
    size = int(share * count)
    if not 0 < share < 1 or size < 1 or count - size < 3:
        raise InputError(
            f"a share of {share!r} of {count} subsets to estimate from is impossible: at least one must be there to estimate from, and three "
            "to judge by"
        )
    return order[:size].sort().values, order[size:].sort().values
