"""Per-example gradients of one parameter, dense or as the factors of an outer product.

Shape legend: B examples, G groups, T positions (time, pixels), R rows and C columns of the parameter seen as
a matrix: R = shape[0], C = the product of the rest (1 for a vector).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


@dataclass(frozen=True, eq=False)
class Block(ABC):
    """Gradients of one parameter for B examples.

    Attributes:
        name: the parameter's canonical name (the first under which `named_parameters` gives it).
        shape: the parameter's shape.

    One parameter may come in several blocks of the same name (a module used twice, tied weights): its
    gradient is their sum.
    """

    name: str
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of examples B."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients multiplied out, [B, *shape]."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(R, C): the parameter seen as a matrix."""
        return (self.shape[0], prod(self.shape[1:])) if self.shape else (1, 1)

    def contract(self, rows_RA: Tensor, columns_CD: Tensor) -> Tensor:
        """rowsᵀ G columns for each example's gradient matrix G [R, C]: [B, A, D]."""
        gradients_BRC = self.dense().reshape(self.batch_size, *self.matrix_shape)
        return rows_RA.T @ (gradients_BRC @ columns_CD)


@dataclass(frozen=True, eq=False)
class DenseBlock(Block):
    """Gradients as they are: `values` [B, *shape]."""

    values: Tensor

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return self.values.shape[0]

    def dense(self) -> Tensor:
        """`values`, as it is."""
        return self.values


@dataclass(frozen=True, eq=False)
class OuterBlock(Block):
    """A sum over positions of outer products: G_b[g] = Σ_t left[b, g, t] ⊗ right[b, g, t].

    left: [B, G, T, R / G], right: [B, G, T, C]. Group g owns rows g·R/G to (g+1)·R/G. For a Linear (G = 1)
    left is the gradient of the layer's outputs and right its inputs. Under autocast one of the two may be in half precision: see `upcast`.
    """

    left: Tensor
    right: Tensor

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return self.left.shape[0]

    def dense(self) -> Tensor:
        """Σ_t left ⊗ right, [B, *shape]."""
        alike = upcast(self, torch.promote_types(self.left.dtype, self.right.dtype))
        return (alike.left.transpose(-1, -2) @ alike.right).reshape(self.batch_size, *self.shape)

    def contract(self, rows_RA: Tensor, columns_CD: Tensor) -> Tensor:
        """Σ_t (rowsᵀ left_t) ⊗ (columnsᵀ right_t): the weight gradient is never formed. [B, A, D]."""
        groups = self.left.shape[1]
        rows_GrA = rows_RA.reshape(groups, -1, rows_RA.shape[1])
        left_BGTA = self.left @ rows_GrA
        right_BGTD = self.right @ columns_CD
        return torch.einsum("bgta,bgtd->bad", left_BGTA, right_BGTD)


@dataclass(frozen=True, eq=False)
class IndexBlock(Block):
    """An embedding's gradient: row indices[b, t] receives values[b, t].

    indices: [B, T] int64 in [0, R), values: [B, T, C].
    """

    indices: Tensor
    values: Tensor

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return self.values.shape[0]

    def dense(self) -> Tensor:
        """Scattered into [B, R, C]."""
        rows, columns = self.matrix_shape
        out_BRC = self.values.new_zeros(self.batch_size, rows, columns)
        if self.values.device.type == "cpu":
            index = self.indices.unsqueeze(-1).expand_as(self.values)
            out_BRC.scatter_add_(1, index, self.values)
        else:
            # Sorts, where scatter_add_ adds atomically in any order.
            example_B1 = torch.arange(self.batch_size, device=self.indices.device)[:, None]
            out_BRC.index_put_((example_B1, self.indices), self.values, accumulate=True)
        return out_BRC.reshape(self.batch_size, *self.shape)

    def contract(self, rows_RA: Tensor, columns_CD: Tensor) -> Tensor:
        """Σ_t rows[indices_t] ⊗ (columnsᵀ values_t), [B, A, D]."""
        return rows_RA[self.indices].transpose(-1, -2) @ (self.values @ columns_CD)


@dataclass(frozen=True, eq=False)
class ConvBlock(Block):
    """A convolution's weight gradient, kept as the layer's inputs and the gradient of its outputs.

    N = B·S images: S consecutive ones belong to one example (S = 1 nearly always), and their gradients are
    summed. Under autocast inputs and gradients may be of two dtypes: see `upcast`.

    Attributes:
        inputs: [N, C_in, *spatial], with any padding that is not zeros already applied.
        gradients: gradient of the layer's outputs, [N, C_out, *out].
        stride, padding, dilation: one integer per spatial dimension.
        groups: of the convolution; group g maps its own C_in / groups channels to its own C_out / groups.
        examples: B.
    """

    inputs: Tensor
    gradients: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    examples: int

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return self.examples

    def dense(self) -> Tensor:
        """The weight gradients, [B, *shape].

        On a CPU with many output positions as one convolution whose groups are the images (about the price of the
        batch's weight gradient); with few positions and many channels, where that is two or three times as
        dear, and elsewhere, by patches and a batched matrix product.
        """
        alike = upcast(self, torch.promote_types(self.inputs.dtype, self.gradients.dtype))
        by_image = alike.by_patches() if self.prefers_patches else alike._by_grouped_convolution()
        if len(by_image) == self.examples:
            return by_image  # A sum over one image each would write all of it once more.
        return by_image.reshape(self.examples, -1, *self.shape).sum(1)

    @property
    def prefers_patches(self) -> bool:
        """Whether patches are the cheaper way: everywhere but on a CPU with many output positions."""
        return (
            self.inputs.device.type != "cpu"
            or prod(self.gradients.shape[2:]) <= 2 * self.shape[0] // self.groups
        )

    def by_positions(self) -> OuterBlock:
        """The same gradients as sums of outer products, over output positions of an example's images: [B, groups, S·L, ·]."""
        patches_NGLC = self.patches()
        images, groups, positions, _ = patches_NGLC.shape
        left_NGLO = self.gradients.reshape(images, groups, -1, positions).transpose(-1, -2)
        both = [left_NGLO, patches_NGLC]
        if images != self.examples:
            both = [factor.unflatten(0, (self.examples, -1)).transpose(1, 2).flatten(2, 3) for factor in both]
        return OuterBlock(self.name, self.shape, *both)

    def by_patches(self) -> Tensor:
        """Gradients per image, [N, *shape], the readable way: Σ_l gradient_l ⊗ patch_l, group by group."""
        patches_NGLC = self.patches()
        images, groups, positions, _ = patches_NGLC.shape
        left_NGOL = self.gradients.reshape(images, groups, -1, positions)
        return (left_NGOL @ patches_NGLC).reshape(images, *self.shape)

    def patches(self) -> Tensor:
        """What each output position sees: [N, groups, positions, C], with C = C_in / groups · kernel size."""
        kernel = self.shape[2:]
        patches = F.pad(self.inputs, [extent for pad in reversed(self.padding) for extent in (pad, pad)])
        for axis, (size, step, spread) in enumerate(zip(kernel, self.stride, self.dilation), start=2):
            patches = patches.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
        images, channels = self.inputs.shape[:2]
        patches = patches.unflatten(1, (self.groups, channels // self.groups))
        spatial = len(kernel)
        order = (0, 1, 2, *range(3 + spatial, 3 + 2 * spatial), *range(3, 3 + spatial))
        return patches.permute(order).reshape(images, self.groups, prod(self.shape[1:]), -1).transpose(-1, -2)

    def contract(self, rows_RA: Tensor, columns_CD: Tensor) -> Tensor:
        """Σ_l (rowsᵀ gradient_l) ⊗ (columnsᵀ patch_l), [B, A, D]."""
        right_NGDL = self.filtered(columns_CD)
        groups, positions = self.groups, right_NGDL.shape[-1]
        left_NGrL = self.gradients.reshape(len(self.gradients), groups, -1, positions)
        rows_GAr = rows_RA.reshape(groups, -1, rows_RA.shape[1]).transpose(-1, -2)
        by_group = (rows_GAr @ left_NGrL) @ right_NGDL.transpose(-1, -2)
        return by_group.reshape(self.examples, -1, *by_group.shape[-2:]).sum(1)

    def filtered(self, columns_CD: Tensor) -> Tensor:
        """columnsᵀ patch_l, [N, G, D, L]: the columns are filters, so that patches are never formed."""
        images, groups = self.inputs.shape[0], self.groups
        filters = columns_CD.T.reshape(-1, *self.shape[1:])
        inputs = self.inputs.reshape(images * groups, -1, *self.inputs.shape[2:])
        convolution = _CONVOLUTIONS[len(self.stride)]
        right_NDL = convolution(inputs, filters, None, self.stride, self.padding, self.dilation)
        return right_NDL.reshape(images, groups, filters.shape[0], -1)

    def _by_grouped_convolution(self) -> Tensor:
        """Gradients per image, [N, *shape].

        The images become groups of one convolution over a batch of one.
        """
        images = self.inputs.shape[0]
        weight_gradient = _WEIGHT_GRADIENTS[len(self.stride)]
        flat = weight_gradient(
            self.inputs.reshape(1, -1, *self.inputs.shape[2:]),
            (images * self.shape[0], *self.shape[1:]),
            self.gradients.reshape(1, -1, *self.gradients.shape[2:]),
            self.stride,
            self.padding,
            self.dilation,
            images * self.groups,
        )
        return flat.reshape(images, *self.shape)


Kind = TypeVar("Kind", bound=Block)


@cache
def field_names(kind: type[Block]) -> tuple[str, ...]:
    """What blocks of one kind consist of: asking a dataclass takes as long as projecting a short vector."""
    return tuple(field.name for field in fields(kind))


def upcast(block: Kind, dtype: torch.dtype) -> Kind:
    """The block with all of its floating-point tensors in `dtype`."""
    changed: dict[str, Any] = {
        name: tensor.to(dtype)
        for name in field_names(type(block))
        if isinstance(tensor := getattr(block, name), Tensor)
        and tensor.dtype != dtype
        and tensor.is_floating_point()
    }
    return replace(block, **changed) if changed else block


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}
