"""Which sentences taught a language model a fact, and does it forget the fact without them?

    python examples/facts.py --out facts-report
    python examples/facts.py --quick

Fact tracing as in the paper of TRAK, small and real: a small masked language model learns sentences of T-REx, one word masked; it is
asked for facts by the templates of LAMA ("[X] was born in [Y] ."). TRAK, TracIn, GAS, representation similarity, BM25 and chance
rank the training sentences of every question: how high are those that state the fact? Then the question that matters: each method's
top k sentences are removed, the model is trained again, and asked again.

Writes result.json, tables.md, CSV tables and two figures. Kill it whenever you like: the same command goes on where it stopped.
`--paper` is the paper's own setting, FTRACE-TREx with mT5-small: it needs a network connection and a GPU.

Needs lama_trex_28rel.jsonl.xz and lama_relations.jsonl (--data), bm25s, and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from facts_results import PAGE, draw, summarise, write_page, write_tables
from facts_task import Recipe, Task, choose, in_full, read_facts
from safetensors.torch import load_file, save_file

import trak
from trak.evaluation import Bank, retrain, retrieval
from trak.progress import bar

MODEL_SEED, CONTROL_SEED, REMOVAL_SEED = 1, 2, 3
ALONG_THE_RUN = (0.25, 0.5, 0.75)  # shares of the epochs at which TracIn reads the models
TOP = 500  # rows of a ranking that are kept
UNBOUNDED = "TRAK, less damped"  # by the trace alone, without the bound on the effective dimension
FORGETTING = ("TRAK", "TracIn", "representation", "BM25", "ground truth", "random")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        models: M, attributed.
        dim: K of the projection.
        controls: models of all rows, whose answers say which facts are known.
        k: numbers of rows removed for each target.
        single_k: the same where targets are removed alone.
        groups: sets of targets whose rows are removed together.
        group_size: targets in each, of different relations and objects.
        single: targets whose rows are removed alone.
        seeds: models trained without the same rows.
    """

    models: int = 4
    dim: int = 2048
    controls: int = 2
    k: tuple[int, ...] = (5, 10, 20)
    single_k: int = 10
    groups: int = 8
    group_size: int = 8
    single: int = 32
    seeds: int = 2


QUICK_RECIPE = Recipe(num_train=500, num_queries=60, epochs=8)
QUICK_PLAN = Plan(models=2, dim=128, controls=1, k=(10,), groups=2, group_size=6, single=0, seeds=1)
PAPER_PLAN = Plan(models=5, dim=4096, k=(500,), single_k=500, groups=50, group_size=1, single=0, seeds=1)


# ---------------------------------------------------------------------------------------------------------------------- models


def train_models(task: Task, plan: Plan, out: Path) -> list[list[tuple[float, Path]]]:
    """M models of all rows: for each (learning rate, file) along the run, and last the finished one, of rate 0."""
    folder, everything, runs = out / "models", torch.arange(len(task.facts.rows)), []
    folder.mkdir(parents=True, exist_ok=True)
    with bar(plan.models, "Training models to attribute", unit="models") as shown:
        for index in range(plan.models):
            done = folder / f"model-{index}.json"
            if not done.is_file():
                seed = 1000 * MODEL_SEED + index
                model, kept = task.train(everything, seed, keep_at=ALONG_THE_RUN)
                states = [*kept, (0.0, model.state_dict())]
                for number, (_, state) in enumerate(states):
                    copies = {
                        name: value.detach().cpu().clone() for name, value in state.items()
                    }  # tied ones apart
                    save_file(copies, folder / f"model-{index}-{number}.safetensors")
                done.write_text(json.dumps([rate for rate, _ in states]))
            rates = json.loads(done.read_text())
            runs.append(
                [(rate, folder / f"model-{index}-{number}.safetensors") for number, rate in enumerate(rates)]
            )
            shown.update(1)
    return runs


def retrained(
    task: Task, masks: torch.Tensor, seeds: int, seed: int, folder: Path, workers: int
) -> torch.Tensor:
    """[S, R, Q] leads of models trained on the rows of each mask [S, N]; read from the folder where they are there."""

    def train(rows: torch.Tensor, seed: int) -> Any:
        start = time.thread_time()
        model, _ = task.train(rows, seed)
        with open(folder.parent / "seconds.txt", "a") as file:
            file.write(f"{time.thread_time() - start:.3f}\n")
        return model

    bank: Bank = retrain(
        train,
        task.leads,
        num_train=len(task.facts.rows),
        masks=masks,
        models_per_subset=seeds,
        seed=seed,
        folder=folder,
        workers=workers,
        version=json.dumps({"facts": 1, **asdict(task.recipe)}, sort_keys=True),
    )
    return bank.outputs


# -------------------------------------------------------------------------------------------------------------------- rankings


def rank_rows(task: Task, runs: list[list[tuple[float, Path]]], dim: int, out: Path) -> dict[str, Any]:
    """Every method's retrieval of the sentences that state the fact, and its first rows; read from out/rankings.json if it is there."""
    file = out / "rankings.json"
    if file.is_file():
        return json.loads(file.read_text())
    loaders = task.train_loader(), task.query_loader()
    explained = task.explained
    common = {"model": explained["model"], "task": explained["task"], **task.representation}
    gradients = {**explained, "projection": trak.Sparse(dim), "save_dir": out / "features"}
    finished = [run[-1][1] for run in runs]
    along = [pair for run in runs for pair in run[:-1]]
    on_the_way: dict[str, Any] = {**gradients, "learning_rates": [rate for rate, _ in along]}
    texts = (
        [in_full(row.words, row.object) for row in task.facts.rows],
        [in_full(query.words, query.fact.object) for query in task.facts.queries],
    )
    files = [path for _, path in along]
    methods = {
        "TRAK": (trak.TRAK(**gradients), finished, loaders),
        UNBOUNDED: (
            trak.TRAK(**gradients, damping=trak.AutomaticDamping(directions=None)),
            finished,
            loaders,
        ),
        "TracIn": (trak.TracIn(**on_the_way), files, loaders),
        "GAS": (trak.TracIn(**on_the_way, normalise=True), files, loaders),
        "representation": (trak.RepresentationSimilarity(**common, similarity="cosine"), finished, loaders),
        "BM25": (trak.BM25(), None, texts),
        "random": (trak.RandomScores(seed=0), None, loaders),
    }
    relevant = [query.relevant for query in task.facts.queries]
    found: dict[str, Any] = {}
    for name, (method, checkpoints, (train, targets)) in methods.items():
        start = time.perf_counter()
        scores = method.fit(train, checkpoints).attribute(targets).scores
        measured = retrieval(scores, relevant, k=[10], seed=0)
        found[name] = {
            "mrr": asdict(measured.mrr),
            "recall any": asdict(measured.recall_any[10]),
            "recall all": asdict(measured.recall_all[10]),
            "reciprocal ranks": [1 / float(ranks[0]) for ranks in measured.ranks],
            "seconds": time.perf_counter() - start,
            "top": scores.top(min(TOP, len(task.facts.rows))).rows.tolist(),
        }
        print(f"{name}: MRR {measured.mrr}, recall@10 {measured.recall_any[10]} (any)", flush=True)
    file.write_text(json.dumps(found))
    return found


def add_references(task: Task, rankings: dict[str, Any]) -> dict[str, list[list[int]]]:
    """First rows by method, with "ground truth": a query's relevant rows, then random ones; and random rows drawn once more."""
    tops = {name: one["top"] for name, one in rankings.items()}
    generator, truth = torch.Generator().manual_seed(1), []
    for query in task.facts.queries:
        others = [
            row
            for row in torch.randperm(len(task.facts.rows), generator=generator).tolist()
            if row not in query.relevant
        ]
        truth.append([*query.relevant, *others][:TOP])
    return {**tops, "ground truth": truth}


# -------------------------------------------------------------------------------------------------------------- counterfactuals


def known_facts(task: Task, runs: list[list[tuple[float, Path]]], controls_CQ: torch.Tensor) -> list[int]:
    """Queries that every attributed model and every control answers."""
    model, leads = task.build(), []
    for run in runs:
        model.load_state_dict(load_file(run[-1][1]))
        leads.append(task.leads(model.eval()))
    given_Q = (torch.stack(leads) > 0).all(0) & (controls_CQ > 0).all(0)
    return given_Q.nonzero().flatten().tolist()


def unrelated_groups(task: Task, targets: Sequence[int], count: int, size: int) -> list[list[int]]:
    """`count` groups of `size` targets that differ in relation and object and share no word of their subjects."""
    groups: list[list[int]] = []
    taken: list[set[str]] = []
    for target in targets:
        fact = task.facts.queries[target].fact
        traits = {fact.relation, "object " + fact.object, *fact.subject.lower().split()}
        for group, used in zip(groups, taken):
            if len(group) < size and not used & traits:
                group.append(target)
                used |= traits
                break
        else:
            groups.append([target])
            taken.append(set(traits))
    full = [group for group in groups if len(group) == size]
    if len(full) < count:
        raise SystemExit(
            f"The model knows {len(targets)} of {len(task.facts.queries)} facts, enough for {len(full)} groups of {size}; {count} are asked for. "
            "Pass a smaller --groups, or more --queries or --epochs."
        )
    return full[:count]


def forget(
    task: Task,
    tops: Mapping[str, list[list[int]]],
    groups: list[list[int]],
    k: int,
    seeds: int,
    folder: Path,
    workers: int,
) -> dict[str, Any]:
    """Leads [G, R, size] of every group's targets after removing their k first rows, by method."""
    found: dict[str, Any] = {}
    for name in FORGETTING:
        masks = torch.ones(len(groups), len(task.facts.rows), dtype=torch.bool)
        for index, group in enumerate(groups):
            for target in group:
                masks[index, tops[name][target][:k]] = False
        print(f"Without the first {k} rows of {name}: {folder / name.replace(' ', '-')}", flush=True)
        outputs = retrained(task, masks, seeds, REMOVAL_SEED, folder / name.replace(" ", "-"), workers)
        found[name] = {
            "leads": [outputs[index][:, group].tolist() for index, group in enumerate(groups)],
            "removed": [int((~mask).sum()) for mask in masks],
        }
    return found


def contents(task: Task, top: list[list[int]], targets: Sequence[int], k: int) -> dict[str, float]:
    """Of the first k rows: the share that states the fact, that masks the same object, and that names the subject."""
    truth = same = named = 0
    for target in targets:
        query = task.facts.queries[target]
        subject = {word for word in query.fact.subject.lower().split() if len(word) > 3}
        for row in top[target][:k]:
            truth += row in query.relevant
            same += task.facts.rows[row].object == query.fact.object
            named += bool(subject & set(task.facts.rows[row].words))
    total = k * len(targets)
    return {"states the fact": truth / total, "same object": same / total, "names the subject": named / total}


# -------------------------------------------------------------------------------------------------------------------- the whole


def run(task: Task, plan: Plan, out: Path, workers: int) -> dict[str, Any]:
    """All stages; each goes on from what is in the folder."""
    settings = {"recipe": asdict(task.recipe), "plan": asdict(plan)}
    check_folder(out, settings)
    runs = train_models(task, plan, out)
    print(f"Controls: {out / 'controls'}", flush=True)
    everything = torch.ones(1, len(task.facts.rows), dtype=torch.bool)
    controls_CQ = retrained(task, everything, plan.controls, CONTROL_SEED, out / "controls", workers)[0]
    rankings = rank_rows(task, runs, plan.dim, out)
    tops = add_references(task, rankings)
    known = known_facts(task, runs, controls_CQ)
    groups = unrelated_groups(task, known, plan.groups, plan.group_size)
    targets = [target for group in groups for target in group]
    result = {
        **settings,
        "sizes": sizes(task),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "trak": trak.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
        "given by the controls": float((controls_CQ > 0).double().mean()),
        "known": known,
        "retrieval": {name: {key: one[key] for key in one if key != "top"} for name, one in rankings.items()},
        "contents": {
            str(k): {name: contents(task, top, targets, k) for name, top in tops.items()}
            for k in sorted({*plan.k, plan.single_k})
        },
        "controls": controls_CQ.tolist(),
        "groups": groups,
        "together": {
            str(k): forget(task, tops, groups, k, plan.seeds, out / f"together-{k}", workers) for k in plan.k
        },
    }
    if plan.single:
        # One target of each group, then a second of each: the groups' relations and objects vary.
        alone = [group[place] for place in range(plan.group_size) for group in groups][: plan.single]
        result["single targets"] = alone
        sets, folder = [[target] for target in alone], out / f"alone-{plan.single_k}"
        result["alone"] = forget(task, tops, sets, plan.single_k, plan.seeds, folder, workers)
    result["seconds for a model"] = seconds_of_training(out)
    return result


def seconds_of_training(out: Path) -> float | None:
    """Processor seconds of a model, the median of those trained into this folder."""
    seconds = [float(line) for file in sorted(out.rglob("seconds.txt")) for line in file.read_text().split()]
    return statistics.median(seconds) if seconds else None


def sizes(task: Task) -> dict[str, float]:
    """Of the data and the model."""
    queries = task.facts.queries
    return {
        "rows": len(task.facts.rows),
        "queries": len(queries),
        "relevant rows": sum(len(query.relevant) for query in queries),
        "words": len(task.vocabulary),
        "parameters": sum(p.numel() for p in task.build().parameters()),
        "rivals": sum(len(query.rivals) for query in queries) / len(queries),
    }


def check_folder(out: Path, settings: dict) -> None:
    """Refuse a folder of other settings."""
    file, now = out / "settings.json", json.loads(json.dumps(settings))
    if file.is_file():
        before = json.loads(file.read_text())
        fixed = [(one["recipe"], one["plan"]["models"], one["plan"]["dim"]) for one in (before, now)]
        if fixed[0] != fixed[1]:
            raise SystemExit(
                f"{out} holds results of other settings ({before}); now they are {now}. Pass another --out."
            )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, beside = parser.add_argument, Path(__file__).resolve().parents[2] / "shared" / "data"
    add(
        "--out",
        type=Path,
        help="folder of everything that is written [facts-report, facts-quick, facts-ftrace]",
    )
    add("--data", type=Path, default=beside, help="folder with the two files of T-REx [%(default)s]")
    add("--quick", action="store_true", help="a small run of about two minutes")
    add("--train", type=int, help=f"training sentences [{Recipe().num_train}]")
    add("--queries", type=int, help=f"facts that are asked for [{Recipe().num_queries}]")
    add("--layers", type=int, help=f"of the model [{Recipe().layers}]")
    add("--epochs", type=int, help=f"of training [{Recipe().epochs}]")
    add("--models", type=int, help=f"to attribute [{Plan().models}]")
    add("--dim", type=int, help=f"K of the projection [{Plan().dim}]")
    add("--k", type=int, nargs="+", help="rows removed for each target [5 10 20]")
    add("--groups", type=int, help=f"of targets whose rows are removed together [{Plan().groups}]")
    add("--group-size", type=int, help=f"targets in a group [{Plan().group_size}]")
    add("--single", type=int, help=f"targets whose rows are removed alone [{Plan().single}]")
    add("--seeds", type=int, help=f"models trained without the same rows [{Plan().seeds}]")
    add("--workers", type=int, default=1, help="models in training at a time, a core each [%(default)s]")
    add(
        "--paper",
        action="store_true",
        help="the paper's setting instead: FTRACE-TREx, mT5-small; network and GPU",
    )
    add("--page", action="store_true", help=f"only write the recorded results to {PAGE.name} and its figures")
    options = parser.parse_args(arguments)
    name = "facts-ftrace" if options.paper else "facts-quick" if options.quick else "facts-report"
    options.out = options.out or Path(name)
    if options.k is not None:
        options.k = tuple(sorted(options.k))
        if not 0 < options.k[0] <= options.k[-1] <= TOP:
            parser.error(f"--k must be from 1 to {TOP}, got {options.k}")
    return options


def changed(default: Any, **values: Any) -> Any:
    """`default` with the values that were given."""
    return type(default)(
        **{**asdict(default), **{name: value for name, value in values.items() if value is not None}}
    )


def make_task(options: argparse.Namespace) -> Task:
    """Data and model: T-REx here, or FTRACE."""
    given = {"num_train": options.train, "num_queries": options.queries, "epochs": options.epochs}
    if options.paper:
        from facts_ftrace import FtraceRecipe, load_ftrace

        return load_ftrace(changed(FtraceRecipe(), **given))
    recipe = changed(QUICK_RECIPE if options.quick else Recipe(), layers=options.layers, **given)
    facts, templates = read_facts(options.data, recipe)
    return Task(choose(facts, templates, recipe), recipe)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    if options.page:
        return write_page()
    plan = changed(
        QUICK_PLAN if options.quick else PAPER_PLAN if options.paper else Plan(),
        models=options.models,
        dim=options.dim,
        k=options.k,
        groups=options.groups,
        group_size=options.group_size,
        single=options.single,
        seeds=options.seeds,
    )
    start = time.perf_counter()
    result = run(make_task(options), plan, options.out, options.workers)
    result["seconds of this call"] = time.perf_counter() - start
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    summary = summarise(result)
    print("\n" + write_tables(summary, options.out))
    draw(summary, options.out / "retrieval.png", options.out / "counterfactual.png")
    print(f"Wrote result.json, tables.md, *.csv and the figures to {options.out}")
    return None


if __name__ == "__main__":
    main()
