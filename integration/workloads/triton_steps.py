"""Triton kernels, on memory that PyTorch allocates."""
import torch
import triton
import triton.language as tl

import steps

args = steps.options()
BLOCK = 1024


@triton.jit
def generator(slab, carry, count, factor, add, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(slab + at, mask=inside, other=0)
    x = x * factor + add + tl.load(carry + at % BLOCK)
    tl.store(slab + at, x, mask=inside)


@triton.jit
def sums(slab, partial, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * ROWS * BLOCK
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for row in range(ROWS):
        at = first + row * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(slab + at, mask=at < count, other=0)
    tl.store(partial + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


device = torch.device("cuda")
words, rows = args.words, 256
slabs = [torch.arange(words, device=device, dtype=torch.int32) * (i + 1) for i in range(steps.SLABS)]
groups = triton.cdiv(words, rows * BLOCK)
partial = torch.zeros(groups * BLOCK, device=device, dtype=torch.int32)
carry = torch.arange(BLOCK, device=device, dtype=torch.int32)


def step(number):
    global carry
    slab = slabs[number % steps.SLABS]
    generator[(triton.cdiv(words, BLOCK),)](slab, carry, words, steps.FACTOR, steps.ADD, BLOCK=BLOCK)
    sums[(groups,)](slab, partial, words, ROWS=rows, BLOCK=BLOCK)
    # Folds the state back into the chain: what is lost or torn shows in every later step.
    carry = partial.view(groups, BLOCK).sum(0, dtype=torch.int32)
    return torch.cat([carry, slab[:: steps.N * steps.N]]).cpu().numpy()


steps.run(args, step)
