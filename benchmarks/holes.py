"""Memory of batches of changing sizes, with tensors of 32 MiB and more mapped by themselves, as glibc has it, or not.

    python benchmarks/holes.py            # both, each in a process of its own; seconds

400 batches of twenty tensors of 128 KiB to 64 MiB, their sizes drawn anew for each, some freed at once, while small ones that
outlive a batch lie between: what would leave holes in a heap. MiB above the start: the largest batch, what is held after
a batch at most, and the peak.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from pathlib import Path

import torch

from trak import allocator


def resident() -> int:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def run(mapped_blocks: int) -> None:
    allocator._set_thresholds(allocator.KEPT_BYTES, mapped_blocks=mapped_blocks)
    draw, start = random.Random(0), resident()
    outliving: list[torch.Tensor] = []
    largest = held = 0
    for step in range(400):
        length, live = draw.randint(16, 512), []
        for _ in range(20):
            live.append(torch.empty(length * draw.choice([2, 8, 32]) * 1024))
            live[-1][::1024] = 1  # a number on every page
            if draw.random() < 0.3:
                live.pop(draw.randrange(len(live)))
        largest = max(largest, sum(tensor.nbytes for tensor in live) // 2**20)
        if step % 10 == 0:
            outliving = [*outliving[-7:], torch.ones(2**18)]
        del live
        held = max(held, resident() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - start
    allocator.give_freed_memory_back()
    print(
        f"{'mapped' if mapped_blocks else 'kept':8s} largest batch {largest}, after a batch {held}, peak {peak}; given back: {resident() - start}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(int(sys.argv[1]))
    else:
        for blocks in (allocator.GLIBC_MAPPED_BLOCKS, 0):
            subprocess.run([sys.executable, __file__, str(blocks)], check=True)
