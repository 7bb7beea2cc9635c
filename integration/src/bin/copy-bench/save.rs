//! GPU → somewhere.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use phos_engine::copy::{Scanner, Session, Tuning};
use phos_engine::device::Pinned;
use phos_engine::image::{CHUNK, Codec, Digest, ImageError, ImageWriter, Location, Sink};
use phos_engine::progress::Progress;
use phos_integration::memory;

use crate::{BLOCK, Bench, Folder, RUNS, buffers, gb_s};

/// Takes everything and keeps nothing.
struct Discard;

impl Sink for Discard {
    fn put(
        &self,
        _: usize,
        _: &[u8],
        _: &[Digest],
        places: &mut [Option<Location>],
    ) -> Result<(), ImageError> {
        places.fill(Some(Location::Zero));
        Ok(())
    }
}

/// An empty folder of this name.
pub fn fresh(folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    Ok(fs::create_dir_all(folder)?)
}

impl Bench {
    fn bytes(&self) -> u64 {
        self.regions.len() as u64 * BLOCK
    }

    /// Digests of everything; the GPU's must be the host's.
    pub fn scan(&self) -> Result<()> {
        let ledger = memory::ledger(&self.regions, BLOCK);
        let mut scanner = Scanner::default();
        scanner.prepare(self.device.as_ref(), &ledger)?;
        let digests = scanner.digests(self.device.as_ref(), &ledger)?;
        let mut stream = self.device.stream(self.gpu.id)?;
        let mut host = self.device.pinned(CHUNK)?;
        for n in (0..digests.len()).step_by(digests.len() / 16 + 1) {
            let chunk = ledger.all()[n];
            let address = ledger.block(chunk.block).context("block")?.chunk_address(chunk.chunk);
            stream.copy_out(address, host.as_mut(), 0, CHUNK)?;
            stream.wait()?;
            ensure!(
                phos_digest::digest(host.bytes()) == digests[n],
                "chunk {n}: the GPU's digest is not the host's"
            );
        }
        let mut rates = Vec::new();
        for _ in 0..RUNS * 2 {
            let begin = Instant::now();
            scanner.digests(self.device.as_ref(), &ledger)?;
            rates.push(gb_s(self.bytes(), begin.elapsed()));
        }
        let note = "digest of everything, list and results included";
        self.report("phos-runc", "scan_gb_s", self.regions.len(), rates, note);
        let mut rates = Vec::new();
        let data: Vec<u8> = (0..8 * CHUNK as u32).map(|i| (i / 3) as u8).collect();
        for _ in 0..RUNS * 20 {
            let begin = Instant::now();
            let sum = data.chunks_exact(CHUNK).fold(0, |sum, c| sum ^ phos_digest::digest(c).0[0]);
            rates.push(gb_s(data.len() as u64, begin.elapsed()));
            std::hint::black_box(sum);
        }
        self.report(
            "phos-runc",
            "host_scan_gb_s",
            self.regions.len(),
            rates,
            "digest on one core, from its cache",
        );
        Ok(())
    }

    /// Everything copied inside the GPU.
    pub fn snapshot(&self) -> Result<()> {
        let progress = Progress::default();
        let ledger = memory::ledger(&self.regions, BLOCK);
        let mut session = Session::prepare(self.device.as_ref(), &progress, Discard, 1, ledger)?;
        session.prepare_scan()?;
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            session.allocate_spare(&BTreeMap::from([(self.gpu.id, self.bytes())]))?;
            let all = session.ledger.all();
            let taken = session.take(&all)?;
            if taken.straight_bytes > 0 {
                bail!("no room for a snapshot: ask for less with --gb");
            }
            rates.push(gb_s(self.bytes(), taken.snapshot));
        }
        self.report("phos-runc", "snapshot_gb_s", self.regions.len(), rates, "copied inside the GPU");
        Ok(())
    }

    /// Everything copied out and forgotten: from spare memory, whose digests are known, and as in a round of pre-copy.
    pub fn discard(&self) -> Result<()> {
        let tuning = Tuning::from(self.lanes);
        let (mut drained, mut pre_copied) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            drained.push(gb_s(self.bytes(), self.copy(Discard, tuning, self.regions.len(), true)?.0));
            pre_copied.push(gb_s(self.bytes(), self.copy(Discard, tuning, self.regions.len(), false)?.0));
        }
        let blocks = self.regions.len();
        self.report("phos-runc", "copy_gb_s", blocks, drained, "to a sink that discards");
        let note = "to a sink that discards, digested by the CPU";
        self.report("phos-runc", "copy_gb_s", blocks, pre_copied, note);
        Ok(())
    }

    /// Copies the first `blocks` out: from spare memory, or (`snapshot`: false) as in a round of pre-copy. Returns the
    /// time and the sink.
    fn copy<S: Sink>(&self, sink: S, tuning: Tuning, blocks: usize, snapshot: bool) -> Result<(Duration, S)> {
        let progress = Progress::default();
        let device = self.device.as_ref();
        let ledger = memory::ledger(&self.regions[..blocks], BLOCK);
        let mut session = Session::prepare(device, &progress, sink, tuning, ledger)?;
        let all = session.ledger.all();
        let time = if snapshot {
            session.allocate_spare(&BTreeMap::from([(self.gpu.id, blocks as u64 * BLOCK)]))?;
            ensure!(
                session.take(&all)?.straight_bytes == 0,
                "no room for a snapshot: ask for less with --gb"
            );
            session.drain()?
        } else {
            session.round(&all)?.1
        };
        Ok((time, session.finish().0))
    }

    /// From spare memory to an image's files, and the same writes without a GPU.
    pub fn save_to(&self, folder: &Folder) -> Result<()> {
        let bytes = folder.blocks as u64 * BLOCK;
        // A first run on fresh memory or blocks would measure how they are found.
        fresh(&folder.path)?;
        self.write(folder, folder.tunings[0])?;
        for tuning in &folder.tunings {
            let (mut plain, mut own) = (Vec::new(), Vec::new());
            for _ in 0..RUNS {
                fresh(&folder.path)?;
                plain.push(gb_s(bytes, self.write(folder, *tuning)?));
                fresh(&folder.path)?;
                let writer = ImageWriter::create(&folder.path, tuning.lanes, Codec::None)?;
                let (time, writer) = self.copy(writer, *tuning, folder.blocks, true)?;
                let begin = Instant::now();
                writer.sync()?;
                own.push(gb_s(bytes, time + begin.elapsed()));
            }
            let note = format!("to {}, {}", folder.kind, buffers(*tuning));
            self.report("phos-runc", "copy_gb_s", folder.blocks, own, &note);
            let note = format!("the same writes without a GPU, {note}");
            self.report("plain", "copy_gb_s", folder.blocks, plain, &note);
        }
        Ok(())
    }

    /// The same bytes written by as many threads, each from two buffers to a file of its own: what the storage takes.
    fn write(&self, folder: &Folder, tuning: Tuning) -> Result<Duration> {
        let bytes = folder.blocks * BLOCK as usize;
        let mut lanes = Vec::new();
        for n in 0..tuning.lanes {
            let direct = if folder.kind == "tmpfs" { 0 } else { libc::O_DIRECT };
            let path = folder.path.join(format!("plain-{n}"));
            let file = File::options().write(true).create_new(true).custom_flags(direct).open(path)?;
            let mut buffers = [self.device.pinned(tuning.piece)?, self.device.pinned(tuning.piece)?];
            buffers.iter_mut().for_each(|b| b.bytes_mut().fill(n as u8 + 1));
            lanes.push((file, buffers));
        }
        let next = AtomicUsize::new(0);
        let begin = Instant::now();
        thread::scope(|scope| {
            let next = &next;
            let write = |(file, buffers): (File, [Box<dyn Pinned>; 2])| {
                scope.spawn(move || {
                    let mut at = 0;
                    while next.fetch_add(tuning.piece, Ordering::Relaxed) < bytes {
                        let buffer = &buffers[at / tuning.piece % 2];
                        file.write_all_at(buffer.bytes(), at as u64)?;
                        at += tuning.piece;
                    }
                    file.sync_all()
                })
            };
            let threads: Vec<_> = lanes.into_iter().map(write).collect();
            threads.into_iter().try_for_each(|t| match t.join() {
                Ok(result) => Ok(result?),
                Err(_) => bail!("a thread panicked"),
            })
        })?;
        Ok(begin.elapsed())
    }
}
