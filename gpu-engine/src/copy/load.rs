//! Image → GPU: several threads, each with its streams and its page-locked buffers.
//!
//! Memory is loaded while more of it is still being allocated. The bytes go from the files to page-locked buffers and from
//! there to the GPU; no processor looks at them. Once all is there, the GPUs digest it, which takes a fraction of a
//! millisecond for a gigabyte and proves the way to the GPU along with the file.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::lanes::{Ring, Tuning};
use super::scan::{Addresses, Scanner};
use crate::device::{Device, GpuId, Pinned, Region, Stream};
use crate::error::EngineError;
use crate::image::{CHUNK, Extent, Image, Location, Unpacker};
use crate::progress::{Progress, State};

/// Name of the loading in timelines.
const TRACK: &str = "copy";

/// An image's allocations on the GPU, in the manifest's order, each from the moment on at which it is allocated.
pub type Regions = [OnceLock<Region>];

/// Room for an image's allocations.
pub fn regions(image: &Image) -> Box<Regions> {
    image.manifest.allocations.iter().map(|_| OnceLock::new()).collect()
}

/// Index of an allocation, and a piece of it.
type Work = (usize, Extent);

/// Allocates an image's memory, fills it and checks every chunk of it. Calls `allocated` when everything is allocated;
/// returns when everything is loaded and proven.
pub fn load(
    device: &dyn Device,
    image: &Image,
    regions: &Regions,
    tuning: Tuning,
    progress: &Progress,
    allocated: impl FnOnce(),
) -> Result<Duration, EngineError> {
    let begin = Instant::now();
    let bytes = image.manifest.gpu_bytes();
    progress.step(State::Load, bytes)?;
    let threads = tuning.lanes.max(1).min(bytes.div_ceil(tuning.piece as u64) as usize);
    let panicked = |_| Err(EngineError::Order("a load thread panicked"));
    let failed = AtomicBool::new(false);
    let (send, work) = mpsc::channel::<Work>();
    let work = Mutex::new(work);
    let take = || match failed.load(Ordering::Relaxed) {
        true => None,
        false => work.lock().unwrap_or_else(|e| e.into_inner()).recv().ok(),
    };
    let mut scanner = thread::scope(|scope| {
        let lanes: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let result = Lane::new(device, image, regions, tuning.piece)
                        .and_then(|mut lane| lane.drive(take, progress));
                    if result.is_err() {
                        failed.store(true, Ordering::Relaxed);
                    }
                    result
                })
            })
            .collect();
        // Compiling the kernels and making the lists takes as long as loading a gigabyte.
        let scanner = scope.spawn(|| {
            let mut scanner = Scanner::default();
            scanner.reserve(device, &chunks_by_gpu(image))?;
            Ok::<_, EngineError>(scanner)
        });
        let placed = allocate(device, image, regions, |i, region| {
            let allocation = &image.manifest.allocations[i];
            debug_assert!(region.size >= allocation.size);
            let extents = image.extents(allocation, tuning.piece);
            // Nobody takes work any more if all threads have failed; why, they say themselves.
            extents.into_iter().all(|extent| send.send((i, extent)).is_ok())
                && !failed.load(Ordering::Relaxed)
        });
        drop(send);
        match placed {
            Err(_) => failed.store(true, Ordering::Relaxed),
            Ok(()) if failed.load(Ordering::Relaxed) => {}
            Ok(()) => allocated(),
        }
        let lanes: Vec<_> = lanes.into_iter().map(|t| t.join().unwrap_or_else(panicked)).collect();
        let scanner = scanner.join().unwrap_or(Err(EngineError::Order("a load thread panicked")));
        placed?;
        lanes.into_iter().collect::<Result<(), _>>()?;
        scanner
    })?;
    progress.span("load", TRACK, begin, begin.elapsed());
    let checking = Instant::now();
    prove(device, image, regions, &mut scanner)?;
    progress.span("digest", TRACK, checking, checking.elapsed());
    Ok(begin.elapsed())
}

fn chunks_by_gpu(image: &Image) -> BTreeMap<GpuId, usize> {
    let mut counts = BTreeMap::new();
    for a in &image.manifest.allocations {
        *counts.entry(image.manifest.gpus[a.gpu as usize].uuid).or_default() +=
            (a.size / CHUNK as u64) as usize;
    }
    counts
}

/// Allocates everything, largest first: there is work for every thread at once, and the small ones are made meanwhile.
/// Stops early when `ready` says so.
fn allocate(
    device: &dyn Device,
    image: &Image,
    regions: &Regions,
    mut ready: impl FnMut(usize, &Region) -> bool,
) -> Result<(), EngineError> {
    let allocations = &image.manifest.allocations;
    let mut order: Vec<_> = (0..allocations.len()).collect();
    order.sort_by_key(|i| Reverse(allocations[*i].size));
    for i in order {
        let gpu = image.manifest.gpus[allocations[i].gpu as usize].uuid;
        let region = device.allocate(gpu, allocations[i].size)?;
        if !ready(i, regions[i].get_or_init(|| region)) {
            break;
        }
    }
    Ok(())
}

fn region(regions: &Regions, i: usize) -> Result<&Region, EngineError> {
    regions.get(i).and_then(OnceLock::get).ok_or(EngineError::Order("memory that is not allocated"))
}

/// Compares the digests of what is on the GPUs with the image's.
fn prove(
    device: &dyn Device,
    image: &Image,
    regions: &Regions,
    scanner: &mut Scanner,
) -> Result<(), EngineError> {
    let mut lists = Addresses::new();
    for (i, allocation) in image.manifest.allocations.iter().enumerate() {
        let region = region(regions, i)?;
        let chunks = (0..allocation.size / CHUNK as u64).map(|n| region.address + n * CHUNK as u64);
        lists.entry(region.gpu).or_default().extend(chunks);
    }
    let mut found = scanner.digests_at(device, &lists)?;
    let mut rest: BTreeMap<_, _> =
        found.iter_mut().map(|(gpu, digests)| (*gpu, digests.as_slice())).collect();
    for (i, allocation) in image.manifest.allocations.iter().enumerate() {
        let digests = rest.entry(region(regions, i)?.gpu).or_default();
        let count = (allocation.size / CHUNK as u64) as usize;
        let (own, others) =
            digests.split_at_checked(count).ok_or(EngineError::Order("a digest is missing"))?;
        image.check(allocation, own)?;
        *digests = others;
    }
    Ok(())
}

/// One thread. While one buffer goes to the GPU, the other is read from the file.
struct Lane<'a> {
    device: &'a dyn Device,
    image: &'a Image,
    regions: &'a Regions,
    /// One for each GPU and buffer, so that a buffer is waited for alone. Dropped before the buffers: that ends the
    /// copies from them.
    streams: BTreeMap<(GpuId, usize), Box<dyn Stream>>,
    /// The GPU that a buffer is on its way to.
    busy: [Option<GpuId>; 2],
    ring: Ring,
    unpacker: Unpacker,
}

impl<'a> Lane<'a> {
    fn new(
        device: &'a dyn Device,
        image: &'a Image,
        regions: &'a Regions,
        piece: usize,
    ) -> Result<Self, EngineError> {
        let ring = Ring::allocate(device, piece)?;
        Ok(Lane {
            device,
            image,
            regions,
            streams: BTreeMap::new(),
            busy: [None; 2],
            ring,
            unpacker: Unpacker::default(),
        })
    }

    /// The stream of a GPU and a buffer, with that buffer.
    fn stream(&mut self, gpu: GpuId, turn: usize) -> Result<(&mut dyn Stream, &mut dyn Pinned), EngineError> {
        let stream = match self.streams.entry((gpu, turn)) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(self.device.stream(gpu)?),
        };
        Ok((stream.as_mut(), self.ring.0[turn].as_mut()))
    }

    fn drive(&mut self, take: impl Fn() -> Option<Work>, progress: &Progress) -> Result<(), EngineError> {
        let mut turn = 0;
        while let Some((i, extent)) = take() {
            let region = region(self.regions, i)?;
            let (address, len) = (region.address + extent.at, extent.count as usize * CHUNK);
            if extent.location == Location::Zero {
                self.stream(region.gpu, turn)?.0.zero(address, len as u64)?;
            } else {
                // The buffer about to be filled must have left for its GPU.
                if let Some(gpu) = self.busy[turn].take() {
                    self.stream(gpu, turn)?.0.wait()?;
                }
                self.image.fetch(&extent, self.ring.0[turn].bytes_mut(), &mut self.unpacker)?;
                let (stream, buffer) = self.stream(region.gpu, turn)?;
                stream.copy_in(address, buffer, 0, len)?;
                self.busy[turn] = Some(region.gpu);
                turn ^= 1;
            }
            progress.add(len as u64);
        }
        self.streams.values_mut().try_for_each(|s| Ok(s.wait()?))
    }
}
