//! What calls cost: empty launches, and allocations of three kinds. One line of `name ns-per-call` each.

use std::time::Instant;

use anyhow::Result;

use crate::cuda::Cuda;
use crate::state::State;

/// Launches between two waits: fewer than the GPU's queue holds.
const BATCH: usize = 500;
/// Allocations alive at once.
const ALIVE: usize = 64;

fn per_call(name: &str, count: usize, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let begin = Instant::now();
    work()?;
    println!("{name} {:.1}", begin.elapsed().as_nanos() as f64 / count as f64);
    Ok(())
}

/// Allocates and frees `count` times with up to [`ALIVE`] pieces held, of `size(n)` bytes.
fn churn(
    count: usize,
    size: impl Fn(usize) -> usize,
    alloc: impl Fn(usize) -> Result<u64>,
    free: impl Fn(u64) -> Result<()>,
) -> Result<()> {
    let mut held = [0u64; ALIVE];
    for n in 0..count {
        let slot = &mut held[n * 31 % ALIVE];
        if *slot != 0 {
            free(*slot)?;
        }
        *slot = alloc(size(n))?;
    }
    held.into_iter().filter(|p| *p != 0).try_for_each(free)
}

/// Runs every benchmark with `launches` launches.
pub fn run(cuda: &Cuda, launches: usize) -> Result<()> {
    let state = State::allocate(cuda, 8 << 20, 0)?;
    let stream = state.stream();
    state.launch_empty(BATCH)?;
    per_call("launch_ns", launches, || {
        let mut left = launches;
        while left > 0 {
            let now = left.min(BATCH);
            state.launch_empty(now)?;
            left -= now;
        }
        Ok(())
    })?;
    let plain = |size| {
        let mut address = 0;
        cuda.alloc(&mut address, size).map(|()| address)
    };
    let ordered = |size| {
        let mut address = 0;
        cuda.alloc_async(&mut address, size, stream).map(|()| address)
    };
    let free = |address| cuda.free(address);
    let free_ordered = |address| cuda.free_async(address, stream);
    let few = (launches / 100).max(ALIVE);
    per_call("small_alloc_free_ns", few, || churn(few, |n| 512 + n * 977 % 65536, plain, free))?;
    per_call("large_alloc_free_ns", few / 10, || churn(few / 10, |n| (1 + n % 16) << 21, plain, free))?;
    per_call("async_alloc_free_ns", few, || {
        churn(few, |n| 512 + n * 977 % 4_000_000, ordered, free_ordered)?;
        cuda.stream_synchronize(stream)
    })?;
    Ok(())
}
