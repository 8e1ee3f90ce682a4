"""Real trainers, seconds long: callbacks, their checkpoints, and attributions from them."""

import json
import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trak
from trak.integrations.trajectory import TrajectoryWriter, read_trajectory
from trak.testing import hugging_face

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

NUM_ROWS = 12


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    words = {
        word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(37))])
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="w36",
    )


# As a user has them: attention of the library's own choice.
bert, gpt2, t5 = (
    partial(make, vocabulary=40, attention=None, **options)
    for make, options in (
        (hugging_face.bert, {}),
        (hugging_face.gpt2, {"use_cache": False}),
        (hugging_face.t5, {"use_cache": False}),
    )
)


def texts(*, equal=False, labels=True, size=NUM_ROWS, seed=0):
    """Tokenised texts with their text still beside them, as a tokeniser's map leaves them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(size):
        length = 6 if equal else int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(3, 36, (length,), generator=generator).tolist()
        rows.append(
            {"text": " ".join(f"w{i - 3}" for i in ids), "input_ids": ids, "attention_mask": [1] * length}
        )
        if labels:
            rows[-1]["label"] = row % 2
    return datasets.Dataset.from_list(rows)


def make_trainer(folder, model, dataset, collator, callbacks=(), *, eval_dataset=None, **options):
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "save_strategy": "epoch",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            **options,
        },
    )
    return transformers.Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=list(callbacks),
    )


def attribute(model, train_set, targets, task, **options):
    return trak.attribute(model, train_set, targets, task=task, batch_size=4, device="cpu", **options)


def by_reference(model, train_set, targets, task, **options):
    return attribute(model, train_set, targets, task, gradients="reference", **options).scores.tensor()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    from trak.integrations.transformers import CheckpointCallback

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trainer")
    trainer = make_trainer(
        folder / "out",
        bert(),
        texts(),
        transformers.DataCollatorWithPadding(tokenizer),
        [CheckpointCallback(folder / "epochs"), CheckpointCallback(folder / "steps", every=2, last=True)],
        learning_rate=1e-3,
    )
    trainer.train()
    return trainer, folder


class TestTrainer:
    """One fine-tuning of a classifier, looked at from all sides."""

    def test_what_is_saved(self, trained):
        _, folder = trained
        epochs, steps = read_trajectory(folder / "epochs"), read_trajectory(folder / "steps")
        assert epochs.steps == [3, 6] and epochs.epochs == [1.0, 2.0]
        assert steps.steps == [2, 4, 6]
        assert steps.epochs == pytest.approx([2 / 3, 4 / 3, 2])
        # Linear decay from 1e-3 over 6 steps: step s is done with 1e-3 · (6 − (s − 1)) / 6.
        assert steps.learning_rates == pytest.approx([1e-3 * (7 - step) / 6 for step in (2, 4, 6)])
        assert epochs.learning_rates == pytest.approx([1e-3 * (7 - step) / 6 for step in (3, 6)])

    def test_weights_are_the_trainers_own(self, trained):
        trainer, folder = trained
        ours = read_trajectory(folder / "epochs").checkpoints
        theirs = trak.list_checkpoints(folder / "out")
        assert [path.name for path in theirs] == ["checkpoint-3", "checkpoint-6"]
        for own, other in zip(ours, theirs):
            own, other = trak.load_checkpoint(own), trak.load_checkpoint(other)
            assert own.keys() == other.keys()
            assert trak.checkpoint_hash(own) == trak.checkpoint_hash(other)
        assert trak.checkpoint_hash(trak.load_checkpoint(ours[-1])) == trak.checkpoint_hash(
            trak.load_checkpoint(trainer.model)
        )

    def test_sharded_files(self, trained, tmp_path):
        model = trained[0].model
        model.save_pretrained(tmp_path, max_shard_size="1KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert trak.checkpoint_hash(trak.load_checkpoint(tmp_path)) == trak.checkpoint_hash(
            trak.load_checkpoint(model)
        )

    def test_attribution_from_the_trainers_data(self, trained, tokenizer):
        from trak.integrations.transformers import trainer_rows

        trainer, folder = trained
        model, checkpoints = trainer.model, read_trajectory(folder / "epochs").checkpoints
        rows, targets = trainer_rows(trainer), trainer_rows(trainer, texts(size=2, seed=1))
        found = attribute(
            model, rows, targets, "text_classification", checkpoints=checkpoints, dtype=torch.float64
        )
        wanted = by_reference(
            model, rows, targets, "text_classification", checkpoints=checkpoints, dtype=torch.float64
        )
        torch.testing.assert_close(found.scores.tensor(), wanted, rtol=1e-7, atol=1e-10)
        plain = texts().remove_columns("text")
        loader = DataLoader(
            plain, batch_size=5, shuffle=True, collate_fn=transformers.DataCollatorWithPadding(tokenizer)
        )
        again = attribute(
            model, loader, targets, "text_classification", checkpoints=checkpoints, dtype=torch.float64
        )
        torch.testing.assert_close(again.scores.tensor(), wanted, rtol=1e-7, atol=1e-10)

    def test_tracin_takes_the_learning_rates(self, trained):
        from trak.integrations.transformers import trainer_rows

        trainer, folder = trained
        saved = read_trajectory(folder / "steps")
        method = trak.TracIn(
            model=trainer.model, task="text_classification", learning_rates=saved.learning_rates
        )
        assert (
            method.fit(trainer_rows(trainer), saved.checkpoints).attribute(trainer_rows(trainer)).num_targets
            == NUM_ROWS
        )

    def test_the_released_protocol(self, trained, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # where TRAKer's default save_dir lies
        trainer, folder = trained
        loader = trainer.get_test_dataloader(texts())
        traker = trak.TRAKer(
            model=trainer.model,
            task="text_classification",
            train_set_size=NUM_ROWS,
            proj_dim=16,
            device="cpu",
        )
        for model_id, path in enumerate(read_trajectory(folder / "epochs").checkpoints):
            traker.load_checkpoint(path, model_id=model_id)
            for batch in loader:
                traker.featurize(batch, num_samples=len(batch["labels"]))
        traker.finalize_features()
        for model_id, path in enumerate(read_trajectory(folder / "epochs").checkpoints):
            traker.start_scoring_checkpoint("found", path, model_id, NUM_ROWS)
            for batch in loader:
                traker.score(batch, num_samples=len(batch["labels"]))
        assert traker.finalize_scores("found").shape == (NUM_ROWS, NUM_ROWS)

    def test_another_run_in_the_folder_is_refused(self, trained, tmp_path, tokenizer):
        from trak.integrations.transformers import CheckpointCallback

        _, folder = trained
        trainer = make_trainer(
            tmp_path,
            bert(),
            texts(),
            transformers.DataCollatorWithPadding(tokenizer),
            [CheckpointCallback(folder / "epochs")],
        )
        with pytest.raises(trak.CheckpointError, match="another run's"):
            trainer.train()


def test_a_resumed_trainer_goes_on_where_it_was(tmp_path, tokenizer):
    """Killed in the second epoch: what was saved after the checkpoint is written again, with the same weights as without the kill."""
    from trak.integrations.transformers import CheckpointCallback

    class Killed(Exception):
        pass

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    def train(name, *more, **options):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / f"{name}-out",
            bert(),
            texts(),
            transformers.DataCollatorWithPadding(tokenizer),
            [CheckpointCallback(tmp_path / name, every=1), *more],
            num_train_epochs=3,
        )
        trainer.train(**options)

    with pytest.raises(Killed):
        train("killed", Kill())
    assert read_trajectory(tmp_path / "killed").steps == [1, 2, 3, 4, 5]
    (tmp_path / "killed" / "step-00000007.safetensors").write_bytes(b"of a longer run")
    train("killed", resume_from_checkpoint=True)
    train("whole")
    resumed, whole = read_trajectory(tmp_path / "killed"), read_trajectory(tmp_path / "whole")
    assert resumed.steps == whole.steps == list(range(1, 10))
    assert resumed.learning_rates == whole.learning_rates
    for one, other in zip(resumed.checkpoints, whole.checkpoints):
        assert trak.checkpoint_hash(trak.load_checkpoint(one)) == trak.checkpoint_hash(
            trak.load_checkpoint(other)
        )


def test_the_best_model_is_not_taken_for_the_last(tmp_path, tokenizer, caplog):
    from trak.integrations.transformers import CheckpointCallback

    class StopEarly(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.epoch >= 2

    trainer = make_trainer(
        tmp_path / "out",
        bert(),
        texts(),
        transformers.DataCollatorWithPadding(tokenizer),
        [CheckpointCallback(tmp_path / "run", every=100), StopEarly()],
        num_train_epochs=3,
        eval_dataset=texts(seed=1),
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    with caplog.at_level(logging.WARNING, "trak"):
        trainer.train()
    assert "the trainer has loaded the best one" in caplog.text
    with pytest.raises(trak.CheckpointError, match="no checkpoints of a run"):
        read_trajectory(tmp_path / "run")


CASES = {
    "bert": (
        bert,
        "text_classification",
        lambda tokenizer, model: transformers.DataCollatorWithPadding(tokenizer),
    ),
    "gpt2": (
        gpt2,
        "causal_lm",
        lambda tokenizer, model: transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ),
    "t5": (
        t5,
        "seq2seq_lm",
        lambda tokenizer, model: transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
    ),
}


def data_for(name):
    if name == "bert":
        return texts()
    rows = texts(labels=False)
    return rows if name == "gpt2" else rows.map(lambda row: {"labels": [*row["input_ids"][:3], 2]})


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_model_from_a_trainer(tmp_path, tokenizer, name):
    """Unequal lengths, a column of text: float64 against the reference gradients."""
    from trak.integrations.transformers import trainer_rows

    make, task, collator = CASES[name]
    torch.manual_seed(0)
    model = make()
    trainer = make_trainer(tmp_path, model, data_for(name), collator(tokenizer, model))
    rows, targets = (
        trainer_rows(trainer),
        trainer_rows(trainer, data_for(name).select(range(2)), batch_size=2),
    )
    settings = {"dtype": torch.float64, "projection": trak.Identity(), "damping": 1.0}
    found = attribute(model, rows, targets, task, **settings).scores.tensor()
    wanted = by_reference(model, rows, targets, task, **settings)
    # T5 computes its norms in float32 whatever its weights are in.
    scale = float(wanted.abs().max())
    torch.testing.assert_close(
        found, wanted, rtol=1e-4 if name == "t5" else 1e-7, atol=(1e-4 if name == "t5" else 1e-9) * scale
    )


def test_collators_that_draw_at_random_are_refused(tmp_path, tokenizer):
    from trak.integrations.transformers import trainer_rows

    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4)
    trainer = make_trainer(tmp_path, hugging_face.masked_bert(vocabulary=40), texts(labels=False), collator)
    with pytest.raises(trak.InputError, match=r"different batches each time.*dataset\.map"):
        trainer_rows(trainer)
    with pytest.raises(trak.InputError, match="needs a dataset with a length"):
        trainer_rows(trainer, iter([]))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_dataset_in_torch_format_is_taken_as_it_is(name):
    model = CASES[name][0]()
    rows = texts(equal=True)
    if name == "gpt2":
        rows = rows.map(lambda row: {"labels": row["input_ids"]}).remove_columns("label")
    rows = rows.remove_columns("text").with_format("torch")
    found = attribute(model, rows, rows.select(range(2)), CASES[name][1])
    whole = {column: rows[:][column] for column in rows.column_names}
    if name == "bert":
        whole["labels"] = whole.pop("label")
    wanted = attribute(model, whole, {key: value[:2] for key, value in whole.items()}, CASES[name][1])
    torch.testing.assert_close(found.scores.tensor(), wanted.scores.tensor(), rtol=1e-4, atol=1e-5)


RECIPE = """
import datasets, torch, trak, transformers

config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                                 max_position_embeddings=16, vocab_size=40)
model = transformers.BertForSequenceClassification(config)
for step in (5, 10):
    torch.manual_seed(step)
    transformers.BertForSequenceClassification(config).save_pretrained(f"out/checkpoint-{step}")
tokens = torch.arange(60).remainder(37).reshape(10, 6).tolist()
train_set = datasets.Dataset.from_dict({"input_ids": tokens, "labels": [0, 1] * 5}).with_format("torch")
targets = train_set.select(range(2))
task = "text_classification"
checkpoints = trak.list_checkpoints("out")
"""


def test_a_recipe_with_a_dataset_and_a_folder_of_checkpoints(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from trak.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.py").write_text(RECIPE)
    done = CliRunner().invoke(app, ["attribute", "recipe.py", "--json", "--top", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output[done.output.index("{") :])
    assert shown["num_train"] == 10 and shown["num_targets"] == 2


@pytest.fixture(scope="module")
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_ROWS, 4, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def fit_module(lightning, data, folder, *, epochs=2, callbacks=(), ckpt_path=None, **options):
    torch.manual_seed(0)

    class Module(lightning.LightningModule):
        def __init__(self, width=5):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))

        def training_step(self, batch, index):
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def fitted(lightning, data, tmp_path_factory):
    from trak.integrations.lightning import CheckpointCallback

    folder = tmp_path_factory.mktemp("lightning")
    theirs = lightning.pytorch.callbacks.ModelCheckpoint(folder / "theirs", save_top_k=-1)
    callbacks = [CheckpointCallback(folder / "epochs"), CheckpointCallback(folder / "steps", every=4), theirs]
    return fit_module(lightning, data, folder, callbacks=callbacks), folder


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
class TestLightning:
    """One fit of a module that holds a model under a name of its own."""

    def test_what_is_saved(self, fitted):
        _, folder = fitted
        epochs, steps = read_trajectory(folder / "epochs"), read_trajectory(folder / "steps")
        assert epochs.steps == [3, 6] and epochs.epochs == [1.0, 2.0]
        assert steps.steps == [4, 6] and steps.epochs == pytest.approx([4 / 3, 2])
        assert steps.learning_rates == pytest.approx([0.1 * 0.5**3, 0.1 * 0.5**5])

    def test_lightnings_own_checkpoints_hold_the_same(self, fitted):
        """Read without running code from a pickle, the model's prefix and the rest of the module left out."""
        module, folder = fitted
        theirs = trak.list_checkpoints(folder / "theirs", model=module.net)
        ours = read_trajectory(folder / "epochs", model=module.net).checkpoints
        for own, other in zip(ours, theirs):
            assert own().keys() == other().keys() == dict(module.net.named_parameters()).keys()
            assert trak.checkpoint_hash(own()) == trak.checkpoint_hash(other())
        assert trak.checkpoint_hash(ours[-1]()) == trak.checkpoint_hash(trak.load_checkpoint(module.net))

    def test_attribution(self, fitted, data):
        module, folder = fitted
        checkpoints = read_trajectory(folder / "epochs", model=module.net).checkpoints
        settings = {"checkpoints": checkpoints, "dtype": torch.float64}
        targets = tuple(part[:3] for part in data.tensors)
        found = attribute(module.net, data, targets, "image_classification", **settings).scores.tensor()
        torch.testing.assert_close(
            found, by_reference(module.net, data, targets, "image_classification", **settings)
        )

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
    def test_resuming(self, fitted, lightning, data, tmp_path):
        """From the trainer's own checkpoint of the first epoch: the same weights as in one go."""
        from trak.integrations.lightning import CheckpointCallback

        _, folder = fitted
        saved = next((folder / "theirs").glob("epoch=0-*.ckpt"))
        fit_module(
            lightning,
            data,
            tmp_path,
            epochs=1,
            callbacks=[CheckpointCallback(tmp_path / "run", every=1)],
            enable_checkpointing=False,
        )
        for path in (tmp_path / "run").iterdir():
            (tmp_path / "run" / "step-00000005.safetensors").write_bytes(path.read_bytes())
        fit_module(
            lightning,
            data,
            tmp_path,
            callbacks=[CheckpointCallback(tmp_path / "run", every=1)],
            ckpt_path=str(saved),
            enable_checkpointing=False,
        )
        resumed = read_trajectory(tmp_path / "run")
        assert resumed.steps == [1, 2, 3, 4, 5, 6]
        last = trak.load_checkpoint(resumed.checkpoints[-1])
        assert trak.checkpoint_hash(last) == trak.checkpoint_hash(
            trak.load_checkpoint(read_trajectory(folder / "epochs").checkpoints[-1])
        )

    def test_accumulated_gradients_are_saved_once_a_step(self, lightning, data, tmp_path):
        from trak.integrations.lightning import CheckpointCallback

        fit_module(
            lightning,
            data,
            tmp_path,
            callbacks=[CheckpointCallback(tmp_path / "run", every=1)],
            accumulate_grad_batches=2,
            enable_checkpointing=False,
        )
        assert read_trajectory(tmp_path / "run").steps == [1, 2, 3, 4]


def test_processes_but_the_first_save_nothing(tmp_path):
    from types import SimpleNamespace

    from trak.integrations.transformers import CheckpointCallback

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rank in (1, 0):
        callback = CheckpointCallback(tmp_path / "run", every=1)
        state = SimpleNamespace(is_world_process_zero=rank == 0, global_step=0, epoch=0.0, max_steps=3)
        args = (None, state, None)
        callback.on_train_begin(*args, model=model, optimizer=optimizer)
        callback.on_step_begin(*args, model=model, optimizer=optimizer)
        state.global_step = 1
        callback.on_step_end(*args, model=model, optimizer=optimizer)
        assert (tmp_path / "run").exists() == (rank == 0)
    assert isinstance(callback.writer, TrajectoryWriter)
