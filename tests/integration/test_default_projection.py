"""Which projection is used when none is named: fitted for TRAK, random where inner products of gradients are wanted or nothing can be fitted."""

import pytest
import torch

import trak

N, T = 40, 5
WIDE = 90  # 8 · 90 + 90 + 90 · 40 + 40 + 40 · 3 + 3 = 4,573 parameters: more than the default's 4,096 columns


def make(hidden=(WIDE, 40)):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = hidden
        model = torch.nn.Sequential(
            *(torch.nn.Linear(8, first), torch.nn.Tanh(), torch.nn.Linear(first, second), torch.nn.Tanh()),
            torch.nn.Linear(second, 3),
        )

    def draw(rows):
        return torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)

    return model, draw(N), draw(T)


def kind_of(attribution):
    return attribution.info["projection"]["kind"]


def test_trak_fits_an_eigenbasis():
    model, train, targets = make()
    options = {"task": "image_classification", "device": "cpu"}
    found = trak.attribute(model, train, targets, **options)
    named = trak.attribute(model, train, targets, projection=trak.Eigenbasis(4096), **options)
    assert kind_of(found) == "eigenbasis"
    torch.testing.assert_close(torch.as_tensor(found.scores[:]), torch.as_tensor(named.scores[:]))
    assert found.info["damping"] == named.info["damping"]


def test_a_small_model_is_not_projected():
    model, train, targets = make(hidden=(9, 9))
    found = trak.attribute(model, train, targets, task="image_classification", device="cpu")
    assert kind_of(found) == "identity"


@pytest.mark.parametrize("method", [trak.GradientSimilarity, trak.TracIn])
def test_methods_of_inner_products_keep_them(method):
    # What an eigenbasis cuts off is missing from inner products; random columns have them right on average.
    model, train, _ = make()
    options = {"learning_rates": [0.1]} if method is trak.TracIn else {}
    fitted = method(model=model, task="image_classification", device="cpu", **options).fit(train)
    assert fitted.run.setting.projection == trak.Sparse(4096)


def test_traker_cannot_fit_by_itself():
    model, _, _ = make()
    traker = trak.TRAKer(model, "image_classification", N, None, device="cpu")
    assert traker._setting.projection == trak.Sparse(4096)


def test_a_store_of_random_columns_is_not_gone_on_with(tmp_path):
    model, train, targets = make()
    options = {"task": "image_classification", "device": "cpu", "save_dir": tmp_path}
    trak.attribute(model, train, targets, projection=trak.Sparse(4096), **options)
    with pytest.raises(
        trak.FingerprintError, match=r"(?s)projection\.kind.*sparse.*eigenbasis|eigenbasis.*sparse"
    ):
        trak.attribute(model, train, targets, **options)
