"""attribute() and TRAKer against TRAK written out densely in float64."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trak

N, T, M = 60, 7, 3


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


def make(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    train = (torch.randn(N, 5, dtype=dtype), torch.randint(3, (N,)))
    targets = (torch.randn(T, 5, dtype=dtype), torch.randint(3, (T,)))
    checkpoints = [
        {k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(M)
    ]
    return model, train, targets, checkpoints


def dense_trak(model, train, targets, checkpoints, projections, dampings, exponent=0.5, logistic=True):
    """The equation, ten lines: returns τ [N, T]; the paper's with exponent 1 and without the logistic weights."""
    kernel, weight = 0, 0
    for checkpoint, P, damping in zip(checkpoints, projections, dampings):
        model.load_state_dict(checkpoint)

        def gradients(batch):
            rows, ps = [], []
            for x, y in zip(*batch):
                p = torch.softmax(model(x[None])[0], 0)[y]
                g = torch.autograd.grad(torch.log(p / (1 - p)), list(model.parameters()))
                rows.append(torch.cat([part.flatten() for part in g]))
                ps.append(p.detach())
            return torch.stack(rows), torch.stack(ps)

        (G, p), (H, _) = gradients(train), gradients(targets)
        Phi, phi, r = G @ P, H @ P, ((p * (1 - p)) ** exponent if logistic else torch.ones_like(p))[:, None]
        kernel = kernel + Phi @ torch.linalg.solve(
            Phi.T @ (r * Phi) + damping * torch.eye(P.shape[1], dtype=P.dtype), phi.T
        ) / len(checkpoints)
        weight = weight + (1 - p)[:, None] ** exponent / len(checkpoints)
    return kernel * weight


def matrices(projection, model, dtype=torch.float64):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    out = []
    for m in range(M):
        state = projection.init(shapes, checkpoint=m, dtype=dtype)
        out.append(torch.cat([projection.matrix(state, name) for name in shapes]))
    return out


PROJECTIONS = [
    trak.Identity(),
    trak.Rademacher(dim=24),
    trak.Gaussian(dim=24, seed=3),
    trak.Sparse(dim=24),
    trak.Kronecker(dim=40),
]


@pytest.mark.parametrize("gradients", ["reference", "functional", "hooked", "auto"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_attribute_equals_dense_trak(projection, gradients):
    model, train, targets, checkpoints = make()
    expected = dense_trak(Net().double(), train, targets, checkpoints, matrices(projection, model), [0.5] * M)
    attribution = trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        checkpoints=checkpoints,
        projection=projection,
        damping=0.5,
        gradients=gradients,
        batch_size=13,
    )
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-8, atol=1e-10)


def run_traker(model, train, targets, checkpoints, batch_size=16, **options):
    traker = trak.TRAKer(model=model, task="image_classification", train_set_size=N, **options)
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for start in range(0, N, batch_size):
            batch = [t[start : start + batch_size] for t in train]
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint(
            exp_name="val", checkpoint=checkpoint, model_id=model_id, num_targets=T
        )
        traker.score(batch=targets, num_samples=T)
    return traker.finalize_scores(exp_name="val")


def test_traker_equals_attribute_and_dense(tmp_path):
    model, train, targets, checkpoints = make()
    projection = trak.Rademacher(dim=24, seed=5)
    parameters = sum(p.numel() for p in model.parameters())
    damping = 0.3 * parameters / 24
    expected = dense_trak(
        Net().double(), train, targets, checkpoints, matrices(projection, model), [damping] * M, 1, False
    )
    scores = run_traker(
        model, train, targets, checkpoints, save_dir=tmp_path, projector=projection, lambda_reg=0.3
    )
    assert scores.shape == (N, T)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-6)
    attribution = trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        checkpoints=checkpoints,
        projection=projection,
        damping=damping,
        gram="uniform",
        weight_exponent=1,
    )
    np.testing.assert_allclose(scores, np.asarray(attribution.scores), rtol=1e-6, atol=1e-7)


def test_batch_size_order_of_checkpoints_and_dtype_of_storage_do_not_matter(tmp_path):
    model, train, targets, checkpoints = make()
    options = {
        "task": "image_classification",
        "projection": trak.Sparse(dim=24),
        "damping": trak.RelativeDamping(0.1),
    }
    expected = trak.attribute(
        model, train, targets, checkpoints=checkpoints, batch_size=60, **options
    ).scores.tensor()
    for batch_size in (1, 7):
        again = trak.attribute(
            model, train, targets, checkpoints=checkpoints, batch_size=batch_size, **options
        )
        torch.testing.assert_close(again.scores.tensor(), expected, rtol=1e-10, atol=1e-12)
    first = trak.attribute(
        model, train, targets, checkpoints=checkpoints, save_dir=tmp_path, **options
    ).scores.tensor()
    other = trak.attribute(
        model, train, targets, checkpoints=checkpoints[::-1], save_dir=tmp_path, **options
    ).scores.tensor()
    torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-12)
    for feature_dtype in ("float16", "bfloat16", "float32"):
        half = trak.attribute(
            model, train, targets, checkpoints=checkpoints, feature_dtype=feature_dtype, **options
        )
        tolerance = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 1e-4}[feature_dtype]
        assert float((half.scores.tensor() - expected).abs().max() / expected.abs().max()) < tolerance


def test_a_second_call_featurizes_no_training_row_again(tmp_path, monkeypatch):
    model, train, targets, checkpoints = make()
    seen = []
    options = {
        "checkpoints": checkpoints,
        "save_dir": tmp_path,
        "projection": trak.Sparse(dim=24),
        "damping": 0.1,
    }

    def task(model, batch):
        seen.append(len(batch[0]))
        return trak.ImageClassification().output(model, batch)

    custom = trak.CustomTask(task, name="margin")
    first = trak.attribute(model, train, targets, task=custom, gradients="functional", check=False, **options)
    assert sum(seen) > 0
    seen.clear()
    again = trak.attribute(model, train, targets, task=custom, gradients="functional", check=False, **options)
    assert seen == []
    assert torch.equal(first.scores.tensor(), again.scores.tensor())
    other = (targets[0] + 1, targets[1])
    trak.attribute(model, train, other, task=custom, gradients="functional", check=False, **options)
    # For each checkpoint's single batch of targets the task is called once by vmap, and for the first once on an example to size chunks.
    assert len(seen) == M + 1


def test_other_data_or_settings_in_the_same_save_dir_are_refused(tmp_path):
    model, train, targets, checkpoints = make()
    options = {
        "task": "image_classification",
        "checkpoints": checkpoints,
        "save_dir": tmp_path,
        "damping": 0.1,
    }
    trak.attribute(model, train, targets, projection=trak.Sparse(dim=24), **options)
    with pytest.raises(trak.FingerprintError, match=r"projection.seed: stored 0, asked for 1"):
        trak.attribute(model, train, targets, projection=trak.Sparse(dim=24, seed=1), **options)
    with pytest.raises(trak.FingerprintError, match="train_sample"):
        trak.attribute(model, (train[0] + 1, train[1]), targets, projection=trak.Sparse(dim=24), **options)


def test_model_comes_back_untouched():
    model, train, targets, checkpoints = make()
    model.train()
    model.head.eval()
    model.first.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    rng = torch.get_rng_state()
    trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        checkpoints=checkpoints,
        parameters="*",
        damping=1.0,
    )
    assert torch.equal(rng, torch.get_rng_state())
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model.head.training
    assert not model.first.weight.requires_grad and model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_results_of_an_attribution(tmp_path):
    model, train, targets, checkpoints = make()
    attribution = trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        checkpoints=checkpoints,
        projection=trak.Identity(),
        damping=0.5,
    )
    scores = attribution.scores.tensor()
    top, bottom = attribution.top(4), attribution.bottom(4)
    assert torch.equal(top.rows, scores.T.argsort(1, descending=True)[:, :4])
    assert torch.equal(bottom.scores, scores.T.sort(1).values[:, :4])
    masks = torch.rand(9, N) < 0.5
    torch.testing.assert_close(attribution.predict(masks), masks.double() @ scores)
    groups = attribution.group(train[1])
    assert groups.names == (0, 1, 2) and groups.sizes.sum() == N
    torch.testing.assert_close(groups.scores.sum(0), scores.sum(0))
    torch.testing.assert_close(groups.scores[1], scores[train[1] == 1].sum(0))
    on_itself = trak.attribute(
        model,
        train,
        train,
        task="image_classification",
        checkpoints=checkpoints,
        projection=trak.Identity(),
        damping=0.5,
    )
    torch.testing.assert_close(attribution.self_influence(), on_itself.scores.tensor().diagonal())
    table = attribution.to_pandas(k=3)
    columns = ["target", "kind", "rank", "row", "score", "standard_error"]
    assert list(table.columns) == columns and len(table) == T * 6
    assert table.query("target == 2 and kind == 'proponent'").row.tolist() == top.rows[2, :3].tolist()
    members = [member.tensor() for member in attribution.members]
    assert len(members) == M
    single = trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        checkpoints=checkpoints[:1],
        projection=trak.Identity(),
        damping=0.5,
    )
    torch.testing.assert_close(members[0], single.scores.tensor())
    folder = attribution.save(tmp_path / "saved")
    loaded = trak.Attribution.load(folder)
    torch.testing.assert_close(loaded.scores.tensor(), scores.float())
    assert torch.equal(loaded.top(4).rows, top.rows)
    torch.testing.assert_close(loaded.self_influence(), attribution.self_influence())
    assert loaded.info["projection"]["kind"] == "identity"
    assert "proponents" in loaded._repr_html_()


def test_loaders_datasets_and_tensors_agree():
    model, train, targets, checkpoints = make()
    options = {
        "task": "image_classification",
        "checkpoints": checkpoints[:1],
        "projection": trak.Identity(),
        "damping": 0.5,
    }
    dataset = torch.utils.data.TensorDataset(*train)
    examples = list(zip(*train))
    loader = torch.utils.data.DataLoader(examples, batch_size=8, shuffle=True, drop_last=True)
    expected = trak.attribute(model, train, targets, **options).scores.tensor()
    for train_set in (dataset, examples, loader, torch.utils.data.Subset(dataset, range(N))):
        torch.testing.assert_close(
            trak.attribute(model, train_set, targets, **options).scores.tensor(), expected
        )


def test_per_layer_preconditioner_is_the_sum_over_layers():
    model, train, targets, checkpoints = make()
    options = {"task": "image_classification", "checkpoints": checkpoints[:1], "damping": 0.5}
    projection = trak.Kronecker(dim=40)
    whole = trak.attribute(
        model, train, targets, projection=projection, preconditioner="per_layer", **options
    )
    P = matrices(projection, model)[0]
    expected = 0
    for column in projection.columns({name: tuple(p.shape) for name, p in model.named_parameters()}):
        expected = expected + dense_trak(
            Net().double(), train, targets, checkpoints[:1], [P[:, column.start : column.stop]], [0.5]
        )
    torch.testing.assert_close(whole.scores.tensor(), expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(trak.InputError, match="per_layer"):
        trak.attribute(
            model, train, targets, projection=trak.Sparse(dim=8), preconditioner="per_layer", **options
        )


def test_a_model_of_one_layer_has_one_block_per_layer():
    model, (train, targets) = nn.Linear(5, 3).double(), (make()[1], make()[2])
    train, targets = ((inputs.flatten(1)[:, :5], labels) for inputs, labels in (train, targets))
    options = {"task": "image_classification", "projection": trak.Sparse(dim=8), "damping": 0.5}
    scores = [
        trak.attribute(model, train, targets, preconditioner=kind, **options).scores.tensor()
        for kind in ("whole", "per_layer")
    ]
    torch.testing.assert_close(*scores)


def test_singular_and_undamped():
    model, train, targets, checkpoints = make()
    options = {"task": "image_classification", "checkpoints": checkpoints[:1], "damping": 0.0}
    with pytest.raises(trak.SingularGramError, match="only 60 training rows"):
        trak.attribute(model, train, targets, projection=trak.Rademacher(dim=64), **options)
    repeated = (train[0][:2].repeat(30, 1), train[1][:2].repeat(30))
    with pytest.raises(trak.SingularGramError, match="singular in working precision"):
        trak.attribute(model, repeated, targets, projection=trak.Rademacher(dim=16), **options)
    fine = trak.attribute(model, train, targets, projection=trak.Rademacher(dim=16), **options)
    P = matrices(trak.Rademacher(dim=16), model)[0]
    torch.testing.assert_close(
        fine.scores.tensor(),
        dense_trak(Net().double(), train, targets, checkpoints[:1], [P], [0.0]),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"task": "nonsense"}, trak.InputError, "unknown task"),
        ({"checkpoints": []}, trak.InputError, "empty list"),
        ({"checkpoints": "model.pt"}, trak.InputError, "must be a list"),
        ({"damping": -1.0}, trak.InputError, "damping must be"),
        ({"damping": "much"}, trak.InputError, "damping must be"),
        ({"batch_size": 0}, trak.InputError, "batch_size"),
        ({"device": "cuda:77"}, trak.InputError, "device"),
        ({"gradients": "magic"}, trak.InputError, "gradients must be"),
        ({"parameters": ["nothing.*"]}, trak.ParameterError, "nothing"),
        ({"projection": 2048}, trak.InputError, "projection must be"),
    ],
)
def test_bad_arguments_say_what_to_do(change, error, match):
    model, train, targets, checkpoints = make()
    options = {"task": "image_classification", "checkpoints": checkpoints} | change
    with pytest.raises(error, match=match):
        trak.attribute(model, train, targets, **options)


def test_the_same_checkpoint_twice_is_refused():
    model, train, targets, _ = make()
    with pytest.raises(trak.CheckpointError, match="same as checkpoint 0"):
        trak.attribute(
            model, train, targets, task="image_classification", checkpoints=[model.state_dict(), model]
        )


def test_nan_outputs_are_refused():
    model, train, targets, checkpoints = make()
    train[0][17] = float("nan")
    with pytest.raises(trak.NonFiniteError):
        trak.attribute(model, train, targets, task="image_classification", checkpoints=checkpoints)


class Bypassing(Net):
    """Uses a layer's weight outside the layer: hooks do not see it."""

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, self.first.weight)[:, :3]


@pytest.mark.parametrize("face", ["attribute", "traker"])
def test_gradients_that_fail_their_check_fall_back_everywhere(face, caplog):
    # For every checkpoint and for targets, not for the batch that was checked only.
    _, train, targets, checkpoints = make()
    model = Bypassing().double()
    projection = trak.Identity()
    expected = dense_trak(
        Bypassing().double(), train, targets, checkpoints, matrices(projection, model), [0.5] * M
    )
    if face == "attribute":
        scores = trak.attribute(
            model,
            train,
            targets,
            task="image_classification",
            checkpoints=checkpoints,
            projection=projection,
            damping=0.5,
        ).scores.tensor()
    else:
        options = {"save_dir": None, "projector": projection, "lambda_reg": trak.FixedDamping(0.5)}
        scores = torch.tensor(run_traker(model, train, targets, checkpoints, **options), dtype=torch.float64)
    assert "slower and used instead" in caplog.text
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(trak.GradientError, match=r"first\.weight"):
        trak.attribute(
            model,
            train,
            targets,
            task="image_classification",
            checkpoints=checkpoints,
            gradients="hooked",
            projection=projection,
        )


def test_progress_is_silent_where_nobody_watches_and_shown_on_request(capsys):
    model, train, targets, checkpoints = make()
    options = {
        "task": "image_classification",
        "checkpoints": checkpoints[:1],
        "projection": trak.Sparse(dim=8),
    }
    trak.attribute(model, train, targets, **options)
    assert capsys.readouterr() == ("", "")
    trak.attribute(model, train, targets, progress=True, **options)
    shown = capsys.readouterr().err
    assert "Featurizing, checkpoint 1 of 1" in shown and "rows/s" in shown


def test_hugging_face_text_classifier():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertForSequenceClassification(config)
    examples = [
        {"input_ids": torch.randint(1, 50, (length,)), "labels": torch.tensor(length % 2)}
        for length in range(5, 25)
    ]

    def collate(items):
        ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        labels = torch.stack([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    def scores(batch_size):
        loader = torch.utils.data.DataLoader(examples, batch_size=batch_size, collate_fn=collate)
        targets = torch.utils.data.DataLoader(examples[:3], batch_size=3, collate_fn=collate)
        attribution = trak.attribute(
            model, loader, targets, task="text_classification", projection=trak.Sparse(dim=64)
        )
        return attribution.scores.tensor()

    # Padding differs between batches and must have no effect.
    torch.testing.assert_close(scores(4), scores(20), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", ["task", "model"])
def test_other_code_under_the_same_name_in_the_same_save_dir_is_refused(change, tmp_path):
    model, train, targets, checkpoints = make()
    options = {"checkpoints": checkpoints, "save_dir": tmp_path, "projection": trak.Identity()}

    def logit(column):
        return lambda model, batch: model(batch[0])[:, column]

    trak.attribute(model, train, targets, task=logit(0), **options)
    trak.attribute(model, train, targets, task=logit(0), **options)
    if change == "model":
        model.norm.eps = 0.5
    with pytest.raises(trak.InputError, match=r"features there come from other.*another save_dir"):
        trak.attribute(model, train, targets, task=logit(1 if change == "task" else 0), **options)


def test_one_corrected_label_in_the_same_save_dir_is_noticed(tmp_path):
    model, train, targets, checkpoints = make()
    options = {"task": "image_classification", "checkpoints": checkpoints, "save_dir": tmp_path}
    trak.attribute(model, train, targets, **options)
    train[1][2] = (train[1][2] + 1) % 3
    with pytest.raises(trak.FingerprintError, match="train_sample"):
        trak.attribute(model, train, targets, **options)


def test_targets_with_other_values_beside_their_tensors_are_others(tmp_path):
    model, train, targets, checkpoints = make()
    task = trak.CustomTask(lambda model, batch: model(batch["x"])[:, batch["column"]], name="column")
    scores = [
        trak.attribute(
            model,
            {"x": train[0], "column": 0},
            {"x": targets[0], "column": column},
            task=task,
            checkpoints=checkpoints,
            save_dir=tmp_path,
        ).scores.tensor()
        for column in (0, 1)
    ]
    assert not torch.allclose(scores[0], scores[1])


def test_a_checkpoint_that_changes_after_fit_is_refused():
    model, train, targets, _ = make()
    fitted = trak.TRAK(model=model, task="image_classification").fit(train)
    fitted.attribute(targets)
    with torch.no_grad():
        model.first.weight += 0.1
    with pytest.raises(trak.CheckpointError, match=r"has changed since the training set was featurized"):
        fitted.attribute((targets[0] + 1, targets[1]))


class Codebook(nn.Module):
    """Applies a layer to 8 rows that belong to no example: as many as are looked at when gradients are checked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 32).reshape(8, 4))
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.embed(self.codes).T))


@pytest.mark.parametrize("face", ["attribute", "traker"])
def test_a_first_batch_of_one_example_settles_nothing(face):
    _, train, targets, _ = make()
    train, targets = tuple(t[:20] for t in train), (torch.cat([targets[0]] * 2)[:8], torch.arange(8) % 3)
    torch.manual_seed(0)
    model = Codebook().double()
    projection = trak.Identity()
    P = [torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64)]
    expected = dense_trak(Codebook().double(), train, targets, [model.state_dict()], P, [0.5])
    if face == "attribute":
        loaders = [DataLoader(TensorDataset(*data), batch_size=b) for data, b in ((train, 1), (targets, 8))]
        scores = trak.attribute(
            model, *loaders, task="image_classification", projection=projection, damping=0.5
        ).scores.tensor()
    else:
        traker = trak.TRAKer(
            model,
            "image_classification",
            20,
            None,
            projector=projection,
            lambda_reg=trak.FixedDamping(0.5),
        )
        traker.load_checkpoint(model.state_dict(), 0)
        for rows in (slice(0, 1), slice(1, 9), slice(9, 20)):
            batch = [t[rows] for t in train]
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("t", model.state_dict(), 0, 8)
        traker.score(targets, num_samples=8)
        scores = torch.as_tensor(np.array(traker.finalize_scores("t"))).double()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_examples_that_only_larger_batches_of_targets_mix_are_refused():
    _, train, targets, _ = make()
    model = Net().double()

    def centred(model, batch):
        return model(batch[0] - batch[0].mean(0))[:, 0]

    with pytest.raises(trak.MixedExamplesError):
        trak.attribute(model, DataLoader(TensorDataset(*train), batch_size=1), targets, task=centred)


def test_embeddings_with_a_maximal_norm_come_back_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 3))
    before = model[0].weight.detach().clone()
    data = torch.randint(9, (10, 3)), torch.randint(3, (10,))
    trak.attribute(model, data, data, task="image_classification", gradients="reference")
    assert torch.equal(model[0].weight, before)


def test_a_number_taken_by_another_process_meanwhile_is_not_asked_for_again(tmp_path, monkeypatch):
    model, train, targets, checkpoints = make()
    options = {"task": "image_classification", "save_dir": tmp_path, "damping": 0.1}
    for checkpoint in checkpoints[:2]:
        trak.attribute(model, train, targets, checkpoints=[checkpoint], **options)
    listed, calls = trak.store.Store.checkpoints, []

    def outdated(store):
        calls.append(store)
        return listed(store)[:1] if len(calls) == 1 else listed(store)

    monkeypatch.setattr(trak.store.Store, "checkpoints", outdated)
    trak.attribute(model, train, targets, checkpoints=checkpoints[2:], **options)
    assert len(calls) > 1 and listed(calls[0]) == [0, 1, 2]


def test_a_scripted_model_is_refused_in_one_line():
    _, train, targets, _ = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(train[0][0].numel(), 3)))
    with pytest.raises(trak.GradientError, match=r"TorchScript.*pass the Python module"):
        trak.attribute(scripted, train, targets, task="image_classification")
