"""What libphos.so costs while nothing is checkpointed: the same container under phos-runc and under runc, alternating."""
import statistics

from harness import Container, log, result

# Workload and its options, steps to leave out, steps to count.
LOADS = {
    "llama13b-infer": (("models.py", "--model", "llama13b-infer"), 30, 300),
    "resnet-train": (("models.py", "--model", "resnet-train"), 30, 200),
    "torch-2g": (("torch_steps.py", "--gb", "2"), 50, 500),
}
# What phos-sample --bench prints, and the names of the workloads it stands for.
CALLS = {"launch_ns": "empty-kernels", "small_alloc_free_ns": "small-allocations", "large_alloc_free_ns": "large-allocations",
         "async_alloc_free_ns": "stream-ordered-allocations"}
LAUNCHES = 2_000_000


def alternating(count):
    """Each system goes first in turn: clocks and caches warm up for both alike."""
    for i in range(count):
        for system in ("phos-runc", "runc")[:: 1 if i % 2 else -1]:
            yield i, system


def steps(load, count):
    words, skip, steps = LOADS[load]
    rates = {"phos-runc": [], "runc": []}
    for i, system in alternating(count):
        box = Container(f"{load}-{system}-{i}", words, plain=system == "runc")
        box.start()
        box.wait_steps(skip + steps + 1, 200)
        times = [t for _, _, t in box.steps()]
        box.stop()
        # The fastest tenth's slowest step: one that something else delayed says nothing about the library.
        spans = sorted(b - a for a, b in zip(times[skip:], times[skip + 1 : skip + steps + 1]))
        rates[system].append(1e9 / spans[len(spans) // 10])
        log(f"{load} {system} {i}: {rates[system][-1]:.3f} steps/s")
    fraction = statistics.median(rates["phos-runc"]) / statistics.median(rates["runc"])
    result("overhead", load, "phos-runc", "rate_fraction", fraction, count, "median", f"{steps} steps each, 10th percentile of a step")
    spread = (max(rates["runc"]) - min(rates["runc"])) / statistics.median(rates["runc"])
    result("overhead", load, "runc", "rate_spread", spread, count, "single", "between runs of the lower runtime alone")


def calls(count):
    found = {}
    for i, system in alternating(count):
        box = Container(f"calls-{system}-{i}", ("phos-sample", "--bench", str(LAUNCHES)), plain=system == "runc")
        box.start()
        box.wait_end(200)
        for line in box.said().splitlines():
            name, value = line.split()
            found.setdefault(name, {}).setdefault(system, []).append(float(value))
        log(f"calls {system} {i}: {box.said().split()}")
    for name, by_system in found.items():
        ours, theirs = (statistics.median(by_system[s]) for s in ("phos-runc", "runc"))
        result("overhead", CALLS.get(name, name), "phos-runc", "rate_fraction", theirs / ours, count, "median", f"{ours:.0f} ns a call, {theirs:.0f} without")


def run(args):
    for load in args.load or [*LOADS, "calls"]:
        calls(args.count) if load == "calls" else steps(load, args.count)
