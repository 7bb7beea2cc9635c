//! Bad input gets one clear line, exit status 1, the container as it was, and no image left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_integration::bundle::Gpu;
use phos_integration::container::{Container, Ended, Place};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// One line, in the log as well, with these words in it.
fn is_one_clear_line(container: &Container<'_>, ended: &Ended, words: &[&str]) -> Result<()> {
    let error = container.last_error()?;
    ensure!(ended.status == 1, "status {}: {error}", ended.status);
    ensure!(
        ended.text.is_empty() || ended.text.trim_end() == error,
        "printed {:?}, logged {error:?}",
        ended.text
    );
    ensure!(!error.contains('\n') && !error.is_empty(), "not one line: {error:?}");
    for word in words {
        ensure!(error.contains(word), "{error:?} does not say {word:?}");
    }
    Ok(())
}

/// A checkpoint that must be refused with these words and change nothing.
fn refused(container: &Container<'_>, name: &str, words: &[&str]) -> Result<()> {
    let image = container.image(name);
    let before: Option<Vec<_>> =
        fs::read_dir(&image).ok().map(|d| d.flatten().map(|e| e.file_name()).collect());
    let ended = container.try_checkpoint(name, true)?;
    is_one_clear_line(container, &ended, words)?;
    let after: Option<Vec<_>> =
        fs::read_dir(&image).ok().map(|d| d.flatten().map(|e| e.file_name()).collect());
    ensure!(before == after, "the image folder held {before:?}, now {after:?}");
    ensure!(container.state()? == "running");
    container.steps(3)?;
    Ok(())
}

fn checkpoints(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    fs::write(place.path("config.toml"), "drain_timeout = 1\n")?;
    let old = place.path("old-criu");
    fs::write(&old, "#!/bin/sh\necho Version: 3.17.1\n")?;
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755))?;
    let good = place.env["PHOS_CRIU"].clone();
    let hang = "/out/hang";
    let options = ["--mib", "24", "--hang-file", hang];

    // Containers borrow their place, so each environment gets a container of its own.
    for (variable, value, words) in [
        ("PHOS_CRIU", "/does/not/exist".into(), vec!["CRIU"]),
        ("PHOS_CRIU", old.clone().into_os_string(), vec!["3.17.1", "4.1"]),
        ("PHOS_STRATEGY", "fast".into(), vec!["'fast'", "snapshot"]),
        ("PHOS_LIBCUDA", "/does/not/exist".into(), vec!["driver", "PHOS_LIBCUDA"]),
    ] {
        let kept = place.env.insert(variable.into(), value);
        let container = place.sample(&options)?;
        container.start()?;
        container.steps(2)?;
        refused(&container, "environment", &words)?;
        drop(container);
        match kept {
            Some(v) => place.env.insert(variable.into(), v),
            None => place.env.remove(variable),
        };
    }
    assert_eq!(place.env["PHOS_CRIU"], good);

    let container = place.sample(&options)?;
    container.start()?;
    container.steps(2)?;
    fs::create_dir(container.image("full"))?;
    fs::write(container.image("full").join("mine"), "x")?;
    refused(&container, "full", &["not empty"])?;
    fs::write(container.image("file"), "x")?;
    refused(&container, "file", &["not a folder"])?;
    let none: Option<&str> = None;
    for (name, options, words) in [("read-only", "size=64m", "written"), ("small", "size=1m", "MiB free")] {
        let folder = container.image(name);
        fs::create_dir(&folder)?;
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some(options))?;
        if name == "read-only" {
            mount(none, &folder, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
        }
        let result = refused(&container, name, &[words]);
        umount(&folder)?;
        result?;
    }

    // The space runs out in the middle of the dump.
    container.checkpoint("fits", true)?;
    let bytes = place.report()?["gpu_bytes"].as_u64().unwrap_or(0);
    for (name, leave_running) in [("full-running", true), ("full-stopping", false)] {
        let folder = container.image(name);
        fs::create_dir(&folder)?;
        let size = format!("size={}", bytes + bytes / 64 + (1 << 20));
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))?;
        let ended = container.try_checkpoint(name, leave_running)?;
        let left = fs::read_dir(&folder)?.count();
        umount(&folder)?;
        ensure!(ended.status != 0 && left == 0, "{ended:?}, {left} files left");
        container.steps(3)?;
    }

    // The GPU is busy with a kernel that does not end: refused after the drain timeout, and the program goes on.
    fs::write(container.bundle.out.join("hang"), "")?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let ended = container.try_checkpoint("hanging", true)?;
    is_one_clear_line(&container, &ended, &["phos-sample", "did not finish", "drain_timeout"])?;
    fs::remove_file(container.bundle.out.join("hang"))?;
    container.steps(3)?;
    ensure!(!container.image("hanging").exists());

    // A process that is stopped does not answer.
    let pid = Pid::from_raw(container.pid()?);
    kill(pid, Signal::SIGSTOP)?;
    let ended = container.try_checkpoint("silent", true)?;
    kill(pid, Signal::SIGCONT)?;
    is_one_clear_line(&container, &ended, &["does not answer"])?;
    container.steps(3)?;

    // Not running any more: the lower runtime says so.
    fs::write(container.bundle.out.join("stop"), "")?;
    while container.state()? == "running" {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    ensure!(container.try_checkpoint("ended", true)?.status != 0);
    ensure!(!container.image("ended").join("phos.json").exists());
    Ok(())
}

#[test]
fn a_checkpoint_that_cannot_be_is_refused_and_changes_nothing() {
    sandboxed("a_checkpoint_that_cannot_be_is_refused_and_changes_nothing", |tools| {
        checkpoints(tools).unwrap()
    });
}

/// A restore that must be refused with these words and leave no container.
fn no_restore(container: &Container<'_>, image: &str, words: &[&str]) -> Result<()> {
    let ended = container.try_restore(image)?;
    is_one_clear_line(container, &ended, words)?;
    ensure!(container.state()?.is_empty(), "a container was left behind");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(to);
    ensure!(Command::new("cp").arg("-a").arg(from).arg(to).status()?.success());
    Ok(())
}

fn restores(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    let (id, bundle);
    {
        let container = place.sample(&["--mib", "24"])?;
        container.start()?;
        container.steps(3)?;
        container.checkpoint("good", false)?;
        container.try_verb("delete", &["--force"])?;
        (id, bundle) = (container.id.clone(), container.bundle.clone());
    }
    let runtime = tools.program("phos-runc");
    let again = |place: &Place, f: &dyn Fn(&Container<'_>) -> Result<()>| -> Result<()> {
        f(&Container { place, id: id.clone(), bundle: bundle.clone(), runtime: runtime.clone() })
    };
    // Another machine, as far as the simulated driver can tell.
    for (variable, value, words) in [
        ("SIMCUDA_DEVICES", "0", vec!["CUDA_ERROR_NO_DEVICE"]),
        ("SIMCUDA_UUID_SEED", "1", vec!["the image needs a Simulated GPU"]),
        ("SIMCUDA_MEMORY", "4194304", vec!["the image needs a Simulated GPU", "4194304 bytes free"]),
        ("SIMCUDA_DRIVER", "12080", vec!["another driver", "12080", "13000"].split_off(1)),
        ("PHOS_LIBCUDA", "/does/not/exist", vec!["driver"]),
    ] {
        let kept = place.env.insert(variable.into(), value.into());
        let result = again(&place, &|c| no_restore(c, "good", &words));
        match kept {
            Some(v) => place.env.insert(variable.into(), v),
            None => place.env.remove(variable),
        };
        result?;
    }
    again(&place, &|container| {
        let (good, bad) = (container.image("good"), container.image("bad"));
        // One byte in every file of the GPU image. Each time, the image is otherwise whole.
        let mut changed = 0;
        for name in ["phos-gpu-0.img", "phos-gpu-1.img", "phos-chunks.idx"] {
            copy(&good, &bad)?;
            let path = bad.join(name);
            let mut bytes = fs::read(&path)?;
            // One of the two threads that copy may have come too late for any work.
            if bytes.is_empty() {
                continue;
            }
            changed += 1;
            let at = bytes.len() / 2;
            bytes[at] ^= 1;
            fs::write(&path, bytes)?;
            no_restore(container, "bad", &["damaged"])?;
        }
        ensure!(changed >= 2, "{changed} files were changed");
        let text = fs::read_to_string(good.join("phos.json"))?;
        for (from, to, words) in [
            ("\"version\": 1", "\"version\": 7", "format version 7"),
            ("\"size\": 2097152", "\"size\": 99999999999999", "bytes"),
            ("\"features\": []", "\"features\": [\"x\"]", "'x'"),
            ("phos-gpu-0.img", "../../etc/passwd", "called"),
        ] {
            copy(&good, &bad)?;
            ensure!(text.contains(from), "{from}");
            fs::write(bad.join("phos.json"), text.replacen(from, to, 1))?;
            no_restore(container, "bad", &[words])?;
        }
        fs::write(bad.join("phos.json"), &text[..text.len() / 2])?;
        no_restore(container, "bad", &["manifest is damaged"])?;
        copy(&good, &bad)?;
        fs::remove_file(bad.join("phos-gpu-1.img"))?;
        no_restore(container, "bad", &["phos-gpu-1.img"])?;
        // What was refused did not spoil anything.
        container.restore("good")?;
        container.steps(3)?;
        Ok(())
    })
}

#[test]
fn an_image_that_cannot_be_restored_is_refused() {
    sandboxed("an_image_that_cannot_be_restored_is_refused", |tools| restores(tools).unwrap());
}

fn without_gpu(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let script =
        "i=0; while [ ! -e /out/stop ]; do i=$((i+1)); echo $i > /out/count; /bin/busybox sleep 0.02; done";
    let mut files = Vec::new();
    for runtime in [tools.program("phos-runc"), tools.runc.clone()] {
        let mut container = place.container(&["/bin/sh", "-c", script], &Gpu::No)?;
        container.runtime = runtime;
        let before = fs::read(container.bundle.path.join("config.json"))?;
        container.start()?;
        let after = fs::read(container.bundle.path.join("config.json"))?;
        ensure!(before == after, "the configuration was touched");
        let count = || fs::read_to_string(container.bundle.out.join("count")).unwrap_or_default();
        while count().is_empty() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        container.checkpoint("image", false)?;
        let mut names: Vec<_> = fs::read_dir(container.image("image"))?
            .flatten()
            .flat_map(|e| e.file_name().into_string())
            .collect();
        // Process ids are part of some names; the kinds of files must be the same.
        names.iter_mut().for_each(|n| n.retain(|c| !c.is_ascii_digit()));
        names.sort();
        names.dedup();
        files.push(names);
        container.try_verb("delete", &["--force"])?;
        let stood = count();
        container.restore("image")?;
        while count() == stood {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    ensure!(files[0] == files[1], "{:?} is not {:?}", files[0], files[1]);
    ensure!(!files[0].iter().any(|f| f.starts_with("phos")));
    Ok(())
}

#[test]
fn a_container_without_a_gpu_is_the_lower_runtimes_business() {
    sandboxed("a_container_without_a_gpu_is_the_lower_runtimes_business", |tools| {
        without_gpu(tools).unwrap()
    });
}
