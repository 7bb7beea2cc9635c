//! Image → GPU: several threads, each with its stream and its pinned buffers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::copy::{PIECE, Ring, lane_count};
use crate::device::{Device, Region, Stream};
use crate::error::EngineError;
use crate::image::{Extent, Image, Location};

/// Loads allocation `i` of the image into `regions[i]`, checking every chunk. Blocks until all is on the GPU.
pub fn load(device: &Arc<dyn Device>, image: &Image, regions: &[Region]) -> Result<Duration, EngineError> {
    let begin = Instant::now();
    let mut work: Vec<(usize, Extent)> = Vec::new();
    for (i, allocation) in image.manifest.allocations.iter().enumerate() {
        work.extend(image.extents(allocation, PIECE).into_iter().map(|e| (i, e)));
    }
    let next = AtomicUsize::new(0);
    let threads = lane_count().min(work.len().max(1));
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    drive(device.as_ref(), image, regions, || {
                        work.get(next.fetch_add(1, Ordering::Relaxed)).copied()
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().unwrap_or(Err(EngineError::Order("a load thread panicked"))))
    })?;
    Ok(begin.elapsed())
}

/// One thread: while one buffer goes to the GPU, the other is read from the file.
fn drive(
    device: &dyn Device,
    image: &Image,
    regions: &[Region],
    take: impl Fn() -> Option<(usize, Extent)>,
) -> Result<(), EngineError> {
    let mut ring = Ring::allocate(device)?;
    // Declared behind the ring, so dropped before it: that ends the copies from its buffers.
    let mut streams = std::collections::BTreeMap::new();
    let mut busy: [Option<crate::device::GpuId>; 2] = [None, None];
    let mut turn = 0;
    while let Some((i, extent)) = take() {
        let region = &regions[i];
        let len = extent.count as usize * crate::image::CHUNK;
        // The buffer about to be reused must have left for its GPU.
        if let Some(stream) = busy[turn].take().and_then(|gpu| streams.get_mut(&gpu)) {
            let stream: &mut Box<dyn Stream> = stream;
            stream.wait()?;
        }
        let stream = match streams.entry(region.gpu) {
            std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::btree_map::Entry::Vacant(e) => e.insert(device.stream(region.gpu)?),
        };
        if extent.location == Location::Zero {
            stream.zero(region.address + extent.at, len as u64)?;
            continue;
        }
        image.read(&extent, ring.0[turn].bytes_mut())?;
        stream.copy_in(region.address + extent.at, ring.0[turn].as_mut(), 0, len)?;
        busy[turn] = Some(region.gpu);
        turn ^= 1;
    }
    for stream in streams.values_mut() {
        stream.wait()?;
    }
    Ok(())
}
