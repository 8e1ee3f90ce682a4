"""The fact-tracing example on facts made here: from a file to models, rankings, removals, tables, figures and page; and again."""

import argparse
import importlib
import json
import lzma
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = (
    "--train 90 --queries 12 --epochs 20 --models 2 --k 3 6 --groups 2 --group-size 2 --single 1 --seeds 1"
)
OBJECTS = {
    "P19": ("paris", "rome", "oslo"),
    "P106": ("painter", "poet", "actor"),
    "P413": ("goalkeeper", "striker", "winger"),
}
TEMPLATES = {
    "P19": "[X] was born in [Y] .",
    "P106": "[X] is a [Y] by profession .",
    "P413": "[X] plays in [Y] position .",
}
STATED = (
    "it is known that {} and {} belong together here",
    "in the old book {} stands beside the {} again",
    "{} , they say , is the {} of them",
)


@pytest.fixture
def facts(monkeypatch):
    """The example as a module: a process of its own would spend most of its time on imports."""
    for package in ("bm25s", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("facts")


@pytest.fixture
def module(monkeypatch):
    """Any of the example's modules by name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten subjects for each relation, three sentences each."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for place, (relation, objects) in enumerate(OBJECTS.items()):
        for number in range(10):
            subject, found = f"Name{place}x{number}", objects[number % 3]
            evidence = [[text.format(subject, found), subject, found] for text in STATED]
            lines.append(json.dumps({"p": relation, "s": subject, "o": found, "ev": evidence}))
    with lzma.open(folder / "lama_trex_28rel.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    relations = [json.dumps({"relation": name, "template": text}) for name, text in TEMPLATES.items()]
    (folder / "lama_relations.jsonl").write_text("\n".join(relations))
    return folder


def test_a_small_run_leaves_rankings_tables_and_figures_and_goes_on_from_them(
    facts, module, data, tmp_path, capsys
):
    command = ["--data", str(data), "--out", str(tmp_path / "out"), "--quick", *SMALL.split()]
    facts.main(command)
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["sizes"]["rows"] == 90 and result["sizes"]["queries"] == 12
    assert result["sizes"]["relevant rows"] == 36
    assert result["retrieval"]["BM25"]["mrr"]["mean"] == 1  # names occur in their own sentences only
    assert result["retrieval"]["TRAK"]["mrr"]["mean"] > 2 * result["retrieval"]["random"]["mrr"]["mean"]
    assert len(result["groups"]) == 2 and all(len(group) == 2 for group in result["groups"])
    assert {target for group in result["groups"] for target in group} <= set(result["known"])
    for name in facts.FORGETTING:
        assert np.shape(result["together"]["6"][name]["leads"]) == (2, 1, 2)
        assert np.shape(result["together"]["3"][name]["leads"]) == (2, 1, 2)
        assert np.shape(result["alone"][name]["leads"]) == (1, 1, 1)
        assert result["alone"][name]["removed"] == [10]
        assert name in printed
    assert result["contents"]["10"]["ground truth"]["states the fact"] == 0.3  # 3 of 10 rows
    for name in ("retrieval.png", "counterfactual.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert (out / "tables.md").read_text() in printed
    assert (out / "counterfactual.csv").read_text().count("\n") == 1 + len(facts.FORGETTING)

    trained = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    facts.main(command)
    again = json.loads((out / "result.json").read_text())
    assert trained == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    for volatile in ("seconds of this call", "machine"):
        again.pop(volatile), result.pop(volatile)
    assert again == result

    with pytest.raises(SystemExit, match="holds results of other settings"):
        facts.main([*command, "--epochs", "13"])
    with pytest.raises(SystemExit, match="Pass a smaller --groups"):
        facts.main([*command, "--groups", "30"])


def test_removal_takes_every_targets_first_rows_and_random_removal_as_many(
    facts, module, data, monkeypatch, tmp_path
):
    """The masks that models are trained with, for two targets together."""
    task_module = module("facts_task")
    recipe = task_module.Recipe(num_train=90, num_queries=12)
    task = task_module.Task(task_module.choose(*task_module.read_facts(data, recipe), recipe), recipe)
    seen = []
    monkeypatch.setattr(
        facts,
        "retrained",
        lambda task, masks, seeds, *rest: seen.append(masks) or torch.zeros(len(masks), seeds, 12),
    )
    tops = {
        name: [[(10 * target + row) % 90 for row in range(8)] for target in range(12)]
        for name in facts.FORGETTING
    }
    found = facts.forget(task, tops, [[0, 2], [1, 5]], 3, 2, tmp_path, 1)
    assert (~seen[0][0]).nonzero().flatten().tolist() == [0, 1, 2, 20, 21, 22]
    assert (~seen[0][1]).nonzero().flatten().tolist() == [10, 11, 12, 50, 51, 52]
    assert found["TRAK"]["removed"] == [6, 6]


def test_sentences_are_used_only_if_they_name_the_subject_and_have_the_object_once(module):
    task = module("facts_task")
    recipe = task.Recipe(max_words=9)
    evidence = [
        ["Alan Turing was born in London , England .", "Alan Turing", "London"],
        ["Turing left London for a while in June .", "Turing", "London"],
        ["He left London for a while in June .", "He", "London"],  # by another word
        ["Turing went from London to London in June .", "Turing", "London"],  # twice
        ["Turing left the capital for a while then .", "Turing", "capital"],  # not as the fact has it
        ["Turing lived in London before he went away from it .", "Turing", "London"],  # too long
        ["Turing , London .", "Turing", "London"],  # too short
    ]
    lines = [
        {"p": "P19", "s": "Alan Turing", "o": "London", "ev": evidence},
        {
            "p": "P19",
            "s": "Paris FC",
            "o": "Paris",
            "ev": [["Paris FC was never born at all", "Paris FC", "Paris"]],
        },
        {"p": "P19", "s": "Alan Turing", "o": "Maida Vale", "ev": []},
    ]
    (fact,) = task.usable_facts(lines, recipe)  # the others have an object of two words, or in the subject
    assert fact.object == "london" and fact.answers == {"london", "maida vale"}
    assert [" ".join(words) for words in fact.masked] == [
        "alan turing was born in [MASK] , england .",
        "turing left [MASK] for a while in june .",
    ]


def test_queries_know_their_rows_and_rivals(module, data):
    task = module("facts_task")
    recipe = task.Recipe(num_train=60, num_queries=9)
    chosen = task.choose(*task.read_facts(data, recipe), recipe)
    assert len(chosen.rows) == 60 and len(chosen.queries) == 9
    assert sorted(query.fact.relation for query in chosen.queries) == sorted(3 * list(OBJECTS))
    for query in chosen.queries:
        assert len(query.relevant) == 3
        subject = query.fact.subject.lower()
        expected = [
            i for i, row in enumerate(chosen.rows) if subject in row.words and row.object == query.fact.object
        ]
        assert list(query.relevant) == expected
        assert query.fact.object not in query.rivals
        assert set(query.rivals) < set(OBJECTS[query.fact.relation])
        template = TEMPLATES[query.fact.relation].replace("[X]", subject).replace("[Y]", "[MASK]")
        assert " ".join(query.words) == template
    with pytest.raises(SystemExit, match="Pass a smaller --queries"):
        task.choose(*task.read_facts(data, recipe), task.Recipe(num_train=60, num_queries=31))


def test_leads_are_above_zero_exactly_where_the_true_object_beats_every_rival(module, data):
    task_module = module("facts_task")
    recipe = task_module.Recipe(num_train=90, num_queries=12)
    task = task_module.Task(task_module.choose(*task_module.read_facts(data, recipe), recipe), recipe)
    model = task.build(3).eval()
    number = {word: index for index, word in enumerate(task.vocabulary)}
    for lead, query in zip(task.leads(model).tolist(), task.facts.queries):
        tokens = torch.tensor([[number[word] for word in query.words]])
        logits = model(tokens, torch.ones_like(tokens))[0, 0].detach()
        expected = logits[number[query.fact.object]] - max(logits[number[word]] for word in query.rivals)
        assert lead == pytest.approx(float(expected), abs=1e-5)


def test_models_do_not_depend_on_padding_and_are_a_function_of_rows_and_seed(module, data):
    task_module = module("facts_task")
    recipe = task_module.Recipe(num_train=90, num_queries=12, epochs=2)
    task = task_module.Task(task_module.choose(*task_module.read_facts(data, recipe), recipe), recipe)
    rows = torch.arange(5, 60)
    (first, kept), (second, _) = (task.train(rows, 7, keep_at=(0.5, 1.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert [rate > 0 for rate, _ in kept] == [True, True]
    assert all(torch.equal(kept[1][1][name], value) for name, value in first.state_dict().items())
    words, label = task.rows[0]
    alone = task_module.collate([(words, label)])
    padded = task_module.collate(
        [(words, label), (words * 2, label)]
    )  # positions go on; the first row is padded
    longer = task_module.MaskedModel(len(task.vocabulary), 2 * len(words), 64).eval()
    torch.testing.assert_close(
        longer(padded["input_ids"], padded["attention_mask"])[:1],
        longer(alone["input_ids"], alone["attention_mask"]),
    )


def test_intervals_resample_sets_of_targets_and_differences_are_paired(module):
    results = module("facts_results")
    leads = {"TRAK": [[[-1.0, 2.0]], [[-3.0, -1.0]]], "BM25": [[[1.0, 2.0]], [[1.0, -1.0]]]}
    found = results.forgetting("title", 10, {name: {"leads": values} for name, values in leads.items()})
    assert found.counts == (2, 4, 1)
    assert found.given["TRAK"].mean == 0.25 and found.given["BM25"].mean == 0.75
    assert (found.given["TRAK"].low, found.given["TRAK"].high) == (0.0, 0.5)
    assert found.lead["TRAK"].mean == -0.75
    assert set(found.differences) == {("TRAK", "BM25")}
    # Both sets differ by one half.
    assert tuple(vars(found.differences["TRAK", "BM25"]).values()) == (-0.5, -0.5, -0.5)


def test_targets_that_are_removed_together_are_unrelated(facts, module):
    task_module = module("facts_task")

    def query(relation, subject, found):
        fact = task_module.Fact(
            relation=relation, subject=subject, object=found, masked=(), answers=frozenset()
        )
        return task_module.Query(fact=fact, words=(), rivals=(), relevant=())

    asked = (
        query("P1", "ann", "rome"),
        query("P1", "bob", "oslo"),  # the relation of 0
        query("P2", "ann lee", "bonn"),  # the subject of 0
        query("P2", "cid", "rome"),  # the object of 0
        query("P2", "dan", "bonn"),
    )
    task = argparse.Namespace(facts=task_module.FactSet(rows=(), queries=asked))
    assert facts.unrelated_groups(task, range(5), 2, 2) == [[0, 4], [1, 2]]


def test_the_page_shows_the_recorded_results(module):
    results = module("facts_results")
    if not results.RESULTS.is_file():
        pytest.skip("nothing is recorded yet")
    text = results.PAGE.read_text(encoding="utf-8")
    assert results.page(text, results.summarise(json.loads(results.RESULTS.read_text()))) == text
    for figure in results.FIGURES:
        assert f"../assets/{figure.name}" in text
        assert figure.stat().st_size < 200_000


def test_what_is_missing_is_said(facts, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="pass --data with the folder"):
        facts.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        facts.main(["--paper", "--out", str(tmp_path / "out")])


class Tokenizer:
    """Words as tokens, as a tokenizer of the hub is called."""

    eos_token_id = 1

    def __init__(self):
        self.numbers = {"<pad>": 0, "</s>": 1, "<extra_id_0>": 2}

    def __call__(self, texts, *, padding, return_tensors, truncation=False, max_length=99):
        known = self.numbers
        rows = [[*(known.setdefault(word, len(known)) for word in text.split()), 1] for text in texts]
        rows = [row[: max_length - 1] + row[-1:] if len(row) > max_length else row for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
        }

    def convert_tokens_to_ids(self, token):
        return self.numbers[token]

    def batch_decode(self, tokens, *, skip_special_tokens):
        words = {number: word for word, number in self.numbers.items()}
        return [" ".join(words.get(number, "?") for number in row.tolist() if number > 2) for row in tokens]


def test_the_papers_setting_on_a_tiny_model(facts, module, tmp_path):
    transformers = pytest.importorskip("transformers")
    ftrace = module("facts_ftrace")
    abstracts = [
        {"inputs_pretokenized": f"the writer name{n} came from <extra_id_0> once .", "facts": f"P1,X,Y;P19,Q{n % 3},S{n}",
         "targets_pretokenized": f"<extra_id_0> city{n % 3}"}
        for n in range(12)
    ]  # fmt: skip
    queries = [
        {"inputs_pretokenized": f"name{n} was born in <extra_id_0> .", "targets_pretokenized": f"<extra_id_0> city{n % 3}",
         "predicate_id": "P19", "obj_uri": f"Q{n % 3}", "sub_uri": f"S{n}", "sub_surface": f"name{n}"}
        for n in range(14)
    ]  # fmt: skip
    recipe = ftrace.FtraceRecipe(num_train=10, num_queries=4, epochs=2, lr=1e-2, batch_size=4)
    chosen = ftrace.choose_ftrace(abstracts, queries, recipe)
    assert len(chosen.rows) == 10
    for query in chosen.queries:
        (row,) = query.relevant
        assert query.fact.subject in chosen.rows[row].words
        assert chosen.rows[row].object == query.fact.object
    with pytest.raises(SystemExit, match="state the facts of 12 queries"):
        ftrace.choose_ftrace(abstracts, queries, ftrace.FtraceRecipe(num_train=10, num_queries=13))

    config = transformers.MT5Config(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = transformers.MT5ForConditionalGeneration(config)
    tokenizer = Tokenizer()
    task = ftrace.FtraceTask(chosen, recipe, tokenizer, lambda: model, "cpu")
    batch = next(iter(task.query_loader()))
    answers = [tokenizer.batch_decode(labels[mask != 0][None], skip_special_tokens=True)[0]
               for labels, mask in zip(batch["labels"], batch["target_mask"])]  # fmt: skip
    assert answers == [query.fact.object for query in chosen.queries]

    runs = facts.train_models(task, facts.Plan(models=1), tmp_path)
    found = facts.rank_rows(task, runs, 32, tmp_path)
    assert set(found) == {"TRAK", facts.UNBOUNDED, "TracIn", "GAS", "representation", "BM25", "random"}
    assert found["BM25"]["mrr"]["mean"] == 1
    assert all(sorted(top) == list(range(10)) for top in found["TRAK"]["top"])
    assert set(task.leads(task.build()).tolist()) <= {-1.0, 1.0}


def test_the_page_says_what_the_bound_costs(facts, module):
    results = module("facts_results")
    recorded = json.loads(results.RESULTS.read_text())["retrieval"]
    less, default = (np.array(recorded[name]["reciprocal ranks"]) for name in (facts.UNBOUNDED, "TRAK"))
    said = f"a paired difference of {results.mean_of(less - default)} over the queries"
    assert said in " ".join(results.PAGE.read_text(encoding="utf-8").split())


def test_the_help_names_every_option_of_the_page(facts):
    page = ROOT / "docs" / "experiments" / "facts.md"
    with pytest.raises(SystemExit):
        facts.parse_options(["--help"])
    for option in re.findall(r"examples/facts\.py.*?(--[a-z-]+)", page.read_text(encoding="utf-8")):
        facts.parse_options([option, *([] if option in ("--quick", "--paper", "--page") else ["1"])])
