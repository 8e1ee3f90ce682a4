"""Language-model tasks against one example, one token at a time by autograd, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak
from trak import projector
from trak.gradients import Auto, Functional, Hooked, Reference, check_first_batch, model_state
from trak.tasks import resolve_task
from trak.tasks.looking import values_unseen
from trak.testing.gradients import collect
from trak.testing.hugging_face import gpt2, llama, masked_bert, t5

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(make, seed=0):
    """A model away from its initialisation, and a batch of three sequences, one of them padded, one with a masked prompt."""
    torch.manual_seed(seed)
    model = make().double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids = torch.randint(3, 19, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if make is t5:
        labels = torch.randint(3, 19, (3, 4))
        labels[1, 3:] = -100
    elif make is masked_bert:
        labels = labels.masked_fill(torch.tensor([[0, 1, 0, 1, 0, 1]] * 3) == 0, -100)
    else:
        labels[2, :3] = -100
    return model, {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


TASKS = {gpt2: trak.CausalLM, llama: trak.CausalLM, t5: trak.Seq2SeqLM, masked_bert: trak.MaskedLM}
# No layer of a known kind: a table looked up for all examples at once, and a bias of the model's own.
UNRULED = {
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "cls.predictions.bias",
}
MODELS = pytest.mark.parametrize("make", list(TASKS), ids=lambda make: make.__name__)


def token_terms(model, batch, row, task):
    """(p_t with its graph) of every target token of one example, from the model's own softmax: the definition."""
    one = {name: value[row : row + 1] for name, value in batch.items()}
    labels = one["labels"][0]
    inputs = {name: value for name, value in one.items() if name not in ("labels", "target_mask")}
    if isinstance(task, trak.Seq2SeqLM):
        start = torch.zeros(1, 1, dtype=torch.long)
        inputs["decoder_input_ids"] = torch.cat([start, one["labels"][:, :-1].clamp_min(0)], 1)
    probabilities = torch.softmax(model(**inputs).logits[0], -1)
    shift = 1 if isinstance(task, trak.CausalLM) else 0
    wanted = one["target_mask"][0] if "target_mask" in one else torch.ones_like(labels)
    return [
        probabilities[t - shift, labels[t]]
        for t in range(shift, len(labels))
        if labels[t] != -100 and wanted[t]
    ]


def grads(model, value):
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def close(got, wanted, make, rtol=1e-7):
    """Llama and T5 compute norms and more in float32 whatever their weights are in."""
    rtol = 2e-5 if make in (llama, t5) else rtol
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * max(1e-3, float(wanted.abs().max())))


@MODELS
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_outputs_and_features_are_the_definition(make, reduction):
    """Targets: f = Σ log(p/(1−p)). Training rows: weight 1 and feature Σ_t q_t ∇f_t, each q_t explicit."""
    model, batch = build(make)
    task = TASKS[make](reduction=reduction)
    outputs, features = collect(Reference(), model, batch, task=task)
    loss_outputs, loss_features = collect(Reference(), model, batch, task=task.for_training())
    assert loss_outputs.q.tolist() == [1, 1, 1]
    for row in range(3):
        p = token_terms(model, batch, row, task)
        count = len(p) if reduction == "mean" else 1
        margins = [torch.log(p_t / (1 - p_t)) for p_t in p]
        close(outputs.f[row], sum(margins).detach() / count, make)
        close(loss_outputs.f[row], sum(p_t.log() for p_t in p).detach() / count, make)
        each = [grads(model, margin) for margin in margins]
        for name in features:
            close(features[name][row], sum(g[name] for g in each) / count, make)
            weighted = sum((1 - p_t).detach() * g[name] for p_t, g in zip(p, each)) / count
            close(loss_features[name][row], weighted, make)


@MODELS
def test_training_feature_is_minus_the_gradient_of_the_models_own_loss(make):
    """Hugging Face's loss with labels is the mean over target tokens."""
    model, batch = build(make)
    task = TASKS[make](reduction="mean").for_training()
    outputs, features = collect(Reference(), model, batch, task=task)
    for row in range(3):
        loss = model(**{name: value[row : row + 1] for name, value in batch.items()}).loss
        close(-outputs.f[row].float(), loss.detach().float(), make, rtol=1e-5)
        for name, gradient in grads(model, loss).items():
            close(features[name][row], -gradient, make, rtol=1e-5)


@MODELS
@pytest.mark.parametrize("training", [False, True])
def test_sources_agree(make, training):
    model, batch = build(make)
    task = TASKS[make]()
    task = task.for_training() if training else task
    outputs, wanted = collect(Reference(), model, batch, task=task)
    if make in (masked_bert, t5):  # they look whether the mask hides anything, which vmap cannot take
        with pytest.raises(trak.GradientError, match=r"attn_implementation='eager'.*Reference"):
            collect(Functional(), model, batch, task=task)
    else:
        got_outputs, got = collect(Functional(), model, batch, task=task)
        close(got_outputs.f, outputs.f, make)
        for name, values in wanted.items():
            close(got[name], values, make)
    names = [name for name in wanted if name not in UNRULED]
    got_outputs, got = collect(Hooked(), model, batch, names, task=task)
    close(got_outputs.f, outputs.f, make)
    for name in names:
        close(got[name], wanted[name], make)


@MODELS
def test_fused_attention_is_hooked_and_otherwise_explained(make):
    model, batch = build(make)
    model.set_attn_implementation("sdpa")
    task = TASKS[make]().for_training()
    names = [name for name, _ in model.named_parameters() if name not in UNRULED]
    _, wanted = collect(Reference(), model, batch, names, task=task)
    _, got = collect(Hooked(), model, batch, names, task=task)
    for name in names:
        close(got[name], wanted[name], make, rtol=1e-5)
    with pytest.raises(trak.GradientError, match="attn_implementation='eager'"):
        collect(Functional(), model, batch, names, task=task)


@MODELS
def test_the_first_batch_check_passes(make):
    model, batch = build(make)
    state = model_state(model, None, "cpu")
    names = [name for name, _ in model.named_parameters() if name not in UNRULED]
    for task in (TASKS[make](), TASKS[make]().for_training()):
        assert isinstance(check_first_batch(Auto(), model, state, task, batch, names), Hooked)


@MODELS
@settings(deadline=None, max_examples=10)
@given(
    extra=st.integers(1, 5),
    junk=st.integers(3, 18),
    labelled=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
)
def test_padding_has_no_effect(make, extra, junk, labelled, reduction):
    """Whatever ids, and for causal and masked models whatever labels, stand where the attention mask is 0."""
    model, batch = build(make)

    def padded(values, fill):
        return torch.cat([values, torch.full((3, extra), fill)], 1)

    longer = {
        "input_ids": padded(batch["input_ids"], junk),
        "attention_mask": padded(batch["attention_mask"], 0),
        "labels": padded(batch["labels"], junk if labelled and make is not t5 else -100),
    }
    for task in (TASKS[make](reduction=reduction), TASKS[make](reduction=reduction).for_training()):
        with torch.no_grad():
            close(task.output(model, longer), task.output(model, batch), make)


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_padding_on_the_left_with_position_ids(make):
    model, batch = build(make)
    left = {name: torch.cat([torch.zeros(3, 2).long(), value], 1) for name, value in batch.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        close(trak.CausalLM().output(model, left), trak.CausalLM().output(model, batch), make)


@MODELS
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_spans_add_up(make, data):
    """Of two disjoint spans f adds up to f of both, for targets and training rows."""
    model, batch = build(make)
    first = 1 if TASKS[make] is trak.CausalLM else 0
    is_target = batch["labels"] != -100
    is_target[:, :first] = False
    draw = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=18, max_size=18)))
    one = draw[: is_target.numel()].reshape(is_target.shape).bool() & is_target
    parts = [one, is_target & ~one]
    if not all(part.any(1).all() for part in parts):
        return
    for task in (TASKS[make](), TASKS[make]().for_training()):
        with torch.no_grad():
            whole = task.output(model, batch)
            summed = sum(task.output(model, {**batch, "target_mask": part.long()}) for part in parts)
            close(summed, whole, make)
            if make is not t5:
                masked = [batch["labels"].masked_fill(~part, -100) for part in parts]
                close(sum(task.output(model, {**batch, "labels": labels}) for labels in masked), whole, make)


@pytest.mark.parametrize("source", [Hooked(), Functional()], ids=["hooked", "functional"])
def test_single_tokens_are_classifications(source):
    """Features ∇f_t and weights q_t = 1 − p_t, whose product is that of the log-likelihood; a log loss."""
    model, batch = build(gpt2)
    task = trak.CausalLM(weights="single_position")
    assert task.is_log_loss and task.for_training() is task
    tokens = torch.utils.data.default_collate(list(task.token_rows(batch)))
    outputs, features = collect(source, model, tokens, task=task)
    p = torch.stack([p_t for row in range(3) for p_t in token_terms(model, batch, row, task)]).detach()
    torch.testing.assert_close(outputs.f, torch.log(p / (1 - p)))
    torch.testing.assert_close(outputs.q, 1 - p)
    torch.testing.assert_close(task.loss_weight(outputs.f), 1 - p)
    _, exact = collect(Reference(), model, tokens, task=trak.CausalLM().for_training())
    for name in features:
        weights = outputs.q.reshape(-1, *[1] * (features[name].ndim - 1))
        torch.testing.assert_close(weights * features[name], exact[name])
    with pytest.raises(trak.InputError, match=r"token_rows\(\).*example 0 of the batch has 5"):
        task.output(model, batch)
    vmapped, _ = collect(Functional(chunk_size=3), model, batch, task=task)
    assert vmapped.f.isnan().all()
    attribution = trak.attribute(
        model, tokens, tokens, task=task, parameters="transformer.ln_f.*", damping=0.1, progress=False
    )
    assert attribution.info["weight_exponent"] == 0.5


def test_one_weight_per_sequence_is_the_mean():
    model, batch = build(gpt2)
    task = trak.CausalLM(weights="mean")
    assert task.for_training() is task
    f, q = task.output_and_weight(model, batch)
    for row in range(3):
        p = torch.stack(token_terms(model, batch, row, task))
        torch.testing.assert_close(q[row], (1 - p).mean().detach())
    torch.testing.assert_close(f, trak.CausalLM().output(model, batch))


@pytest.mark.parametrize("make", [gpt2, t5, masked_bert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["mapping", "list", "lists"])
def test_token_rows(make, kind):
    """One row per target token; rows of a document add up to it."""
    model, batch = build(make)
    task = TASKS[make]()
    sequences = batch
    if kind != "mapping":
        sequences = [{name: value[row] for name, value in batch.items()} for row in range(3)]
    if kind == "lists":
        sequences = [{name: value.tolist() for name, value in one.items()} for one in sequences]
    rows = task.token_rows(sequences)
    expected = [
        (row, t)
        for row in range(3)
        for t in range(1 if make is gpt2 else 0, batch["labels"].shape[1])
        if batch["labels"][row, t] != -100
    ]
    assert rows.origins.tolist() == [list(origin) for origin in expected] and len(rows) == len(expected)
    tokens = torch.utils.data.default_collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        per_token = task.output(model, tokens)
        summed = torch.zeros(3, dtype=torch.float64).index_add(0, rows.origins[:, 0], per_token)
        torch.testing.assert_close(summed, task.output(model, batch))
    # Rows respect masks that are there already.
    narrow = {**batch, "target_mask": torch.zeros_like(batch["labels"])}
    narrow["target_mask"][0, 1] = narrow["target_mask"][2, 3] = 1
    left = [origin for origin in expected if origin in [(0, 1), (2, 3)]]
    assert task.token_rows(narrow).origins.tolist() == [list(origin) for origin in left]


def test_token_rows_of_texts_padded_on_the_left():
    """The first token after the padding is predicted from padding, and is no target."""
    _, batch = build(gpt2)
    left = {name: torch.cat([torch.zeros(3, 2).long(), value], 1) for name, value in batch.items()}
    rows, shifted = trak.CausalLM().token_rows(batch), trak.CausalLM().token_rows(left)
    assert torch.equal(shifted.origins, rows.origins + torch.tensor([0, 2]))


def test_texts_of_all_lengths_from_a_loader():
    """Collated with padding, in batches of any size: the scores of each text alone."""
    model, _ = build(gpt2)
    torch.manual_seed(2)
    texts = [torch.randint(3, 19, (length,)) for length in (2, 5, 3, 7, 4, 6)]

    def collate(chosen):
        def pad(values, fill):
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

        masks = [torch.ones_like(text) for text in chosen]
        return {"input_ids": pad(chosen, 0), "attention_mask": pad(masks, 0), "labels": pad(chosen, -100)}

    def scores(size):
        loader = torch.utils.data.DataLoader(texts, batch_size=size, collate_fn=collate)
        settings = {"parameters": "transformer.h.*", "projection": trak.Rademacher(dim=8), "damping": 0.1}
        return trak.attribute(
            model, loader, loader, task="causal_lm", progress=False, **settings
        ).scores.tensor()

    alone = scores(1)
    for size in (2, 4, 6):
        torch.testing.assert_close(scores(size), alone)


def test_token_rows_of_nothing():
    with pytest.raises(trak.InputError, match="none of the 2 sequences"):
        trak.CausalLM().token_rows({"labels": torch.full((2, 3), -100)})
    with pytest.raises(trak.InputError, match="sequence 0 must be a mapping"):
        trak.CausalLM().token_rows([(1, 2)])


def test_attribution_is_the_newton_step_in_loss_gradients():
    """Without a projection: φ(z)ᵀ (ΨᵀΨ + λI)⁻¹ ψ_i with ψ = −∇L of a sequence and φ = ∇f of a target, weights 1."""
    model, batch = build(gpt2)
    torch.manual_seed(1)
    train = {"input_ids": torch.randint(3, 19, (9, 6))}
    train |= {"attention_mask": torch.ones_like(train["input_ids"]), "labels": train["input_ids"]}
    parameters = ["transformer.ln_f.*", "transformer.h.0.attn.c_proj.*"]
    attribution = trak.attribute(
        model,
        train,
        batch,
        task="causal_lm",
        parameters=parameters,
        projection=trak.Identity(),
        damping=0.1,
        progress=False,
    )
    task = trak.CausalLM()
    names = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("transformer.ln_f", "transformer.h.0.attn.c_proj"))
    ]

    def matrix(data, task):
        found = collect(Reference(), model, data, names, task=task)[1]
        return torch.cat([found[name].flatten(1) for name in names], 1)

    psi, phi = matrix(train, task.for_training()), matrix(batch, task)
    inverse = torch.linalg.inv(psi.T @ psi + 0.1 * torch.eye(psi.shape[1], dtype=torch.float64))
    torch.testing.assert_close(
        attribution.scores.tensor().double(), psi @ inverse @ phi.T, rtol=1e-6, atol=1e-8
    )
    assert attribution.weights.tolist() == [1] * 9
    torch.testing.assert_close(attribution.outputs.double(), task.output(model, batch).detach())
    torch.testing.assert_close(attribution.self_influence().double(), (psi @ inverse * psi).sum(1))
    assert attribution.info["weight_exponent"] == 1
    assert attribution.info["task"]["training"] == {"task": "LogLikelihood", "of": task.fingerprint()}


def test_stores_of_other_training_outputs_are_refused(tmp_path):
    model, batch = build(gpt2)
    settings = {"parameters": "transformer.ln_f.*", "progress": False, "damping": 0.1}
    first = trak.attribute(model, batch, batch, task="causal_lm", save_dir=tmp_path, **settings)
    again = trak.attribute(model, batch, batch, task=trak.CausalLM(), save_dir=tmp_path, **settings)
    assert torch.equal(first.scores.tensor(), again.scores.tensor())
    with pytest.raises(trak.FingerprintError, match="weights"):
        trak.attribute(model, batch, batch, task=trak.CausalLM(weights="mean"), save_dir=tmp_path, **settings)


@pytest.mark.parametrize("weights", ["per_position", "mean"])
def test_traker_gives_the_same(weights):
    model, batch = build(gpt2)
    task, projection = trak.CausalLM(weights=weights), trak.Rademacher(dim=8)
    wanted = trak.attribute(
        model,
        batch,
        batch,
        task=task,
        parameters="transformer.h.*",
        projection=projection,
        damping=0.1,
        progress=False,
    )
    traker = trak.TRAKer(
        model,
        task,
        3,
        save_dir=None,
        projector=projection,
        grad_wrt=["transformer.h.*"],
        lambda_reg=trak.FixedDamping(0.1),
    )
    state = model.state_dict()
    traker.load_checkpoint(state, model_id=0)
    traker.featurize(batch, num_samples=3)
    traker.finalize_features()
    traker.start_scoring_checkpoint("val", state, model_id=0, num_targets=3)
    traker.score(batch, num_samples=3)
    torch.testing.assert_close(
        torch.tensor(traker.finalize_scores("val")), wanted.scores.tensor(), check_dtype=False
    )


def test_tracin_of_losses_takes_loss_gradients_on_both_sides():
    model, batch = build(gpt2)
    task = trak.CausalLM()
    names = [name for name, _ in model.named_parameters() if name.startswith("transformer.ln_f")]

    def matrix(task):
        return torch.cat(
            [g.flatten(1) for g in collect(Reference(), model, batch, names, task=task)[1].values()], 1
        )

    settings = {
        "model": model,
        "task": task,
        "parameters": "transformer.ln_f.*",
        "projection": trak.Identity(),
        "progress": False,
    }
    psi, phi = matrix(task.for_training()), matrix(task)
    for target, vectors in (("loss", psi), ("output", phi)):
        scores = trak.TracIn(target=target, **settings).fit(batch).attribute(batch).scores.tensor()
        torch.testing.assert_close(scores.double(), psi @ vectors.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [trak.InfluenceFunction, trak.EKFACInfluence])
def test_methods_that_need_a_loss_of_f_refuse(method):
    model, batch = build(gpt2)
    with pytest.raises(trak.InputError):
        method(model=model, task="causal_lm", parameters="transformer.ln_f.*", progress=False).fit(batch)


def test_examples_without_target_tokens():
    """Nothing to explain for a target; no influence of a training example."""
    model, batch = build(gpt2)
    batch["labels"][1] = -100
    for task in (trak.CausalLM(), trak.CausalLM(weights="mean")):
        with pytest.raises(trak.InputError, match="example 1 of the batch, 1 of 3"):
            task.output(model, batch)
    outputs, features = collect(Hooked(), model, batch, task=trak.CausalLM(reduction="mean").for_training())
    assert outputs.f[1] == 0 and all(not values[1].any() for values in features.values())
    vmapped, _ = collect(Functional(chunk_size=3), model, batch, task=trak.CausalLM())
    assert vmapped.f.isnan().tolist() == [False, True, False]


def test_mistakes_are_explained():
    model, batch = build(gpt2)
    task = trak.CausalLM()
    wrong = batch["labels"].clone()
    wrong[0, 2] = 19
    without = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(trak.InputError, match="mapping with `labels`"):
        task.output(model, without)
    with pytest.raises(trak.InputError, match="mapping with `labels`"):
        task.output(model, (batch["input_ids"], batch["labels"]))
    with pytest.raises(trak.InputError, match="integer labels"):
        task.output(model, {**batch, "labels": batch["labels"].double()})
    with pytest.raises(trak.InputError, match="got logits \\[3, 6, 19\\] and labels \\[3, 5\\]"):
        task.output(model, {**batch, "labels": batch["labels"][:, :5]})
    with pytest.raises(trak.InputError, match=r"labels 0 to 18.*got 19 at position 2 of example 0"):
        task.output(model, {**batch, "labels": wrong})
    with pytest.raises(trak.InputError, match="target_mask"):
        task.output(model, {**batch, "target_mask": torch.ones(3, 2)})
    with pytest.raises(trak.InputError, match="reduction must be 'sum' or 'mean'"):
        trak.MaskedLM(reduction="none")
    with pytest.raises(trak.InputError, match="weights must be"):
        trak.Seq2SeqLM(weights="none")
    with pytest.raises(trak.InputError, match="for_training"):
        task.loss_weight(torch.zeros(3))
    with pytest.raises(trak.InputError, match="gram"):
        trak.TRAK(model=model, task=task, gram="logistic").fit(batch)


def test_seq2seq_spans_by_labels_are_refused():
    model, batch = build(t5)
    batch["labels"][0, :2] = -100
    with pytest.raises(trak.InputError, match=r"example 0 .*target_mask"):
        trak.Seq2SeqLM().output(model, batch)
    with pytest.raises(trak.InputError, match="decoder_input_ids"):
        trak.Seq2SeqLM().output(build(gpt2)[0], batch)
    given_inputs = {**batch, "decoder_input_ids": torch.randint(3, 19, (3, 4))}
    assert trak.Seq2SeqLM().output(model, given_inputs).isfinite().all()


def test_seq2seq_spans_by_labels_are_nan_where_values_are_not_looked_at(monkeypatch):
    model, batch = build(t5)
    expected_B = trak.Seq2SeqLM().output(model, batch)
    batch["labels"][1, 0] = -100
    with values_unseen():
        outputs_B = trak.Seq2SeqLM().output(model, batch)
        likelihood_B = trak.Seq2SeqLM().for_training().output(model, batch)
    torch.testing.assert_close(outputs_B[[0, 2]], expected_B[[0, 2]])
    assert outputs_B[1].isnan() and likelihood_B[1].isnan() and likelihood_B[[0, 2]].isfinite().all()
    monkeypatch.setattr(projector, "has_queue", lambda device: True)
    # The first batch is checked apart, with a look at its values.
    with pytest.raises(trak.InputError, match=r"example 0 .*target_mask"):
        trak.TRAK(model=model, task="seq2seq_lm", projection=trak.Sparse(16), batch_size=1).fit(batch)


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq_lm", "masked_lm"])
def test_names(name):
    task = resolve_task(name)
    assert not task.is_log_loss and not task.for_training().is_log_loss
    assert task.fingerprint()["reduction"] == "sum"
