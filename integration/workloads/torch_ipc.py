"""Two PyTorch processes that share tensors by CUDA IPC (torch.multiprocessing).

One makes the memory and writes the first half of each tensor, the other one the second half; both look at all of it. Were
the memory two after a checkpoint instead of one, the next step would show it.
"""
import hashlib

import numpy as np
import torch
import torch.multiprocessing as mp

import steps


def change(tensors, half, number):
    for tensor in tensors:
        part = tensor.chunk(2)[half]
        part.mul_(steps.FACTOR).add_(steps.ADD + number % 1000)
    torch.cuda.synchronize()


def look(tensors):
    parts = [torch.cat([t[:: steps.N * steps.N].long(), t.sum(dtype=torch.int64).view(1)]) for t in tensors]
    return torch.cat(parts).cpu().numpy()


def partner(pipe):
    tensors = pipe.recv()
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        change(tensors, 1, number)
        pipe.send(hashlib.sha256(look(tensors).tobytes()).hexdigest())


def main():
    args = steps.options()
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    other = context.Process(target=partner, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    device = torch.device("cuda")
    # Large tensors with memory of their own, and small ones that lie somewhere in a segment of PyTorch's.
    tensors = [torch.arange(args.words, device=device, dtype=torch.int32) * (i + 1) for i in range(steps.SLABS)]
    tensors += [torch.arange(1000 * (i + 1), device=device, dtype=torch.int32) for i in range(3)]
    pipe.send(tensors)

    def step(number):
        change(tensors, 0, number)
        pipe.send(number)
        seen = pipe.recv()
        result = look(tensors)
        if hashlib.sha256(result.tobytes()).hexdigest() != seen:
            raise SystemExit(f"step {number}: the two processes do not see the same")
        return np.ascontiguousarray(result)

    steps.run(args, step)
    pipe.close()
    other.join()


if __name__ == "__main__":
    main()
