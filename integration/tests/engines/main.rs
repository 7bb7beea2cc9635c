//! The commands people type, on real engines: Docker, Podman and containerd with their daemons and monitors. Each test
//! runs with the engines of this machine, and with those of Debian 13 and 14 in root file systems of theirs.

mod containerd;
mod cri;
mod docker;
mod podman;
mod wrong;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use phos_integration::bundle::{Bundle, Gpu};
use phos_integration::container::{Ended, Place};
use phos_integration::engine::present;
use phos_integration::root;
use phos_integration::sandbox::sandboxed_in;
use phos_integration::status;
use phos_integration::tools::Tools;

/// Tests of one body: with this machine's engines, with Debian 13's and with Debian 14's.
macro_rules! generations {
    ($name:ident, $program:literal, $body:path) => {
        mod $name {
            #[test]
            fn this_machine() {
                crate::on(None, concat!(module_path!(), "::this_machine"), $program, $body);
            }

            #[test]
            fn debian_13() {
                crate::on(Some(13), concat!(module_path!(), "::debian_13"), $program, $body);
            }

            #[test]
            fn debian_14() {
                crate::on(Some(14), concat!(module_path!(), "::debian_14"), $program, $body);
            }
        }
    };
}
use generations;

fn on(version: Option<u32>, path: &str, program: &str, test: fn(&Tools) -> Result<()>) {
    let name = path.split_once("::").map_or(path, |(_, inside)| inside);
    let root = version.map(root::debian);
    if let (Some(version), Some(root)) = (version, &root)
        && !root.join(".packages").exists()
    {
        let reason = format!("no engines of Debian {version}: run integration/scripts/setup.sh engines");
        assert!(std::env::var("CI").is_err(), "{reason}");
        eprintln!("skipped {name}: {reason}");
        return;
    }
    sandboxed_in(root.as_deref(), name, |tools| {
        if present(program)
            && let Err(e) = test(tools)
        {
            panic!("{e:?}");
        }
    });
}

/// What the README says is tested is what is tested: on the systems that its table is about, it has this version.
fn documented(engine: &str, version: &str) -> Result<()> {
    let number =
        version.split(|c: char| !c.is_ascii_digit() && c != '.').find(|w| w.contains('.')).unwrap_or("");
    let short = number.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    let system = root::system();
    eprintln!("{engine} {number} on {system}");
    let readme = include_str!("../../../README.md");
    let rows = readme.lines().filter_map(|l| l.strip_prefix("| ")?.strip_prefix(engine)?.strip_prefix(" | "));
    let named = rows.flat_map(|row| row.split(" | ").next().unwrap_or("").split(", ")).any(|v| v == short);
    ensure!(
        named || !matches!(system.as_str(), "debian 12" | "debian 13"),
        "the README does not name {engine} {short}"
    );
    Ok(())
}

/// The sample in any engine: its GPU, its output folder.
const DEVICE: [&str; 2] = ["--device", "/dev/fuse:/dev/simgpu0"];
const SAMPLE: [&str; 5] = ["/usr/bin/phos-sample", "--out", "/out/status", "--mib", "16"];

/// A seccomp profile: something to be restored, with something that the sample does not do forbidden.
const SECCOMP: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["ptrace", "add_key"], "action": "SCMP_ACT_ERRNO"}]}"#;

/// A root file system with the sample in it.
fn sample_root(place: &Place) -> Result<Bundle> {
    Bundle::make(&place.tools, &place.path("engine"), "unused", &[], &Gpu::Simulated)
}

/// Waits for further steps; every line so far must be right. Returns the last step.
fn steps(file: &Path, more: usize) -> Result<u64> {
    let lines = status::wait_for(file, more, Duration::from_secs(60))?;
    status::check(&lines)?;
    Ok(lines.last().map_or(0, |l| l.step))
}

/// Waits for the first steps of a program that was restored: they continue at step `from` or a little later.
fn steps_again(file: &Path, from: u64) -> Result<()> {
    let lines = status::wait_for(file, 5, Duration::from_secs(60))?;
    status::check(&lines)?;
    // The step that was under way when the program was stopped may not have been written then.
    ensure!((2..=from + 1).contains(&lines[0].step), "at {from} it stood, at {} it goes on", lines[0].step);
    Ok(())
}

/// containerd and Docker freeze a container before its checkpoint, with runc's own `pause`. On a busy machine with the
/// old cgroup hierarchy runc gives that up («unable to freeze»); a person would try again.
fn patiently(checkpoint: impl Fn() -> Result<Ended>) -> Result<Ended> {
    for _ in 0..5 {
        match checkpoint()? {
            ended if ended.text.contains("unable to freeze") => eprintln!("again: {}", ended.text),
            ended => return Ok(ended),
        }
    }
    checkpoint()
}

/// What CRIU itself has to say, where an engine names its log: for a test that failed.
fn say_why(ended: &Ended) {
    let log = ended.text.split("path= ").nth(1).and_then(|t| t.split(": unknown").next()).unwrap_or_default();
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().filter(|l| l.contains("Error") || l.contains("Warn")).for_each(|l| eprintln!("{l}"));
}

/// A command that must succeed.
fn done(ended: Ended) -> Result<String> {
    if ended.status != 0 {
        say_why(&ended);
    }
    ensure!(ended.status == 0, "ended with {}: {}", ended.status, ended.text);
    Ok(ended.text)
}

/// A command that must be refused with these words.
fn refused(ended: &Ended, words: &[&str]) -> Result<()> {
    ensure!(ended.status != 0, "was not refused: {}", ended.text);
    for word in words {
        ensure!(ended.text.contains(word), "{:?} does not say {word:?}", ended.text);
    }
    Ok(())
}

/// A new folder that any user may write to.
fn open_folder(place: &Place, name: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = place.path(name);
    fs::create_dir_all(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
    Ok(path)
}

/// Options for a user other than root. CRIU asks for the limits of the processes, and needs `CAP_SYS_RESOURCE` for those
/// of another user.
fn user() -> &'static [&'static str] {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap_or_default().trim();
    if u64::from_str_radix(effective, 16).unwrap_or(0) >> 24 & 1 == 1 {
        return &["--user", "1000:1000"];
    }
    eprintln!("skipped: --user, this machine has no CAP_SYS_RESOURCE");
    &[]
}

/// A program in the place.
fn script(place: &Place, name: &str, text: &str) -> Result<String> {
    use std::os::unix::fs::PermissionsExt;
    let path = place.path(name);
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path.display().to_string())
}

/// A lower runtime that says in a file that it is about to checkpoint, waits for a second, and does.
fn slow_runtime(place: &Place) -> Result<String> {
    let (mark, runc) = (place.path("dumping"), &place.tools.runc);
    let case = format!("case \" $* \" in *' checkpoint '*) : >{}; sleep 1 ;; esac", mark.display());
    script(place, "slow-runc", &format!("#!/bin/sh\n{case}\nexec {} \"$@\"\n", runc.display()))
}
