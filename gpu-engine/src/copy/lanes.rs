//! GPU → image: several threads, each with its stream, its page-locked buffers and its data file.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::ledger::{Batch, ChunkRef, Ledger};
use crate::device::{Chunks, Device, DeviceError, GpuId, Pinned, Region, Stream};
use crate::error::EngineError;
use crate::image::{CHUNK, Digest, Saved, Sink};
use crate::progress::Progress;

/// Bytes moved by one copy. Two buffers of this size per thread keep link and file busy at the same time.
pub const PIECE: usize = 8 << 20;
/// Chunks in a piece.
const MOST: usize = PIECE / CHUNK;
/// More threads than this no longer raise the rate (FACTS: a file system's own limit comes first).
const MOST_LANES: usize = 12;

/// Threads that move data on this machine.
pub fn lane_count() -> usize {
    thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, MOST_LANES)
}

/// Page-locked buffers for one thread, each for a piece and the digests of its chunks.
pub struct Ring(pub [Box<dyn Pinned>; 2]);

impl Ring {
    /// Allocates them.
    pub fn allocate(device: &dyn Device) -> Result<Self, DeviceError> {
        let buffer = || device.pinned(PIECE + MOST * size_of::<Digest>());
        Ok(Ring([buffer()?, buffer()?]))
    }
}

/// The threads' buffers. Slow to set up, so they exist before the program is stopped.
pub struct Lanes<'a> {
    device: &'a dyn Device,
    rings: Vec<Ring>,
    /// For each thread and GPU two staging slots, one behind the other.
    stages: Vec<BTreeMap<GpuId, Region>>,
}

impl<'a> Lanes<'a> {
    /// Allocates the buffers for `lanes` threads.
    pub fn allocate(device: &'a dyn Device, lanes: usize) -> Result<Self, DeviceError> {
        let rings = (0..lanes).map(|_| Ring::allocate(device)).collect::<Result<_, _>>()?;
        Ok(Lanes { device, rings, stages: (0..lanes).map(|_| BTreeMap::new()).collect() })
    }

    /// Allocates the staging slots on these GPUs.
    pub fn stage_on(&mut self, gpus: &[GpuId]) -> Result<(), DeviceError> {
        for stages in &mut self.stages {
            for gpu in gpus {
                if !stages.contains_key(gpu) {
                    stages.insert(*gpu, self.device.allocate(*gpu, 2 * PIECE as u64)?);
                }
            }
        }
        Ok(())
    }

    /// Copies chunks of memory that nobody writes to at present.
    pub fn copy(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        chunks: &[ChunkRef],
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let batches = ledger.batches(chunks, MOST);
        self.run(sink, ledger, chunks, &batches, false, progress)
    }

    /// Copies chunks of memory that its owner may write to at any time: each goes through a staging slot, see
    /// [`Lanes::stage_on`].
    pub fn copy_staged(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        chunks: &[ChunkRef],
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let batches = ledger.batches(chunks, MOST);
        self.run(sink, ledger, chunks, &batches, true, progress)
    }

    /// Copies what a [`super::Spare`] holds.
    pub fn copy_spare(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        spare: &super::Spare,
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let (chunks, batches) = spare.batches(MOST);
        self.run(sink, ledger, &chunks, &batches, false, progress)
    }

    fn run(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        chunks: &[ChunkRef],
        batches: &[Batch],
        staged: bool,
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let begin = Instant::now();
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let take = || match failed.load(Ordering::Relaxed) {
            true => None,
            false => batches.get(next.fetch_add(1, Ordering::Relaxed)).copied(),
        };
        let (device, known) = (self.device, &*ledger);
        let copied: Vec<Vec<(ChunkRef, Saved)>> = thread::scope(|scope| {
            let threads: Vec<_> = self
                .rings
                .iter_mut()
                .zip(&self.stages)
                .enumerate()
                .map(|(number, (ring, stages))| {
                    let (take, failed) = (&take, &failed);
                    scope.spawn(move || {
                        let stages = staged.then_some(stages);
                        let mut lane = Lane { number, device, sink, known, chunks, ring, stages };
                        let result = lane.drive(take, progress);
                        if result.is_err() {
                            failed.store(true, Ordering::Relaxed);
                        }
                        result
                    })
                })
                .collect();
            let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            results
                .into_iter()
                .map(|r| r.unwrap_or(Err(EngineError::Order("a copy thread panicked"))))
                .collect::<Result<_, _>>()
        })?;
        ledger.record(copied.into_iter().flatten());
        Ok(begin.elapsed())
    }
}

/// One thread.
struct Lane<'a> {
    number: usize,
    device: &'a dyn Device,
    sink: &'a dyn Sink,
    known: &'a Ledger,
    chunks: &'a [ChunkRef],
    ring: &'a mut Ring,
    stages: Option<&'a BTreeMap<GpuId, Region>>,
}

impl Lane<'_> {
    /// While one buffer is filled by the GPU, the other goes to the file.
    fn drive(
        &mut self,
        take: impl Fn() -> Option<Batch>,
        progress: &Progress,
    ) -> Result<Vec<(ChunkRef, Saved)>, EngineError> {
        // Declared here, so dropped before the buffers can be: that ends the copies to them.
        let mut streams = BTreeMap::new();
        let mut copied = Vec::new();
        let mut turn = 0;
        let mut filling: Option<Batch> = None;
        loop {
            let batch = take();
            if let Some(done) = &filling {
                let stream: &mut Box<dyn Stream> =
                    streams.get_mut(&done.gpu).ok_or(EngineError::Order("no stream"))?;
                stream.wait()?;
            }
            let filled = (filling, turn);
            if let Some(b) = batch {
                turn ^= 1;
                self.start(&mut streams, b, turn)?;
            }
            if let (Some(done), buffer) = filled {
                self.store(done, buffer, &mut copied)?;
                progress.add((done.count * CHUNK) as u64);
            }
            if batch.is_none() {
                return Ok(copied);
            }
            filling = batch;
        }
    }

    /// Has the GPU fill buffer `turn`.
    fn start(
        &mut self,
        streams: &mut BTreeMap<GpuId, Box<dyn Stream>>,
        batch: Batch,
        turn: usize,
    ) -> Result<(), EngineError> {
        let stream = match streams.entry(batch.gpu) {
            std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::btree_map::Entry::Vacant(e) => e.insert(self.device.stream(batch.gpu)?),
        };
        let len = batch.count * CHUNK;
        let from = match self.stages {
            None => batch.address,
            Some(stages) => {
                let stage = stages.get(&batch.gpu).ok_or(EngineError::Order("no staging slot"))?;
                let slot = stage.address + (turn * PIECE) as u64;
                stream.copy_within(slot, batch.address, len as u64)?;
                slot
            }
        };
        let buffer = self.ring.0[turn].as_mut();
        stream.digest(Chunks::Run(from), batch.count as u64, buffer, PIECE)?;
        Ok(stream.copy_out(from, buffer, 0, len)?)
    }

    /// Gives what is in a buffer to the sink.
    fn store(
        &self,
        batch: Batch,
        turn: usize,
        copied: &mut Vec<(ChunkRef, Saved)>,
    ) -> Result<(), EngineError> {
        let chunks = &self.chunks[batch.first..batch.first + batch.count];
        let bytes = self.ring.0[turn].bytes();
        let (data, digests) = bytes.split_at(PIECE);
        let digests: Vec<Digest> = digests
            .chunks_exact(size_of::<Digest>())
            .take(batch.count)
            .map(|d| Digest::from_bytes(std::array::from_fn(|i| d[i])))
            .collect();
        let mut places: Vec<_> =
            chunks.iter().map(|c| self.known.saved(*c).map(|(_, place)| place)).collect();
        self.sink.put(self.number, &data[..batch.count * CHUNK], &digests, &mut places)?;
        for ((chunk, digest), place) in chunks.iter().zip(digests).zip(places) {
            let place = place.ok_or(EngineError::Order("a chunk was not stored"))?;
            copied.push((*chunk, (digest, place)));
        }
        Ok(())
    }
}
