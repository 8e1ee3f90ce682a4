"""The image-text example on pictures of one colour: from files to models, removals, tables and figures; and its page."""

import gzip
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}
SMALL = "--train 80 --held-out 16 --checkpoints 2 --targets 2 --seeds 1 --controls 2 --negatives 20 --dim 64 --epochs 8 --shown 1"


@pytest.fixture
def example(monkeypatch):
    """The example's modules by name: a process of its own would spend most of its time on imports."""
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    return lambda name: importlib.import_module(f"clip_{name}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A hundred pictures of one colour each, a little noisy, and what they show in five sentences."""
    image_module = pytest.importorskip("PIL.Image")
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files, captions = [], {}
    for number in range(100):
        name = list(COLOURS)[number % 4]
        pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, 20, (64, 64, 3)), 0, 255).astype(
            np.uint8
        )
        out = io.BytesIO()
        image_module.fromarray(pixels).save(out, "JPEG")
        files.append(out.getvalue())
        captions[f"{number}.jpg"] = [
            f"A {name} {thing} ." for thing in ("wall", "field", "square", "car", "sea")
        ]
    np.savez(
        folder / "flickr8k_64px.npz",
        jpeg=np.frombuffer(b"".join(files), dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, files)]).astype(np.uint32),
        names=np.array(list(captions)),
    )
    with gzip.open(folder / "flickr8k_captions.json.gz", "wt", encoding="utf-8") as file:
        json.dump(captions, file)
    return folder


def test_a_small_run_leaves_tables_and_figures_and_goes_on_from_what_it_trained(
    example, data, tmp_path, capsys
):
    command = ["--data", str(data), "--out", str(tmp_path), *SMALL.split()]
    example("flickr").main([*command, "--k", "15"])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["held_out"]["matched"] > 0.3 + result["held_out"]["unmatched"]  # colours were learned
    for measure in ("alignment", "excess"):
        # 2 controls and 1 of the removals' seed, targets
        assert np.shape(result[measure]["controls"]) == (3, 2)
        shapes = {name: np.shape(rows) for name, rows in result[measure]["without"]["15"].items()}
        assert shapes == {"TRAK": (1, 2), "TracIn": (1, 2), "CLIP similarity": (1, 2), "random": (2, 2)}
    assert (tmp_path / "table.md").read_text() in printed
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + 2 * 4
    for name in ("removal.png", "gallery.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"

    def trained():
        names = ("checkpoints/model-*", "controls/subset-*", "removals/rows-*")
        return {path: path.stat().st_mtime_ns for name in names for path in tmp_path.glob(name)}

    models = trained()
    folders = [path.parent.name for path in models if path.suffix == ".safetensors"]
    assert [folders.count(name) for name in ("checkpoints", "controls")] == [2 * 3, 2 + 2]
    assert 2 < folders.count("removals") <= 1 + 2 * 3  # methods may choose the same pairs
    example("flickr").main([*command, "--k", "5", "15"])
    more = json.loads((tmp_path / "result.json").read_text())
    assert (
        models.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}.items()
    )
    for measure in ("alignment", "excess"):
        assert more[measure]["without"]["15"] == result[measure]["without"]["15"]

    with pytest.raises(SystemExit, match="Pass another --out"):
        example("flickr").main([*command, "--k", "15", "--epochs", "7"])


def test_removals_are_the_strongest_pairs_of_each_target_and_serve_both_measures(example, tmp_path):
    flickr = example("flickr")
    scores = {"TRAK": torch.randn(30, 4), "other": torch.randn(30, 4)}
    calls = []

    def again(rows, seed):
        calls.append((tuple(rows.tolist()), seed))
        present = torch.zeros(30).index_fill_(0, rows, 1.0)
        return torch.cat([scores["TRAK"].T @ present, 10 * scores["TRAK"].T @ present])

    options = flickr.parse_options(["--out", str(tmp_path), "--k", "3", "6", "--seeds", "2"])
    found = example("stages").remove(again, scores, [2, 0], type("Family", (), {"version": "1"}), options)
    assert len(calls) == 2 * (1 + 2 * 2 * 2)  # none is trained twice for the second measure
    top = set(scores["TRAK"][:, 2].topk(6).indices.tolist())
    assert (tuple(row for row in range(30) if row not in top), 1001) in calls
    without = found.curves["TRAK"].changes[1, 0]
    assert without[0] == pytest.approx(-float(scores["TRAK"][:, 2].topk(6).values.sum()), abs=1e-5)
    np.testing.assert_allclose(found.full_outputs[:, 2:], 10 * found.full_outputs[:, :2], rtol=1e-5)
    assert list(found.targets) == [2, 0, 6, 4]


def test_controls_miss_random_pairs_and_a_smaller_removal_comes_last(example):
    masks = example("stages").control_masks(50, [4, 10], 3)
    assert masks.sum(1).tolist() == [50] * 3 + [40] * 3 + [46] * 3
    assert torch.equal(example("stages").control_masks(50, [10], 3), masks[:6])
    assert bool((masks[6:] | ~masks[3:6]).any(1).all())
    assert len({tuple(mask.tolist()) for mask in masks[3:]}) == 6


def test_targets_are_drawn_from_the_better_half_and_more_begin_with_fewer(example):
    choose, aligned_H = example("stages").choose_targets, torch.randn(40, dtype=torch.float64)
    chosen = choose(aligned_H, 12)
    assert len(set(chosen)) == 12
    assert aligned_H[chosen].min() >= aligned_H.median()
    assert choose(aligned_H, 5) == chosen[:5]
    with pytest.raises(SystemExit, match="half of the held-out pairs are 20"):
        choose(aligned_H, 21)


def test_fall_is_the_ratio_of_means_and_its_interval_covers_targets_and_models(example):
    falls = example("results").falls
    base = np.array([[0.5, 0.3], [0.7, 0.5]])
    exact = falls(
        {"controls": base.tolist(), "without": {"9": {"TRAK": [[0.3, 0.2]], "random": [[0.6, 0.4]]}}}
    )
    assert [row.fall for row in exact] == pytest.approx([0.5, 0.0])
    assert exact[1].less_than_trak[0] == pytest.approx(0.5)

    generator = np.random.default_rng(0)
    level_t = generator.uniform(0.3, 0.6, 40)
    noisy = {
        "controls": (level_t + 0.02 * generator.normal(size=(10, 40))).tolist(),
        "without": {"9": {"TRAK": (0.7 * level_t + 0.02 * generator.normal(size=(3, 40))).tolist()}},
    }
    (row,) = falls(noisy)
    assert row.low < 0.3 < row.high  # the fall that was built in
    assert row.high - row.low < 0.08
    assert falls(noisy) == [row]

    same = {"controls": [[0.4] * 5], "without": {"9": {"TRAK": [[0.3] * 5], "random": [[0.4] * 5]}}}
    assert [(row.low, row.high) for row in falls(same)] == [
        pytest.approx((0.25, 0.25)),
        pytest.approx((0.0, 0.0)),
    ]


def test_excess_is_the_cosine_less_the_mean_of_unmatched_ones(example):
    cosines_HH = torch.rand(7, 7, dtype=torch.float64)
    for target, value in enumerate(example("towers").excess(cosines_HH)):
        others = [cosines_HH[target, j] for j in range(7) if j != target]
        others += [cosines_HH[j, target] for j in range(7) if j != target]
        assert value == pytest.approx(float(cosines_HH[target, target] - sum(others) / 12))


def test_towers_ignore_padding_and_training_depends_on_rows_and_seed_alone(example, data):
    towers, pairs = example("towers"), example("data")
    train, held_out = pairs.split(pairs.read_pairs(data, 1), 80, 16)
    family = towers.SmallTowers(train, held_out, towers.Recipe(epochs=3, batch_size=32))
    assert family.num_words == len({"a", "wall", *COLOURS}) + 1
    rows = torch.arange(5, 80)
    model, snapshots = family.train(rows, 3, 3)
    again, _ = family.train(rows, 3)
    states = [
        one.state_dict() for one in (model, again, family.train(rows, 4)[0], family.train(rows[1:], 3)[0])
    ]
    alike = [all(torch.equal(states[0][name], state[name]) for name in state) for state in states]
    assert alike == [True, True, False, False]
    assert all(torch.equal(snapshots[-1].state[name], states[0][name]) for name in states[0])
    assert len(snapshots) == 3
    assert all(0 < one.learning_rate < 3e-3 for one in snapshots)

    tokens = family.held_out[1][:4]
    padded = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.int64)], 1)
    torch.testing.assert_close(model.embed_texts(tokens), model.embed_texts(padded))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "nowhere"], "pass --data with the folder"),
        (["--train", "90", "--held-out", "20"], "more pairs than the 100"),
        (["--clip", "clip-vit", "--train", "10", "--held-out", "8"], "expected transformers:NAME"),
        (
            ["--clip", "open_clip:ViT-B-32/x", "--train", "10", "--held-out", "8"],
            "pip install open_clip_torch",
        ),
    ],
)
def test_what_is_missing_is_said(example, data, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SystemExit, match=reason):
        example("flickr").main(["--data", str(data), "--out", str(tmp_path / "out"), *arguments])


def test_a_pretrained_clip_is_loaded_fine_tuned_and_attributed(example, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    pretrained, pairs = example("pretrained"), example("data")
    write_clip(transformers, tmp_path / "clip")
    train, held_out = pairs.split(pairs.read_pairs(data, 1), 12, 4)
    family = pretrained.load(
        f"transformers:{tmp_path / 'clip'}",
        train,
        held_out,
        pretrained.FineTuning(epochs=2, batch_size=6),
        "cpu",
    )
    before, (model, snapshots) = family.build(), family.train(torch.arange(12), 0, 2)
    assert len(snapshots) == 2
    assert not torch.equal(before.text_projection.weight, model.text_projection.weight)
    assert example("towers").alignment(family, model).shape == (8,)
    images_ND, texts_ND = family.embed(model, family.train_set)
    torch.testing.assert_close(images_ND.norm(dim=1), torch.ones(12))
    assert texts_ND.shape == (12, 8)

    options = example("flickr").parse_options(
        ["--out", str(tmp_path / "out"), "--negatives", "6", "--dim", "32"]
    )
    files = [[tmp_path / f"{number}.safetensors" for number in range(2)]]
    for file, snapshot in zip(files[0], snapshots):
        example("stages").save_file(snapshot.state, file)
    checkpoints = example("stages").Checkpoints(files=files, rates=[[one.learning_rate for one in snapshots]])
    found = example("stages").attribute(family, checkpoints, options)
    assert all(one.scores.tensor().shape == (12, 4) for one in found.values())

    with pytest.raises(SystemExit, match="a folder with a model and tokenizer"):
        pretrained.load(f"transformers:{tmp_path / 'none'}", train, held_out, pretrained.FineTuning())


def write_clip(transformers, folder):
    """A CLIP with random weights and a tokenizer of whole words, as save_pretrained writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    known = ["[PAD]", "[UNK]", "[END]", "A", "wall", ".", *COLOURS]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": len(known),
        "max_position_embeddings": 8,
        "bos_token_id": 3,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = transformers.CLIPConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)


def test_page_shows_the_recorded_result(example):
    results = example("results")
    if not results.RECORD.is_file():
        pytest.skip("no result was recorded yet")
    result, page = json.loads(results.RECORD.read_text()), results.PAGE.read_text()
    assert results.with_section(page, result) == page
    with pytest.raises(SystemExit, match="once each"):
        results.with_section("no markers", result)
