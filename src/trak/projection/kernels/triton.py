"""A product with random signs or normal numbers that are drawn in registers and never stored, for CUDA.

Every program owns a tile of the output [BLOCK_B, BLOCK_K] and one range of blocks of 128 rows. For each block a
thread makes one Philox call for a column (signs: four words are its 128 rows; normals: 32 calls of four numbers),
and 32 rows at a time go to tensor cores as the right-hand side of `tl.dot`. Counters are those of `signs` and
`normals`, so that the matrix is the CPU's: signs exactly, normal numbers up to the last bit of float32.

Precision. Sums are in float32. Signs are exact in every dtype. Float16 and bfloat16 gradients are multiplied as
they are. Float32 gradients are cut into three bfloat16 terms of eight bits, x = x1 + x2 + x3 exactly (for |x| >
1e-33), and multiplied three times: no bit of x is lost, and TF32, which would keep 11 bits (a relative error of up
to 2^-11 in each term of the sum), is never used alone. Normal numbers are multiplied as "tf32x3": both sides split,
a relative error of about 2^-21 in each term. On AMD: in plain float32.

Determinism. The rows are cut into ranges by their number and K alone. Each range is summed in order by one program and
stored apart, and a second pass adds the ranges in a fixed order. No atomics: the bits are the same from run to run,
and for any number of multiprocessors.

Roofline, from the data sheet of an H100 SXM (990 Tflop/s dense bfloat16, 3.35 TB/s, about 14·10^12 32-bit integer
operations per second in 132 × 64 lanes), per row and column of the matrix; nothing here was timed:

    memory      4·B / K bytes of float32 gradients (the matrix costs nothing): 0.02 ps at B = 64, K = 4096.
    L2          4·B / BLOCK_K bytes: programs of one batch each read x from it. At B = 64 these are 2 bytes, or 5 TB/s if
                nothing else took longer than the products below. The data sheet gives no figure for it.
    Philox      10 rounds of two wide products, two three-way exclusive ors and two key additions, about 60
                operations for 128 signs: 0.5 each. Unpacking (shift, and, select, convert): 3. Together 0.25 ps.
                For normal numbers 15 operations and a quarter of two logarithms, roots, sines and cosines in
                float64, some 75 double operations: 3 to 5 ps.
    products    2·B flop for each of three terms: 0.39 ps at B = 64 (0.13 ps for half-precision gradients).
    compiled    all instructions of the loop, at four a cycle: 0.34 ps at B = 64 (0.25 ps for half-precision gradients,
                0.43 ps at 128). What is not Philox and unpacking is addresses, masks, terms of x and shared memory.

By what is compiled, tensor cores are the bottleneck for float32 gradients from B = 64 on, if L2 keeps up; for fewer
examples, and in half precision, it is the issue of instructions. Memory never is. A program generates signs for at most 64
examples (128 in half precision on Hopper): larger batches pay for them again. `Gaussian` is bound by float64 arithmetic for any batch up to 500.

Compiled, not run. `benchmarks/triton_ahead.py` compiles what `add_by_triton` launches for compute capabilities 8.0, 8.9 and 9.0,
without a GPU, and `benchmarks/results/triton-ahead.json` has its counts. No register is spilled. From 64 examples on,
Hopper multiplies signs by wgmma; all else is mma. A multiprocessor holds 1 to 4 programs at a time. No GPU has run any of it.

Legend: B examples, n rows, K columns, S ranges of blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trak.projection.kernels.entries import Entries
from trak.projection.philox import Key

PROGRAMS = 256
"""Ranges of blocks times tiles of 128 columns, at most: about what 132 multiprocessors hold two of. Partial sums then take 128 KiB an example."""

MIN_BLOCKS = 16
"""Fewest blocks of 128 rows in a range, where there is more than one."""


def add_by_triton(
    target_BK: Tensor,
    values_Bn: Tensor,
    *,
    skip: int,
    entries: Entries,
    key: Key,
    blocks_c: Tensor,
    scale: float,
) -> None:
    """Add to the target: target += scale · values @ matrix[skip : skip + n].

    Args:
        target_BK: float32 [B, K], any strides.
        values_Bn: float32, bfloat16 or float16 [B, n], any strides; sums are in float32 for all.
        skip: the row of the blocks, side by side, that the first of the n rows is.
        entries: signs or normal numbers.
        key: of the parameter.
        blocks_c: int64 [c], indices of blocks of 128 rows.
        scale: a factor.
    """
    batch_size, count = values_Bn.shape
    columns, blocks = target_BK.shape[1], blocks_c.numel()
    if not (batch_size and count):
        return
    per_split = _range_blocks(blocks, columns)
    splits = triton.cdiv(blocks, per_split)
    partial_SBK = torch.empty(splits, batch_size, columns, dtype=torch.float32, device=values_Bn.device)
    tile = _tile(batch_size, entries, values_Bn.dtype, hopper=_is_hopper(values_Bn.device))
    block_b, block_k, warps, stages = tile
    grid = (triton.cdiv(columns, block_k), triton.cdiv(batch_size, block_b), splits)
    _product[grid](
        values_Bn,
        blocks_c,
        partial_SBK,
        batch_size,
        count,
        columns,
        blocks,
        skip,
        *values_Bn.stride(),
        _signed(key[0] | key[1] << 32),
        per_split,
        NORMAL=entries is Entries.NORMALS,
        SPLIT=values_Bn.dtype == torch.float32,
        TERM=_term_dtype(values_Bn.dtype),
        PRECISION="ieee" if torch.version.hip else "tf32x3",
        BLOCK_B=block_b,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
        # Triton's default is about to change, and it warns if none is named. Nothing here depends on it.
        enable_fp_fusion=True,
    )
    target_BK.add_(partial_SBK.sum(0), alpha=scale)


def _range_blocks(blocks: int, columns: int) -> int:
    """Blocks of one range: by the shape of the matrix alone, so that neither the batch nor the device changes the order of sums."""
    ranges = max(1, PROGRAMS // triton.cdiv(columns, 128))
    return max(MIN_BLOCKS, triton.cdiv(blocks, ranges))


def _tile(
    batch_size: int, entries: Entries, dtype: torch.dtype, *, hopper: bool
) -> tuple[int, int, int, int]:
    """BLOCK_B, BLOCK_K, warps and stages of loads. No sum depends on them, only which program makes it.

    Chosen by the counts of `benchmarks/triton_ahead.py`: no registers spilled, few instructions, and no more than 64 KiB
    of shared memory except on Hopper, which has 227.
    """
    needed = max(16, triton.next_power_of_2(batch_size))
    if entries is Entries.NORMALS:
        return min(32, needed), 64, 8, 2
    exact = dtype == torch.float32
    if needed <= 32:
        # By the compiler's count, a third stage takes fewer registers than two.
        return needed, 128, 4, 3 if exact and needed == 32 else 2
    if hopper:
        # Four warps multiply 64 examples together. Of eight, the second four would repeat the work of the first.
        if exact or needed == 64:
            return 64, 128, 4, 3 if exact else 1
        return 128, 128, 8, 2
    if exact:
        return 64, 64, 4, 2
    return 64, 128 if needed == 64 else 256, 8, 2


def _is_hopper(device: torch.device) -> bool:
    """Whether groups of four warps multiply from shared memory: compute capability 9 alone."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _signed(word: int) -> int:
    """An unsigned 64-bit number as the signed one of the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _term_dtype(dtype: torch.dtype) -> tl.dtype:
    """What tensor cores multiply. Triton's interpreter has no products of bfloat16, and takes their values in float32."""
    if not isinstance(_product, triton.runtime.JITFunction):
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


@triton.jit(do_not_specialize=["seed", "skip", "count", "blocks", "per_split"])
def _product(  # type: ignore[no-untyped-def]
    x_ptr,
    blocks_ptr,
    partial_ptr,
    batch_size,
    count,
    columns,
    blocks,
    skip,
    stride_b,
    stride_n,
    seed,
    per_split,
    NORMAL: tl.constexpr,
    SPLIT: tl.constexpr,
    TERM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    example = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(2)
    x_ptrs = x_ptr + example.to(tl.int64)[:, None] * stride_b
    valid = example < batch_size
    acc = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    for index in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        block = tl.load(blocks_ptr + index)
        first = tl.full((), 128, tl.int64) * index - skip
        if NORMAL:
            r0, r1, r2, r3 = _normals(seed, block, column)
        else:
            r0, r1, r2, r3 = _signs(seed, block, column)
        acc = _multiply(acc, x_ptrs, valid, first, count, stride_n, r0, NORMAL, SPLIT, TERM, PRECISION)
        acc = _multiply(acc, x_ptrs, valid, first + 32, count, stride_n, r1, NORMAL, SPLIT, TERM, PRECISION)
        acc = _multiply(acc, x_ptrs, valid, first + 64, count, stride_n, r2, NORMAL, SPLIT, TERM, PRECISION)
        acc = _multiply(acc, x_ptrs, valid, first + 96, count, stride_n, r3, NORMAL, SPLIT, TERM, PRECISION)
    # Offsets in 64 bits: S·B·K may exceed 2^31.
    row = split.to(tl.int64) * batch_size + example
    out_ptrs = partial_ptr + row[:, None] * columns + column[None, :]
    tl.store(out_ptrs, acc, mask=valid[:, None] & (column < columns)[None, :])


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    acc,
    x_ptrs,
    valid,
    first,
    count,
    stride_n,
    entries,
    NORMAL: tl.constexpr,
    SPLIT: tl.constexpr,
    TERM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum acc + x[:, first : first + 32] @ entries [32, BLOCK_K], zeros outside of [0, count)."""
    row = first + tl.arange(0, 32)
    inside = valid[:, None] & ((row >= 0) & (row < count))[None, :]
    x = tl.load(x_ptrs + row[None, :] * stride_n, mask=inside, other=0.0)
    if NORMAL:
        acc = tl.dot(x.to(tl.float32), entries, acc, input_precision=PRECISION)
    elif SPLIT:
        signs = entries.to(TERM)
        high = _truncate(x)
        middle = _truncate(x - high)
        acc = tl.dot(high.to(tl.bfloat16).to(TERM), signs, acc)
        acc = tl.dot(middle.to(tl.bfloat16).to(TERM), signs, acc)
        acc = tl.dot((x - high - middle).to(tl.bfloat16).to(TERM), signs, acc)
    else:
        acc = tl.dot(x.to(TERM), entries.to(TERM), acc)
    return acc


@triton.jit
def _truncate(x):  # type: ignore[no-untyped-def]
    """The float32 number whose last 16 bits are zeros: exact in bfloat16, and no larger than x."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _words(seed, block, column, lane):  # type: ignore[no-untyped-def]
    """Philox words of counters (block, column, lane), for column and lane of one shape."""
    zero = tl.zeros_like(column)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(seed, zero.to(tl.uint32) + low, zero.to(tl.uint32) + high, column, lane)


@triton.jit
def _signs(seed, block, column):  # type: ignore[no-untyped-def]
    """±1 as four tiles [32, BLOCK_K]: rows 32·w to 32·w + 31 of the block are the bits of word w."""
    w0, w1, w2, w3 = _words(seed, block, column, tl.zeros_like(column))
    return _unpack(w0), _unpack(w1), _unpack(w2), _unpack(w3)


@triton.jit
def _unpack(word):  # type: ignore[no-untyped-def]
    bits = word[None, :] >> tl.arange(0, 32).to(tl.uint32)[:, None]
    return tl.where((bits & 1) != 0, 1.0, -1.0)


@triton.jit
def _normals(seed, block, column):  # type: ignore[no-untyped-def]
    """Normal numbers as four tiles [32, BLOCK_K]: row 32·w + lane of the block is number w of the lane's call."""
    lane = tl.arange(0, 32)[:, None] + tl.zeros_like(column)[None, :]
    w0, w1, w2, w3 = _words(seed, block, tl.zeros_like(lane) + column[None, :], lane)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _box_muller(w0, w1):  # type: ignore[no-untyped-def]
    """In float64, rounded at the end: float32 has no relative precision near u = 1 and where the cosine is 0."""
    # `full` keeps all bits of the constant, which a literal would round to float32.
    step = tl.full((1, 1), 2 * 3.141592653589793 / 4294967296.0, tl.float64)
    unit = tl.full((1, 1), 1 / 4294967296.0, tl.float64)
    radius = tl.sqrt(-2.0 * tl.log((w0.to(tl.float64) + 0.5) * unit))
    angle = (w1.to(tl.float64) + 0.5) * step
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)
