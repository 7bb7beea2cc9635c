"""CuPy, with its own memory pool (--pool default), or stream-ordered allocation (--pool async)."""
import cupy as cp

import steps

args = steps.options(pool=dict(choices=["default", "async"], default="default"))
if args.pool == "async":
    cp.cuda.set_allocator(cp.cuda.MemoryAsyncPool().malloc)
N = steps.N
cells = cp.arange(N * N, dtype=cp.int32)
weights = [((cells * (2 * i + 3) >> 5) & 31).astype(cp.float32).reshape(N, N) for i in range(4)]
h = (cells % steps.MOD).astype(cp.float32).reshape(N, N)
slabs = [cp.arange(args.words, dtype=cp.uint32) * cp.uint32(i + 1) for i in range(steps.SLABS)]
generator = cp.ElementwiseKernel("uint32 factor, uint32 add", "uint32 x", "x = x * factor + add", "generator")


def step(number):
    global h
    slab = slabs[number % steps.SLABS]
    for w in weights:
        h = cp.remainder(h @ w, cp.float32(steps.MOD))
    generator(steps.FACTOR, steps.ADD, slab)
    slab[: N * N] += h.ravel().astype(cp.uint32)
    # Folds the state back into the chain: what is lost or torn shows in every later step.
    h = cp.remainder(h + (slab[-N * N :].reshape(N, N) & 31).astype(cp.float32), cp.float32(steps.MOD))
    total = slab.sum(dtype=cp.uint64).reshape(1)
    parts = [h.ravel()[:: N + 1].astype(cp.uint64), slab[:: N * N].astype(cp.uint64), total]
    return cp.concatenate(parts).get()


steps.run(args, step)
