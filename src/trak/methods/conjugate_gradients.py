"""The method of conjugate gradients, for several right-hand sides at once.

Shape legend: T right-hand sides, P unknowns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trak.errors import SingularGramError

Product = Callable[[Tensor], Tensor]
"""Vectors [t, P] -> H times each, [t, P]."""


def conjugate_gradients(
    product: Product, rhs_TP: Tensor, *, damping: float, tolerance: float, max_iter: int, where: str
) -> Tensor:
    """(H + λI)⁻¹ b for every right-hand side b, [T, P] float64 (Hestenes, Stiefel 1952).

    All right-hand sides step together, each with its own step size; those that have converged drop out.

    Raises:
        SingularGramError: a direction in which H + λI is not positive, or no convergence in `max_iter` steps.
    """
    solution_TP = torch.zeros_like(rhs_TP)
    residual_TP, direction_TP = rhs_TP.clone(), rhs_TP.clone()
    square_T = rhs_TP.square().sum(1)
    enough_T = square_T * tolerance**2
    for _ in range(max_iter):
        open_t = (square_T > enough_T).nonzero().squeeze(1)
        if not len(open_t):
            return solution_TP
        direction_tP = direction_TP[open_t]
        image_tP = product(direction_tP) + damping * direction_tP
        curvature_t = (direction_tP * image_tP).sum(1)
        if not bool((curvature_t > 0).all()):
            raise SingularGramError(
                f"{where}: the damped Hessian is not positive definite (damping {damping:g}), so that the influence is not defined: "
                'raise damping, or use hessian="gauss_newton" with damping > 0'
            )
        step_t1 = (square_T[open_t] / curvature_t).unsqueeze(1)
        solution_TP[open_t] += step_t1 * direction_tP
        residual_TP[open_t] -= step_t1 * image_tP
        new_t = residual_TP[open_t].square().sum(1)
        direction_TP[open_t] = residual_TP[open_t] + (new_t / square_T[open_t]).unsqueeze(1) * direction_tP
        square_T[open_t] = new_t
    if bool((square_T <= enough_T).all()):
        return solution_TP
    worst = float((square_T / rhs_TP.square().sum(1).clamp_min(1e-300)).max().sqrt())
    raise SingularGramError(
        f"{where}: conjugate gradients reached a relative residual of {worst:.2g} in {max_iter} steps, and {tolerance:g} is asked for: raise "
        f"damping (now {damping:g}) or max_iter"
    )
