//! GPU → image: several threads, each with its stream, its page-locked buffers and its data file.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use phos_digest::ZERO_CHUNK;

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

/// The niceness of threads that copy: they get a third of what others get that want the same processor.
const GIVE_WAY: i32 = 5;

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

    /// Copies chunks. Without `digests` their owner may write to them at any time: each gets that of the bytes which were
    /// saved.
    pub fn copy(
        &mut self,
        sink: &dyn Sink,
        ledger: &mut Ledger,
        chunks: &[ChunkRef],
        digests: &[Digest],
        progress: &Progress,
    ) -> Result<Duration, EngineError> {
        let batches = ledger.batches(chunks, self.most);
        self.run(sink, ledger, chunks, &batches, digests, progress)
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
        // What is known to be zero is not stored, so it need not be looked at.
        let zeros = zeros(chunks, digests);
        progress.add((zeros.len() * CHUNK) as u64);
        ledger.note_zeros(&zeros);
        let batches = &without_zeros(batches, digests);
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
                        give_way();
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

/// Has this thread give way where there are fewer processors than threads: the program, or CRIU while the program stands
/// still, should not wait for what has time.
fn give_way() {
    // SAFETY: changes the priority of this thread, and nothing else.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, GIVE_WAY) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "a copy thread keeps its priority");
    }
}

/// The chunks whose digests say that they are zero.
fn zeros(chunks: &[ChunkRef], digests: &[Digest]) -> Vec<ChunkRef> {
    let known = chunks.iter().zip(digests).filter(|(_, digest)| **digest == ZERO_CHUNK);
    known.map(|(chunk, _)| *chunk).collect()
}

/// The batches without the chunks whose digests say that they are zero.
fn without_zeros(batches: &[Batch], digests: &[Digest]) -> Vec<Batch> {
    let is_zero = |digest: &Digest| *digest == ZERO_CHUNK;
    let mut rest = Vec::with_capacity(batches.len());
    for batch in batches {
        let Some(known) = digests.get(batch.first..batch.first + batch.count) else {
            rest.push(*batch);
            continue;
        };
        let mut done = 0;
        for run in known.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            if !is_zero(&run[0]) {
                let (first, address) = (batch.first + done, batch.address + (done * CHUNK) as u64);
                rest.push(Batch { gpu: batch.gpu, address, first, count: run.len() });
            }
            done += run.len();
        }
    }
    rest
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_cut_out_of_batches() {
        let gpu = GpuId([1; 16]);
        let batch = |first, count| Batch { gpu, address: 0x1000_0000 + (first * CHUNK) as u64, first, count };
        let digests = |zero: &[bool]| -> Vec<_> {
            zero.iter().map(|z| if *z { ZERO_CHUNK } else { Digest([1, 2]) }).collect()
        };
        let batches = [batch(0, 4), batch(4, 2)];
        assert_eq!(without_zeros(&batches, &[]), batches, "nothing is known");
        let known = digests(&[false, true, true, false, true, true]);
        assert_eq!(without_zeros(&batches, &known), [batch(0, 1), batch(3, 1)]);
        let known = digests(&[true, false, false, true, false, false]);
        assert_eq!(without_zeros(&batches, &known), [batch(1, 2), batch(4, 2)]);
        let chunks: Vec<_> = (0..6).map(|chunk| ChunkRef { block: (0, 7), chunk }).collect();
        assert_eq!(zeros(&chunks, &known), [chunks[0], chunks[3]]);
    }
}
