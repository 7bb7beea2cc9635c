//! What an administrator or an engine writes: `config.toml`, and a container's `config.json`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use phos_hooks::{Host, Mode, detect, inject, inject_as, late, merge, plan};
use serde_json::Value;

#[allow(dead_code, unused, clippy::all)]
#[path = "../../../runtime/src/config.rs"]
mod file;

/// A configuration file.
pub fn config(data: &[u8]) {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder"));
    let path = folder.path().join("config.toml");
    fs::write(&path, data).expect("written");
    // SAFETY: every caller in this process sets the same value, and nothing else reads the environment meanwhile.
    unsafe { std::env::set_var(file::PATH_ENV, &path) };
    match file::Config::load() {
        Ok(config) => {
            let (_, _) = (config.inject(), config.strategy(None));
            let _ = (config.timeouts(), config.library(), config.state_dir());
        }
        Err(e) => {
            let line = format!("{e:#}");
            assert!(!line.contains('\n'), "not one line: {line:?}");
        }
    }
}

/// A bundle whose root file system has a driver and a C library, and the host's side of an injection.
fn bundle() -> &'static (tempfile::TempDir, Host) {
    static BUNDLE: OnceLock<(tempfile::TempDir, Host)> = OnceLock::new();
    BUNDLE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut library = vec![0u8; 64];
        library[..5].copy_from_slice(b"\x7fELF\x02");
        (library[16], library[18]) = (3, 62);
        library.extend_from_slice(b"GLIBC_2.36\0\0");
        for name in ["rootfs/usr/lib64/libc.so.6", "rootfs/usr/lib64/libcuda.so.1", "libphos.so", "phos-hook"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, &library).expect("written");
        }
        let at = |name: &str| folder.path().join(name);
        let host = Host {
            library: at("libphos.so"),
            hook: at("phos-hook"),
            control_dir: "/run/phos-runc/c/ctl".into(),
            default_mode: Mode::Mount,
        };
        (folder, host)
    })
}

/// Whether reading the configuration would lead out of the fuzzer's own folder.
fn leaves(spec: &Value) -> bool {
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    let root = spec["root"]["path"].as_str().unwrap_or_default();
    mounts.filter_map(|m| m["source"].as_str()).any(|s| s.starts_with('/')) || root.starts_with('/') || root.contains("..")
}

/// A container's configuration, one that an image remembers, and a `mountinfo`, separated by NUL.
pub fn spec(data: &[u8]) {
    let mut parts = data.splitn(3, |b| *b == 0);
    let mut json = || parts.next().and_then(|p| serde_json::from_slice::<Value>(p).ok()).unwrap_or_default();
    let (spec, effective) = (json(), json());
    let mountinfo = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let well_formed = phos_hooks::check(&spec);
    if let Err(line) = &well_formed {
        assert!(!line.contains('\n'));
        return;
    }
    if leaves(&spec) {
        return;
    }
    let (folder, host) = bundle();
    let modes = [Mode::Mount, Mode::Preload, Mode::Off];
    let injections = modes.map(|m| inject_as(m, &spec, folder.path(), host));
    for injection in injections.into_iter().chain([inject(&spec, folder.path(), host)]) {
        let mut once = spec.clone();
        plan::apply(&mut once, &injection.edits);
        let mut twice = once.clone();
        plan::apply(&mut twice, &injection.edits);
        assert_eq!(once, twice, "done twice is done once");
        if injection.edits.is_empty() {
            assert_eq!(once, spec, "nothing to do changes nothing");
        }
        for (key, value) in spec.as_object().into_iter().flatten() {
            if !["mounts", "hooks", "process", "annotations"].contains(&key.as_str()) {
                assert_eq!(once.get(key), Some(value), "{key} is none of our business");
            }
        }
    }
    let mut merged = spec.clone();
    merge::merge(&mut merged, &effective);
    let before = merged.clone();
    merge::merge(&mut merged, &effective);
    assert_eq!(merged, before, "merged twice is merged once");
    let _ = detect::injected(&effective);
    let inside = late::parse(&mountinfo);
    let root = PathBuf::from("/ctr/rootfs");
    let mounts = late::mounts(&inside, &inside, &spec, &root);
    if let Ok(options) = late::criu_options(&mounts) {
        for line in options.lines() {
            assert!(line.starts_with("external mnt[/") && line.split_whitespace().count() == 2, "{line:?}");
        }
    }
    let mut remembered = spec;
    late::remember(&mut remembered, &mounts, |p| (p == Path::new("/dev/nvidia0")).then_some((195, 0)));
}
