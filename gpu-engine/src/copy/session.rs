//! The copying of one checkpoint: rounds while the program runs, what is left when it stands still, and the drain.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use phos_digest::ZERO_CHUNK;

use super::lanes::{Lanes, Tuning};
use super::ledger::{ChunkRef, Ledger};
use super::scan::Scanner;
use super::spare::Spare;
use crate::device::{Device, DeviceError, GpuId};
use crate::error::EngineError;
use crate::image::{CHUNK, Digest, Sink};
use crate::progress::{Progress, State};

/// Name of the copying in timelines.
const TRACK: &str = "copy";

/// What happened to the memory while the program stood still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quiesced {
    /// Finding out what differs from what is saved.
    pub digest: Duration,
    /// Copying it to spare memory.
    pub snapshot: Duration,
    /// Copying straight out what found no room there.
    pub copy: Duration,
    /// Bytes that differed.
    pub dirty_bytes: u64,
    /// Bytes copied straight out, without those that were zero.
    pub straight_bytes: u64,
}

/// One checkpoint's memory, buffers and sink. Everything slow to set up exists before the program is stopped.
pub struct Session<'a, S: Sink> {
    device: &'a dyn Device,
    progress: &'a Progress,
    sink: S,
    lanes: Lanes<'a>,
    scanner: Scanner,
    spare: Spare,
    /// What is saved. Add and remove allocations here as the program does.
    pub ledger: Ledger,
}

fn bytes(chunks: &[ChunkRef]) -> u64 {
    (chunks.len() * CHUNK) as u64
}

impl<'a, S: Sink> Session<'a, S> {
    /// Allocates the threads' buffers.
    pub fn prepare(
        device: &'a dyn Device,
        progress: &'a Progress,
        sink: S,
        tuning: impl Into<Tuning>,
        ledger: Ledger,
    ) -> Result<Self, DeviceError> {
        let lanes = Lanes::allocate(device, tuning.into())?;
        Ok(Session {
            device,
            progress,
            sink,
            lanes,
            scanner: Scanner::default(),
            spare: Spare::default(),
            ledger,
        })
    }

    /// Allocates spare memory for the time when the program stands still: see [`Spare::allocate`]. Returns its bytes.
    pub fn allocate_spare(&mut self, wanted: &BTreeMap<GpuId, u64>) -> Result<u64, DeviceError> {
        self.spare = Spare::allocate(self.device, wanted)?;
        Ok(self.spare.bytes())
    }

    /// Makes the lists for [`Session::dirty`] before the program is stopped.
    pub fn prepare_scan(&mut self) -> Result<(), DeviceError> {
        self.scanner.prepare(self.device, &self.ledger)
    }

    /// The chunks whose bytes differ from what is saved of them, at this moment.
    pub fn dirty(&mut self) -> Result<Vec<ChunkRef>, DeviceError> {
        let digests = self.scanner.digests(self.device, &self.ledger)?;
        Ok(self.ledger.dirty(&digests))
    }

    /// As [`Session::dirty`], with what is zero at this moment apart: `(zero, others)`. Unlike other content that costs no room
    /// and no time to save: see [`Ledger::note_zeros`].
    pub fn dirty_by_zero(&mut self) -> Result<(Vec<ChunkRef>, Vec<ChunkRef>), DeviceError> {
        let digests = self.scanner.digests(self.device, &self.ledger)?;
        Ok(self.ledger.part_zeros(self.ledger.dirty(&digests), &digests))
    }

    /// The share of all chunks that change within `window`; 0 if there are none.
    pub fn changing(&mut self, window: Duration) -> Result<f64, DeviceError> {
        let before = self.scanner.digests(self.device, &self.ledger)?;
        std::thread::sleep(window);
        let after = self.scanner.digests(self.device, &self.ledger)?;
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        Ok(changed as f64 / before.len().max(1) as f64)
    }

    /// Copies chunks while the program runs. Returns the bytes copied and the time it took.
    pub fn round(&mut self, chunks: &[ChunkRef]) -> Result<(u64, Duration), EngineError> {
        self.progress.step(State::Precopy, bytes(chunks))?;
        let begin = Instant::now();
        let time = self.lanes.copy(&self.sink, &mut self.ledger, chunks, &[], self.progress)?;
        self.progress.span("pre-copy", TRACK, begin, time);
        Ok((bytes(chunks), time))
    }

    /// The program stands still: what differs from what is saved goes to spare memory, and what finds no room there
    /// straight out.
    pub fn quiesce(&mut self) -> Result<Quiesced, EngineError> {
        let begin = Instant::now();
        if self.ledger.is_blank() {
            return self.take(&self.ledger.all());
        }
        let all = self.scanner.digests(self.device, &self.ledger)?;
        let dirty = self.ledger.dirty(&all);
        let digests = self.ledger.digests_of(&dirty, &all);
        let digest = begin.elapsed();
        self.progress.span("digest", TRACK, begin, digest);
        let taken = self.take_with(&dirty, &digests)?;
        Ok(Quiesced { digest: digest + taken.digest, ..taken })
    }

    /// The second half of [`Session::quiesce`], for the chunks given.
    pub fn take(&mut self, dirty: &[ChunkRef]) -> Result<Quiesced, EngineError> {
        self.take_with(dirty, &[])
    }

    /// The same; `digests` are those of the chunks, or none.
    fn take_with(&mut self, dirty: &[ChunkRef], digests: &[Digest]) -> Result<Quiesced, EngineError> {
        let begin = Instant::now();
        let (left, digests) =
            self.spare.take(self.device, &mut self.scanner, &self.ledger, dirty, digests)?;
        let snapshot = begin.elapsed();
        if left.len() < dirty.len() {
            self.progress.span("snapshot", TRACK, begin, snapshot);
            self.spare.digest(self.device, &mut self.scanner)?;
        }
        let mut quiesced = Quiesced { snapshot, dirty_bytes: bytes(dirty), ..Quiesced::default() };
        if !left.is_empty() {
            let begin = Instant::now();
            // Much of a large reserve may never have been used: what is zero needs no copying.
            let digests = match digests.len() == left.len() {
                true => digests,
                false => self.scanner.digests_of(self.device, &self.ledger, &left)?.unwrap_or_default(),
            };
            quiesced.digest = begin.elapsed();
            let zeros = digests.iter().filter(|d| **d == ZERO_CHUNK).count();
            quiesced.straight_bytes = ((left.len() - zeros) * CHUNK) as u64;
            self.progress.span("digest", TRACK, begin, quiesced.digest);
            let begin = Instant::now();
            quiesced.copy = self.lanes.copy(&self.sink, &mut self.ledger, &left, &digests, self.progress)?;
            self.progress.span("copy straight out", TRACK, begin, quiesced.copy);
        }
        Ok(quiesced)
    }

    /// Copies what is in spare memory to the sink, while the program runs again.
    pub fn drain(&mut self) -> Result<Duration, EngineError> {
        let (chunks, _) = self.spare.batches(1);
        self.progress.step(State::Copy, bytes(&chunks))?;
        let begin = Instant::now();
        let time = self.lanes.copy_spare(&self.sink, &mut self.ledger, &self.spare, self.progress)?;
        self.progress.span("drain", TRACK, begin, time);
        Ok(time)
    }

    /// Where the chunks go.
    pub fn sink(&self) -> &S {
        &self.sink
    }

    /// Gives back all buffers and spare memory.
    pub fn finish(self) -> (S, Ledger) {
        (self.sink, self.ledger)
    }
}
