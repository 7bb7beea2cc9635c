//! Who may do what: capabilities of the processes, modes of the files, users who are not the host's root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phos_engine::privilege::{KEEPER, RESTORE_KEEPER, WORKER};
use phos_integration::container::Place;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// A field of `/proc/PID/status`.
fn field(status: &str, name: &str) -> Result<String> {
    let found = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    Ok(found.with_context(|| format!("no {name} in {status:?}"))?.trim().to_string())
}

fn capabilities(status: &str) -> Result<u64> {
    Ok(u64::from_str_radix(&field(status, "CapEff")?, 16)?)
}

/// Writes an executable script.
fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn processes(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    let (lower, seen) = (place.path("watching-runc"), place.path("seen"));
    fs::create_dir(&seen)?;
    // In a checkpoint the lower runtime's parent is the worker, and that one's is the keeper.
    let text = format!(
        "#!/bin/sh\ncase \" $* \" in *' checkpoint '*)\n cat /proc/$PPID/status >{0}/worker\n cat /proc/$$/status >{0}/lower\n \
         keeper=$(sed -n 's/^PPid:[^0-9]*//p' {0}/worker)\n cat /proc/$keeper/status >{0}/keeper ;;\n\
         *' restore '*) for p in /proc/[0-9]*; do grep -q __keeper $p/cmdline 2>/dev/null && cat $p/status >{0}/restore; done ;;\nesac\nexec {1} \"$@\"\n",
        seen.display(),
        tools.runc.display()
    );
    script(&lower, &text)?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), lower.into());
    let container = place.sample(&["--mib", "8"])?;
    container.start()?;
    container.steps(2)?;
    container.checkpoint("image", true)?;
    container.steps(2)?;
    let read = |name: &str| fs::read_to_string(seen.join(name));
    let mask = |list: &[caps::Capability]| list.iter().fold(0, |m, c| m | c.bitmask());
    let own = capabilities(&fs::read_to_string("/proc/self/status")?)?;
    ensure!(capabilities(&read("worker")?)? == mask(WORKER) & own, "{}", read("worker")?);
    ensure!(capabilities(&read("keeper")?)? == mask(KEEPER) & own, "{}", read("keeper")?);
    ensure!(capabilities(&read("lower")?)? == own, "the lower runtime has all: {}", read("lower")?);
    container.stop_and_restore("stopped")?;
    container.steps(2)?;
    ensure!(capabilities(&read("restore")?)? == mask(RESTORE_KEEPER) & own, "{}", read("restore")?);
    // What is written is its owner's alone.
    for entry in fs::read_dir(container.image("image"))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let meta = entry.metadata()?;
        if name.starts_with("phos") {
            ensure!(meta.mode() & 0o7777 == 0o600 && meta.uid() == 0, "{name} has mode {:o}", meta.mode());
        }
    }
    ensure!(fs::metadata(container.image("image"))?.mode() & 0o7777 == 0o700);
    for entry in fs::read_dir(place.path("state"))?.flatten() {
        let mode = entry.metadata()?.mode() & 0o7777;
        if entry.file_type()?.is_file() {
            ensure!(mode == 0o600, "the lock {:?} has mode {mode:o}", entry.file_name());
            continue;
        }
        ensure!(mode == 0o700);
        for name in ["effective-spec.json", "engine.log"] {
            let mode = fs::metadata(entry.path().join(name))?.mode();
            ensure!(mode & 0o077 == 0 || mode & 0o022 == 0, "{name} has mode {mode:o}");
        }
    }
    Ok(())
}

#[test]
fn keeper_and_worker_keep_what_they_need_and_the_lower_runtime_all() {
    sandboxed("keeper_and_worker_keep_what_they_need_and_the_lower_runtime_all", |tools| {
        processes(tools).unwrap()
    });
}

/// A hook waits for the runtime's state on its standard input; by then it has given up what it does not need.
fn hook(tools: &Tools) -> Result<()> {
    let mut hook = Command::new(tools.program("phos-hook"))
        .args(["late", "/none"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let status = loop {
        let status = fs::read_to_string(format!("/proc/{}/status", hook.id()))?;
        if field(&status, "NoNewPrivs")? == "1" || Instant::now() > deadline {
            break status;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    drop(hook.stdin.take());
    hook.wait()?;
    ensure!(field(&status, "NoNewPrivs")? == "1", "{status}");
    // CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH and CAP_DAC_OVERRIDE.
    ensure!(capabilities(&status)? & !(1 << 21 | 1 << 2 | 1 << 1) == 0, "{status}");
    Ok(())
}

#[test]
fn the_hook_keeps_what_mounting_needs() {
    sandboxed("the_hook_keeps_what_mounting_needs", |tools| hook(tools).unwrap());
}

/// Runs phos-runc on a container as somebody who is not the host's root; what it wrote to its log.
fn as_other(place: &Place, how: &[&str], verb: &[&str], id: &str) -> Result<(i32, String)> {
    let log = place.path("other.log");
    let _ = fs::remove_file(&log);
    fs::write(&log, "")?;
    fs::set_permissions(&log, fs::Permissions::from_mode(0o666))?;
    let (runtime, root) = (place.tools.program("phos-runc"), place.path("root"));
    let mut words: Vec<String> = how.iter().map(|w| w.to_string()).collect();
    for word in [runtime.as_path(), Path::new("--root"), &root, Path::new("--log"), &log] {
        words.push(word.to_string_lossy().into_owned());
    }
    words.extend(verb.iter().map(|w| w.to_string()));
    words.push(id.into());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ended = place.command(Path::new("/usr/bin/env"), &words, false)?;
    Ok((ended.status, fs::read_to_string(log)?))
}

fn rootless(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    let container = place.sample(&["--mib", "8"])?;
    container.start()?;
    container.steps(2)?;
    container.checkpoint("image", true)?;
    let (id, bundle) = (container.id.clone(), container.bundle.path.clone());
    let image = container.image("image").to_string_lossy().into_owned();
    let namespace = ["unshare", "--user", "--map-root-user", "--"];
    for verb in ["checkpoint", "restore"] {
        let path = if verb == "restore" { image.clone() } else { format!("{image}-2") };
        let (status, log) = as_other(&place, &namespace, &[verb, "--image-path", &path], &id)?;
        ensure!(status == 1 && log.lines().count() == 1, "{log}");
        ensure!(log.contains("needs the host's root") && log.contains("user namespace"), "{log}");
    }
    ensure!(!Path::new(&format!("{image}-2")).exists());
    container.steps(2)?;
    drop(container);
    // A container is made as if there were no phos-runc, and the log says what that means.
    let (lower, called) = (place.path("fake-runc"), place.path("called"));
    fs::create_dir(&called)?;
    fs::write(called.join("words"), "")?;
    fs::set_permissions(called.join("words"), fs::Permissions::from_mode(0o666))?;
    script(&lower, &format!("#!/bin/sh\necho \"$*\" >>{}/words\n[ \"$3\" != state ]\n", called.display()))?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), lower.into());
    fs::set_permissions(place.path("."), fs::Permissions::from_mode(0o755))?;
    // Nobody but root reads what is built below `/root`.
    let lib = place.path("lib");
    fs::create_dir(&lib)?;
    for name in ["libphos.so", "phos-hook"] {
        fs::copy(place.tools.built.join(name), lib.join(name))?;
    }
    place.env.insert("PHOS_LIB_DIR".into(), lib.into());
    let config = bundle.join("config.json");
    let text = fs::read_to_string(&config)?;
    let user = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "--"];
    for (how, word) in [(&namespace[..], "user namespace"), (&user[..], "as user 4711")] {
        let flags = ["create", "--bundle", bundle.to_str().context("path")?];
        let (status, log) = as_other(&place, how, &flags, "new")?;
        ensure!(
            status == 0 && log.contains("cannot be checkpointed") && log.contains(word),
            "{status} {log}"
        );
        ensure!(fs::read_to_string(&config)? == text, "the configuration was touched");
    }
    let words = fs::read_to_string(called.join("words"))?;
    ensure!(words.lines().filter(|l| l.contains(" create --bundle ")).count() == 2, "{words}");
    Ok(())
}

#[test]
fn rootless_use_is_refused_with_the_reason() {
    sandboxed("rootless_use_is_refused_with_the_reason", |tools| rootless(tools).unwrap());
}
