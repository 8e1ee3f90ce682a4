"""The variance of an estimated inner product is what theory gives, for every kind.

Legend: X, Y gradient matrices [R, C] of one parameter, x and y the same flattened.
"""

import pytest
import torch

from trak.projection import Gaussian, Kronecker, Rademacher, Sparse
from trak.projection.kronecker import Split, choose_splits

DRAWS = 1000


def gaussian_variance(x, y, dim):
    return (x @ x * (y @ y) + (x @ y) ** 2) / dim


def sign_variance(x, y, dim):
    return (x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / dim


def sparse_variance(x, y, dim, nonzeros):
    """The mean of `nonzeros` sketches, one for each group of columns, in which entries of one block do not meet."""
    sizes = [(t + 1) * dim // nonzeros - t * dim // nonzeros for t in range(nonzeros)]
    apart = sum(gaussian_variance(u, v, 1) for u, v in zip(*(z.split(dim // nonzeros) for z in (x, y))))
    return sum((gaussian_variance(x, y, 1) - apart) / size for size in sizes) / nonzeros**2


def form_variance(M):
    """Var(bᵀMb) for random signs b."""
    return (M**2).sum() + (M * M.T).sum() - 2 * (M.diagonal() ** 2).sum()


def product_variance(X, Y):
    """Var((aᵀXb)(aᵀYb)) for random signs a and b: E over a first, then over b."""
    S, T, M = X.T @ X, Y.T @ Y, X.T @ Y
    second = S.trace() * T.trace() + 2 * (S * T).sum() - 2 * (S.diagonal() * T.diagonal()).sum()
    second = second + 2 * (form_variance(M) + M.trace() ** 2)
    rows = (X**2).sum(1) * (Y**2).sum(1) + 2 * (X * Y).sum(1) ** 2 - 2 * (X**2 * Y**2).sum(1)
    return second - 2 * rows.sum() - (X * Y).sum() ** 2


def split_variance(X, Y, split):
    """One split: pairs of kept numbers that share a column of A, of B, or both, covary."""
    if split.exact == "columns":
        return split_variance(X.T, Y.T, Split(split.b, split.a, split.k, "rows"))
    kept = split.kept()
    p, q = kept // split.b, kept % split.b
    if split.exact == "rows":
        counts = p.bincount().double()
        by_column = [p[q == column] for column in range(split.b)]
        return sum(form_variance((X[rows] / counts[rows, None]).T @ Y[rows]) for rows in by_column)
    same_a = (p.bincount() ** 2).sum() - split.k
    same_b = (q.bincount() ** 2).sum() - split.k
    pairs = same_a * form_variance(X @ Y.T) + same_b * form_variance(X.T @ Y)
    return (pairs + split.k * product_variance(X, Y)) / split.k**2


def kronecker_variance(X, Y, dim, sketches):
    splits = choose_splits(*X.shape, dim, sketches)
    return sum((split.k / dim) ** 2 * split_variance(X, Y, split) for split in splits)


def gradients(rows, columns):
    """Two correlated gradients, each a few outer products with entries of uneven size."""
    generator = torch.Generator().manual_seed(rows * columns)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = draw(rows, 2) @ draw(2, columns)
    pair = [common + 0.7 * draw(rows, 1) @ draw(1, columns) for _ in range(2)]
    return [matrix / matrix.norm() for matrix in pair]


CASES = [
    (Rademacher(12), (6, 5)),
    (Rademacher(129), (3, 4)),
    (Gaussian(12), (6, 5)),
    (Sparse(12), (6, 5)),
    (Sparse(12, nonzeros=4), (6, 5)),
    (Sparse(11, nonzeros=3), (6, 5)),
    (Sparse(2), (6, 11)),
    (Kronecker(16), (12, 10)),
    (Kronecker(14), (12, 10)),
    (Kronecker(10), (4, 20)),
    (Kronecker(10), (20, 4)),
    (Kronecker(11, sketches=2), (12, 10)),
    (Kronecker(9), (40, 1)),
]


def theory(projection, X, Y):
    x, y = X.flatten(), Y.flatten()
    if isinstance(projection, Rademacher):
        return sign_variance(x, y, projection.dim)
    if isinstance(projection, Gaussian):
        return gaussian_variance(x, y, projection.dim)
    if isinstance(projection, Sparse):
        return sparse_variance(x, y, projection.dim, projection.nonzeros)
    return kronecker_variance(X, Y, projection.dim, projection.sketches)


@pytest.mark.parametrize(("projection", "shape"), CASES, ids=str)
def test_variance_is_that_of_theory(projection, shape):
    X, Y = gradients(*shape)
    pair = torch.stack([X.flatten(), Y.flatten()])
    estimates = torch.empty(DRAWS, dtype=torch.float64)
    for draw in range(DRAWS):
        state = projection.init({"w": shape}, checkpoint=draw, dtype=torch.float64)
        features = pair @ projection.matrix(state, "w")
        estimates[draw] = features[0] @ features[1]
    expected = theory(projection, X, Y)
    bias = abs(estimates.mean() - (X * Y).sum())
    assert bias <= 5 * (expected / DRAWS) ** 0.5
    squares = (estimates - (X * Y).sum()) ** 2
    standard_error = squares.std() / DRAWS**0.5
    assert standard_error < 0.15 * expected, "too few draws for a test of any strength"
    assert abs(squares.mean() - expected) <= 5 * standard_error


@pytest.mark.parametrize("shape", [(10, 64), (64, 10), (3, 200), (64, 64), (30, 40), (17, 90)])
@pytest.mark.parametrize("k", [16, 50, 64, 100])
def test_the_chosen_split_has_the_lower_variance(shape, k):
    """For one outer product, against the square split and against leaving a side exact."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in shape)
    X = torch.outer(u, v)
    X = X / X.norm()
    chosen = kronecker_variance(X, X, k, 1)
    side = next(side for side in range(1, k + 1) if side * side >= k)
    options = []
    if side <= min(shape):
        options.append(Split(side, -(-k // side), k, None))
    if shape[0] <= min(k, shape[1]):
        options.append(Split(shape[0], -(-k // shape[0]), k, "rows"))
    if shape[1] <= min(k, shape[0]):
        options.append(Split(-(-k // shape[1]), shape[1], k, "columns"))
    assert options
    # The rule drops the smaller term of the square split, so near the boundary it may lose a little.
    assert chosen <= 1.1 * min(split_variance(X, X, option) for option in options)


def test_sketches_lower_the_variance():
    X, Y = gradients(40, 30)
    variances = [float(kronecker_variance(X, Y, 64, sketches)) for sketches in (1, 4, 16, 64)]
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] < 0.4 * variances[0]
