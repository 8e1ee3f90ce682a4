"""Train models on subsets with the caller's own function, several at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trak.evaluation._values import check_count
from trak.evaluation.retrain.bank import Bank
from trak.evaluation.retrain.errors import RetrainError
from trak.evaluation.retrain.plan import Job, make_plan
from trak.evaluation.retrain.randomness import SharedState, seeded
from trak.evaluation.retrain.results import Results
from trak.logs import logger
from trak.progress import Bar, bar

Train = Callable[[Tensor, int], Any]
Outputs = Callable[[Any], Any]


def retrain(
    train: Train,
    outputs: Outputs,
    *,
    num_train: int,
    masks: Any = None,
    num_subsets: int | None = None,
    fraction: float = 0.5,
    models_per_subset: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    workers: int = 1,
    keep_models: bool = False,
    target_rows: Any = None,
    version: str | None = None,
    progress: bool | None = None,
) -> Bank:
    """Train R models on each of S subsets of the training rows, and keep their outputs on the targets.

    With a folder, the outputs of each model are one small file that appears whole or not at all: a run that was
    killed goes on where it stopped, and loses only the models that were in training. The bank is the same as
    that of an uninterrupted run if `train` depends on nothing but its arguments.

    A bank is made larger by asking for more with the same folder: a larger num_subsets or models_per_subset, or masks
    that begin with those of before. Only the new models are trained, and the bank is the same as if it had been asked for
    at once. Until they are there, `Bank.load(folder)` gives the smaller bank.

    Seeds are `model_seed(seed, subset, repeat)`, whatever the number of workers. The random generators that all
    threads share (torch's, NumPy's, `random`) are put back at the end. With one worker they are seeded anew for
    each model, so `train` may draw from them. With more, threads would disturb one another: a model is refused if
    somebody has drawn from them; use a `torch.Generator` of your own, and `seeded(seed)` around what cannot.

    Each worker is a thread in which torch computes with one thread, also if there is only one worker: the result
    then has the same bits for every number of workers, and small models train faster so. torch releases the
    interpreter's lock inside its operations; a training loop of very small operations gains little from threads.

    Args:
        train: function (rows [n] int64 ascending, seed in [0, 2³²)) → model. The model is whatever `outputs` takes; a
            module or state dict if it is to be kept. Called in several threads at once if workers > 1.
        outputs: function model → [T], the model output f of each target, finite; same order for every model.
        num_train: N, number of training rows.
        masks: [S, N] bool, the rows that the models of each subset see; or give num_subsets.
        num_subsets: S; subsets are then `random_subsets(num_train, num_subsets, fraction, seed=seed)`. Use another
            seed than for subsets that attributed checkpoints were trained on.
        fraction: α, share of rows in each drawn subset.
        models_per_subset: R; more models per subset are less noise from training.
        seed: of subsets and models.
        folder: where finished models are written, None for memory only.
        workers: models in training at a time; the number of cores is a good choice on a CPU.
        keep_models: also write each model's parameters to the folder.
        target_rows: [T], which rows of the target data the outputs are of; for the record.
        version: any word for your functions and data, which cannot be compared themselves: change it when they
            change, and models of the old version are refused.
        progress: True or False to force the bar.

    Returns:
        The bank; with a folder also written there, for `Bank.load(folder)`.

    Raises:
        RetrainError: `train` or `outputs` raised (chained), or outputs are not [T]. Names the subset and the seed; models in
            training in other threads are finished and kept.
        NonFiniteError: NaN or infinity in a model's outputs.
        FingerprintError: the folder is of a larger bank, or of one with other settings; the message has each difference.
        CorruptShardError: a damaged file in the folder.
        InputError: a bad argument.
    """
    check_count(workers, "workers", 1)
    plan = make_plan(
        num_train,
        masks=masks,
        num_subsets=num_subsets,
        fraction=fraction,
        models_per_subset=models_per_subset,
        seed=seed,
        keep_models=keep_models,
        target_rows=target_rows,
        version=version,
        recipe={"method": "retrain"},
    )
    results = Results(plan, folder)
    missing = results.missing()
    shared = SharedState.now()

    failed = threading.Event()

    def run(job: Job) -> bool:
        # Without it a worker would begin another model before the error has reached the calling thread.
        if failed.is_set():
            return False
        try:
            train_one(job)
        except BaseException:
            failed.set()
            raise
        return True

    def train_one(job: Job) -> None:
        with calling(job), seeded(job.seed) if workers == 1 else nullcontext():
            model = train(plan.rows(job), job.seed)
            values = outputs(model)
        if workers > 1:
            _refuse_shared_draws(job, shared)
        results.keep(job, model, values)

    try:
        with one_thread_each(workers) as pool, models_bar(plan.jobs(), missing, progress) as shown:
            for future in as_completed([pool.submit(run, job) for job in missing]):
                shown.update(int(future.result()))
    finally:
        shared.restore()
    return results.bank()


@contextmanager
def calling(job: Job) -> Iterator[None]:
    """Say which model an error of the caller's functions belongs to."""
    try:
        yield
    except Exception as error:
        raise RetrainError(
            f"Training or evaluating the model of {job} failed: {type(error).__name__}: {error}. "
            "Models that were finished are kept if there is a folder; call again to go on.",
            subset=job.subset,
            repeat=job.repeat,
            seed=job.seed,
        ) from error


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which torch itself uses one; those in work are waited for on leaving."""
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "trak-retrain", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # The calling thread kept its own setting; this is for threads that are started later.
        torch.set_num_threads(num_threads)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch compute with one thread in the calling thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class _PerMinute:
    """A bar that shows models per minute, which are seldom as many as one per second."""

    def __init__(self, shown: Bar) -> None:
        self._show: Callable[..., object] | None = getattr(shown, "set_postfix_str", None)
        self._shown = shown
        self._start = time.monotonic()
        self._done = 0

    def update(self, n: int = 1, /) -> None:
        """N more models are done."""
        self._done += n
        if self._show is not None:
            rate = 60 * self._done / max(time.monotonic() - self._start, 1e-9)
            self._show(f"{rate:.3g} models/min", refresh=False)
        self._shown.update(n)


@contextmanager
def models_bar(jobs: list[Job], missing: list[Job], progress: bool | None) -> Iterator[Bar]:
    """A progress bar over models; those of an earlier run are done already."""
    there = len(jobs) - len(missing)
    if there and missing:
        logger.info("retrain: %d of %d models are there already", there, len(jobs))
    with bar(len(jobs), "Retraining", unit="models", enabled=progress, initial=there) as shown:
        yield _PerMinute(shown)


def _refuse_shared_draws(job: Job, before: SharedState) -> None:
    changed = before.changed()
    if changed:
        raise RetrainError(
            f"While the model of {job} was trained, {' and '.join(changed)} shared random generator was drawn from "
            "or seeded. Threads share it, so the models would depend on which thread came first. In train, use "
            "torch.Generator().manual_seed(seed), and wrap what draws from the shared generator, such as "
            "building the model, in `with trak.evaluation.seeded(seed):`; or pass workers=1.",
            subset=job.subset,
            repeat=job.repeat,
            seed=job.seed,
        )
