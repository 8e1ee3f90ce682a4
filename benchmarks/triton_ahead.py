"""What the compiler makes of the Triton kernel, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/triton_ahead.py [--capabilities 8.0,8.9,9.0] [--kinds signs-float32,...] [--batches 16,32,64,128]
                                      [--rows 65536] [--skip 0] [--out benchmarks/results/triton-ahead.json]

Every case is compiled as `add_by_triton` would launch it: the call is made with tensors on a CPU, its arguments are
caught in front of the launch, and Triton specialises and compiles them for the capability. Triton ships ptxas and
cuobjdump, whose counts these are.

Nothing is run and nothing is timed. `least` is a static estimate for an H100 SXM, from its data sheet and the
instructions of one turn of the loop: below it no run can fall, and how far above it a run would be is not known. It
takes every multiprocessor to be busy, no instruction to wait and tensor cores to work beside all else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from records import RESULTS, write_record

import trak
from trak.projection.kernels.entries import NORMALS, SIGNS

KINDS = {
    "signs-float32": (SIGNS, torch.float32),
    "signs-bfloat16": (SIGNS, torch.bfloat16),
    "signs-float16": (SIGNS, torch.float16),
    "normals-float32": (NORMALS, torch.float32),
}
COLUMNS = 4096
ROWS_A_TURN = 128

# What one multiprocessor has, by compute capability: shared memory, warps and programs (NVIDIA's programming guide).
LIMITS = {"8.0": (164 << 10, 64, 32), "8.9": (100 << 10, 48, 24), "9.0": (228 << 10, 64, 32)}
REGISTERS = 65536
RESERVED = 1 << 10  # bytes of shared memory that the system takes for each program

# An H100 SXM: 132 · 4096 · 1.83e9 are the data sheet's 989 Tflop/s of dense bfloat16 products.
MULTIPROCESSORS, CLOCK, FLOP_A_CYCLE, ISSUED_A_CYCLE = 132, 1.83e9, 4096, 4

# The first class whose expression the name of an instruction begins with.
CLASSES = {
    "tensor": r"HGMMA|HMMA|UTC\w*MMA",
    "shared": r"LDS|STS|LDSM|STSM",
    "global": r"LDG|STG|LDC|ULDC|DEPBAR",
    "local": r"LDL|STL",
    "float64": r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU|I2F\.|F2F\.|F2I",
    "float32": r"F(ADD|MUL|FMA|SEL|SETP|2FP|MNMX|CHK)|HADD|HFMA|HMUL|PACK",
    "control": r"BAR|BRA|BRX|BSSY|BSYNC|BREAK|WARP|NOP|EXIT|YIELD|FENCE|MEMBAR|ERRBAR|SYNCS|CALL|RET|CCTL|VOTE",
    "integer": r"",
}


def launch(batch_size, entries, dtype, options, *, hopper):
    """(positional, named) arguments with which `add_by_triton` would launch its kernel."""
    from trak.projection.kernels import triton as kernels

    caught, is_hopper = [], kernels._is_hopper
    kernels._is_hopper = lambda device: hopper
    kernels._product.run = lambda *args, grid, warmup, **named: caught.append((args, named))
    try:
        kernels.add_by_triton(
            torch.zeros(batch_size, COLUMNS),
            torch.zeros(batch_size, options.rows, dtype=dtype),
            skip=options.skip,
            entries=entries,
            key=(0xDEADBEEF, 0xFEEDFACE),
            blocks_c=torch.arange(-(-options.rows // ROWS_A_TURN)),
            scale=1.0,
        )
    finally:
        kernels._is_hopper = is_hopper
        del kernels._product.run
    return caught[0]


def compile_ahead(args, named, capability):
    """(Triton's compiled kernel, its arguments' types, what ptxas said): the steps of Triton's own launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from trak.projection.kernels.triton import _product

    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(_product.signature, _product.params, backend)(
        *args, **named
    )
    chosen, signature, constants, hints = _product._pack_args(backend, named, bound, specialization, None)
    said = io.StringIO()
    # A cache of its own, so that ptxas runs and its words are there to read.
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = folder, True
        with contextlib.redirect_stdout(said):
            source = ASTSource(_product, signature, constants, hints)
            kernel = triton.compile(source, target=target, options=chosen.__dict__)
    return kernel, signature, said.getvalue()


def instructions(cubin):
    """(address, name, operands) of every instruction."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", listing)
    return [(int(address, 16), name, operands) for address, name, operands in lines]


def turn_of_the_loop(code):
    """Names of the instructions in the longest loop with products in it.

    For signs it has no branches, so that all of them are issued in every turn. For normals it has rare ones (sines of
    large angles), which are counted like the others.
    """
    turns = []
    for end, name, operands in code:
        start = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if start and int(start[1], 16) < end:
            inside = [n for address, n, _ in code if int(start[1], 16) <= address <= end]
            if any(re.match(CLASSES["tensor"], n) for n in inside):
                turns.append(inside)
    return max(turns, key=len)


def products(names, warps):
    """Floating-point operations of tensor cores in one program, repetitions of the same product included."""
    total = 0
    for name in names:
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            total += 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4
        elif shape := re.match(r"HMMA\.16(8)(16|8|4)\.", name):
            total += 2 * 16 * int(shape[1]) * int(shape[2]) * warps
    return total


def resident(capability, registers, shared, warps):
    """Programs that one multiprocessor holds at a time."""
    memory, most_warps, most_programs = LIMITS[capability]
    of_a_program = -(-registers // 8) * 8 * 32 * warps  # registers are given out eight at a time
    return min(REGISTERS // of_a_program, memory // (shared + RESERVED), most_warps // warps, most_programs)


def least(turn, warps, flop, block_b, block_k, batch_size):
    """Static lower bounds for an H100, in picoseconds for each row and column of the matrix and the whole batch."""
    cycles = {"issue": len(turn) * warps / ISSUED_A_CYCLE, "tensor": flop / FLOP_A_CYCLE}
    programs = -(-batch_size // block_b)
    scale = 1e12 * programs / (ROWS_A_TURN * block_k * MULTIPROCESSORS * CLOCK)
    return {name: round(value * scale, 3) for name, value in cycles.items()}


def examine(capability, kind, batch_size, options):
    """The counts of one case."""
    entries, dtype = KINDS[kind]
    args, named = launch(batch_size, entries, dtype, options, hopper=capability == "9.0")
    kernel, signature, said = compile_ahead(args, named, capability)
    code = instructions(kernel.asm["cubin"])
    turn, warps = turn_of_the_loop(code), named["num_warps"]
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    block_b, block_k = named["BLOCK_B"], named["BLOCK_K"]
    terms = 3 if named["SPLIT"] else 1
    flop = products(turn, warps)
    case = {
        "tile": [block_b, block_k],
        "warps": warps,
        "stages": named["num_stages"],
        "registers": registers,
        "spill_stores": int(spilled[1]),
        "spill_loads": int(spilled[2]),
        "shared": kernel.metadata.shared,
        "resident": resident(capability, registers, kernel.metadata.shared, warps),
        "wgmma": len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"])),
        "mma": len(re.findall(r"\bmma\.sync", kernel.asm["ptx"])),
        "turn": dict(sorted(Counter(_class(name) for name in turn).items())),
        "products_done_over_needed": round(flop / (2 * terms * ROWS_A_TURN * block_b * block_k), 2),
        "arguments": {name: kind for name, kind in signature.items() if kind != "constexpr"},
    }
    if capability == "9.0" and entries is SIGNS:
        case["least_ps"] = least(turn, warps, flop, block_b, block_k, batch_size)
    return case


def _class(name):
    return next(kind for kind, start in CLASSES.items() if re.match(start, name))


def _line(capability, kind, batch_size, case):
    tile = "×".join(map(str, case["tile"]))
    spills = case["spill_stores"] + case["spill_loads"]
    bounds = case.get("least_ps", {})
    return (
        f"{capability:4s} {kind:16s} {batch_size:5d} {tile:>8s} {case['warps']:5d} {case['stages']:6d} "
        f"{case['registers']:9d} {spills:7d} {case['shared']:7d} {case['resident']:8d} {case['wgmma']:5d} "
        f"{case['mma']:4d} {sum(case['turn'].values()):5d} {bounds.get('issue', ''):>6} {bounds.get('tensor', ''):>6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capabilities", default=",".join(LIMITS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--batches", default="16,32,64,128")
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "triton-ahead.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton interprets and does not compile with TRITON_INTERPRET=1: unset it")
    import triton

    print(
        "     kind             batch     tile warps stages registers spilled  shared resident wgmma  mma  "
        "turn  least: issue, tensor (ps, static)"
    )
    cases = {}
    for capability in options.capabilities.split(","):
        for kind in options.kinds.split(","):
            for batch_size in map(int, options.batches.split(",")):
                case = examine(capability, kind, batch_size, options)
                cases[f"{capability} {kind} {batch_size}"] = case
                print(_line(capability, kind, batch_size, case), flush=True)
    record = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": {name: _ptxas(name) for name in options.capabilities.split(",")},
        "trak": trak.__version__,
        "rows": options.rows,
        "skip": options.skip,
        "columns": COLUMNS,
        "cases": cases,
    }
    write_record(options.out, record)
    print(f"\nwritten to {options.out}")


def _ptxas(capability):
    """The release of the ptxas that Triton takes for a capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(int(capability.replace(".", ""))).version


if __name__ == "__main__":
    main()
