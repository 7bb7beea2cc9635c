//! `make install` into an empty folder, and the configuration that it installs, read by the engines it is for.

#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not take for tests

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_integration::container::Place;
use phos_integration::engine::present;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::{Tools, built, workspace};

/// Runs a target of the Makefile on what this test was built with.
fn make(target: &str, root: &Path, more: &[&str]) -> Output {
    let profile = built("").unwrap();
    let profile = profile.file_name().unwrap().to_str().unwrap().to_string();
    let output = Command::new("make")
        // What is built already is not built again.
        .args(["--old-file", &profile, "--no-print-directory", target, &format!("PROFILE={profile}")])
        .arg(format!("DESTDIR={}", root.display()))
        .args(more)
        .env_remove("MAKEFLAGS")
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{target}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Every file below a folder, with its mode and what is in it.
fn files(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let mode = entry.metadata().unwrap().permissions().mode();
                found.insert(
                    path.strip_prefix(root).unwrap().into(),
                    (mode & 0o777, fs::read(&path).unwrap()),
                );
            }
        }
    }
    found
}

const DROP_INS: [&str; 3] = [
    "etc/containers/containers.conf.d/phos-runc.conf",
    "etc/crio/crio.conf.d/10-phos.conf",
    "etc/phos-runc/config.toml",
];

#[test]
fn installing_twice_is_installing_once_and_uninstalling_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    make("install", root.path(), &["PREFIX=/usr"]);
    let first = files(root.path());
    for (path, mode) in [
        ("usr/bin/phos-runc", 0o755),
        ("usr/lib/phos/libphos.so", 0o755),
        ("usr/lib/phos/phos-hook", 0o755),
        ("usr/share/man/man8/phos-runc.8", 0o644),
        ("usr/share/phos-runc/docker/daemon.json", 0o644),
        ("usr/share/phos-runc/kubernetes/runtimeclass.yaml", 0o644),
        (DROP_INS[0], 0o644),
        (DROP_INS[1], 0o644),
        (DROP_INS[2], 0o644),
    ] {
        assert_eq!(first.get(Path::new(path)).map(|f| f.0), Some(mode), "{path}");
    }
    // Engines that read no folder of further files have their one file left alone.
    let etc: Vec<_> = first.keys().filter(|p| p.starts_with("etc")).map(|p| p.to_str().unwrap()).collect();
    assert_eq!(etc, DROP_INS);
    // The program is where the configuration says, wherever that is.
    for (path, (_, text)) in
        first.iter().filter(|(p, _)| !p.starts_with("usr/bin") && !p.starts_with("usr/lib"))
    {
        let text = String::from_utf8_lossy(text);
        assert!(!text.contains("/usr/local/bin/phos-runc"), "{}", path.display());
    }
    make("install", root.path(), &["PREFIX=/usr"]);
    assert!(files(root.path()) == first, "a second run changes something");
    make("uninstall", root.path(), &["PREFIX=/usr"]);
    assert_eq!(files(root.path()).keys().collect::<Vec<_>>(), Vec::<&PathBuf>::new());
}

#[test]
fn what_is_somebodys_own_is_kept() {
    let root = tempfile::tempdir().unwrap();
    for path in DROP_INS {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "# mine\n").unwrap();
    }
    let said = make("install", root.path(), &[]);
    let said = String::from_utf8(said.stdout).unwrap();
    for path in DROP_INS {
        assert_eq!(fs::read_to_string(root.path().join(path)).unwrap(), "# mine\n");
        assert!(said.contains(&format!("kept /{path}")), "{said}");
    }
    make("uninstall", root.path(), &[]);
    let left: Vec<_> = files(root.path()).into_keys().collect();
    assert_eq!(left, DROP_INS.map(PathBuf::from));
}

/// The installed examples, with the program's path as it is on the machine of the test.
fn installed(place: &Place) -> PathBuf {
    let root = place.path("installed");
    make("install", &root, &[&format!("PREFIX={}", place.path("prefix").display())]);
    let share = place.path("prefix/share/phos-runc");
    let below = root.join(share.strip_prefix("/").unwrap());
    fs::create_dir_all(place.path("prefix/bin")).unwrap();
    std::os::unix::fs::symlink(place.tools.program("phos-runc"), place.path("prefix/bin/phos-runc")).unwrap();
    below
}

/// Docker comes up with the shipped file and knows the runtime.
fn docker(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let file = installed(&place).join("docker/daemon.json");
    let at = |name: &str| place.path(name).display().to_string();
    let socket = format!("unix://{}", at("docker.sock"));
    let log = fs::File::create(place.path("dockerd.log"))?;
    let mut daemon = Command::new("/usr/sbin/dockerd")
        .args(["--config-file", &file.display().to_string(), "--host", &socket, "--data-root", &at("docker")])
        .args(["--exec-root", &at("docker-exec"), "--pidfile", &at("docker.pid"), "--storage-driver", "vfs"])
        .args(["--iptables=false", "--ip6tables=false", "--bridge", "none"])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let ask = || {
        let words =
            ["-H", &socket, "info", "--format", "{{.ExperimentalBuild}} {{(index .Runtimes \"phos\").Path}}"];
        place.command(Path::new("/usr/bin/docker"), &words, false)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    let answer = loop {
        let ended = ask()?;
        // Docker 26 ends with 0 without a daemon too.
        let answers = ended.status == 0 && !ended.text.contains("Cannot connect");
        if answers || Instant::now() > deadline {
            break ended;
        }
        thread::sleep(Duration::from_millis(100));
    };
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM)?;
    daemon.wait()?;
    let expected = format!("true {}", at("prefix/bin/phos-runc"));
    let said = fs::read_to_string(place.path("dockerd.log"))?;
    ensure!(answer.text.trim() == expected, "{answer:?}\n{said}");
    Ok(())
}

#[test]
fn docker_reads_its_file() {
    sandboxed("docker_reads_its_file", |tools| {
        if present("dockerd") {
            docker(tools).unwrap();
        }
    });
}

/// Podman finds the runtime by its name.
fn podman(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let file = installed(&place).join("podman/containers.conf");
    let at = |name: &str| place.path(name).display().to_string();
    let conf = format!("CONTAINERS_CONF={}", file.display());
    let (root, run) = (at("podman"), at("podman-run"));
    let words = [
        &conf,
        "podman",
        "--root",
        &root,
        "--runroot",
        &run,
        "--cgroup-manager",
        "cgroupfs",
        "--storage-driver",
        "vfs",
        "--runtime",
        "phos-runc",
        "info",
        "--format",
        "{{.Host.OCIRuntime.Name}} {{.Host.OCIRuntime.Path}}",
    ];
    let ended = place.command(Path::new("/usr/bin/env"), &words, false)?;
    let expected = format!("phos-runc {}", at("prefix/bin/phos-runc"));
    ensure!(ended.text.lines().any(|l| l == expected), "{ended:?}");
    Ok(())
}

#[test]
fn podman_reads_its_file() {
    sandboxed("podman_reads_its_file", |tools| {
        if present("podman") {
            podman(tools).unwrap();
        }
    });
}

/// containerd's own account of what it has read. It reads formats up to its own.
fn containerd(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let share = installed(&place);
    let dump = |file: &Path| {
        let words = ["--config", file.to_str().unwrap_or_default(), "config", "dump"];
        place.command(Path::new("/usr/bin/containerd"), &words, false)
    };
    let version = place.command(Path::new("/usr/bin/containerd"), &["--version"], false)?.text;
    let newer = version.split_whitespace().any(|w| w.trim_start_matches('v').starts_with("2."));
    let files = ["containerd/config-v2.toml", "containerd/phos.toml"].into_iter();
    for name in files.chain(newer.then_some("containerd/config-v3.toml")) {
        let ended = dump(&share.join(name))?;
        // The runtime's table, up to the next runtime's.
        let (_, table) = ended
            .text
            .split_once("containerd.runtimes.phos]")
            .with_context(|| format!("{name}: {ended:?}"))?;
        let table = table.split("containerd.runtimes.runc]").next().unwrap_or_default();
        let program = format!("BinaryName = \"{}\"", place.path("prefix/bin/phos-runc").display());
        ensure!(
            table.contains(&program) && table.contains("pod_annotations = [\"phos.*\"]"),
            "{name}: {table}"
        );
    }
    // A main configuration that imports the folder.
    let main = place.path("main.toml");
    fs::write(&main, format!("version = 2\nimports = [\"{}/containerd/phos.toml\"]\n", share.display()))?;
    let ended = dump(&main)?;
    ensure!(ended.text.contains("containerd.runtimes.phos]"), "{ended:?}");
    Ok(())
}

#[test]
fn containerd_reads_its_files() {
    sandboxed("containerd_reads_its_files", |tools| {
        if present("containerd") {
            containerd(tools).unwrap();
        }
    });
}

/// What no engine here reads is well formed, and its parts name each other.
#[test]
fn the_other_files_fit_together() {
    let script = r#"
import sys, tomllib, yaml
top = sys.argv[1]
v3 = tomllib.load(open(top + "/containerd/config-v3.toml", "rb"))
assert v3["version"] == 3
containerd = v3["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
v2 = tomllib.load(open(top + "/containerd/config-v2.toml", "rb"))
assert containerd == v2["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
crio = tomllib.load(open(top + "/crio/10-phos.conf", "rb"))["crio"]["runtime"]
assert crio["enable_criu_support"] is True
kind = yaml.safe_load(open(top + "/kubernetes/runtimeclass.yaml"))
assert (kind["apiVersion"], kind["kind"]) == ("node.k8s.io/v1", "RuntimeClass")
# The handler is the name of a runtime of the engine's.
assert kind["handler"] in containerd and kind["handler"] in crio["runtimes"]
assert crio["runtimes"]["phos"]["runtime_path"] == containerd["phos"]["options"]["BinaryName"]
pod = yaml.safe_load(open(top + "/kubernetes/pod.yaml"))
assert pod["spec"]["runtimeClassName"] == kind["metadata"]["name"]
allowed = crio["runtimes"]["phos"]["allowed_annotations"]
assert all(name in allowed for name in pod["metadata"]["annotations"])
"#;
    let contrib = workspace().join("contrib");
    let output = Command::new("python3").args(["-c", script]).arg(&contrib).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let kubelet =
        Command::new("sh").arg("-n").arg(contrib.join("kubernetes/checkpoint.sh")).status().unwrap();
    assert!(kubelet.success());
    let configuration = fs::read_to_string(contrib.join("phos-runc/config.toml")).unwrap();
    // Each key that is commented out is one that the program knows.
    let keys: String = configuration
        .lines()
        .filter_map(|l| l.strip_prefix("# "))
        .filter(|l| l.contains(" = "))
        .map(|l| format!("{l}\n"))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), keys).unwrap();
    let output = Command::new(built("phos-runc").unwrap())
        .args(["state", "x"])
        .env("PHOS_CONFIG", file.path())
        .env("PHOS_LOWER_RUNTIME", "/bin/true")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
