"""PyTorch in the ways that allocate or launch differently from eager mode.

compile: torch.compile; graphs: each step is the replay of a CUDA graph; expandable: PyTorch's expandable segments, and
async: its cudaMallocAsync backend, both with memory that comes and goes; eager: the same steps without any of these.
"""
import os
import steps

args = steps.options(mode=dict(choices=["compile", "graphs", "expandable", "async", "eager"], default="eager"))
config = {"expandable": "expandable_segments:True", "async": "backend:cudaMallocAsync"}.get(args.mode)
if config:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = config
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiler processes beside this one
import torch  # noqa: E402

N = steps.N
device = torch.device("cuda")
cells = torch.arange(N * N, device=device, dtype=torch.int32)
weights = [((cells * (2 * i + 3) >> 5) & 31).float().view(N, N) for i in range(4)]
h = (cells % steps.MOD).float().view(N, N)
slabs = [torch.arange(args.words, device=device, dtype=torch.int32) * (i + 1) for i in range(steps.SLABS)]


def advance(h, slab):
    for w in weights:
        h = torch.remainder(h @ w, steps.MOD)
    slab.mul_(steps.FACTOR).add_(steps.ADD)
    slab[: N * N].add_(h.view(-1).int())
    # Folds the state back into the chain: what is lost or torn shows in every later step.
    h = torch.remainder(h + (slab[-N * N :].view(N, N) & 31).float(), steps.MOD)
    total = slab.sum(dtype=torch.int64).view(1)
    return h, torch.cat([h.view(-1)[:: N + 1].long(), slab[:: N * N].long(), total])


step_of = torch.compile(advance, fullgraph=True) if args.mode == "compile" else advance
graphs = []
if args.mode == "graphs":
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # cuBLAS makes its workspace outside the capture
        advance(h, slabs[0].clone())
    torch.cuda.synchronize()
    for slab in slabs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            new, result = advance(h, slab)
            h.copy_(new)
        graphs.append((graph, result))


def step(number):
    global h
    i = number % steps.SLABS
    if graphs:
        graphs[i][0].replay()
        return graphs[i][1].cpu().numpy()
    if args.mode in ("expandable", "async"):
        # Memory of changing sizes, filled from the state; what was freed goes back to the driver now and then.
        extra = [slabs[i][: (number * 37 + k * 11) % 50 * 65536 + N].clone() for k in range(8)]
        slabs[i][:N].add_(torch.stack([e[:N] for e in extra]).sum(0, dtype=torch.int32))
        del extra
        if number % 50 == 49:
            torch.cuda.empty_cache()
    h, result = step_of(h, slabs[i])
    return result.cpu().numpy()


steps.run(args, step)
