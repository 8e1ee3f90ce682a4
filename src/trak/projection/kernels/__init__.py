"""Products with matrices that are drawn, not stored.

reference   what every other file computes, by the plainest way
matmul      tiles unpacked and multiplied: any device, any dtype
cpu         float32 with random signs on a CPU: sums looked up, no multiplications
triton      float32 on CUDA: drawn in registers, multiplied on tensor cores, never in memory
dispatch    which of them runs
"""
