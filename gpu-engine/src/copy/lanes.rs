//! GPU → image: several threads, each with its stream, its page-locked buffers and its data file.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::ledger::{Batch, ChunkRef, Ledger};
use crate::device::{Device, DeviceError, GpuId, Pinned, Stream};
use crate::error::EngineError;
use crate::image::{CHUNK, Digest, Saved, Sink};
use crate::progress::Progress;

/// Bytes moved by one copy. Two buffers of this size per thread keep link and file busy at the same time; page-locked
/// memory is slow to allocate, and a restore waits for it.
const PIECE: usize = 2 << 20;
/// More threads than this no longer raise the rate (FACTS: a file system's own limit comes first).
const MOST_LANES: usize = 12;

/// Threads that move data on this machine.
pub fn lane_count() -> usize {
    thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, MOST_LANES)
}

/// How the work is spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Threads.
    pub lanes: usize,
    /// Bytes of each of a thread's two buffers, a multiple of the chunk size.
    pub piece: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        lane_count().into()
    }
}

/// So many threads.
impl From<usize> for Tuning {
    fn from(lanes: usize) -> Self {
        Tuning { lanes, piece: PIECE }
    }
}

/// Page-locked buffers for one thread, each for a piece.
pub struct Ring(pub [Box<dyn Pinned>; 2]);

impl Ring {
    /// Allocates them.
    pub fn allocate(device: &dyn Device, piece: usize) -> Result<Self, DeviceError> {
        Ok(Ring([device.pinned(piece)?, device.pinned(piece)?]))
    }
}

/// The threads' buffers. Slow to set up, so they exist before the program is stopped.
pub struct Lanes<'a> {
    device: &'a dyn Device,
    rings: Vec<Ring>,
    /// Chunks in a piece.
    most: usize,
}

impl<'a> Lanes<'a> {
    /// Allocates the buffers.
    pub fn allocate(device: &'a dyn Device, tuning: Tuning) -> Result<Self, DeviceError> {
        let rings =
            (0..tuning.lanes).map(|_| Ring::allocate(device, tuning.piece)).collect::<Result<_, _>>()?;
        Ok(Lanes { device, rings, most: tuning.piece / CHUNK })
    }

    /// Copies chunks. Their owner may write to them at any time: the digest is that of the bytes which were saved.
    pub fn copy(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        chunks: &[ChunkRef],
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let batches = ledger.batches(chunks, self.most);
        self.run(sink, ledger, chunks, &batches, &[], progress)
    }

    /// Copies what a [`super::Spare`] holds.
    pub fn copy_spare(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        spare: &super::Spare,
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let (chunks, batches) = spare.batches(self.most);
        self.run(sink, ledger, &chunks, &batches, &spare.digests(), progress)
    }

    /// `digests`: those of `chunks`, if they are known.
    fn run(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        chunks: &[ChunkRef],
        batches: &[Batch],
        digests: &[Digest],
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
                .enumerate()
                .map(|(number, ring)| {
                    let (take, failed) = (&take, &failed);
                    scope.spawn(move || {
                        let mut lane = Lane { number, device, sink, known, chunks, digests, ring };
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
    digests: &'a [Digest],
    ring: &'a mut Ring,
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
        Ok(stream.copy_out(batch.address, self.ring.0[turn].as_mut(), 0, batch.count * CHUNK)?)
    }

    /// Gives what is in a buffer to the sink.
    fn store(
        &self,
        batch: Batch,
        turn: usize,
        copied: &mut Vec<(ChunkRef, Saved)>,
    ) -> Result<(), EngineError> {
        let range = batch.first..batch.first + batch.count;
        let chunks = &self.chunks[range.clone()];
        let data = &self.ring.0[turn].bytes()[..batch.count * CHUNK];
        let digests = match self.digests.get(range) {
            Some(known) => known.to_vec(),
            None => data.chunks_exact(CHUNK).map(phos_digest::digest).collect(),
        };
        let mut places: Vec<_> =
            chunks.iter().map(|c| self.known.saved(*c).map(|(_, place)| place)).collect();
        self.sink.put(self.number, data, &digests, &mut places)?;
        for ((chunk, digest), place) in chunks.iter().zip(digests).zip(places) {
            let place = place.ok_or(EngineError::Order("a chunk was not stored"))?;
            copied.push((*chunk, (digest, place)));
        }
        Ok(())
    }
}
