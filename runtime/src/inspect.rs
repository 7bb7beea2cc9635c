//! `inspect IMAGE [--json] [--verify]`: what a GPU image holds.

use std::path::Path;

use anyhow::{Result, bail};
use phos_engine::image::{Codec, Image};

use crate::args::Args;
use crate::log::rfc3339;

const MIB: u64 = 1 << 20;

/// Prints the image's contents.
pub fn run(args: &Args) -> Result<i32> {
    // Flags may stand on either side of the path here.
    let words: Vec<_> =
        args.all[args.verb_at + 1..].iter().map(|w| w.to_string_lossy().into_owned()).collect();
    let (flags, paths): (Vec<_>, Vec<_>) = words.iter().partition(|w| w.starts_with('-'));
    if let Some(flag) = flags.iter().find(|f| !["--json", "--verify"].contains(&f.as_str())) {
        bail!("inspect: unknown flag {flag}: use --json or --verify");
    }
    let [path] = paths.as_slice() else { bail!("usage: phos-runc inspect IMAGE [--json] [--verify]") };
    let image = Image::open(Path::new(path))?;
    let stored: u64 = image.manifest.files.iter().map(|f| f.size).sum();
    if flags.iter().any(|f| *f == "--verify") {
        image.verify()?;
    }
    let m = &image.manifest;
    if flags.iter().any(|f| *f == "--json") {
        println!("{}", serde_json::to_string_pretty(m)?);
        return Ok(0);
    }
    let made = std::time::UNIX_EPOCH + std::time::Duration::from_secs(m.created);
    println!("container   {} at {} by {}", m.container, rfc3339(made), m.made_by);
    let release = if m.driver.release.is_empty() { "-" } else { &m.driver.release };
    println!("driver      {release} (CUDA API {})", m.driver.version);
    println!("below       {}, CRIU {}", m.lower_runtime, m.criu);
    for gpu in &m.gpus {
        println!("gpu         {} {} ({} MiB)", gpu.name, gpu.uuid, gpu.total_bytes / MIB);
    }
    for (i, p) in m.processes.iter().enumerate() {
        let of = m.allocations.iter().filter(|a| a.process as usize == i);
        let (count, bytes) = of.fold((0, 0), |(n, b), a| (n + 1, b + a.size));
        let shared = match m.shared.iter().filter(|s| s.process as usize == i).count() {
            0 => String::new(),
            n => format!(", {n} shared with another process"),
        };
        let how = if p.has_library { "" } else { " (saved by the driver alone)" };
        println!(
            "process     {} {}: {count} allocations, {} MiB{shared}{how}",
            p.pid,
            p.command,
            bytes / MIB
        );
    }
    let packed = match Codec::of(&m.features) {
        Ok(codec) if codec != Codec::None => format!(", packed by {codec}"),
        _ => String::new(),
    };
    println!(
        "gpu memory  {} MiB, {} MiB stored in {} files{packed}",
        m.gpu_bytes() / MIB,
        stored / MIB,
        m.files.len()
    );
    if m.is_pre_dump() {
        println!("kind        pre-dump: a base for a later checkpoint, not restorable by itself");
    }
    if let Some(parent) = &m.parent {
        println!("parent      {} (chunks that did not change are there)", parent.path);
    }
    m.warnings.iter().for_each(|w| println!("warning     {w}"));
    Ok(0)
}
