//! Which container engines are on the host, and which of their configuration files name phos-runc.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A runtime of an engine's configuration that is phos-runc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// What the engine calls it.
    pub name: String,
    /// The program, if one of those named exists.
    pub program: Option<PathBuf>,
}

/// An installed engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// `docker`, `podman`, `containerd` or `cri-o`.
    pub name: &'static str,
    /// The file in which its runtimes are named.
    pub config: &'static str,
    /// Its runtimes that are phos-runc.
    pub runtimes: Vec<Runtime>,
    /// What its configuration lacks besides: what that means, and what to set.
    pub lacks: Vec<(String, String)>,
    /// Files that cannot be read, each with the reason.
    pub broken: Vec<String>,
}

/// A runtime's name, and the paths that stand for it.
type Named = (String, Vec<String>);

struct Kind {
    name: &'static str,
    program: &'static str,
    config: &'static str,
    /// A folder with further files.
    more: &'static str,
    runtimes: fn(&Value) -> Vec<Named>,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "docker",
        program: "dockerd",
        config: "/etc/docker/daemon.json",
        more: "",
        runtimes: |v| named(&v["runtimes"], "path"),
    },
    Kind {
        name: "podman",
        program: "podman",
        config: "/etc/containers/containers.conf",
        more: "/etc/containers/containers.conf.d",
        runtimes: |v| named(&v["engine"]["runtimes"], ""),
    },
    Kind {
        name: "containerd",
        program: "containerd",
        config: "/etc/containerd/config.toml",
        more: "/etc/containerd/conf.d",
        runtimes: |v| {
            let plugins = v["plugins"].as_object().into_iter().flatten();
            plugins.flat_map(|(_, p)| named(&p["containerd"]["runtimes"], "BinaryName")).collect()
        },
    },
    Kind {
        name: "cri-o",
        program: "crio",
        config: "/etc/crio/crio.conf",
        more: "/etc/crio/crio.conf.d",
        runtimes: |v| named(&v["crio"]["runtime"]["runtimes"], "runtime_path"),
    },
];

/// The paths of each runtime of a table: at `key` of it or of its `options`, or the runtime itself.
fn named(table: &Value, key: &str) -> Vec<Named> {
    let paths = |v: &Value| -> Vec<String> {
        let at = [v, &v[key], &v["options"][key]];
        let lists = at.iter().filter_map(|v| v.as_array()).flatten();
        at.iter().copied().chain(lists).filter_map(|v| v.as_str().map(Into::into)).collect()
    };
    table.as_object().into_iter().flatten().map(|(name, v)| (name.clone(), paths(v))).collect()
}

/// A configuration file, JSON or TOML; `None` if there is none.
fn read(path: &Path) -> Result<Option<Value>, String> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let value = match path.extension().is_some_and(|e| e == "json") {
        true => serde_json::from_str(&text).map_err(|e| e.to_string()),
        false => toml::from_str(&text).map_err(|e| e.message().to_string()),
    };
    value.map(Some)
}

/// A file of the host below another root.
fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn files(root: &Path, kind: &Kind) -> Vec<PathBuf> {
    let mut more: Vec<PathBuf> = match kind.more {
        "" => Vec::new(),
        folder => {
            fs::read_dir(below(root, folder)).into_iter().flatten().flatten().map(|e| e.path()).collect()
        }
    };
    more.retain(|p| p.extension().is_some_and(|e| e == "conf" || e == "toml"));
    more.sort();
    more.insert(0, below(root, kind.config));
    more
}

fn look(root: &Path, kind: &Kind) -> Engine {
    let (mut runtimes, mut broken, mut values) = (Vec::<Runtime>::new(), Vec::new(), Vec::new());
    for file in files(root, kind) {
        let value = match read(&file) {
            Ok(Some(value)) => value,
            Ok(None) => continue,
            Err(why) => {
                broken.push(format!("{}: {why}", file.display()));
                continue;
            }
        };
        for (name, mut paths) in (kind.runtimes)(&value) {
            paths.retain(|p| Path::new(p).file_name().is_some_and(|n| n == "phos-runc"));
            if !paths.is_empty() {
                let program = paths.iter().find(|p| below(root, p).is_file()).map(Into::into);
                runtimes.retain(|r| r.name != name);
                runtimes.push(Runtime { name, program });
            }
        }
        values.push(value);
    }
    let lacks = if runtimes.is_empty() { Vec::new() } else { lacking(kind, &runtimes, &values) };
    Engine { name: kind.name, config: kind.config, runtimes, lacks, broken }
}

/// What the files of an engine that knows phos-runc lack. Of a key that several set, the last counts.
fn lacking(kind: &Kind, runtimes: &[Runtime], values: &[Value]) -> Vec<(String, String)> {
    let last = |path: &str| values.iter().rev().find_map(|v| v.pointer(path)).unwrap_or(&Value::Null);
    let mut lacks = Vec::new();
    let mut lack = |what: String, set: String| lacks.push((what, set));
    match kind.name {
        "docker" if last("/experimental") != true => lack(
            "`docker checkpoint` is switched off".into(),
            format!("set \"experimental\": true in {} and restart it", kind.config),
        ),
        "cri-o" if last("/crio/runtime/enable_criu_support") != true => lack(
            "checkpoints are switched off".into(),
            format!("set enable_criu_support = true in [crio.runtime] of {}", kind.config),
        ),
        "podman" => {
            let listed = last("/engine/runtime_supports_json").as_array();
            for r in
                runtimes.iter().filter(|r| !listed.is_some_and(|l| l.iter().any(|n| *n == r.name.as_str())))
            {
                lack(
                    format!("errors of runtime {} do not reach the person", r.name),
                    format!("add \"{}\" to runtime_supports_json in [engine] of {}", r.name, kind.config),
                );
            }
        }
        _ => {}
    }
    lacks
}

/// The engines that are installed below `root`.
pub fn find(root: &Path) -> Vec<Engine> {
    let folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
    let installed = |k: &&Kind| folders.iter().any(|d| below(root, d).join(k.program).is_file());
    KINDS.iter().filter(installed).map(|k| look(root, k)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files that are installed for the engines are understood as naming phos-runc.
    #[test]
    fn the_products_own_configuration_files_are_recognised() {
        let root = tempfile::tempdir().unwrap();
        let at = |p: &str| below(root.path(), p);
        let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib");
        for (from, to) in [
            ("docker/daemon.json", "/etc/docker/daemon.json"),
            ("podman/containers.conf", "/etc/containers/containers.conf.d/phos-runc.conf"),
            ("containerd/config-v2.toml", "/etc/containerd/config.toml"),
            ("containerd/config-v3.toml", "/etc/containerd/conf.d/phos.toml"),
            ("containerd/phos.toml", "/etc/containerd/conf.d/more.toml"),
            ("crio/10-phos.conf", "/etc/crio/crio.conf.d/10-phos.conf"),
        ] {
            fs::create_dir_all(at(to).parent().unwrap()).unwrap();
            fs::copy(contrib.join(from), at(to)).unwrap();
        }
        for program in ["usr/sbin/dockerd", "usr/bin/podman", "usr/bin/containerd", "usr/bin/crio"] {
            fs::create_dir_all(at(program).parent().unwrap()).unwrap();
            fs::write(at(program), "").unwrap();
        }
        let engines = find(root.path());
        let names: Vec<_> = engines.iter().map(|e| e.name).collect();
        assert_eq!(names, ["docker", "podman", "containerd", "cri-o"]);
        for engine in &engines {
            assert!(engine.broken.is_empty() && engine.lacks.is_empty(), "{engine:?}");
            let [runtime] = engine.runtimes.as_slice() else { panic!("{engine:?}") };
            assert_eq!(runtime.program, None, "{engine:?}");
        }
        fs::create_dir_all(at("usr/local/bin")).unwrap();
        fs::write(at("usr/local/bin/phos-runc"), "").unwrap();
        for engine in find(root.path()) {
            assert_eq!(engine.runtimes[0].program, Some("/usr/local/bin/phos-runc".into()), "{engine:?}");
        }
    }

    #[test]
    fn other_runtimes_and_broken_files_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let at = |p: &str| below(root.path(), p);
        for folder in ["usr/sbin", "usr/bin", "etc/docker", "etc/containerd"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        assert_eq!(find(root.path()), []);
        fs::write(at("usr/sbin/dockerd"), "").unwrap();
        fs::write(at("usr/bin/containerd"), "").unwrap();
        fs::write(at("etc/docker/daemon.json"), r#"{"runtimes": {"x": {"path": "/usr/bin/runsc"}}}"#)
            .unwrap();
        fs::write(at("etc/containerd/config.toml"), "version = ").unwrap();
        let [docker, containerd] = find(root.path()).try_into().unwrap();
        assert!(docker.runtimes.is_empty() && docker.lacks.is_empty() && docker.broken.is_empty());
        assert!(containerd.broken[0].contains("config.toml:"), "{containerd:?}");
    }

    #[test]
    fn what_a_configuration_lacks_is_said_and_the_last_file_counts() {
        let root = tempfile::tempdir().unwrap();
        let at = |p: &str| below(root.path(), p);
        for folder in ["usr/bin", "etc/docker", "etc/containers/containers.conf.d", "etc/crio/crio.conf.d"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for program in ["dockerd", "podman", "crio"] {
            fs::write(at("usr/bin").join(program), "").unwrap();
        }
        let program = "/usr/local/bin/phos-runc";
        fs::write(
            at("etc/docker/daemon.json"),
            format!(r#"{{"runtimes": {{"p": {{"path": "{program}"}}}}}}"#),
        )
        .unwrap();
        let podman =
            format!("[engine]\nruntime_supports_json = [\"p\"]\n[engine.runtimes]\np = [\"{program}\"]\n");
        fs::write(at("etc/containers/containers.conf"), podman).unwrap();
        let crio = format!(
            "[crio.runtime]\nenable_criu_support = false\n[crio.runtime.runtimes.p]\nruntime_path = \"{program}\"\n"
        );
        fs::write(at("etc/crio/crio.conf"), crio).unwrap();
        let lacks = || find(root.path()).into_iter().map(|e| e.lacks.len()).collect::<Vec<_>>();
        assert_eq!(lacks(), [1, 0, 1]);
        fs::write(at("etc/crio/crio.conf.d/9.conf"), "[crio.runtime]\nenable_criu_support = true\n").unwrap();
        fs::write(
            at("etc/containers/containers.conf.d/9.conf"),
            "[engine]\nruntime_supports_json = [\"runc\"]\n",
        )
        .unwrap();
        assert_eq!(lacks(), [1, 1, 0]);
    }
}
