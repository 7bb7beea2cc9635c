//! phos-runc's command line against a lower runtime that only says how it was called: no container is made.

#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not take for tests

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// The program under test.
fn phos_runc() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let built = exe.parent().unwrap().parent().unwrap().join("phos-runc");
    assert!(built.exists(), "{} is not built: run cargo build --workspace", built.display());
    built
}

struct Lower {
    folder: TempDir,
}

impl Lower {
    /// A lower runtime that prints its arguments, one to a line, and ends with status 7.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = "#!/bin/sh\nfor a in \"$@\"; do printf '<%s>\\n' \"$a\"; done\nexit 7\n";
        let path = folder.path().join("lower");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Lower { folder }
    }

    fn run(&self, lower: &Path, words: &[&str]) -> Output {
        Command::new(phos_runc())
            .args(words)
            .env_clear()
            .env("PHOS_LOWER_RUNTIME", lower)
            .env("PHOS_CONFIG", self.folder.path().join("config.toml"))
            .env("PHOS_STATE_DIR", self.folder.path().join("state"))
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    fn echoed(&self, words: &[&str]) -> (i32, String) {
        let output = self.run(&self.folder.path().join("lower"), words);
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    }
}

#[test]
fn what_is_not_ours_arrives_word_for_word() {
    let lower = Lower::new();
    for line in [
        "--root /r --log /x/log.json --log-format json --systemd-cgroup state c",
        "--unknown-global start c --odd",
        "kill --all c 9",
        "exec --process /p --detach --pid-file /f c",
        "ps --format json c",
        "update -r - c",
        "features",
        "spec --rootless",
        "checkpoint --help",
        "restore --lsm-mount-context",
        "delete --force gone",
        "frobnicate --whatever=1 x y z",
    ] {
        let words: Vec<_> = line.split(' ').collect();
        let (status, text) = lower.echoed(&words);
        let expected: String = words.iter().map(|w| format!("<{w}>\n")).collect();
        assert_eq!((status, text), (7, expected), "{line}");
    }
    // Words that are not text, or hold spaces and new lines, too.
    let (_, text) = lower.echoed(&["start", "a b", "", "c\nd"]);
    assert_eq!(text, "<start>\n<a b>\n<>\n<c\nd>\n");
}

#[test]
fn version_and_help_say_whose_they_are() {
    let lower = Lower::new();
    let (_, text) = lower.echoed(&["--version"]);
    assert!(text.starts_with("phos-runc version ") && text.ends_with("<--version>\n"), "{text}");
    let (_, text) = lower.echoed(&["--help"]);
    assert!(text.starts_with("<--help>\n") && text.contains("inspect IMAGE"), "{text}");
}

#[test]
fn a_lower_runtime_that_will_not_do_is_named() {
    let lower = Lower::new();
    let link = lower.folder.path().join("runc");
    std::os::unix::fs::symlink(phos_runc(), &link).unwrap();
    for (path, words) in [
        (link.as_path(), "is phos-runc itself"),
        (Path::new("/does/not/exist"), "does not exist"),
        (Path::new("runc"), "must be absolute"),
    ] {
        let output = lower.run(path, &["state", "c"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text.contains(words) && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn a_mistake_in_the_configuration_is_named_with_its_line() {
    let lower = Lower::new();
    fs::write(lower.folder.path().join("config.toml"), "\ncrui = '/x'\n").unwrap();
    let log = lower.folder.path().join("log.json");
    let output = lower
        .run(Path::new("/bin/true"), &["--log", log.to_str().unwrap(), "--log-format", "json", "state", "c"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("line 2") && text.contains("crui") && text.lines().count() == 1, "{text}");
    let logged: serde_json::Value = serde_json::from_str(&fs::read_to_string(&log).unwrap()).unwrap();
    assert_eq!(logged["msg"].as_str().unwrap(), text.trim_end());
}

#[test]
fn ids_that_are_no_names_never_become_paths() {
    let lower = Lower::new();
    let bundle = lower.folder.path().join("bundle");
    fs::create_dir(&bundle).unwrap();
    fs::write(bundle.join("config.json"), "{}").unwrap();
    for id in ["../x", "a/b", "..", "a b", ""] {
        // What is wrong with them is the lower runtime's to say.
        for verb in ["create", "run", "delete", "checkpoint", "restore"] {
            let (status, text) = lower.echoed(&[verb, "--bundle", bundle.to_str().unwrap(), id]);
            assert!(status == 7 && text.ends_with(&format!("<{id}>\n")), "{verb} {id}: {text}");
        }
    }
    assert!(!lower.folder.path().join("state").exists());
}

/// A host on which everything is in place but for one thing is told which.
#[test]
fn doctor_says_what_prevents_a_checkpoint() {
    let lower = Lower::new();
    let built = phos_runc().parent().unwrap().to_path_buf();
    let script = |name: &str, text: &str| {
        let path = lower.folder.path().join(name);
        fs::write(&path, format!("#!/bin/sh\necho '{text}'\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let doctor = |criu: &Path, words: &[&str]| {
        Command::new(phos_runc())
            .arg("doctor")
            .args(words)
            .env_clear()
            .env("PHOS_LOWER_RUNTIME", script("runc", "runc version 9"))
            .env("PHOS_CONFIG", lower.folder.path().join("config.toml"))
            .env("PHOS_STATE_DIR", lower.folder.path().join("state"))
            .env("PHOS_LIB_DIR", &built)
            .env("PHOS_LIBCUDA", built.join("libsimcuda.so"))
            .env("PHOS_CRIU", criu)
            .output()
            .unwrap()
    };
    let report = |output: &Output| -> serde_json::Value { serde_json::from_slice(&output.stdout).unwrap() };
    let problems = |report: &serde_json::Value| -> Vec<String> {
        let bad = report["findings"].as_array().unwrap().iter().filter(|f| f["level"] == "problem");
        bad.map(|f| format!("{}: {} -> {}", f["check"], f["found"], f["remedy"])).collect()
    };
    let (new, old) = (script("criu", "Version: 4.1"), script("old-criu", "Version: 3.17.1"));
    let good = doctor(&new, &["--json"]);
    let found = report(&good);
    // What the machine itself lacks is not this test's matter.
    let own = |p: &&String| {
        ["criu", "libphos", "lower", "driver", "gpus"].iter().any(|w| p.starts_with(&format!("\"{w}")))
    };
    assert_eq!(problems(&found).iter().find(own), None);
    assert_eq!(good.status.code() == Some(0), problems(&found).is_empty());
    assert_eq!(found["usable"], problems(&found).is_empty());
    let bad = doctor(&old, &["--json"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(problems(&report(&bad)).iter().any(|p| p.contains("3.17.1") && p.contains("4.1 or newer")));
    let text = String::from_utf8(doctor(&old, &[]).stdout).unwrap();
    assert!(text.lines().any(|l| l.starts_with("PROBLEM") && l.contains("criu")), "{text}");
    let wrong = doctor(&new, &["--jsn"]);
    assert_eq!((wrong.status.code(), wrong.stdout.len()), (Some(1), 0));
    assert!(!lower.folder.path().join("state").exists(), "doctor leaves nothing behind");
}
