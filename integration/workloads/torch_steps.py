"""A PyTorch program whose state on the GPU evolves in steps and can be compared with an uninterrupted run.

A chain of matrix products feeds a large state, one slab after the other; each step's result depends on all earlier
ones. One line a step goes to --out: number, SHA-256 of the step's result, monotonic time in ns. The file is opened and
closed for each line: a checkpointed program must not hold a file whose length changes behind its back.
"""
import argparse
import hashlib
import os
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import torch  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--gb", type=float, default=2.0, help="GPU memory to hold, 1e9 bytes")
parser.add_argument("--steps", type=int, default=0, help="stop after so many; 0: go on until --stop exists")
parser.add_argument("--step-ms", type=float, default=0, help="wait so long after each step")
parser.add_argument("--out", required=True)
parser.add_argument("--stop", default="", help="end when this file exists")
args = parser.parse_args()

torch.use_deterministic_algorithms(True)
torch.backends.cuda.matmul.allow_tf32 = False
device = torch.device("cuda")
generator = torch.Generator(device=device).manual_seed(1)
N = 4096
weights = [torch.randn(N, N, device=device, dtype=torch.bfloat16, generator=generator) / N**0.5 for _ in range(8)]
SLAB = 256 * 1024 * 1024
slabs = [torch.randn(SLAB // 4, device=device, generator=generator) for _ in range(max(1, int(args.gb * 1e9 / SLAB)))]
h = torch.randn(N, N, device=device, dtype=torch.bfloat16, generator=generator)

step = 0
while (args.steps == 0 or step < args.steps) and not (args.stop and os.path.exists(args.stop)):
    for w in weights:
        h = torch.tanh(h @ w * 1.5)
    slab = slabs[step % len(slabs)]
    slab.mul_(0.999).add_(h.float().view(-1)[: N * N].repeat(SLAB // 4 // (N * N)))
    # Folds the state back into the chain: what is lost or torn shows in every later step.
    h = h + slab[: N * N].view(N, N).to(torch.bfloat16) * 0.01
    result = torch.cat([h.view(-1)[:: N + 1].float(), slab[:: SLAB // 4096]]).cpu()
    digest = hashlib.sha256(result.numpy().tobytes()).hexdigest()[:16]
    with open(args.out, "a") as out:
        out.write(f"{step} {digest} {time.monotonic_ns()}\n")
    step += 1
    time.sleep(args.step_ms / 1e3)
