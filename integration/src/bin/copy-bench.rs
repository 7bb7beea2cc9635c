//! How fast the engine's copy pipeline is on this machine's GPU, each part against the plain rate of what limits it.
//!
//! `copy-bench [--gb N] [--folder F]...` prints one JSON line for each figure and a row for people on standard error.
//! `PHOS_LIBCUDA` names another driver.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};
use phos_engine::copy::{Ledger, PIECE, Scanner, Session, lane_count};
use phos_engine::device::{Device, GpuId, Region, cuda};
use phos_engine::image::{CHUNK, Digest, ImageError, ImageWriter, Location, Sink};
use phos_engine::progress::Progress;

/// Each figure is the median of so many runs.
const RUNS: usize = 3;
/// Bytes of one allocation.
const BLOCK: u64 = 256 << 20;

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

struct Bench {
    device: std::sync::Arc<dyn Device>,
    gpu: GpuId,
    name: String,
    regions: Vec<Region>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn gb_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64()
}

impl Bench {
    /// Allocates `bytes` and fills them with what is neither zero nor the same everywhere.
    fn new(bytes: u64) -> Result<Self> {
        let device = cuda::open()?;
        let info = device.gpus()?.into_iter().next().context("no GPU")?;
        let count = (bytes / BLOCK).max(1);
        let regions = (0..count).map(|_| device.allocate(info.id, BLOCK)).collect::<Result<Vec<_>, _>>()?;
        let mut stream = device.stream(info.id)?;
        let mut piece = device.pinned(PIECE)?;
        let mut state = 1u64;
        for (n, region) in regions.iter().enumerate() {
            for word in piece.bytes_mut().chunks_exact_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(n as u64 | 1);
                word.copy_from_slice(&state.to_le_bytes());
            }
            for at in (0..BLOCK).step_by(PIECE) {
                stream.copy_in(region.address + at, piece.as_mut(), 0, PIECE)?;
            }
            stream.wait()?;
        }
        drop(stream);
        Ok(Bench { device, gpu: info.id, name: info.name, regions })
    }

    fn bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.size).sum()
    }

    fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        for (n, r) in self.regions.iter().enumerate() {
            ledger.add((0, n as u64), self.gpu, r.address, r.size);
        }
        ledger
    }

    fn report(&self, metric: &str, values: Vec<f64>, note: &str) {
        let (n, value) = (values.len(), median(values));
        eprintln!("{metric:12} {value:10.1}  {note}");
        let line = serde_json::json!({
            "bench": "copy", "workload": format!("{:.0} GB", self.bytes() as f64 / 1e9), "system": "phos-runc",
            "metric": metric, "value": (value * 1e3).round() / 1e3, "stat": "median", "n": n, "device": self.name,
            "driver": self.device.driver().release, "note": note,
        });
        println!("{line}");
    }

    /// Digests of everything; the GPU's must be the host's.
    fn scan(&self) -> Result<()> {
        let ledger = self.ledger();
        let mut scanner = Scanner::default();
        scanner.prepare(self.device.as_ref(), &ledger)?;
        let digests = scanner.digests(self.device.as_ref(), &ledger)?;
        let mut stream = self.device.stream(self.gpu)?;
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
        self.report("scan_gb_s", rates, "digest of everything, list and results included");
        Ok(())
    }

    /// Everything copied inside the GPU.
    fn snapshot(&self) -> Result<()> {
        let progress = Progress::default();
        let mut session = Session::prepare(self.device.as_ref(), &progress, Discard, 1, self.ledger())?;
        session.prepare_scan()?;
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            session.allocate_spare(&BTreeMap::from([(self.gpu, self.bytes())]))?;
            let all = session.ledger.all();
            let taken = session.take(&all)?;
            if taken.straight_bytes > 0 {
                eprintln!("no room for a snapshot");
                return Ok(());
            }
            rates.push(gb_s(self.bytes(), taken.snapshot));
        }
        self.report("snapshot_gb_s", rates, "copied inside the GPU");
        Ok(())
    }

    /// Everything copied out: from spare memory, whose digests are known, or (`snapshot`: false) as in a round of pre-copy.
    fn copy(&self, sink: impl Fn() -> Result<Box<dyn Sink>>, snapshot: bool, note: &str) -> Result<()> {
        struct Boxed(Box<dyn Sink>);
        impl Sink for Boxed {
            fn put(
                &self,
                l: usize,
                d: &[u8],
                g: &[Digest],
                p: &mut [Option<Location>],
            ) -> Result<(), ImageError> {
                self.0.put(l, d, g, p)
            }
        }
        let progress = Progress::default();
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            let lanes = lane_count();
            let mut session =
                Session::prepare(self.device.as_ref(), &progress, Boxed(sink()?), lanes, self.ledger())?;
            let all = session.ledger.all();
            let time = if snapshot {
                session.allocate_spare(&BTreeMap::from([(self.gpu, self.bytes())]))?;
                ensure!(session.take(&all)?.straight_bytes == 0, "no room for a snapshot: ask for less");
                session.drain()?
            } else {
                session.round(&all)?.1
            };
            rates.push(gb_s(self.bytes(), time));
        }
        self.report("copy_gb_s", rates, note);
        Ok(())
    }

    /// The same bytes written by the same threads without a GPU: what the storage takes.
    fn plain(&self, folder: &Path, note: &str) -> Result<()> {
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            let writer = ImageWriter::create(folder, lane_count())?;
            let mut buffer = self.device.pinned(PIECE)?;
            buffer.bytes_mut().fill(7);
            let data = buffer.bytes();
            let digests = vec![Digest([7, 7]); PIECE / CHUNK];
            let next = AtomicUsize::new(0);
            let begin = Instant::now();
            let write = |lane| {
                let mut places = vec![None; PIECE / CHUNK];
                while next.fetch_add(PIECE, Ordering::Relaxed) < self.bytes() as usize {
                    places.fill(None);
                    writer.put(lane, data, &digests, &mut places)?;
                }
                Ok::<_, ImageError>(())
            };
            let write = &write;
            thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..lane_count()).map(|lane| scope.spawn(move || write(lane))).collect();
                threads.into_iter().try_for_each(|t| t.join().unwrap_or(Ok(())))
            })?;
            rates.push(gb_s(self.bytes(), begin.elapsed()));
        }
        self.report("plain_gb_s", rates, note);
        Ok(())
    }
}

fn main() -> Result<()> {
    let (mut gb, mut folders) = (8.0, Vec::<PathBuf>::new());
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--gb" => gb = value.parse()?,
            "--folder" => folders.push(value.into()),
            _ => bail!("usage: copy-bench [--gb N] [--folder F]..."),
        }
    }
    let bench = Bench::new((gb * 1e9) as u64)?;
    bench.scan()?;
    bench.snapshot()?;
    bench.copy(|| Ok(Box::new(Discard)), true, "to a sink that discards")?;
    bench.copy(|| Ok(Box::new(Discard)), false, "to a sink that discards, digested by the CPU")?;
    for folder in folders {
        let name = folder.display().to_string();
        let fresh = || {
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir_all(&folder)?;
            Ok::<_, anyhow::Error>(())
        };
        // A first run on fresh memory or blocks would measure how they are found.
        for _ in 0..2 {
            fresh()?;
            bench.plain(&folder, &format!("the same writes without a GPU, {name}"))?;
            fresh()?;
            let sink = || {
                fresh()?;
                Ok(Box::new(ImageWriter::create(&folder, lane_count())?) as Box<dyn Sink>)
            };
            bench.copy(sink, true, &format!("to {name}"))?;
        }
        fs::remove_dir_all(&folder)?;
    }
    Ok(())
}
