//! phos-runc beside the lower runtime: the same commands on containers without a GPU, the same answers, to every verb and
//! flag, right and wrong. `PHOS_EMBEDDED` names a phos-runc built with the feature `libcontainer`; its embedded lower runtime
//! is then compared too.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::Gpu;
use phos_integration::container::{Container, Place};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;
use serde_json::json;

/// A command line behind the global flags. `ID`, `BUNDLE` and `DIR` stand for the container's id, its bundle and a folder of
/// its own. A first word that begins with `!` is this test's: see [`Side::act`].
type Line = &'static [&'static str];

const VERBS: [&str; 17] = [
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "kill",
    "list",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
];

/// The life of a container.
const LIFE: &[Line] = &[
    &["state", "ID"],
    &["start", "ID"],
    &["create", "--bundle", "DIR/none", "ID"],
    &["create", "--bundle", "BUNDLE", "--pid-file", "DIR/pid", "ID"],
    &["!file", "DIR/pid"],
    &["create", "--bundle", "BUNDLE", "ID"],
    &["state", "ID"],
    &["exec", "ID", "/bin/busybox", "true"],
    &["start", "ID"],
    &["start", "ID"],
    &["state", "ID"],
    &["list", "-q"],
    &["list"],
    &["list", "--format", "json"],
    &["list", "--format", "bogus"],
    &["ps", "--format", "json", "ID"],
    &["ps", "-f", "table", "ID"],
    &["ps", "ID", "-o", "pid,args"],
    &["ps", "--format", "bogus", "ID"],
    &["events", "--stats", "ID"],
    &["events", "--interval", "0s", "ID"],
    &["pause", "ID"],
    &["pause", "ID"],
    &["state", "ID"],
    &["exec", "ID", "/bin/busybox", "true"],
    &["resume", "ID"],
    &["resume", "ID"],
    &["exec", "--ignore-paused", "ID", "/bin/busybox", "true"],
    &["kill", "ID", "NOSUCH"],
    &["kill", "ID", "0"],
    &["delete", "ID"],
    &["state", "ID", "more"],
    &["kill", "--all", "ID", "CONT"],
    &["kill", "ID", "KILL"],
    &["!stopped"],
    &["state", "ID"],
    &["kill", "ID", "TERM"],
    &["start", "ID"],
    &["exec", "ID", "/bin/busybox", "true"],
    &["pause", "ID"],
    &["ps", "ID"],
    &["events", "--stats", "ID"],
    &["update", "--pids-limit", "9", "ID"],
    &["delete", "ID"],
    &["delete", "ID"],
    &["delete", "--force", "ID"],
    &["list", "--quiet"],
];

/// What runs in a container and how it is limited.
const INSIDE: &[Line] = &[
    &["run", "-d", "-b", "BUNDLE", "--pid-file", "DIR/pid", "--no-new-keyring", "ID"],
    &["!file", "DIR/pid"],
    &["exec", "ID", "/bin/busybox", "false"],
    &["exec", "ID", "/bin/busybox", "sh", "-c", "exit 42"],
    &["exec", "ID", "/bin/busybox", "sh", "-c", "kill -9 $$"],
    &["exec", "ID", "/bin/busybox", "echo", "a b", "--c"],
    &["exec", "ID", "/does/not/exist"],
    &["exec", "ID", "/tmp"],
    &["exec", "ID"],
    &["exec", "--cwd", "/usr", "ID", "/bin/busybox", "pwd"],
    &["exec", "--env", "A=b", "-e", "C=d", "ID", "/bin/busybox", "env"],
    &["exec", "--user", "7:8", "ID", "/bin/busybox", "id"],
    &["exec", "-u", "nobody", "ID", "/bin/busybox", "id"],
    &["exec", "--user", "7:8", "-g", "9", "--additional-gids", "10", "ID", "/bin/busybox", "id"],
    &["exec", "--cap", "CAP_NET_RAW", "ID", "/bin/busybox", "grep", "CapBnd", "/proc/self/status"],
    &["exec", "--cap", "CAP_BOGUS", "ID", "/bin/busybox", "true"],
    &["exec", "--no-new-privs", "ID", "/bin/busybox", "grep", "NoNewPrivs", "/proc/self/status"],
    &["exec", "--tty", "ID", "/bin/busybox", "true"],
    &["exec", "--process", "DIR/process.json", "ID"],
    &["exec", "-p", "DIR/none.json", "ID"],
    &["exec", "--detach", "--pid-file", "DIR/exec-pid", "ID", "/bin/busybox", "true"],
    &["!file", "DIR/exec-pid"],
    &["exec", "--cgroup", "nonsense:/x", "ID", "/bin/busybox", "true"],
    &["exec", "--preserve-fds", "5", "ID", "/bin/busybox", "true"],
    &["exec", "--apparmor", "none", "ID", "/bin/busybox", "true"],
    &["update", "--pids-limit", "50", "ID"],
    &["!cgroup", "pids/pids.max"],
    &["update", "--memory", "lots", "ID"],
    &["update", "--memory", "64000000", "--memory-reservation", "32000000", "ID"],
    &["!cgroup", "memory/memory.limit_in_bytes"],
    &["update", "--cpu-share", "512", "--cpu-period", "100000", "--cpu-quota", "50000", "ID"],
    &["!cgroup", "cpu/cpu.shares"],
    &["update", "--cpuset-cpus", "0", "--cpuset-mems", "0", "ID"],
    &["!cgroup", "cpuset/cpuset.cpus"],
    &["update", "--cpuset-cpus", "99999", "ID"],
    &["update", "--resources", "DIR/resources.json", "ID"],
    &["!cgroup", "pids/pids.max"],
    &["update", "-r", "-", "ID"],
    &["update", "-r", "DIR/none.json", "ID"],
    &["update", "--l3-cache-schema", "x", "ID"],
    &["delete", "-f", "ID"],
];

/// Containers that end by themselves: the program is `sh -c "exit 3"`.
const ENDING: &[Line] = &[
    &["run", "--bundle", "BUNDLE", "ID"],
    &["state", "ID"],
    &["run", "--keep", "--bundle", "BUNDLE", "ID"],
    &["state", "ID"],
    &["run", "--bundle", "BUNDLE", "ID"],
    &["delete", "ID"],
    &["run", "--no-pivot", "--no-subreaper", "--bundle", "BUNDLE", "ID"],
    &["run", "--preserve-fds", "7", "--bundle", "BUNDLE", "ID"],
    &["create", "--console-socket", "DIR/none.sock", "--bundle", "BUNDLE", "ID"],
    &["run", "--detach", "--console-socket", "DIR/none.sock", "--bundle", "BUNDLE", "ID"],
    &["delete", "--force", "ID"],
    // Configurations that will not do.
    &["!config", "{"],
    &["create", "--bundle", "BUNDLE", "ID"],
    &["run", "--bundle", "BUNDLE", "ID"],
    &["!config", "{}"],
    &["create", "--bundle", "BUNDLE", "ID"],
    &[
        "!config",
        "{\"ociVersion\": \"1.0.2\", \"process\": {\"args\": [\"/x\"], \"cwd\": \"/\"}, \"root\": {\"path\": \"none\"}, \"linux\": {}}",
    ],
    &["create", "--bundle", "BUNDLE", "ID"],
    &["!config", "[]"],
    &["create", "--bundle", "BUNDLE", "ID"],
    &["list"],
];

/// Saved and brought back without a GPU.
const SAVED: &[Line] = &[
    &["!quiet", "create", "--bundle", "BUNDLE", "ID"],
    &["checkpoint", "--image-path", "DIR/image", "ID"],
    &["start", "ID"],
    &["checkpoint", "--image-path", "DIR/image", "--work-path", "DIR/work", "--leave-running", "ID"],
    &["state", "ID"],
    &["!file", "DIR/image/inventory.img"],
    &["checkpoint", "--image-path", "DIR/image2", "--parent-path", "/absolute", "--pre-dump", "ID"],
    &["checkpoint", "--image-path", "DIR/image2", "--manage-cgroups-mode", "bogus", "ID"],
    &["checkpoint", "--image-path", "DIR/image2", "--empty-ns", "bogus", "ID"],
    &["checkpoint", "--image-path", "DIR/image2", "--page-server", "nonsense", "ID"],
    &["restore", "--image-path", "DIR/image", "--bundle", "BUNDLE", "ID"],
    &[
        "checkpoint",
        "--image-path",
        "DIR/image2",
        "--work-path",
        "DIR/work",
        "--file-locks",
        "--ext-unix-sk",
        "ID",
    ],
    &["state", "ID"],
    &["delete", "--force", "ID"],
    &["restore", "--image-path", "DIR/none", "--bundle", "BUNDLE", "ID"],
    &[
        "!quiet",
        "restore",
        "-d",
        "--image-path",
        "DIR/image2",
        "--work-path",
        "DIR/work",
        "--pid-file",
        "DIR/restored",
        "-b",
        "BUNDLE",
        "ID",
    ],
    &["!file", "DIR/restored"],
    &["state", "ID"],
    &["exec", "ID", "/bin/busybox", "true"],
    &["kill", "ID", "KILL"],
    &["!stopped"],
    &["delete", "ID"],
];

/// Without a container.
const ALONE: &[Line] = &[
    &["features"],
    &["frobnicate"],
    &["create", "--bundle", "BUNDLE", "../id"],
    &["create", "--bundle", "BUNDLE", "a/b"],
    &["create", "--bundle", "BUNDLE", "a b"],
    &["create", "--bundle", "BUNDLE", ""],
    &["state", "../id"],
    &["delete", "a/b"],
    &["delete", "--force", "a b"],
    &["checkpoint", "a/b"],
    &["restore", "a/b"],
    &["restore", "--lsm-mount-context"],
    &["restore", "--lsm-profile"],
    &["spec", "--bundle", "DIR"],
    &["!file", "DIR/config.json"],
    &["spec", "-b", "DIR"],
    &["spec", "--bundle", "DIR/none"],
    &["spec", "--rootless", "-b", "DIR/rootless"],
    &["!file", "DIR/rootless/config.json"],
];

/// Global flags, right and wrong, in front of a verb.
const GLOBAL: &[Line] = &[
    &["--no-such-flag", "state", "x"],
    &["--log-format", "bogus", "state", "x"],
    &["--log", "/does/not/exist/log", "state", "x"],
    &["--rootless", "bogus", "state", "x"],
    &["--root"],
    &["--systemd-cgroup", "create", "--bundle", "BUNDLE", "ID"],
    &["--debug", "--log", "/dev/null", "state", "x"],
    &["--criu", "/does/not/exist", "list"],
];

/// One of the two that are compared.
struct Side<'a> {
    container: Container<'a>,
    dir: PathBuf,
}

impl Side<'_> {
    fn new<'a>(place: &'a Place, runtime: &Path, args: &[&str]) -> Result<Side<'a>> {
        let mut container = place.container(args, &Gpu::No)?;
        container.runtime = runtime.into();
        let dir = place.path(&format!("{}.dir", container.id));
        fs::create_dir_all(dir.join("rootless"))?;
        fs::write(dir.join("process.json"), json!({"args": ["/bin/busybox", "echo", "by file"], "cwd": "/", "env": ["X=y"], "user": {"uid": 0, "gid": 0}}).to_string())?;
        fs::write(dir.join("resources.json"), json!({"pids": {"limit": 77}}).to_string())?;
        Ok(Side { container, dir })
    }

    fn filled(&self, word: &str) -> String {
        let bundle = self.container.bundle.path.display().to_string();
        match word {
            "ID" => self.container.id.clone(),
            "BUNDLE" => bundle,
            word => word.replace("DIR", &self.dir.display().to_string()),
        }
    }

    /// What differs between two runs of one runtime is made the same: its own paths, and digits, which are process ids,
    /// times and counters.
    fn comparable(&self, text: &str) -> String {
        let bundle = self.container.bundle.path.display().to_string();
        let text = text.replace(&self.dir.display().to_string(), "DIR").replace(&bundle, "BUNDLE");
        let text = text.replace(&self.container.id, "ID").replace("phos-runc", "runc");
        // The exit status stays.
        let status =
            text.strip_prefix("ended with ").and_then(|t| t.find(':')).map_or(0, |n| n + "ended with ".len());
        let mut out = text[..status].to_string();
        for c in text[status..].chars() {
            match c {
                '0'..='9' if out.ends_with('#') => {}
                '0'..='9' => out.push('#'),
                // Columns are as wide as the numbers in them.
                ' ' | '-' if out.ends_with(c) => {}
                c => out.push(c),
            }
        }
        // Left out of a container's statistics as long as it is 0.
        out.replace("\"cache\":#,", "")
    }

    /// `!file PATH`: whether it exists. `!cgroup FILE`: a limit of the container. `!config TEXT`: another configuration.
    /// `!stopped`: waits for the container's end. `!quiet VERB …`: a verb whose streams the container keeps, which must be
    /// none of this test's files or CRIU could not save it.
    fn act(&self, words: &[String], global: &[String]) -> Result<String> {
        Ok(match words[0].as_str() {
            "!file" => Path::new(&words[1]).exists().to_string(),
            "!cgroup" => {
                let (controller, file) = words[1].split_once('/').context("a controller and a file")?;
                let path = Path::new("/sys/fs/cgroup").join(controller).join(&self.container.id).join(file);
                fs::read_to_string(path).unwrap_or_else(|_| "not there".into())
            }
            "!config" => {
                fs::write(self.container.bundle.path.join("config.json"), &words[1])?;
                String::new()
            }
            "!stopped" => {
                let deadline = Instant::now() + Duration::from_secs(10);
                loop {
                    let line = [global, &["state".into(), self.container.id.clone()]].concat();
                    let text = self.run(&line, false)?;
                    if text.contains("\"stopped\"") {
                        break String::new();
                    }
                    ensure!(Instant::now() < deadline, "it does not stop: {text}");
                }
            }
            "!quiet" => {
                let line = [global, &words[1..]].concat();
                self.run(&line, true)?
            }
            other => anyhow::bail!("{other}"),
        })
    }

    fn run(&self, line: &[String], quiet: bool) -> Result<String> {
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let ended = self.container.place.command(&self.container.runtime, &line, quiet)?;
        Ok(format!("ended with {}: {}", ended.status, ended.text))
    }

    /// Everything a conversation shows: exit status, output, and the lines of the log file.
    fn converse(&self, lines: &[Line], global: &[&str]) -> Result<Vec<String>> {
        let root = format!("{}/root", self.dir.display());
        let log = self.dir.join("log");
        let log_file = log.display().to_string();
        let mut before = vec!["--root".to_string(), root];
        if global.contains(&"--log-format") {
            before.extend(["--log".to_string(), log_file]);
        }
        before.extend(global.iter().map(ToString::to_string));
        let mut answers = Vec::new();
        for words in lines {
            let filled: Vec<String> = words.iter().map(|w| self.filled(w)).collect();
            let answer = match words[0].strip_prefix('!') {
                Some(_) => self.act(&filled, &before)?,
                None => self.run(&[&before[..], &filled].concat(), false)?,
            };
            answers.push(format!("{words:?} {}", self.comparable(&answer)));
        }
        let logged = fs::read_to_string(&log).unwrap_or_default();
        answers.extend(logged.lines().map(|l| self.comparable(l)));
        Ok(answers)
    }
}

impl Drop for Side<'_> {
    /// The container's own end looks for it in another root.
    fn drop(&mut self) {
        let root = format!("{}/root", self.dir.display());
        let words = ["--root", &root, "delete", "--force", &self.container.id];
        let _ = self.container.place.command(&self.container.runtime, &words, false);
    }
}

/// The two runtimes' answers, which must be the same, and of which at least `good` must be no errors.
fn compare(place: &Place, args: &[&str], lines: &[Line], global: &[&str], good: usize) -> Result<()> {
    let tools = &place.tools;
    let lower = Side::new(place, &tools.runc, args)?.converse(lines, global)?;
    let own = Side::new(place, &tools.program("phos-runc"), args)?.converse(lines, global)?;
    let differ: Vec<String> = lower
        .iter()
        .zip(&own)
        .filter(|(lower, own)| lower != own)
        .map(|(lower, own)| format!("the lower runtime: {lower}\nphos-runc:         {own}\n"))
        .collect();
    ensure!(differ.is_empty(), "{}", differ.join("\n"));
    ensure!(lower.len() == own.len(), "{} lines of the lower runtime, {} here", lower.len(), own.len());
    let succeeded = own.iter().filter(|a| a.contains(" ended with 0:")).count();
    ensure!(succeeded >= good, "only {succeeded} commands succeeded: {own:#?}");
    Ok(())
}

const SLEEP: [&str; 3] = ["/bin/busybox", "sleep", "1000"];

fn side_by_side(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for format in ["text", "json"] {
        compare(&place, &SLEEP, LIFE, &["--log-format", format], 18).context(format)?;
    }
    // One more where there is a controlling terminal.
    compare(&place, &SLEEP, INSIDE, &[], 15)?;
    compare(&place, &["/bin/sh", "-c", "exit 3"], ENDING, &[], 2)
}

#[test]
fn the_same_answers_as_the_lower_runtime() {
    sandboxed("the_same_answers_as_the_lower_runtime", |tools| side_by_side(tools).unwrap());
}

fn saved(tools: &Tools) -> Result<()> {
    compare(&Place::new(tools)?, &SLEEP, SAVED, &[], 9)
}

#[test]
fn a_container_without_a_gpu_is_saved_as_by_the_lower_runtime() {
    sandboxed("a_container_without_a_gpu_is_saved_as_by_the_lower_runtime", |tools| saved(tools).unwrap());
}

fn alone(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    compare(&place, &SLEEP, ALONE, &[], 3)?;
    // Every verb: its help, a flag that does not exist, no id, an id that does not exist.
    for verb in VERBS {
        let leak =
            |words: &[&'static str]| -> Line { Box::leak([&[verb], words].concat().into_boxed_slice()) };
        let mut lines: Vec<Line> =
            vec![leak(&["--help"]), leak(&["-h"]), leak(&["--no-such-flag"]), leak(&["-z", "x"])];
        if !["features", "list", "spec"].contains(&verb) {
            // A foreground `run` or `restore` would look for a bundle in this folder.
            lines.extend([leak(&[]), leak(&["nobody"]), leak(&["nobody", "a", "b", "c"])]);
        }
        compare(&place, &SLEEP, &lines, &[], 2)?;
    }
    Ok(())
}

#[test]
fn every_verb_says_the_same_without_a_container() {
    sandboxed("every_verb_says_the_same_without_a_container", |tools| alone(tools).unwrap());
}

fn global(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    // Flags that follow others of the same name win, so that `--root` of the line counts.
    compare(&place, &SLEEP, GLOBAL, &[], 1)?;
    // No PATH, as engines run some verbs.
    let answer = |runtime: &Path, words: &[&str]| -> Result<String> {
        let side = Side::new(&place, runtime, &SLEEP)?;
        let root = format!("{}/root", side.dir.display());
        let mut line = vec!["-i".to_string()];
        line.extend(place.env.iter().map(|(k, v)| format!("{k}={}", v.to_string_lossy())));
        line.extend([runtime.display().to_string(), "--root".into(), root]);
        line.extend(words.iter().map(|w| side.filled(w)));
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let ended = place.command(Path::new("/usr/bin/env"), &words, false)?;
        Ok(side.comparable(&format!("{} {}", ended.status, ended.text)))
    };
    for words in [
        &["create", "--bundle", "BUNDLE", "ID"][..],
        &["list"],
        &["state", "x"],
        &["delete", "--force", "x"],
        &["features"],
    ] {
        let (lower, own) = (answer(&tools.runc, words)?, answer(&tools.program("phos-runc"), words)?);
        ensure!(lower == own, "{words:?} without a PATH: {lower} and {own}");
    }
    // The lower runtime's own words come first, then this program's.
    let line = |runtime: &Path, words: &[&str]| {
        Ok::<_, anyhow::Error>(place.command(runtime, words, false)?.text.replace("phos-runc", "runc"))
    };
    for words in [&["--help"][..], &["-h"], &["help"], &[]] {
        let (lower, own) = (line(&tools.runc, words)?, line(&tools.program("phos-runc"), words)?);
        ensure!(own.starts_with(&lower) && own.len() > lower.len(), "{words:?}: {own}");
    }
    for words in [["--version"], ["-v"]] {
        let (lower, own) = (line(&tools.runc, &words)?, line(&tools.program("phos-runc"), &words)?);
        ensure!(own.ends_with(&lower) && own.starts_with("runc version "), "{own}");
    }
    Ok(())
}

#[test]
fn global_flags_mean_the_same() {
    sandboxed("global_flags_mean_the_same", |tools| global(tools).unwrap());
}

/// Commands that the embedded libcontainer answers otherwise: `runtime/README.md` says how. The first is answered when the
/// container is created and not started.
const OTHERWISE: [&str; 5] = [
    "[\"exec\", \"ID\", \"/bin/busybox\", \"true\"]",
    "[\"exec\", \"--env\", \"A=b\", \"-e\"",
    "[\"exec\", \"--user\", \"7:8\", \"-g\"",
    "[\"exec\", \"--cap\", \"CAP_BOGUS\"",
    "[\"exec\", \"--process\", \"DIR/process.json\"",
];

/// Whether two answers mean the same: what was done or found is equal, and a command fails where the other one fails. The words
/// of an error are each runtime's own.
fn means_the_same(lower: &str, own: &str) -> bool {
    let status = |answer: &str| -> Option<(i32, String)> {
        let (_, rest) = answer.split_once(" ended with ")?;
        let (number, text) = rest.split_once(':')?;
        Some((number.parse().ok()?, text.to_string()))
    };
    let (Some((lower_status, lower_text)), Some((own_status, own_text))) = (status(lower), status(own))
    else {
        return lower == own;
    };
    let shown = |text: &str| -> Option<String> {
        let (_, status) = text.split_once("\"status\":")?;
        Some(status.trim_start().split('"').nth(1)?.to_string())
    };
    let failed = [1, 255].contains(&lower_status) && own_status != 0;
    (lower_status == own_status || failed) && shown(&lower_text) == shown(&own_text)
}

fn embedded(tools: &Tools, program: &Path) -> Result<()> {
    let lower = Place::new(tools)?;
    let mut own = Place::new(tools)?;
    own.env.insert("PHOS_LOWER_RUNTIME".into(), "libcontainer".into());
    let mut otherwise = Vec::new();
    for (args, lines) in [(&SLEEP[..], LIFE), (&SLEEP, INSIDE), (&["/bin/sh", "-c", "exit 3"], ENDING)] {
        let lower = Side::new(&lower, &tools.runc, args)?.converse(lines, &[])?;
        let own = Side::new(&own, program, args)?.converse(lines, &[])?;
        let pairs = lower.iter().zip(&own).filter(|(l, o)| !means_the_same(l, o));
        otherwise.extend(pairs.map(|(l, o)| (l.clone(), o.clone())));
    }
    let known = |line: &str| OTHERWISE.iter().any(|k| line.starts_with(k));
    let unknown: Vec<_> = otherwise.iter().filter(|(l, _)| !known(l)).collect();
    ensure!(unknown.is_empty(), "{unknown:#?}");
    let gone: Vec<_> =
        OTHERWISE.iter().filter(|k| !otherwise.iter().any(|(l, _)| l.starts_with(*k))).collect();
    ensure!(gone.is_empty(), "these are answered alike now: {gone:?}");
    // A container with a GPU runs on it too, the library in front of the driver.
    let mut sample = own.sample(&["--mib", "16"])?;
    sample.runtime = program.into();
    sample.start()?;
    sample.steps(3)?;
    let folders = fs::read_dir(own.path("state"))?.flatten().map(|e| e.path());
    let state = folders.into_iter().find(|p| p.is_dir()).context("no state folder")?;
    ensure!(
        fs::read_dir(state.join("ctl"))?
            .flatten()
            .any(|e| e.file_name().to_string_lossy().ends_with(".sock"))
    );
    ensure!(
        sample.try_checkpoint("none", true)?.status == 1 && sample.last_error()?.contains("install runc")
    );
    sample.steps(3)?;
    // What it cannot do, it says, whatever the container.
    let container = Side::new(&own, program, &SLEEP)?;
    for verb in ["checkpoint", "restore"] {
        let answer = container.run(&[verb.into(), container.container.id.clone()], false)?;
        ensure!(
            answer.starts_with("ended with 1: ")
                && answer.contains("install runc")
                && answer.lines().count() == 1,
            "{answer}"
        );
    }
    Ok(())
}

#[test]
fn the_embedded_libcontainer_does_the_same() {
    let Some(program) = std::env::var_os("PHOS_EMBEDDED").map(PathBuf::from) else {
        eprintln!(
            "skipped: PHOS_EMBEDDED names no phos-runc with the feature libcontainer (make test-embedded)"
        );
        return;
    };
    sandboxed("the_embedded_libcontainer_does_the_same", |tools| embedded(tools, &program).unwrap());
}
