"""Numba's CUDA kernels, on memory of its own allocator."""
import numpy as np

# NumPy 2.5 has dropped a name that numba-cuda still looks for when it is loaded.
if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack

from numba import cuda  # noqa: E402

import steps  # noqa: E402

args = steps.options()
BLOCKS = THREADS = 256
CARRY = 1024


@cuda.jit
def fill(slab, factor):
    for at in range(cuda.grid(1), slab.size, cuda.gridsize(1)):
        slab[at] = at * factor


@cuda.jit
def generator(slab, carry, factor, add):
    for at in range(cuda.grid(1), slab.size, cuda.gridsize(1)):
        slab[at] = slab[at] * factor + add + carry[at % carry.size]


@cuda.jit
def sums(slab, partial):
    total = 0
    for at in range(cuda.grid(1), slab.size, cuda.gridsize(1)):
        total += slab[at]
    partial[cuda.grid(1)] = total


slabs = [cuda.device_array(args.words, np.uint32) for _ in range(steps.SLABS)]
for i, slab in enumerate(slabs):
    fill[BLOCKS, THREADS](slab, np.uint32(i + 1))
partial = cuda.device_array(BLOCKS * THREADS, np.uint64)
carry = np.arange(CARRY, dtype=np.uint32)


def step(number):
    global carry
    slab = slabs[number % steps.SLABS]
    generator[BLOCKS, THREADS](slab, cuda.to_device(carry), np.uint32(steps.FACTOR), np.uint32(steps.ADD))
    sums[BLOCKS, THREADS](slab, partial)
    result = partial.copy_to_host()
    # Folds the state back into the chain: what is lost or torn shows in every later step.
    carry = result.reshape(-1, CARRY).sum(axis=0).astype(np.uint32)
    return result


steps.run(args, step)
