"""Contrastive pairs against the formula, one pair at a time by autograd, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trak
from trak.gradients import Functional, Hooked, Reference
from trak.tasks import resolve_task
from trak.testing import hugging_face
from trak.testing.gradients import collect


class Towers(nn.Module):
    """A dual encoder of one's own."""

    def __init__(self):
        super().__init__()
        self.images, self.texts = nn.Linear(5, 4), nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.2))


TOWERS = trak.DualEncoder(
    image_features=lambda model, batch: model.images(batch[0]).tanh(),
    text_features=lambda model, batch: model.texts(batch[1]).tanh(),
    logit_scale=lambda model: model.log_scale.exp(),
    name="towers",
)


def pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, size, dtype=torch.float64, generator=generator) for size in (5, 3))


def towers(seed=0):
    torch.manual_seed(seed)
    return Towers().double()


def at(task, model):
    """The task at the model's own parameters."""
    return task.bind(model, lambda batch: batch)


def definition(model, one, negatives):
    """(f, p, p') of one pair, term by term."""

    def unit(values):
        return values / values.norm()

    scale = model.log_scale.exp()
    image, text = unit(model.images(one[0]).tanh()), unit(model.texts(one[1]).tanh())
    own = scale * (image @ text)
    to_text, to_image = 0.0, 0.0
    for other_image, other_text in zip(*negatives):
        with torch.no_grad():
            other_image = unit(model.images(other_image).tanh())
            other_text = unit(model.texts(other_text).tanh())
        to_text = to_text + torch.exp(-(own - scale * (image @ other_text)))
        to_image = to_image + torch.exp(-(own - scale * (text @ other_image)))
    return -torch.log(to_text) - torch.log(to_image), 1 / (1 + to_text), 1 / (1 + to_image)


def test_output_weight_and_gradient_are_the_definition():
    model, batch, negatives = towers(), pairs(4, 1), pairs(7, 2)
    task = at(trak.ContrastivePairs(negatives, encoder=TOWERS), model)
    outputs, features = collect(Reference(), model, batch, task=task)
    for row in range(4):
        f, p, p_image = definition(model, (batch[0][row], batch[1][row]), negatives)
        torch.testing.assert_close(outputs.f[row], f.detach())
        torch.testing.assert_close(outputs.q[row], (1 - (p + p_image) / 2).detach())
        gradients = torch.autograd.grad(f, list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), gradients):
            torch.testing.assert_close(features[name][row], gradient, msg=lambda m, name=name: f"{name}: {m}")
    assert not task.is_log_loss


def test_sources_agree():
    model, batch = towers(), pairs(5, 1)
    task = at(trak.ContrastivePairs(pairs(7, 2), encoder=TOWERS), model)
    outputs, wanted = collect(Reference(), model, batch, task=task)
    got_outputs, got = collect(Functional(), model, batch, task=task)
    torch.testing.assert_close((got_outputs.f, got_outputs.q), (outputs.f, outputs.q))
    torch.testing.assert_close(got, wanted)
    names = [name for name in wanted if name != "log_scale"]  # of no layer
    _, got = collect(Hooked(), model, batch, names, task=task)
    torch.testing.assert_close(got, {name: wanted[name] for name in names})


@pytest.mark.parametrize("source", [Hooked(), Functional()], ids=["hooked", "functional"])
def test_without_bind_it_is_the_same(source):
    """Negatives are embedded for each call, outside the hooks and the transforms."""
    model, batch = towers(), pairs(3, 1)
    task = trak.ContrastivePairs(pairs(7, 2), encoder=TOWERS)
    names = ["images.weight", "texts.bias"]
    outputs, features = collect(source, model, batch, names, task=task)
    wanted_outputs, wanted = collect(source, model, batch, names, task=at(task, model))
    torch.testing.assert_close((outputs.f, outputs.q), (wanted_outputs.f, wanted_outputs.q))
    torch.testing.assert_close(features, wanted)
    torch.testing.assert_close(task.output(model, batch).detach(), wanted_outputs.f)


@settings(deadline=None, max_examples=25)
@given(total=st.integers(2, 30), data=st.data())
def test_negatives_are_drawn_reproducibly_without_replacement(total, data):
    count, seed = data.draw(st.integers(2, total)), data.draw(st.integers(0, 10))
    numbers = torch.arange(total, dtype=torch.float64)
    given_pairs = (numbers[:, None].expand(-1, 5), numbers[:, None].expand(-1, 3))
    task = trak.ContrastivePairs(given_pairs, num_negatives=count, seed=seed, encoder=TOWERS)
    images, texts = task._drawn
    assert len(images) == count == len(images[:, 0].unique()) and torch.equal(images[:, 0], texts[:, 0])
    again = trak.ContrastivePairs(given_pairs, num_negatives=count, seed=seed, encoder=TOWERS)
    assert again.fingerprint() == task.fingerprint()
    as_dataset = [(given_pairs[0][i], given_pairs[1][i]) for i in range(total)]
    listed = trak.ContrastivePairs(as_dataset, num_negatives=count, seed=seed, encoder=TOWERS)
    assert listed.fingerprint() == task.fingerprint()


def test_every_pair_is_drawn_equally_often():
    numbers = torch.arange(6, dtype=torch.float64)
    counts = torch.zeros(6)
    for seed in range(600):
        task = trak.ContrastivePairs((numbers[:, None], numbers[:, None]), num_negatives=2, seed=seed)
        counts[task._drawn[0][:, 0].long()] += 1
    assert counts.sum() == 1200 and (counts - 200).abs().max() < 60  # 5 standard deviations


def test_tasks_do_not_share_negatives():
    one, other = (trak.ContrastivePairs(pairs(7, seed), encoder=TOWERS) for seed in (2, 3))
    model, batch = towers(), pairs(3, 1)
    before = at(one, model).output(model, batch)
    at(other, towers(5)).output(model, batch)
    assert torch.equal(at(one, model).output(model, batch), before)
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_pair_is_no_negative_of_itself(dtype):
    model = towers().to(dtype)
    train = tuple(side.to(dtype) for side in pairs(8, 1))
    whole = at(trak.ContrastivePairs(train, encoder=TOWERS), model)
    for row in range(8):
        others = tuple(torch.cat([side[:row], side[row + 1 :]]) for side in train)
        one = tuple(side[row : row + 1] for side in train)
        alone = at(trak.ContrastivePairs(others, encoder=TOWERS), model)
        torch.testing.assert_close(whole.output(model, one), alone.output(model, one))
    # The same image with another text is one.
    images = train[0].clone()
    images[1] = images[0]
    task = at(trak.ContrastivePairs((images, train[1]), num_negatives=8, encoder=TOWERS), model)
    without = at(trak.ContrastivePairs((images[2:], train[1][2:]), encoder=TOWERS), model)
    first = (images[:1], train[1][:1])
    assert (task.output(model, first) < without.output(model, first)).all()


@given(factor=st.floats(0.1, 10))
@settings(deadline=None, max_examples=10)
def test_lengths_of_embeddings_do_not_matter(factor):
    model, batch = towers(), pairs(3, 1)
    longer = trak.DualEncoder(
        lambda model, batch: factor * TOWERS.image_features(model, batch),
        TOWERS.text_features,
        TOWERS.logit_scale,
    )
    negatives = pairs(7, 2)
    wanted = at(trak.ContrastivePairs(negatives, encoder=TOWERS), model).output(model, batch)
    got = at(trak.ContrastivePairs(negatives, encoder=longer), model).output(model, batch)
    torch.testing.assert_close(got, wanted)


def newton(model, task, train, targets, names):
    """TRAK at one checkpoint without a projection, from dense gradients: (φ(z)ᵀ(ΦᵀΦ + λI)⁻¹φ_i, q)."""

    def matrix(batch):
        outputs, found = collect(Reference(), model, batch, names, task=at(task, model))
        return torch.cat([found[name].flatten(1) for name in names], 1), outputs.q

    phi, q = matrix(train)
    inverse = torch.linalg.inv(phi.T @ phi + 0.5 * torch.eye(phi.shape[1], dtype=torch.float64))
    return phi @ inverse @ matrix(targets)[0].T, q


@pytest.mark.parametrize("gradients", ["hooked", "functional", "reference"])
@pytest.mark.parametrize("face", ["attribute", "traker"])
def test_negatives_are_embedded_at_each_checkpoint(face, gradients, tmp_path):
    train, targets = pairs(12, 1), pairs(3, 4)
    models = [towers(seed) for seed in range(2)]
    names = ["images.weight", "images.bias", "texts.weight", "texts.bias"]
    task = trak.ContrastivePairs(train, num_negatives=8, encoder=TOWERS)
    kernels, weights = zip(*(newton(model, task, train, targets, names) for model in models))
    expected = torch.stack(kernels).mean(0) * torch.stack(weights).mean(0)[:, None]
    states = [model.state_dict() for model in models]
    if face == "attribute":
        for _ in range(2):  # the second time from the store
            attribution = trak.attribute(
                towers(9),
                train,
                targets,
                task=task,
                checkpoints=states,
                parameters=names,
                projection=trak.Identity(),
                gradients=gradients,
                damping=0.5,
                save_dir=tmp_path,
                batch_size=5,
                progress=False,
            )
            torch.testing.assert_close(attribution.scores.tensor().double(), expected, rtol=1e-6, atol=1e-8)
        return
    traker = trak.TRAKer(
        towers(9),
        task,
        12,
        save_dir=None,
        gradient_computer=gradients,
        projector=trak.Identity(),
        grad_wrt=names,
        lambda_reg=trak.FixedDamping(0.5),
    )
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for start in range(0, 12, 5):
            batch = tuple(side[start : start + 5] for side in train)
            traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("val", state, model_id=model_id, num_targets=3)
        traker.score(targets, num_samples=3)
    torch.testing.assert_close(
        torch.tensor(traker.finalize_scores("val")).double(), expected, rtol=1e-6, atol=1e-8
    )


def test_other_negatives_are_refused_in_one_store(tmp_path):
    model, train = towers(), pairs(9, 1)
    options = {"parameters": "images.*", "save_dir": tmp_path, "progress": False}
    trak.attribute(
        model, train, train, task=trak.ContrastivePairs(train, num_negatives=5, encoder=TOWERS), **options
    )
    other = trak.ContrastivePairs(train, num_negatives=5, seed=1, encoder=TOWERS)
    with pytest.raises(trak.FingerprintError, match="negatives"):
        trak.attribute(model, train, train, task=other, **options)


def clip():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = hugging_face.clip(vocabulary=30).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def clip_batch(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (count, 6), generator=generator)
    ids[:, 5] = 2
    images = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)
    return {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_hugging_face_clip():
    """Outputs from the model's own logits over the pair and the negatives; hooked gradients by autograd, pair by pair."""
    model, batch, negatives = clip(), clip_batch(3, 1), clip_batch(5, 2)
    task = at(trak.ContrastivePairs(negatives, batch_size=2), model)
    f, q = task.output_and_weight(model, batch)
    for row in range(3):
        together = {name: torch.cat([batch[name][row : row + 1], negatives[name]]) for name in batch}
        logits = model(**together).logits_per_image
        p = [torch.softmax(logits[0], 0)[0], torch.softmax(logits[:, 0], 0)[0]]
        torch.testing.assert_close(f[row], sum(torch.log(p_i / (1 - p_i)) for p_i in p))
        torch.testing.assert_close(q[row], 1 - sum(p).detach() / 2)
    ruled = [
        n
        for n, _ in model.named_parameters()
        if n not in ("logit_scale", "vision_model.embeddings.class_embedding")
    ]
    _, wanted = collect(Reference(), model, batch, ruled, task=task)
    _, got = collect(Hooked(), model, batch, ruled, task=task)
    for name in ruled:
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-8, atol=1e-9 * max(scale, 1e-3))
    _, wanted = collect(Reference(), model, batch, task=task)
    _, got = collect(Functional(), model, batch, task=task)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    attribution = trak.attribute(
        model,
        clip_batch(8, 3),
        batch,
        task=trak.ContrastivePairs(negatives),
        parameters="*.layers.0.mlp.*",
        progress=False,
    )
    assert attribution.scores.tensor().shape == (8, 3)


class OpenClip(Towers):
    """The part of open_clip's interface that is used."""

    def __init__(self):
        super().__init__()
        self.logit_scale = self.log_scale

    def encode_image(self, image, normalize=False):
        return self.images(image).tanh()

    def encode_text(self, text, normalize=False):
        return self.texts(text).tanh()


def test_open_clip():
    torch.manual_seed(0)
    model, batch, negatives = OpenClip().double(), pairs(3, 1), pairs(7, 2)
    got = trak.ContrastivePairs(negatives, encoder="open_clip").output(model, batch)
    torch.testing.assert_close(got, trak.ContrastivePairs(negatives, encoder=TOWERS).output(model, batch))
    with pytest.raises(trak.InputError, match=r"\(images, tokenised texts\)"):
        trak.ContrastivePairs(negatives, encoder="open_clip").output(model, {"image": batch[0]})


def test_mistakes_are_explained():
    model, batch, negatives = towers(), pairs(3, 1), pairs(7, 2)
    with pytest.raises(trak.InputError, match="from 2 to the number of pairs given, 7; got 8"):
        trak.ContrastivePairs(negatives, num_negatives=8)
    with pytest.raises(trak.InputError, match="got 1"):
        trak.ContrastivePairs(negatives, num_negatives=1)
    with pytest.raises(trak.InputError, match="negatives must be a batch"):
        trak.ContrastivePairs(iter([negatives]))
    with pytest.raises(trak.InputError, match="encoder must be one of transformers, open_clip"):
        trak.ContrastivePairs(negatives, encoder="siglip")
    with pytest.raises(trak.InputError, match="mappings with pixel_values"):
        trak.ContrastivePairs(negatives).output(model, batch)
    with pytest.raises(trak.InputError, match="no encode_image"):
        trak.ContrastivePairs(negatives, encoder="open_clip").output(model, batch)
    crooked = trak.DualEncoder(lambda m, b: m.images(b[0])[:, :2], lambda m, b: m.texts(b[1]), lambda m: 1.0)
    with pytest.raises(trak.InputError, match="two tensors"):
        trak.ContrastivePairs(negatives, encoder=crooked).output(model, batch)
    task = trak.ContrastivePairs(negatives, encoder=TOWERS)
    for one in (task, at(task, model)):
        with pytest.raises(trak.InputError, match="no function of f"):
            one.loss_weight(torch.zeros(3))
    with pytest.raises(trak.InputError, match="ContrastivePairs"):
        resolve_task("clip")


@pytest.mark.parametrize("method", [trak.InfluenceFunction, trak.EKFACInfluence])
def test_methods_that_need_a_loss_of_f_refuse(method):
    task = trak.ContrastivePairs(pairs(7, 2), encoder=TOWERS)
    with pytest.raises(trak.InputError):
        method(model=towers(), task=task, parameters="images.*", progress=False).fit(pairs(6, 1))
