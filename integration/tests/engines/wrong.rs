//! Everything that can be wrong with a checkpoint or restore, in any engine, and the words that have to reach the person.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_integration::container::{Ended, Place};
use phos_integration::processes::process_with;
use phos_integration::tools::Tools;

use crate::{refused, script, steps};

/// A variable of phos-runc's environment, its value, and the words that say what is wrong with it.
pub type Hindrance = (&'static str, String, &'static str);

/// A lower runtime whose CRIU fails, for a reason that is in CRIU's log only.
fn broken_runtime(place: &Place) -> Result<String> {
    let text = format!(
        r#"#!/bin/sh
for word in "$@"; do
    case "$previous" in --work-path) work=$word ;; --log) log=$word ;; esac
    case "$word" in checkpoint) verb=dump ;; restore) verb=restore ;; esac
    previous=$word
done
[ -n "$verb" ] && [ -n "$work" ] || exec {} "$@"
mkdir -p "$work"
{{ echo '(00.01) Error (criu/x.c:1): This is why'; echo '(00.02) Error (criu/x.c:2): It FAILED.'; }} >"$work/$verb.log"
[ -z "$log" ] || printf '%s\n' '{{"level":"error","msg":"criu failed: type NOTIFY errno 0\nlog file: x","time":"2026-01-01T00:00:00Z"}}' >>"$log"
echo 'criu failed: type NOTIFY errno 0' >&2
exit 1
"#,
        place.tools.runc.display()
    );
    script(place, "broken-runc", &text)
}

/// What neither a checkpoint nor a restore can do without.
fn common(place: &Place) -> Result<Vec<Hindrance>> {
    let old = script(place, "old-criu", "#!/bin/sh\necho Version: 3.17.1\n")?;
    Ok(vec![
        ("PHOS_CRIU", "/does/not/exist".into(), "no CRIU found: install criu 4.1 or newer"),
        ("PHOS_CRIU", old, "is CRIU 3.17.1: version 4.1 or newer is needed"),
        ("PHOS_LIBCUDA", "/does/not/exist".into(), "no NVIDIA driver library on this host"),
        ("PHOS_LOWER_RUNTIME", broken_runtime(place)?, "CRIU: This is why (see "),
    ])
}

/// What makes a checkpoint impossible.
pub fn hindrances(place: &Place) -> Result<Vec<Hindrance>> {
    let mut all = common(place)?;
    all.push((
        "PHOS_STRATEGY",
        "fast".into(),
        "unknown strategy 'fast': use auto, snapshot, precopy or stop",
    ));
    Ok(all)
}

/// The same of a restore.
pub fn restore_hindrances(place: &Place) -> Result<Vec<Hindrance>> {
    let mut all = common(place)?;
    all.extend([
        ("SIMCUDA_DEVICES", "0".into(), "CUDA_ERROR_NO_DEVICE"),
        ("SIMCUDA_DRIVER", "12080".into(), "made with driver API 13000, this machine runs API 12080"),
        ("SIMCUDA_UUID_SEED", "1".into(), "the image needs a Simulated GPU (GPU-"),
        ("SIMCUDA_MEMORY", "4194304".into(), "4194304 bytes free"),
    ]);
    Ok(all)
}

/// The sample with a kernel that does not end as long as /out/hang exists; see [`impatient`].
pub const HANGING: [&str; 2] = ["--hang-file", "/out/hang"];

/// A place whose checkpoints wait for the GPU for one second.
pub fn impatient(tools: &Tools) -> Result<Place> {
    let place = Place::new(tools)?;
    fs::write(place.path("config.toml"), "drain_timeout = 1\n")?;
    Ok(place)
}

/// While the GPU is busy without end, a checkpoint is refused; then the program goes on.
pub fn refused_while_busy(out: &Path, checkpoint: impl Fn() -> Result<Ended>) -> Result<()> {
    fs::write(out.join("hang"), "")?;
    thread::sleep(Duration::from_millis(300));
    refused(&checkpoint()?, &["did not finish in time", "drain_timeout"])?;
    fs::remove_file(out.join("hang"))?;
    steps(&out.join("status"), 3).map(|_| ())
}

/// The same while the process stands still. It is given ten seconds.
pub fn refused_while_silent(out: &Path, checkpoint: impl Fn() -> Result<Ended>) -> Result<()> {
    let pid = Pid::from_raw(process_with(&["/usr/bin/phos-sample"]).context("the sample's process")?);
    kill(pid, Signal::SIGSTOP)?;
    let ended = checkpoint();
    kill(pid, Signal::SIGCONT)?;
    refused(&ended?, &["does not answer"])?;
    steps(&out.join("status"), 3).map(|_| ())
}

/// A checkpoint that the engine writes to `folder` is refused for lack of space.
pub fn refused_without_space(folder: &Path, checkpoint: impl Fn() -> Result<Ended>) -> Result<()> {
    fs::create_dir_all(folder)?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("size=1m"))?;
    let ended = checkpoint();
    umount(folder)?;
    refused(&ended?, &["MiB free, the checkpoint needs about"])
}

/// A checkpoint is refused because a folder cannot be written.
pub fn refused_read_only(folder: &Path, words: &str, checkpoint: impl Fn() -> Result<Ended>) -> Result<()> {
    let none: Option<&str> = None;
    fs::create_dir_all(folder)?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::MS_RDONLY, none)?;
    let ended = checkpoint();
    umount(folder)?;
    refused(&ended?, &[words])
}

/// The folder of the image below `folder`.
pub fn image_below(folder: &Path) -> Result<PathBuf> {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        if folder.join("phos.json").is_file() {
            return Ok(folder);
        }
        let entries = fs::read_dir(folder)?.flatten();
        folders.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    anyhow::bail!("no image")
}

/// A restore of the image below `folder` is refused as long as it is damaged, in each of these ways.
pub fn refused_while_damaged(folder: &Path, restore: impl Fn() -> Result<Ended>) -> Result<()> {
    let image = image_below(folder)?;
    let flipped = |mut bytes: Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes
    };
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let version = |bytes| replaced(bytes, "\"version\": 1", "\"version\": 7");
    let size = |bytes| replaced(bytes, "\"size\": ", "\"size\": 9999999999");
    type Damage<'a> = &'a dyn Fn(Vec<u8>) -> Vec<u8>;
    let ways: [(&str, Damage<'_>, &str); 4] = [
        ("phos-gpu-0.img", &flipped, "phos-gpu-0.img is damaged"),
        ("phos.json", &cut, "manifest is damaged"),
        ("phos.json", &version, "format version 7"),
        ("phos.json", &size, " bytes"),
    ];
    for (name, damage, words) in ways {
        let path = image.join(name);
        let good = fs::read(&path)?;
        fs::write(&path, damage(good.clone()))?;
        let ended = restore();
        fs::write(&path, good)?;
        refused(&ended?, &[words])?;
    }
    Ok(())
}

/// A text with its first `from` replaced.
fn replaced(bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    String::from_utf8_lossy(&bytes).replacen(from, to, 1).into_bytes()
}
