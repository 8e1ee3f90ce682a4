"""Every built-in projection, at several K, under the contract suite that ships."""

import pytest

from trak.projection import Gaussian, Identity, Kronecker, Rademacher, Sparse
from trak.testing.projection import CHECKS, check_unbiased

DIMS = (7, 128, 129, 200)
PROJECTIONS = [
    Identity(),
    *(kind(dim) for kind in (Rademacher, Gaussian, Sparse) for dim in (1, *DIMS)),
    *(Sparse(dim, nonzeros=nonzeros) for dim, nonzeros in ((7, 3), (129, 4), (7, 7))),
    *(kind(dim, per_layer=True) for kind in (Rademacher, Gaussian, Sparse) for dim in (4, *DIMS)),
    Sparse(9, nonzeros=4, per_layer=True),
    *(Kronecker(dim) for dim in (6, *DIMS)),
    *(Kronecker(dim, seed=5, sketches=sketches) for dim, sketches in ((7, 2), (60, 3), (128, 40))),
]


# Drawing a hundred checkpoints takes a while: once for each kind is enough beside the exact tests.
UNBIASED = [
    Identity(),
    *(kind(129, per_layer=per_layer) for kind in (Rademacher, Sparse) for per_layer in (False, True)),
    Gaussian(7),
    Sparse(7, nonzeros=3),
    Kronecker(30),
    Kronecker(60, sketches=3),
]


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check is not check_unbiased], ids=lambda check: check.__name__
)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=repr)
def test_contract(projection, check):
    check(projection)


@pytest.mark.parametrize("projection", UNBIASED, ids=repr)
def test_unbiased(projection):
    check_unbiased(projection)
