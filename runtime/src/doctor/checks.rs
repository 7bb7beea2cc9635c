//! What the facts mean for a checkpoint. Pure: facts in, findings out.

use serde::Serialize;

use super::engines::Engine;
use super::facts::{Facts, Installed};
use super::kernel::{Cgroups, Kernel};
use crate::config::PATH;

/// The first driver whose checkpoint calls this product was written for.
const DRIVER: u32 = 570;
/// A container's state is control sockets, a specification and a log.
const STATE_BYTES: u64 = 16 << 20;
/// Each piece of GPU memory is a descriptor while it is parked.
const OPEN_FILES: u64 = 16384;
/// Buffers through which memory is copied.
const LOCKED_BYTES: u64 = 256 << 20;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Something will not work, or not as well.
    Warning,
    /// No container with a GPU can be checkpointed.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub check: &'static str,
    /// How bad.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

fn ok(check: &'static str, found: impl Into<String>) -> Finding {
    Finding { check, level: Level::Ok, found: found.into(), remedy: None }
}

fn bad(check: &'static str, level: Level, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check, level, found: found.into(), remedy: Some(remedy.into()) }
}

/// Every finding, in the order in which a person would go through them.
pub fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !facts.root {
        let remedy = "run it as root: CRIU, the driver's checkpoint calls and this check need that";
        findings.push(bad("user", Level::Problem, "not root", remedy));
    }
    if let Err(why) = &facts.configuration {
        findings.push(bad("configuration", Level::Problem, why, format!("correct it in {PATH}")));
    }
    findings.extend(kernel(&facts.kernel));
    findings.push(program("criu", &facts.criu));
    if facts.criu.is_ok() {
        findings.push(match &facts.criu_check {
            Ok(()) => ok("criu check", "the kernel has what CRIU needs"),
            Err(why) => {
                let remedy = "run `criu check` as root; use a kernel with what it names";
                bad("criu check", Level::Warning, why, remedy)
            }
        });
    }
    findings.push(program("lower runtime", &facts.lower));
    findings.push(installed("libphos.so", Level::Problem, &facts.library));
    // Only needed where hooks of a toolkit mount the driver.
    findings.push(installed("phos-hook", Level::Warning, &facts.hook));
    findings.extend(driver(facts));
    findings.extend(limits(facts));
    findings.extend(engines(&facts.engines));
    findings
}

fn kernel(kernel: &Kernel) -> Vec<Finding> {
    let feature = |check, there: bool, level, without: &str, remedy: &str| match there {
        true => ok(check, "offered by the kernel"),
        false => bad(check, level, without, remedy),
    };
    let cgroups = match kernel.cgroups {
        Cgroups::V2 => ok("cgroups", "version 2"),
        Cgroups::V1 => bad(
            "cgroups",
            Level::Warning,
            "version 1: freezing a container may fail under load, and is then to be tried again",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
        Cgroups::None => bad("cgroups", Level::Problem, "none at /sys/fs/cgroup", "mount cgroup2 there"),
    };
    vec![
        ok("kernel", &kernel.release),
        cgroups,
        feature("pidfd", kernel.pidfd, Level::Problem, "no pidfd_open", "use Linux 5.3 or newer"),
        feature(
            "pagemap scan",
            kernel.pagemap_scan,
            Level::Warning,
            "no PAGEMAP_SCAN: CRIU looks through page tables the slow way",
            "use Linux 6.7 or newer",
        ),
        feature(
            "soft-dirty",
            kernel.soft_dirty,
            Level::Warning,
            "changed memory is not tracked: --pre-dump saves the GPU's side only",
            "use a kernel with CONFIG_MEM_SOFT_DIRTY",
        ),
        feature(
            "userfaultfd",
            kernel.userfaultfd,
            Level::Warning,
            "no userfaultfd: CRIU cannot restore programs that use it",
            "use a kernel with CONFIG_USERFAULTFD",
        ),
    ]
}

fn program(check: &'static str, found: &Result<(std::path::PathBuf, String), String>) -> Finding {
    match found {
        Ok((path, version)) if version.is_empty() => bad(
            check,
            Level::Problem,
            format!("{} does not say its version", path.display()),
            "run it by hand: it does not start on this host",
        ),
        Ok((path, version)) => ok(check, format!("{} ({version})", path.display())),
        // These sentences name the remedy behind a colon.
        Err(why) => match why.split_once(": ") {
            Some((found, remedy)) => bad(check, Level::Problem, found, remedy),
            None => bad(check, Level::Problem, why, format!("name another in {PATH}")),
        },
    }
}

fn installed(check: &'static str, level: Level, file: &Installed) -> Finding {
    match file {
        Ok(path) => ok(check, path.display().to_string()),
        Err((path, why)) => {
            let remedy = format!("install phos-runc anew on this host, or set lib_dir in {PATH}");
            bad(check, level, format!("{} {why}", path.display()), remedy)
        }
    }
}

fn driver(facts: &Facts) -> Vec<Finding> {
    let driver = match &facts.driver {
        Ok(driver) => driver,
        Err(why) => {
            let remedy = match &facts.module {
                None => format!("install an NVIDIA driver {DRIVER} or newer"),
                Some(_) => {
                    format!("name the driver's libcuda.so.1 in libcuda of {PATH}, or reboot after an upgrade")
                }
            };
            // The library's own sentence ends with a shorter advice.
            let found = why.rsplit_once(": install").map_or(why.as_str(), |(found, _)| found);
            return vec![bad("driver", Level::Problem, found, remedy)];
        }
    };
    if driver.release.is_empty() {
        return vec![ok("driver", format!("CUDA API {}, no kernel module", driver.api)), gpus(&driver.gpus)];
    }
    let major = driver.release.split('.').next().and_then(|n| n.parse::<u32>().ok());
    let release = match major {
        Some(n) if n >= DRIVER => ok("driver", format!("{} (CUDA API {})", driver.release, driver.api)),
        _ => bad("driver", Level::Problem, &driver.release, format!("install driver {DRIVER} or newer")),
    };
    let nodes = match facts.missing_nodes.as_slice() {
        [] => ok("device nodes", "all there"),
        missing => bad(
            "device nodes",
            Level::Warning,
            format!("no {}", missing.join(", ")),
            "run nvidia-modprobe -c 0 -u",
        ),
    };
    vec![release, nodes, gpus(&driver.gpus)]
}

fn gpus(gpus: &[String]) -> Finding {
    match gpus {
        [] => {
            bad("gpus", Level::Problem, "the driver sees none", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
        }
        gpus => ok("gpus", gpus.join(", ")),
    }
}

fn limits(facts: &Facts) -> Vec<Finding> {
    let (path, free, writable) = &facts.state;
    let shown = format!("{} ({} MiB free)", path.display(), free >> 20);
    let state = match (*writable, *free >= STATE_BYTES) {
        (true, true) => ok("state folder", shown),
        (false, _) => bad(
            "state folder",
            Level::Problem,
            format!("{} cannot be written", path.display()),
            format!("set state_dir in {PATH}"),
        ),
        (true, false) => {
            let remedy = format!("make room, or set state_dir in {PATH}");
            bad("state folder", Level::Problem, shown, remedy)
        }
    };
    let limit = |check, found: u64, enough: u64, remedy: &str| match found {
        u64::MAX => ok(check, "unlimited"),
        n if n >= enough => ok(check, n.to_string()),
        n => bad(check, Level::Warning, format!("at most {n}: {enough} and more is advised"), remedy),
    };
    let mut findings = vec![
        state,
        limit(
            "open files",
            facts.open_files,
            OPEN_FILES,
            "raise LimitNOFILE of the engine's unit: every piece of GPU memory is a descriptor while it is parked",
        ),
    ];
    // Root may lock what it likes.
    if !facts.root {
        findings.push(limit("locked memory", facts.locked_memory, LOCKED_BYTES, "raise LimitMEMLOCK"));
    }
    findings
}

/// What stands in the product's file for an engine, in words.
fn example(engine: &Engine) -> &'static str {
    match engine.name {
        "docker" => "share/phos-runc/docker/daemon.json",
        "podman" => "share/phos-runc/podman/containers.conf",
        "containerd" => "share/phos-runc/containerd/config-v2.toml (config-v3.toml for containerd 2)",
        _ => "share/phos-runc/crio/10-phos.conf",
    }
}

fn engines(engines: &[Engine]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for engine in engines {
        let warn = |found: String, remedy: String| bad(engine.name, Level::Warning, found, remedy);
        for broken in &engine.broken {
            findings.push(warn(broken.clone(), "correct the file".into()));
        }
        if engine.runtimes.is_empty() && engine.broken.is_empty() {
            let remedy = format!("merge {} into {}", example(engine), engine.config);
            findings.push(warn("does not know phos-runc".into(), remedy));
        }
        for runtime in &engine.runtimes {
            findings.push(match &runtime.program {
                Some(path) => ok(engine.name, format!("runtime {} is {}", runtime.name, path.display())),
                None => warn(
                    format!("runtime {} names a phos-runc that does not exist", runtime.name),
                    format!("correct the path in {}", engine.config),
                ),
            });
        }
        findings.extend(engine.lacks.iter().map(|(what, set)| warn(what.clone(), set.clone())));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::engines::Runtime;
    use super::super::facts::Driver;
    use super::*;

    /// A host with nothing wrong.
    fn healthy() -> Facts {
        let path = |p: &str| std::path::PathBuf::from(p);
        let runtime = Runtime { name: "phos".into(), program: Some(path("/usr/local/bin/phos-runc")) };
        let engine = |name| Engine {
            name,
            config: "/etc/x",
            runtimes: vec![runtime.clone()],
            lacks: Vec::new(),
            broken: Vec::new(),
        };
        Facts {
            root: true,
            configuration: Ok(()),
            kernel: Kernel {
                release: "6.18.0".into(),
                cgroups: Cgroups::V2,
                pagemap_scan: true,
                soft_dirty: true,
                userfaultfd: true,
                pidfd: true,
            },
            criu: Ok((path("/usr/sbin/criu"), "4.1.1".into())),
            criu_check: Ok(()),
            lower: Ok((path("/usr/sbin/runc"), "runc version 1.1.5".into())),
            library: Ok(path("/l/libphos.so")),
            hook: Ok(path("/l/phos-hook")),
            driver: Ok(Driver { release: "580.159.04".into(), api: 13000, gpus: vec!["NVIDIA H200".into()] }),
            module: Some("580.159.04".into()),
            missing_nodes: Vec::new(),
            state: (path("/run/phos-runc"), 1 << 30, true),
            open_files: 1 << 20,
            locked_memory: u64::MAX,
            engines: vec![engine("docker"), engine("podman")],
        }
    }

    type Change = (fn(&mut Facts), &'static str, Level, &'static str);

    #[test]
    fn a_healthy_host_is_all_right() {
        let findings = all(&healthy());
        assert!(findings.iter().all(|f| f.level == Level::Ok && f.remedy.is_none()), "{findings:?}");
    }

    #[test]
    fn each_fault_is_one_finding_with_a_remedy() {
        let changes: [Change; 20] = [
            (|f| f.root = false, "user", Level::Problem, "root"),
            (|f| f.configuration = Err("line 2: x".into()), "configuration", Level::Problem, "config.toml"),
            (|f| f.kernel.cgroups = Cgroups::V1, "cgroups", Level::Warning, "unified"),
            (|f| f.kernel.cgroups = Cgroups::None, "cgroups", Level::Problem, "mount"),
            (|f| f.kernel.pidfd = false, "pidfd", Level::Problem, "5.3"),
            (|f| f.kernel.pagemap_scan = false, "pagemap scan", Level::Warning, "6.7"),
            (|f| f.kernel.soft_dirty = false, "soft-dirty", Level::Warning, "SOFT_DIRTY"),
            (|f| f.criu = Err("no CRIU found: install it".into()), "criu", Level::Problem, "install it"),
            (|f| f.lower = Ok(("/r".into(), String::new())), "lower runtime", Level::Problem, "by hand"),
            (
                |f| f.library = Err(("/l".into(), "is missing".into())),
                "libphos.so",
                Level::Problem,
                "lib_dir",
            ),
            (|f| f.hook = Err(("/l".into(), "is missing".into())), "phos-hook", Level::Warning, "lib_dir"),
            (|f| f.driver.as_mut().unwrap().release = "565.1".into(), "driver", Level::Problem, "570"),
            (|f| f.driver = Err("no libcuda".into()), "driver", Level::Problem, "libcuda.so.1"),
            (|f| f.driver.as_mut().unwrap().gpus.clear(), "gpus", Level::Problem, "nvidia-smi"),
            (
                |f| f.missing_nodes = vec!["/dev/nvidia-uvm".into()],
                "device nodes",
                Level::Warning,
                "modprobe",
            ),
            (|f| f.state.2 = false, "state folder", Level::Problem, "state_dir"),
            (|f| f.open_files = 1024, "open files", Level::Warning, "LimitNOFILE"),
            (
                |f| f.engines[0].lacks.push(("off".into(), "experimental".into())),
                "docker",
                Level::Warning,
                "experimental",
            ),
            (|f| f.criu_check = Err("Error: no x".into()), "criu check", Level::Warning, "kernel"),
            (|f| f.engines[1].runtimes.clear(), "podman", Level::Warning, "containers.conf"),
        ];
        for (change, check, level, remedy) in changes {
            let mut facts = healthy();
            change(&mut facts);
            let bad: Vec<_> = all(&facts).into_iter().filter(|f| f.level != Level::Ok).collect();
            let [finding] = bad.as_slice() else { panic!("{check}: {bad:?}") };
            assert_eq!((finding.check, finding.level), (check, level));
            assert!(finding.remedy.as_ref().is_some_and(|r| r.contains(remedy)), "{finding:?}");
            assert!(!finding.found.contains('\n'));
        }
    }

    #[test]
    fn without_a_driver_the_remedy_depends_on_the_kernel_module() {
        let mut facts = healthy();
        facts.driver = Err("no libcuda".into());
        facts.module = None;
        let finding = driver(&facts).remove(0);
        assert!(finding.remedy.unwrap().contains("install an NVIDIA driver 570"));
    }
}
