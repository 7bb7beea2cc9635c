"""JAX. XLA_PYTHON_CLIENT_PREALLOCATE=false in the environment turns its preallocation of most of the GPU's memory off,
XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async its own allocator.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

import steps

args = steps.options()
N = steps.N
jax.config.update("jax_default_matmul_precision", "highest")
cells = jnp.arange(N * N, dtype=jnp.int32)
weights = [((cells * (2 * i + 3) >> 5) & 31).astype(jnp.float32).reshape(N, N) for i in range(4)]
h = (cells % steps.MOD).astype(jnp.float32).reshape(N, N)
slabs = [jnp.arange(args.words, dtype=jnp.uint32) * jnp.uint32(i + 1) for i in range(steps.SLABS)]


@functools.partial(jax.jit, donate_argnums=(0, 1))
def advance(h, slab, weights):
    for w in weights:
        h = jnp.remainder(h @ w, steps.MOD)
    slab = slab * jnp.uint32(steps.FACTOR) + jnp.uint32(steps.ADD)
    slab = slab.at[: N * N].set(slab[: N * N] + h.reshape(-1).astype(jnp.uint32))
    # Folds the state back into the chain: what is lost or torn shows in every later step.
    h = jnp.remainder(h + (slab[-N * N :].reshape(N, N) & 31).astype(jnp.float32), steps.MOD)
    total = slab.sum(dtype=jnp.uint32).reshape(1)
    return h, slab, jnp.concatenate([h.reshape(-1)[:: N + 1].astype(jnp.uint32), slab[:: N * N], total])


def step(number):
    global h
    i = number % steps.SLABS
    h, slabs[i], result = advance(h, slabs[i], weights)
    return np.asarray(result)


steps.run(args, step)
