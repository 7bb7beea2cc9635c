//! How fast the engine's copy pipeline is on this machine's GPU, each part against the plain rate of what limits it,
//! alternating.
//!
//! `copy-bench [--gb N] [--disk-gb N] [--folder F]... [--lanes N] [--sweep] [--pack]` prints one JSON line for each figure and a
//! row for people on standard error. `--gb`: GPU memory to copy; at most `--disk-gb` of it to a folder that is not on
//! tmpfs. `--sweep`: folders on tmpfs with buffers of several sizes. `--pack`: compressors as well. `PHOS_LIBCUDA` names
//! another driver.

mod load;
mod pack;
mod save;

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use phos_engine::copy::{Tuning, lane_count};
use phos_engine::device::{Device, GpuInfo, Region, cuda};
use phos_engine::image::Codec;
use phos_integration::memory;

/// Each figure is the median of so many runs.
const RUNS: usize = 3;
/// Bytes of one allocation.
const BLOCK: u64 = 256 << 20;
/// Sizes of buffers that a sweep tries, bytes.
const PIECES: [usize; 5] = [512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20];

/// Memory on the GPU, filled with what looks like weights.
struct Bench {
    device: Arc<dyn Device>,
    gpu: GpuInfo,
    regions: Vec<Region>,
    lanes: usize,
}

/// A folder to write to.
struct Folder {
    path: PathBuf,
    kind: &'static str,
    /// How much of the memory goes there.
    blocks: usize,
    tunings: Vec<Tuning>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn gb_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64()
}

/// As it stands in a note.
fn buffers(tuning: Tuning) -> String {
    format!("{} threads, buffers of {} KiB", tuning.lanes, tuning.piece >> 10)
}

impl Bench {
    fn new(bytes: u64, lanes: usize) -> Result<Self> {
        let device = cuda::open()?;
        let gpu = memory::first_gpu(device.as_ref())?;
        let count = (bytes / BLOCK).max(1);
        let regions = (0..count).map(|_| device.allocate(gpu.id, BLOCK)).collect::<Result<Vec<_>, _>>()?;
        let mut stream = device.stream(gpu.id)?;
        let piece = 8 << 20;
        let mut buffer = device.pinned(piece)?;
        buffer.bytes_mut().copy_from_slice(&pack::weights(piece));
        for region in &regions {
            for at in (0..BLOCK).step_by(piece) {
                stream.copy_in(region.address + at, buffer.as_mut(), 0, piece)?;
            }
            stream.wait()?;
        }
        drop(stream);
        Ok(Bench { device, gpu, regions, lanes })
    }

    /// Prints a figure of what was done with `blocks` of the memory.
    fn report(&self, system: &str, metric: &str, blocks: usize, values: Vec<f64>, note: &str) {
        let gb = blocks as u64 * BLOCK / 1_000_000_000;
        let n = values.len();
        self.print(&format!("{gb} GB"), system, metric, median(values), n, note);
    }

    fn print(&self, workload: &str, system: &str, metric: &str, value: f64, n: usize, note: &str) {
        eprintln!("{metric:15} {system:9} {value:10.2}  {workload}: {note}");
        let line = serde_json::json!({
            "bench": "copy", "workload": workload, "system": system, "metric": metric,
            "value": (value * 1e3).round() / 1e3, "stat": "median", "n": n, "device": self.gpu.name,
            "driver": self.device.driver().release, "note": note,
        });
        println!("{line}");
    }

    fn folder(&self, path: &Path, disk_bytes: u64, sweep: bool) -> Result<Folder> {
        ensure!(path.is_absolute(), "{}: name folders by their full path", path.display());
        let above = path.parent().context("a folder's name")?;
        let tmpfs = statfs(above).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC);
        let all = self.regions.len();
        let every = |lanes| PIECES.map(|piece| Tuning { lanes, piece }).to_vec();
        Ok(Folder {
            path: path.into(),
            kind: if tmpfs { "tmpfs" } else { "disk" },
            blocks: if tmpfs { all } else { all.min((disk_bytes / BLOCK).max(1) as usize) },
            tunings: if sweep && tmpfs { every(self.lanes) } else { vec![self.lanes.into()] },
        })
    }
}

fn main() -> Result<()> {
    let (mut gb, mut disk_gb, mut lanes, mut sweep, mut pack) = (8.0, 3.0, lane_count(), false, false);
    let mut paths = Vec::<PathBuf>::new();
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--gb" => gb = value()?.parse()?,
            "--disk-gb" => disk_gb = value()?.parse()?,
            "--lanes" => lanes = value()?.parse()?,
            "--folder" => paths.push(value()?.into()),
            "--sweep" => sweep = true,
            "--pack" => pack = true,
            _ => bail!(
                "usage: copy-bench [--gb N] [--disk-gb N] [--folder F]... [--lanes N] [--sweep] [--pack]"
            ),
        }
    }
    let bytes = |gb: f64| (gb * 1e9) as u64;
    let bench = Bench::new(bytes(gb), lanes)?;
    bench.scan()?;
    bench.snapshot()?;
    bench.discard()?;
    if pack {
        bench.pack()?;
    }
    for path in paths {
        let folder = bench.folder(&path, bytes(disk_gb), sweep)?;
        let codecs: &[Codec] = if pack { &[Codec::None, Codec::Lz4, Codec::Zstd] } else { &[Codec::None] };
        let all = || {
            bench.save_to(&folder)?;
            codecs.iter().try_for_each(|codec| bench.load_from(&folder, *codec))
        };
        let result = all();
        // Also after a failure: what is left here may be all of the machine's memory.
        let removed = std::fs::remove_dir_all(&folder.path);
        result?;
        removed?;
    }
    Ok(())
}
