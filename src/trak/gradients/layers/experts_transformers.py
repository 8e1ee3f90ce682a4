"""Experts of Hugging Face's mixtures: each expert's matrix is a slice of one parameter, [E, O, I].

Their classes (Mixtral, Qwen, DeepSeek, gpt-oss, …) have no module for an expert that a hook could see, and one contract:
`forward(tokens [S, D], experts of each token [S, k], their weights [S, k])`, which transformers computes in several ways from the same
attributes. For the length of a forward pass the module gets another one, which calls a module for the products with each
parameter. A token's k uses stay beside each other, so that rows belong to examples as in any layer; which expert a row was
sent to is a second argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak.blocks import Block, DenseBlock
from trak.gradients.layers.base import LayerCall, SteppedRule, own_parameters
from trak.gradients.layers.rows import SortedRows

_KNOWN = (None, "eager", "batched_mm", "grouped_mm")
"""Ways of transformers to compute the same; anybody may register others."""


class ExpertProjection(nn.Module):
    """y_r = x_r W[e_r]ᵀ + b[e_r], with W and b the experts' parameters of these names. Transposed: y_r = x_r W[e_r] + b[e_r]."""

    def __init__(self, experts: nn.Module, weight: str) -> None:
        super().__init__()
        self.weight_name, self.bias_name = weight, f"{weight}_bias"
        self._experts = (experts,)  # in a tuple: not a submodule

    def __getattr__(self, name: str) -> Any:
        """The experts' parameters as they are at the time."""
        if name in (vars(self).get("weight_name"), vars(self).get("bias_name")):
            return getattr(self._experts[0], name)
        return super().__getattr__(name)

    @property
    def parameter_names(self) -> frozenset[str]:
        """Those of the experts' parameters that are multiplied or added here."""
        return own_parameters(self._experts[0], self.weight_name, *[self.bias_name] * self.has_bias)

    @property
    def has_bias(self) -> bool:
        """Whether there is b."""
        return bool(self._experts[0].has_bias)

    @property
    def is_transposed(self) -> bool:
        """Whether W is [E, I, O] rather than [E, O, I]."""
        return bool(self._experts[0].is_transposed)

    def forward(self, inputs: Tensor, experts: Tensor) -> Tensor:
        """[n, I], [n] -> [n, O]; 0 for an expert that there is not."""
        weight, bias = (
            getattr(self, self.weight_name),
            getattr(self, self.bias_name) if self.has_bias else None,
        )
        rows_by_expert = [(experts == index).nonzero()[:, 0] for index in range(len(weight))]
        parts = [
            F.linear(
                inputs[rows],
                weight[index].T if self.is_transposed else weight[index],
                None if bias is None else bias[index],
            )
            for index, rows in enumerate(rows_by_expert)
        ]
        outputs = torch.cat(parts)
        return outputs.new_zeros(len(inputs), outputs.shape[1]).index_copy(
            0, torch.cat(rows_by_expert), outputs
        )


@dataclass(frozen=True)
class TransformersExpertsRule(SteppedRule):
    """∇W_b[e] = Σ_{t sent to e} ∇y_bt ⊗ x_bt, ∇b_b[e] = Σ_{t sent to e} ∇y_bt."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The experts' weights and biases, of a module that can be computed in steps."""
        if not experts_in_steps(module):
            return frozenset()
        return frozenset().union(*(part.parameter_names for part in expert_projections(module)))

    def event_ndim(self, module: Any) -> int:
        """One vector."""
        return 1

    def parts(self, module: Any) -> tuple[ExpertProjection, ...]:
        """See `expert_projections`."""
        return expert_projections(module)

    def forward(self, module: Any, parts: tuple[Any, ...]) -> Callable[..., Tensor]:
        """See `forward_of_experts`."""
        return forward_of_experts(module, parts)

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: [B, E, O, I] and [B, E, O]."""
        part, size = call.module, call.batch_size
        (expert_n,) = call.others
        shape = tuple(getattr(part, part.weight_name).shape)
        number = shape[0]
        example_n = torch.arange(size, device=expert_n.device).repeat_interleave(len(expert_n) // size)
        group_n = torch.where(expert_n < number, example_n * number + expert_n, -1)
        by_pair = SortedRows.by(group_n, size * number)
        if not by_pair.most:
            return
        gradient_PTO = by_pair(call.gradient).unflatten(0, (size * number, -1))
        if part.weight_name in call.names:
            inputs_PTI = by_pair(call.inputs).unflatten(0, (size * number, -1))
            left, right = (inputs_PTI, gradient_PTO) if part.is_transposed else (gradient_PTO, inputs_PTI)
            values = (left.transpose(1, 2) @ right).reshape(size, *shape)
            yield DenseBlock(call.names[part.weight_name], shape, values)
        if part.bias_name in call.names:
            yield from call.dense(part.bias_name, gradient_PTO.sum(1))


def experts_in_steps(module: nn.Module) -> bool:
    """Whether `forward_of_experts` computes what this module does."""
    forward = type(module).forward
    return (
        "forward" not in vars(module)
        and getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"
        and not getattr(module, "_is_expert_parallel", False)
        and all(hasattr(module, name) for name in ("config", "has_gate", "has_bias", "is_transposed"))
        and getattr(module.config, "_experts_implementation", None) in _KNOWN
        and all(part.parameter_names for part in expert_projections(module))
    )


def expert_projections(module: Any) -> tuple[ExpertProjection, ExpertProjection]:
    """(into the experts, out of them)."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return ExpertProjection(module, first), ExpertProjection(module, "down_proj")


def forward_of_experts(module: nn.Module, parts: tuple[ExpertProjection, ...]) -> Callable[..., Tensor]:
    """A forward for this module that calls `parts` as modules."""
    return partial(_forward, module, parts)


def _forward(
    module: Any,
    parts: tuple[ExpertProjection, ...],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """As transformers' own, see `transformers.integrations.moe`: tokens [S, D], experts and weights [S, k] -> [S, D]."""
    into, out_of = parts
    uses = top_k_index.shape[-1]
    expert_n = top_k_index.reshape(-1)
    inner = into(hidden_states.repeat_interleave(uses, 0), expert_n)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = out_of(inner, expert_n)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = outer * top_k_weights.reshape(-1, 1)
    return weighted.unflatten(0, (-1, uses)).sum(1).to(hidden_states.dtype)
