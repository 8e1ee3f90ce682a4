"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/triton_ahead.py [--capabilities 8.0,8.9,9.0] [--kinds signs-float32,...] [--batches 16,32,64,128]
                                      [--rows 65536] [--skip 0] [--out benchmarks/results/triton-ahead.json]

Every case is compiled as `add_by_triton` or, for the sparse kinds, `add_by_gathering` would launch it: the call is made with tensors
on a CPU, its arguments are caught in front of the launch, and Triton specialises and compiles them for the capability. Triton ships ptxas and
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
from trak.projection.shifts import Shifts

KINDS = {
    "signs-float32": (SIGNS, torch.float32),
    "signs-bfloat16": (SIGNS, torch.bfloat16),
    "signs-float16": (SIGNS, torch.float16),
    "normals-float32": (NORMALS, torch.float32),
    "sparse-float32": (None, torch.float32),
    "sparse-bfloat16": (None, torch.bfloat16),
}
COLUMNS = 4096
ROWS_A_TURN = 128

# What one multiprocessor has, by compute capability: shared memory, warps and programs (NVIDIA's programming guide).
LIMITS = {"8.0": (164 << 10, 64, 32), "8.9": (100 << 10, 48, 24), "9.0": (228 << 10, 64, 32)}
REGISTERS = 65536
RESERVED = 1 << 10  # bytes of shared memory that the system takes for each program

# An H100 SXM: 132 · 4096 · 1.83e9 are the data sheet's 989 Tflop/s of dense bfloat16 products.
MULTIPROCESSORS, CLOCK, FLOP_A_CYCLE, ISSUED_A_CYCLE = 132, 1.83e9, 4096, 4
MEMORY = 3.35e12  # bytes a second

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
    """(kernel, positional, named): how it would be launched."""
    gradients = torch.zeros(batch_size, options.rows, dtype=dtype)
    call = _sparse_call(gradients) if entries is None else _dense_call(gradients, entries, options.skip)
    from trak.projection.kernels import triton as dense
    from trak.projection.kernels import triton_slices as sparse

    kernel = sparse._gather if entries is None else dense._product
    caught, is_hopper = [], dense._is_hopper
    dense._is_hopper = lambda device: hopper
    kernel.run = lambda *args, grid, warmup, **named: caught.append((args, named))
    try:
        call()
    finally:
        dense._is_hopper = is_hopper
        del kernel.run
    return kernel, *caught[0]


def _dense_call(gradients, entries, skip):
    from trak.projection.kernels.triton import add_by_triton

    blocks_c = torch.arange(-(-gradients.shape[1] // ROWS_A_TURN))
    out = torch.zeros(len(gradients), COLUMNS)
    settings = {"skip": skip, "entries": entries, "blocks_c": blocks_c, "scale": 1.0}
    return lambda: add_by_triton(out, gradients, key=(0xDEADBEEF, 0xFEEDFACE), **settings)


def _sparse_call(gradients):
    from trak.projection.kernels.triton_slices import add_by_gathering

    shifts = Shifts((1, 2), (3, 4), gradients.shape[1], COLUMNS, 1)
    words = shifts.packed_signs(0, -(-shifts.size // ROWS_A_TURN), "cpu").view(torch.int32)
    out = torch.zeros(len(gradients), COLUMNS)
    return lambda: add_by_gathering(out, gradients, 0, shifts, words, shifts.moves_sn.int())


def compile_ahead(jitted, args, named, capability):
    """(Triton's compiled kernel, its arguments' types, what ptxas said): the steps of Triton's own launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(jitted.signature, jitted.params, backend)(
        *args, **named
    )
    chosen, signature, constants, hints = jitted._pack_args(backend, named, bound, specialization, None)
    said = io.StringIO()
    # A cache of its own, so that ptxas runs and its words are there to read.
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = folder, True
        with contextlib.redirect_stdout(said):
            source = ASTSource(jitted, signature, constants, hints)
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


def turn_of_the_loop(code, kind):
    """Names of the instructions in the longest loop with instructions of a kind in it.

    For signs it has no branches, so that all of them are issued in every turn. For normals it has rare ones (sines of
    large angles), which are counted like the others.
    """
    turns = []
    for end, name, operands in code:
        start = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if start and int(start[1], 16) < end:
            inside = [n for address, n, _ in code if int(start[1], 16) <= address <= end]
            if any(re.match(CLASSES[kind], n) for n in inside):
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


def least_of_a_sum(turn, warps, block_b, block_k, dtype):
    """Static lower bounds of the sparse kernel for an H100, in picoseconds for each gradient: its instructions, and reading it once."""
    issued = len(turn) * warps / ISSUED_A_CYCLE / (block_b * block_k * MULTIPROCESSORS * CLOCK)
    return {"issue": round(1e12 * issued, 3), "memory": round(1e12 * dtype.itemsize / MEMORY, 3)}


def least(turn, warps, flop, block_b, block_k, batch_size):
    """Static lower bounds for an H100, in picoseconds for each row and column of the matrix and the whole batch."""
    cycles = {"issue": len(turn) * warps / ISSUED_A_CYCLE, "tensor": flop / FLOP_A_CYCLE}
    programs = -(-batch_size // block_b)
    scale = 1e12 * programs / (ROWS_A_TURN * block_k * MULTIPROCESSORS * CLOCK)
    return {name: round(value * scale, 3) for name, value in cycles.items()}


def examine(capability, kind, batch_size, options):
    """The counts of one case."""
    entries, dtype = KINDS[kind]
    jitted, args, named = launch(batch_size, entries, dtype, options, hopper=capability == "9.0")
    kernel, signature, said = compile_ahead(jitted, args, named, capability)
    code = instructions(kernel.asm["cubin"])
    turn, warps = turn_of_the_loop(code, "global" if entries is None else "tensor"), named["num_warps"]
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    block_b, block_k = named["BLOCK_B"], named["BLOCK_K"]
    case = {
        "tile": [block_b, block_k],
        "warps": warps,
        "stages": named.get("num_stages", 0),
        "registers": registers,
        "spill_stores": int(spilled[1]),
        "spill_loads": int(spilled[2]),
        "shared": kernel.metadata.shared,
        "resident": resident(capability, registers, kernel.metadata.shared, warps),
        "wgmma": len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"])),
        "mma": len(re.findall(r"\bmma\.sync", kernel.asm["ptx"])),
        "turn": dict(sorted(Counter(_class(name) for name in turn).items())),
        "arguments": {name: kind for name, kind in signature.items() if kind != "constexpr"},
    }
    if entries is None:
        bounds = least_of_a_sum(turn, warps, block_b, block_k, dtype)
    else:
        flop, terms = products(turn, warps), 3 if named["SPLIT"] else 1
        case["products_done_over_needed"] = round(flop / (2 * terms * ROWS_A_TURN * block_b * block_k), 2)
        bounds = least(turn, warps, flop, block_b, block_k, batch_size)
    if capability == "9.0" and entries is not NORMALS:
        case["least_ps"] = bounds
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
        f"{case['mma']:4d} {sum(case['turn'].values()):5d} {bounds.get('issue', ''):>6} {bounds.get('tensor', bounds.get('memory', '')):>6}"
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
        "turn  least: issue, tensor or memory (ps, static)"
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
