"""A product with random signs in whole numbers, on a CPU that multiplies bytes faster than floats.

The gradients of an example are rounded to multiples of one unit, and each multiple is cut into three digits of eight bits:

    g_i ≈ unit · (65536 d2_i + 256 d1_i + d0_i),    −128 ≤ d ≤ 127,    unit = max_i |g_i| / (127 · 65536 + ...)

Digits and signs are bytes, and products of bytes are summed in 32 bits without rounding. With AMX a
processor multiplies so many more bytes than floats that three products of bytes take less than half the time of one of floats.

Error: up to half a unit in every gradient, 2^-24 of the largest of the `GROUP_ROWS` gradients that share it, which is about what
sums in float32 have. Neither the batch nor the number of threads changes any of it. Where the largest is below
1e-31, bits are lost; an example with an infinite or undefined gradient gets no finite feature. Gradients in bfloat16, which were rounded
to 2^-8 of themselves, have two digits: 2^-16 of the largest.

Signs are kept as bits b and unpacked to zeros and ones: Σ ±d = 2 (Σ d·b − Σ d / 2), exact in float32 since sums stay
below 2^23.

Milliseconds for 32,768 rows, K = 2048 and 16, 64 and 256 examples, one core with AMX (benchmarks/projection.py): 23, 40 and 123;
`tables` 24, 66 and 250, the bare product of float32 54, 104 and 231. By AVX-512 VNNI alone (`ONEDNN_MAX_CPU_ISA`) digits took no
less than tables, and are not used.

Legend: B examples, D digits, n rows, K columns (k of one slice), W bytes (eight rows each) of the rows of one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trak.projection.kernels.entries import Part

GROUP_ROWS = 4096
"""Rows with one unit and one product; sums of so many bytes stay below 2^23."""

SLICE_EXAMPLES = 64
"""Examples cut into digits together (1 MiB of a group of rows: in cache)."""

SLICE_COLUMNS = 1024
"""Columns whose signs are unpacked together (4 MiB for a group of rows)."""

MIN_COLUMNS = 512
"""With fewer columns cutting gradients into digits costs more than it saves."""

LIMITS = {2: 32_600, 3: 8_355_000}
"""Units in the largest gradient, by the number of digits: just below 127 · 65536 + 127 · 256 + 127, whatever the rounding of the quotient."""

SMALLEST = 1e-31
"""Smaller largest gradients count as this one: their quotient is still a float32 number."""


def add_by_digits(target_BK: Tensor, parts: Iterable[Part], scale: float) -> None:
    """Add to the target: target += scale · Σ values @ signs, the target of float32 (values of bfloat16, too), signs packed as in
    `signs.draw_packed_signs`.
    """
    batch_size, columns = target_BK.shape
    sums_KB = target_BK.new_zeros(columns, batch_size)
    width = min(columns, SLICE_COLUMNS)
    # Results of megabytes that live for a millisecond: in the same place each time, since fresh pages would cost as much as the sums.
    product = torch.empty(width * 3 * batch_size, dtype=torch.int32)
    centred = target_BK.new_empty(width * 3 * batch_size)
    for group in _groups(parts):
        digits_DBn, unit_B = _cut(group)
        right_nC = digits_DBn.flatten(0, 1).T
        ones_1n = torch.ones(1, right_nC.shape[0], dtype=torch.int8)
        half_C = torch._int_mm(ones_1n, right_nC)[0].to(centred.dtype).div_(2)
        packed_KW = torch.cat([span.packed_KW for span in group], dim=1)
        for first in range(0, columns, SLICE_COLUMNS):
            bits_kn = _unpack_bits(packed_KW[first : first + SLICE_COLUMNS])
            product_kC = product[: bits_kn.shape[0] * right_nC.shape[1]].view(-1, right_nC.shape[1])
            torch._int_mm(bits_kn, right_nC, out=product_kC)
            centred_kC = centred[: product_kC.numel()].view_as(product_kC).copy_(product_kC).sub_(half_C)
            sums_kB = sums_KB[first : first + SLICE_COLUMNS]
            for place, digit_kB in enumerate(centred_kC.split(batch_size, dim=1)):
                sums_kB.addcmul_(digit_kB, unit_B * (2 << 8 * place))
    target_BK.add_(sums_KB.T, alpha=scale)


class _Span(NamedTuple):
    """Consecutive rows of a product and their signs, from the byte of the first row to that of the last.

    Attributes:
        values_Bn: gradients.
        lead: rows of the first byte before the first of the n rows.
        packed_KW: signs.
    """

    values_Bn: Tensor
    lead: int
    packed_KW: Tensor


def _groups(parts: Iterable[Part]) -> Iterator[list[_Span]]:
    """Parts together, up to `GROUP_ROWS` rows of whole bytes."""
    group: list[_Span] = []
    rows = 0
    for values_Bn, skip, kept_KW in parts:
        first, lead = divmod(skip, 8)
        packed_KW = kept_KW[:, first : first + -(-(lead + values_Bn.shape[1]) // 8)]
        for start in range(0, packed_KW.shape[1], GROUP_ROWS // 8):
            span_KW = packed_KW[:, start : start + GROUP_ROWS // 8]
            low = max(0, 8 * start - lead)
            high = 8 * (start + span_KW.shape[1]) - lead
            if rows + 8 * span_KW.shape[1] > GROUP_ROWS:
                yield group
                group, rows = [], 0
            group.append(_Span(values_Bn[:, low:high], lead if start == 0 else 0, span_KW))
            rows += 8 * span_KW.shape[1]
    if group:
        yield group


def _cut(group: list[_Span]) -> tuple[Tensor, Tensor]:
    """(digits int8 [D, B, n], lowest first, unit float32 [B]) of a group: zeros for the rows of its bytes that have no gradients."""
    batch_size = group[0].values_Bn.shape[0]
    rows = 8 * sum(span.packed_KW.shape[1] for span in group)
    in_half = all(span.values_Bn.dtype == torch.bfloat16 for span in group)
    digits_DBn = torch.empty(2 if in_half else 3, batch_size, rows, dtype=torch.int8)
    unit_B = torch.empty(batch_size, dtype=torch.float32)
    gathered = unit_B.new_zeros(min(batch_size, SLICE_EXAMPLES), rows)
    whole = torch.empty(gathered.shape, dtype=torch.int32)
    for first in range(0, batch_size, SLICE_EXAMPLES):
        examples = slice(first, first + SLICE_EXAMPLES)
        gathered_bn = gathered[: batch_size - first]
        start = 0
        for values_Bn, lead, packed_KW in group:
            gathered_bn[:, start + lead : start + lead + values_Bn.shape[1]] = values_Bn[examples]
            start += 8 * packed_KW.shape[1]
        largest_b = torch.maximum(gathered_bn.amax(1), -gathered_bn.amin(1))
        unit_b = largest_b.clamp_(min=SMALLEST).div_(LIMITS[len(digits_DBn)])
        whole_bn = whole[: batch_size - first].copy_(gathered_bn.div_(unit_b[:, None]).round_())
        # Half of the base on top of every digit, and off again by flipping its highest bit: bytes are then the digits from -128 to 127.
        whole_bn.add_(0x808080).bitwise_xor_(0x808080)
        for digits_Bn in digits_DBn:
            digits_Bn[examples] = whole_bn
            whole_bn >>= 8
        unit_B[examples] = unit_b
    return digits_DBn, unit_B


def _unpack_bits(packed_kW: Tensor) -> Tensor:
    """Zeros and ones as int8 [k, 8·W]."""
    bits = np.unpackbits(packed_kW.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits).view(torch.int8)
