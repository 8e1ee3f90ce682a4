"""Our scores under quanda's metrics.

quanda asks for a dozen large packages, so most tests run against a stand-in with the signatures of quanda 0.5.0: `Explainer`,
`ClassDetectionMetric`, `MislabelingDetectionMetric`, and a wrapper that imports the released package by the name `trak`. The last
test needs quanda itself.
"""

import importlib.util
import sys

import pytest
import torch

import trak
from trak import ArrayScores, Attribution, InputError, MissingDependencyError
from trak.integrations import quanda as adapter

N, T = 24, 7

STAND_IN = {
    "quanda/__init__.py": "from quanda import explainers, metrics\n",
    "quanda/explainers/__init__.py": """
from quanda.explainers import wrappers
from quanda.explainers.base import Explainer
""",
    "quanda/explainers/wrappers.py": """
from trak import TRAKer
from trak.projectors import BasicProjector, CudaProjector, NoOpProjector, ProjectionType
from trak.utils import get_matrix_mult
""",
    "quanda/explainers/base.py": """
import functools
from abc import ABC, abstractmethod
import torch

def cache_result(method):
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if "_cached" not in self.__dict__:
            self.__dict__["_cached"] = method(self, *args, **kwargs)
        return self.__dict__["_cached"]
    return wrapper

class OnDeviceDataset(torch.utils.data.Dataset):
    def __init__(self, dataset, device):
        self.dataset, self.device = dataset, device
    def __len__(self):
        return len(self.dataset)
    def __getitem__(self, index):
        return tuple(torch.as_tensor(item, device=self.device) for item in self.dataset[index])

class Explainer(ABC):
    accepted_tasks = []
    def __init__(self, model, train_dataset, task="image_classification", checkpoints=None, checkpoints_load_func=None, **kwargs):
        if task not in self.accepted_tasks:
            raise ValueError(f"Task {task} not supported by this explainer.")
        self.model = model
        self.device = str(next(model.parameters()).device)
        self.checkpoints_load_func = checkpoints_load_func or (lambda model, path: model.load_state_dict(torch.load(path)))
        self.checkpoints = [] if checkpoints is None else checkpoints if isinstance(checkpoints, list) else [checkpoints]
        self.train_dataset = OnDeviceDataset(train_dataset, self.device)

    @abstractmethod
    def explain(self, test_data, targets):
        raise NotImplementedError

    @cache_result
    def self_influence(self, batch_size=32):
        influences = torch.empty(len(self.train_dataset))
        for i in range(0, len(influences), batch_size):
            rows = [self.train_dataset[j] for j in range(i, min(i + batch_size, len(influences)))]
            inputs, labels = (torch.stack(part) for part in zip(*rows))
            influences[i:i + batch_size] = self.explain(test_data=inputs, targets=labels).diag(diagonal=i)
        return influences
""",
    "quanda/metrics.py": """
import torch

class ClassDetectionMetric:
    def __init__(self, model, train_dataset, s=5):
        self.train_dataset, self.s, self.scores = train_dataset, s, []
    def update(self, explanations, test_targets, test_data=None):
        top = explanations.topk(k=self.s, dim=1).indices
        labels = torch.tensor([int(self.train_dataset[int(i)][1]) for i in top.flatten()]).reshape(top.shape)
        self.scores.append((labels == test_targets.unsqueeze(1)).float().mean(dim=1))
    def compute(self):
        return {"score": torch.cat(self.scores).mean().item()}

class MislabelingDetectionMetric:
    def __init__(self, model, train_dataset, mislabeling_indices, explainer_cls=None, expl_kwargs=None, checkpoints=None,
                 checkpoints_load_func=None):
        explainer = explainer_cls(model=model, checkpoints=checkpoints, train_dataset=train_dataset,
                                  checkpoints_load_func=checkpoints_load_func, **expl_kwargs)
        influence = explainer.self_influence()
        order = (influence + 1e-4 * torch.arange(len(influence))).argsort(descending=True)
        found = torch.tensor([int(row) in set(mislabeling_indices) for row in order])
        self.curve = found.float().cumsum(0) / len(mislabeling_indices)
    def compute(self):
        return {"score": (torch.trapezoid(self.curve) / len(self.curve)).item()}
""",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    for name, text in STAND_IN.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "quanda"}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    adapter.explainer_class.cache_clear()
    yield adapter.import_quanda()
    adapter.explainer_class.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "quanda"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def data():
    centres = 2 * torch.randn(3, 5)
    labels, target_labels = torch.arange(N) % 3, torch.arange(T) % 3
    inputs, targets = centres[labels] + torch.randn(N, 5), centres[target_labels] + torch.randn(T, 5)
    return torch.utils.data.TensorDataset(inputs, labels), (targets, target_labels)


@pytest.fixture
def checkpoints(tmp_path):
    paths = []
    for index in range(2):
        torch.save(torch.nn.Linear(5, 3).state_dict(), tmp_path / f"{index}.pt")
        paths.append(str(tmp_path / f"{index}.pt"))
    return paths


def trak_method(model, **options):
    return trak.TRAK(model=model, task="image_classification", damping=0.5, **options)


# Scores in quanda's orientation


def test_explanations_are_the_scores_turned():
    scores = torch.randn(N, T)
    for given in (ArrayScores(scores), Attribution(ArrayScores(scores))):
        assert torch.equal(adapter.explanations(given), scores.T)
    assert adapter.explanations(ArrayScores(scores.double())).dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_batches_are_the_explanations_in_parts(batch_size):
    scores = torch.randn(N, T)
    parts = list(adapter.batches(ArrayScores(scores), batch_size))
    assert torch.equal(torch.cat([rows for rows, _ in parts]), torch.arange(T))
    assert torch.equal(torch.cat([part for _, part in parts]), scores.T)
    assert max(len(part) for _, part in parts) == min(batch_size, T)


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"make trak\.ArrayScores"):
        adapter.explanations(torch.randn(N, T))
    with pytest.raises(InputError, match="batch_size"):
        next(adapter.batches(ArrayScores(torch.randn(N, T)), 0))


def test_without_quanda(monkeypatch):
    monkeypatch.setitem(sys.modules, "quanda", None)
    adapter.explainer_class.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install quanda"):
        adapter.explainer_class()


# The stand-in


def test_the_released_packages_names_are_there_for_the_import_only(stand_in):
    assert "trak.projectors" not in sys.modules
    assert not hasattr(trak, "projectors")
    with pytest.raises(MissingDependencyError, match=r"trak\.projectors\.BasicProjector"):
        stand_in.explainers.wrappers.BasicProjector(proj_dim=8)


def test_the_explainer_gives_what_attribute_gives(stand_in, data, checkpoints):
    model = torch.nn.Linear(5, 3)
    explainer_class = adapter.explainer_class()
    assert issubclass(explainer_class, stand_in.explainers.Explainer)
    assert adapter.explainer_class() is explainer_class
    expected = trak.attribute(model, *data, task="image_classification", checkpoints=checkpoints, damping=0.5)
    for method in (trak_method(model), trak_method):
        explainer = explainer_class(
            model=model, train_dataset=data[0], checkpoints=checkpoints, method=method
        )
        explained = explainer.explain(data[1][0], data[1][1])
        assert explained.shape == (T, N)
        torch.testing.assert_close(explained, expected.scores.tensor().T)
        torch.testing.assert_close(explainer.explain(data[1][0], data[1][1].tolist()), explained)
        torch.testing.assert_close(explainer.explain(data[1][0][2:4], data[1][1][2:4]), explained[2:4])


def test_without_checkpoints_the_models_own_state(stand_in, data):
    model = torch.nn.Linear(5, 3)
    explainer = adapter.explainer_class()(model=model, train_dataset=data[0], method=trak_method(model))
    expected = trak.attribute(model, *data, task="image_classification", damping=0.5)
    torch.testing.assert_close(explainer.explain(*data[1]), expected.scores.tensor().T)


def test_the_model_that_quanda_gives_is_explained(stand_in, data):
    """Randomisation tests give another model than the one that the method was made with."""
    model, other = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    explainer_class = adapter.explainer_class()
    method = trak_method(model)
    explained = explainer_class(model=other, train_dataset=data[0], method=method).explain(*data[1])
    expected = trak.attribute(other, *data, task="image_classification", damping=0.5)
    torch.testing.assert_close(explained, expected.scores.tensor().T)
    assert method.model is model


def test_equal_checkpoints_count_once(stand_in, data, checkpoints):
    """Quanda draws its randomised checkpoints from one seed."""
    model = torch.nn.Linear(5, 3)
    several, one = (
        adapter.explainer_class()(
            model=model, train_dataset=data[0], method=trak_method, checkpoints=paths
        ).explain(*data[1])
        for paths in ([checkpoints[0]] * 3, checkpoints[0])
    )
    assert torch.equal(several, one)


def test_a_load_function_of_ones_own(stand_in, data, tmp_path):
    model, saved = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    torch.save({"epoch": 3, "weights": saved.state_dict()}, tmp_path / "a.ckpt")

    def load(model, path):
        model.load_state_dict(torch.load(path)["weights"])

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explainer = adapter.explainer_class()(
        model=model,
        train_dataset=data[0],
        method=trak_method,
        checkpoints=str(tmp_path / "a.ckpt"),
        checkpoints_load_func=load,
    )
    expected = trak.attribute(saved, *data, task="image_classification", damping=0.5)
    torch.testing.assert_close(explainer.explain(*data[1]), expected.scores.tensor().T)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_self_influence_is_the_methods_own_or_that_of_explaining_every_row(stand_in, data):
    model = torch.nn.Linear(5, 3)
    explainer_class = adapter.explainer_class()
    with_own = explainer_class(model=model, train_dataset=data[0], method=trak_method)
    by_rows = stand_in.explainers.Explainer.self_influence(with_own, batch_size=10)
    torch.testing.assert_close(with_own.self_influence(), by_rows)
    similarity = trak.GradientSimilarity(model=model, task="image_classification", similarity="dot")
    without = explainer_class(model=model, train_dataset=data[0], method=similarity)
    influence = without.self_influence(batch_size=10)
    explained = without.explain(*data[0].tensors)
    torch.testing.assert_close(influence, explained.diag())


def test_mappings_of_tensors(stand_in):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 2)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids).mean(1))

    words, labels = torch.randint(11, (N, 3)), torch.arange(N) % 2
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(words, labels)]
    model = Classifier()
    method = trak.TRAK(model=model, task="text_classification", damping=0.5)
    explainer = adapter.explainer_class()(
        model=model, train_dataset=rows, method=method, task="text_classification"
    )
    explained = explainer.explain({"input_ids": words[:T]}, labels[:T])
    targets = {"input_ids": words[:T], "labels": labels[:T]}
    expected = trak.attribute(model, rows, targets, task="text_classification", damping=0.5)
    torch.testing.assert_close(explained, expected.scores.tensor().T)


def test_what_is_no_method_or_task(stand_in, data):
    model = torch.nn.Linear(5, 3)
    explainer_class = adapter.explainer_class()
    for method in ("trak", lambda model: None):
        with pytest.raises(InputError, match=r"method must be a trak\.Attributor"):
            explainer_class(model=model, train_dataset=data[0], method=method)
    with pytest.raises(ValueError, match="not supported"):
        explainer_class(model=model, train_dataset=data[0], method=trak_method, task="causal_lm")


def test_metrics_of_the_stand_in(stand_in, data, checkpoints):
    check_metrics(stand_in, data, checkpoints)


def check_metrics(quanda, data, checkpoints, where=lambda quanda, name: getattr(quanda.metrics, name)):
    """Class detection is our class agreement, and mislabelled rows are found by our self-influence."""
    model = torch.nn.Linear(5, 3)
    attribution = trak.attribute(
        model, *data, task="image_classification", checkpoints=checkpoints, damping=0.5
    )
    metric = where(quanda, "ClassDetectionMetric")(model=model, train_dataset=data[0], s=5)
    for rows, part in adapter.batches(attribution, 3):
        metric.update(explanations=part, test_targets=data[1][1][rows])
    ours = trak.evaluation.class_agreement(attribution.scores, data[0].tensors[1], data[1][1], k=5)
    assert metric.compute()["score"] == pytest.approx(ours.agreement.mean, abs=1e-6)

    # Quanda breaks ties by adding 1e-4 for each row.
    broken_ties = attribution.self_influence() + 1e-4 * torch.arange(N)
    suspicious = broken_ties.argsort(descending=True)[:3].tolist()
    found = where(quanda, "MislabelingDetectionMetric")(
        model=model,
        train_dataset=data[0],
        mislabeling_indices=suspicious,
        explainer_cls=adapter.explainer_class(),
        expl_kwargs={"method": trak_method},
        checkpoints=checkpoints,
    )
    best = torch.cat([torch.arange(1, 4) / 3, torch.ones(N - 3)])
    assert found.compute()["score"] == pytest.approx(float(torch.trapezoid(best)) / N, abs=1e-6)


# quanda itself


def test_metrics_of_quanda(data, checkpoints):
    # Not importorskip: quanda imports with names in place of the released package's only.
    if importlib.util.find_spec("quanda") is None:
        pytest.skip("needs quanda")
    quanda = adapter.import_quanda()
    check_metrics(
        quanda, data, checkpoints, lambda quanda, name: getattr(quanda.metrics.downstream_eval, name)
    )
