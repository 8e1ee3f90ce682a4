"""The QNLI example on a tiny random BERT and pairs made here: from files to models, scores, table, figure and page; and again."""

import html
import importlib
import json
import lzma
from pathlib import Path

import pytest
import torch

from trak.evaluation import Bank

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "--train 40 --targets 8 --max-tokens 32 --epochs 1 --subsets 5 --repeats 3 --models 2 --checkpoints 1 2 --dim 64 --frozen 1"
WORDS = "what who where river king city built wrote is in the a of old tall north book tower ? ."


@pytest.fixture
def qnli(monkeypatch):
    """The example as a module: a process of its own would spend most of its time on imports."""
    for package in ("transformers", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("qnli")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folder of a BERT of two layers and 16 features, with a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file like QNLI's; the sentence has the answer where it holds the question's noun."""
    generator = torch.Generator().manual_seed(0)
    nouns = ("river", "king", "city", "book", "tower")

    def draw(words):
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    lines = ["index\tquestion\tsentence\tlabel"]
    for index in range(60):
        noun, other = draw(nouns), draw(nouns)
        question = f"{draw(('what', 'who', 'where'))} is the {draw(('old', 'tall'))} {noun} ?"
        sentence = f"the {other} is in the north{' of the old city' * (index % 3)} ."
        lines.append(
            f"{index}\t{question}\t{sentence}\t{'entailment' if noun == other else 'not_entailment'}"
        )
    file = tmp_path_factory.mktemp("data") / "qnli.tsv.xz"
    with lzma.open(file, "wt", encoding="utf-8") as opened:
        opened.write("\n".join(lines) + "\n")
    return file


def test_a_small_run_leaves_a_bank_figures_and_a_page_and_goes_on_from_them(
    qnli, bert, pairs, tmp_path, capsys
):
    command = ["--data", str(pairs), "--model", str(bert), "--out", str(tmp_path), *SMALL.split()]
    qnli.main([*command, "--train-only"])
    bank = Bank.load(tmp_path / "bank")
    assert bank.outputs.shape == (5, 1, 8)
    assert (bank.masks.sum(dim=1) == 20).all()
    assert not (tmp_path / "result.json").exists()
    kept = {
        path: path.stat().st_mtime_ns for path in [*tmp_path.glob("*/subset-*"), *tmp_path.glob("frozen-*")]
    }
    assert (
        len(kept) == 2 * 2 + 5 + 3 + 2
    )  # checkpoints keep their parameters; frozen layers of training pairs and targets

    capsys.readouterr()
    qnli.main(command)
    printed = capsys.readouterr().out
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # read, not made again
    result = json.loads((tmp_path / "result.json").read_text())
    names = [(row["method"], row["checkpoints"]) for row in result["methods"]]
    gradients = [(name, size) for name in ("gradient cosine", "gradient dot (TracIn)") for size in (1, 2)]
    assert names == [
        ("TRAK", 1),
        ("TRAK", 2),
        ("TRAK, 10 × the damping", 2),
        ("TRAK, 100 × the damping", 2),
        *gradients,
        ("representation cosine", 1),
        ("representation cosine", 2),
        ("same label", 0),
        ("random", 0),
    ]
    assert all(f"{row['lds']:6.3f}" in printed for row in result["methods"])
    assert (
        len((tmp_path / "seconds.jsonl").read_text().splitlines()) == 2 + 5 + 3 + 2
    )  # each model and checkpoint once
    page = html.unescape((tmp_path / "report.html").read_text())
    for example in result["examples"]:
        scores = [found["score"] for found in example["raise"] + example["lower"][::-1]]
        assert scores == sorted(scores, reverse=True)
        assert example["text"] in page
        assert example["raise"][0]["text"] in page
    assert (tmp_path / "lds.png").read_bytes()[:4] == b"\x89PNG"


def test_the_first_token_is_that_of_the_whole_model(qnli, bert, pairs, tmp_path):
    module = importlib.import_module("qnli_task")
    recipe = module.Recipe(num_train=40, num_targets=8, frozen=0, pooling="cls")
    pretrained = module.load_pretrained(str(bert))
    task = module.Task(module.read_pairs(pairs), None, pretrained, recipe, folder=tmp_path)
    batch = next(iter(task.target_loader()))
    labels = batch.pop("labels")
    assert (batch["attention_mask"] == 0).any()
    model = task.build().double()
    bert_model = pretrained[1].double()
    with torch.no_grad():
        whole = bert_model(
            input_ids=batch["inputs"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
        )
        logits = model.head(whole.pooler_output)
        torch.testing.assert_close(model(**batch), logits, rtol=1e-12, atol=1e-12)
        margins = task.outputs(model)[: len(labels)]
    torch.testing.assert_close(
        margins, logits[range(len(labels)), labels] - logits[range(len(labels)), 1 - labels]
    )


@pytest.mark.parametrize("pooling", ["product", "cls"])
def test_the_trained_part_on_what_the_frozen_layers_make_is_the_whole_model(
    qnli, bert, pairs, tmp_path, pooling
):
    module = importlib.import_module("qnli_task")
    everything = module.read_pairs(pairs)
    tasks = [
        module.Task(
            everything, None, module.load_pretrained(str(bert)),
            module.Recipe(num_train=40, num_targets=8, frozen=frozen, pooling=pooling), folder=tmp_path,
        )
        for frozen in (0, 1)
    ]  # fmt: skip
    whole, part = (task.build(seed=3) for task in tasks)
    torch.testing.assert_close(tasks[0].outputs(whole), tasks[1].outputs(part))
    assert "embeddings" not in {name.split(".")[0] for name, _ in part.named_parameters()}
    texts = {*tasks[0].train_set.rows} & {*tasks[0].targets.rows}
    assert not texts  # no target is a training pair


def test_the_product_starts_as_the_cosine_of_sentences_that_are_read_alone(qnli, bert, pairs, tmp_path):
    module = importlib.import_module("qnli_task")
    everything, (tokenizer, model) = module.read_pairs(pairs), module.load_pretrained(str(bert))
    recipe = module.Recipe(num_train=40, num_targets=8, frozen=1)
    task = module.Task(everything, None, (tokenizer, model), recipe, folder=tmp_path)
    batch = next(iter(task.train_loader()))
    embedded = []
    for side, texts in enumerate((everything.questions, everything.sentences)):
        for place, row in enumerate(task.train_set.rows[:3]):
            tokens = tokenizer(texts[row], return_tensors="pt")
            with torch.no_grad():
                whole = model(**tokens, output_hidden_states=True)
                # The frozen layer is exact; the last one sees the mean of its inputs as a query.
                frozen = whole.hidden_states[1]
                mean = frozen.mean(dim=1, keepdim=True)
                last = importlib.import_module("qnli_model").from_queries(
                    model.encoder.layer[1], mean, frozen, torch.ones(1, 1, frozen.shape[1])
                )
            assert (
                batch["inputs"][place][batch["token_type_ids"][place] == side][: frozen.shape[1]] - frozen[0]
            ).abs().max() < 1e-5
            embedded.append(last[0, 0])
    cosines = torch.cosine_similarity(torch.stack(embedded[:3]), torch.stack(embedded[3:]))
    started = task.build()
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = started(**batch)
    differences = (logits[:3, 0] - logits[:3, 1]) - 0.5 * 16**0.5 * cosines
    torch.testing.assert_close(differences, differences[:1].expand(3), rtol=1e-4, atol=1e-5)
    assert len(labels) == len(logits)


def test_related_pairs_have_the_question_or_the_sentence(qnli, bert, pairs, tmp_path):
    module = importlib.import_module("qnli_task")
    everything = module.read_pairs(pairs)
    recipe = module.Recipe(num_train=40, num_targets=8, frozen=1)
    task = module.Task(everything, None, module.load_pretrained(str(bert)), recipe, folder=tmp_path)
    related = task.related()
    for i, row in enumerate(task.train_set.rows):
        for t, target in enumerate(task.targets.rows):
            same = everything.questions[row] == everything.questions[target]
            same |= everything.sentences[row] == everything.sentences[target]
            assert related[i, t] == same


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "nowhere.xz"], "pass --data with the file"),
        (["--model", "nowhere/at-all"], "could not be loaded"),
        (["--max-tokens", "5", "--frozen", "1"], "larger --max-tokens"),
        (["--frozen", "2"], "at least one must be trained"),
    ],
)
def test_what_is_wrong_is_said(qnli, bert, pairs, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ["--data", str(pairs), "--model", str(bert), "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit, match=reason):
        qnli.main(command)
    assert not (tmp_path / "out").exists()


def test_the_papers_data_without_a_network(qnli, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SystemExit, match="needs the network once"):
        qnli.main(["--paper", "--out", str(tmp_path / "out")])


def test_the_papers_data_and_model_as_the_hub_gives_them(qnli, bert, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {
        "question": [f"what is the {word} ?" for word in WORDS.split()] * 3,
        "sentence": ["the old tower is in the north ."] * (3 * len(WORDS.split())),
        "label": [0, 1] * (3 * len(WORDS.split()) // 2) + [0] * (3 * len(WORDS.split()) % 2),
    }
    part = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, task, split: part)
    sizes = ["--train", "30", "--targets", "6", "--max-tokens", "9", "--epochs", "1"]
    options = qnli.parse_options(["--paper", "--model", str(bert), "--out", str(tmp_path), *sizes])
    task = qnli.make_task(options)
    assert task.recipe.pooling == "cls"
    assert task.recipe.cut
    assert task.train_loader().dataset[0][0].dtype == torch.int64  # token ids: nothing is frozen
    batch = next(iter(task.train_loader()))
    assert batch["inputs"].shape[1] == 9
    model = task.train(torch.arange(15), seed=0)
    assert task.outputs(model).shape == (6,)


def test_the_page_has_the_recorded_results(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("qnli_page")
    text = module.PAGE.read_text(encoding="utf-8")
    if module.page(text, json.loads(module.RECORD.read_text(encoding="utf-8"))) != text:
        pytest.fail("docs/experiments/qnli.md is out of date: python examples/qnli.py --page")
    assert module.FIGURE.stat().st_size < 200_000
