//! Mounts that hooks have made: they stand in no configuration, and neither CRIU nor a restore knows of them unless told.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::plan::is_ours;

/// The annotation of a configuration that [`remember`] has added mounts to.
pub const LATE: &str = "phos.late";
/// The annotation that lists, as JSON, the mounts below /proc: the lower runtime takes none there from a configuration.
pub(crate) const IN_PROC: &str = "phos.late.proc";

/// A line of `mountinfo` (proc(5)), as much of it as matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// `major:minor` of the file system.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub at: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// Whether this mount is read-only.
    pub read_only: bool,
}

/// A mount that a hook made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LateMount {
    /// Where it is in the container.
    pub destination: PathBuf,
    /// The same file or folder on the host.
    pub source: PathBuf,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// Undoes the octal escapes of `mountinfo`.
fn unescape(word: &str) -> PathBuf {
    let mut out = Vec::with_capacity(word.len());
    let mut bytes = word.as_bytes();
    while let [first, rest @ ..] = bytes {
        let escape = rest.get(..3).filter(|_| *first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match escape.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                bytes = &rest[3..];
            }
            None => {
                out.push(*first);
                bytes = rest;
            }
        }
    }
    use std::os::unix::ffi::OsStringExt;
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Reads `mountinfo`; lines that are none are passed over.
pub fn parse(mountinfo: &str) -> Vec<Mounted> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, _, device, root, at, options, ..] = words.as_slice() else { return None };
        let read_only = options.split(',').any(|o| o == "ro");
        // Optional fields of any number end with a dash.
        let kind = words.iter().skip(6).skip_while(|w| **w != "-").nth(1)?;
        Some(Mounted {
            device: device.to_string(),
            root: unescape(root),
            at: unescape(at),
            kind: kind.to_string(),
            read_only,
        })
    };
    mountinfo.lines().filter_map(line).collect()
}

/// The host's path of what a container's mount shows; `None` if the host has it mounted nowhere.
fn on_host(mount: &Mounted, host: &[Mounted]) -> Option<PathBuf> {
    let same = host.iter().filter(|h| h.device == mount.device && mount.root.starts_with(&h.root));
    let best = same.max_by_key(|h| h.root.components().count())?;
    let below = mount.root.strip_prefix(&best.root).ok()?;
    Some(if below.as_os_str().is_empty() { best.at.clone() } else { best.at.join(below) })
}

/// Places that the runtime mounts something at without a mount in the configuration.
fn is_the_runtimes(spec: &Value, at: &Path) -> bool {
    let listed = |key: &str| {
        spec["linux"][key]
            .as_array()
            .into_iter()
            .flatten()
            .any(|p| p.as_str().is_some_and(|p| Path::new(p) == at))
    };
    let device = spec["linux"]["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|d| d["path"].as_str().is_some_and(|p| Path::new(p) == at));
    at == Path::new("/") || device || listed("maskedPaths") || listed("readonlyPaths")
}

/// The mounts of a container that a hook made: those that show something of the host and stand in no configuration.
/// `container` and `host` are the two sides' `mountinfo`, `root` is the container's root file system on the host.
pub fn mounts(container: &[Mounted], host: &[Mounted], spec: &Value, root: &Path) -> Vec<LateMount> {
    // After a restore the hooks are gone and their mounts below /proc are still in no configuration.
    if !crate::detect::has_hooks(spec) && spec["annotations"][IN_PROC].is_null() {
        return Vec::new();
    }
    // A destination may lead through links of the container's root; `mountinfo` shows where it led.
    let destinations =
        spec["mounts"].as_array().into_iter().flatten().filter_map(|m| m["destination"].as_str());
    let known: Vec<PathBuf> = destinations
        .flat_map(|d| {
            let resolved = crate::locate::resolve(root, Path::new(d)).map(|r| Path::new("/").join(r));
            resolved.into_iter().chain([PathBuf::from(d)])
        })
        .collect();
    let late = |m: &Mounted| {
        // The lower runtime mounts one of these for each controller, at places that no configuration names.
        if m.kind.starts_with("cgroup") {
            return None;
        }
        if known.contains(&m.at) || is_the_runtimes(spec, &m.at) {
            return None;
        }
        let source = match on_host(m, host) {
            // A toolkit puts a changed copy of the driver's parameters over them, from a file system that nothing else
            // shows. A restore has the host's own there.
            None if m.at.starts_with("/proc") && is_orphan(m, container) => m.at.clone(),
            // What the container has mounted of its own root stays its own business, and CRIU's.
            source => source.filter(|s| !s.starts_with(root))?,
        };
        // Nothing else can stand in a configuration. CRIU will name the mount when it refuses it.
        source.to_str()?;
        Some(LateMount { destination: m.at.clone(), source, read_only: m.read_only })
    };
    container.iter().filter(|m| is_plain(&m.at)).filter_map(late).collect()
}

/// Whether a mount shows a part of a file system of which nothing more is mounted: CRIU cannot make such a one again.
fn is_orphan(mount: &Mounted, container: &[Mounted]) -> bool {
    let whole =
        |m: &&Mounted| m.device == mount.device && m.at != mount.at && mount.root.starts_with(&m.root);
    mount.root != Path::new("/") && !container.iter().any(|m| whole(&m))
}

/// Whether a path can stand in CRIU's configuration file. A container may choose its mounts' names, and CRIU runs what a
/// line of that file tells it to.
fn is_plain(path: &Path) -> bool {
    let plain = |p: &str| p.chars().all(|c| c.is_ascii_graphic() && !"#\"'[]".contains(c));
    path.is_absolute() && path.to_str().is_some_and(plain)
}

/// Options for CRIU's configuration file that declare the mounts, so that they can be dumped. The names are those that
/// the lower runtime gives to mounts of the configuration, which they will be on restore.
pub fn criu_options(mounts: &[LateMount]) -> String {
    let mut lines: Vec<String> =
        mounts.iter().map(|m| format!("external mnt[{0}]:{0}\n", m.destination.display())).collect();
    lines.sort();
    lines.dedup();
    lines.concat()
}

/// Options for CRIU's configuration file with which a container is restored that ran with the configuration `effective`:
/// where on the host its mounts below /proc come from.
pub fn restore_options(effective: &Value) -> String {
    let text = effective["annotations"][IN_PROC].as_str().unwrap_or_default();
    let mounts: Vec<(PathBuf, PathBuf)> = serde_json::from_str(text).unwrap_or_default();
    let plain = mounts.iter().filter(|(at, source)| is_plain(at) && is_plain(source));
    plain.map(|(at, source)| format!("external mnt[{}]:{}\n", at.display(), source.display())).collect()
}

/// Adds the mounts to a configuration, for restore: on restore no hook makes them again. `device` tells the numbers of a
/// device node on the host, which the container's cgroup must allow then.
pub fn remember(spec: &mut Value, mounts: &[LateMount], device: impl Fn(&Path) -> Option<(u64, u64)>) {
    let (in_proc, mounts): (Vec<_>, Vec<_>) = mounts.iter().partition(|m| m.destination.starts_with("/proc"));
    if !in_proc.is_empty() {
        let pairs: Vec<_> = in_proc.iter().map(|m| (&m.destination, &m.source)).collect();
        spec["annotations"][IN_PROC] = json!(json!(pairs).to_string());
    }
    for m in &mounts {
        let options = if m.read_only { json!(["bind", "ro", "private"]) } else { json!(["bind", "private"]) };
        let mount = json!({
            "destination": m.destination, "source": m.source, "type": "bind", "options": options,
        });
        // This crate's own are made anew.
        if is_ours(&mount) {
            continue;
        }
        push(&mut spec["mounts"], mount);
        if let Some((major, minor)) = device(&m.source) {
            let rule = json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
            push(&mut spec["linux"]["resources"]["devices"], rule);
        }
    }
    if !mounts.is_empty() || !in_proc.is_empty() {
        spec["annotations"][LATE] = json!("true");
    }
}

fn push(list: &mut Value, item: Value) {
    match list.as_array_mut() {
        Some(list) => list.push(item),
        None => *list = json!([item]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "\
22 1 0:21 / / rw,relatime - ext4 /dev/vda rw
23 22 0:30 / /opt/driver ro,relatime - squashfs driver ro
24 22 0:6 / /dev rw - devtmpfs devtmpfs rw
26 22 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
25 22 0:21 /srv/c\\040d /srv/shared rw - ext4 /dev/vda rw
";

    fn container() -> Vec<Mounted> {
        parse(
            "\
60 59 0:90 / / rw - overlay overlay rw
61 60 0:91 / /dev rw - tmpfs tmpfs rw
62 60 0:21 /var/out /out rw - ext4 /dev/vda rw
63 60 0:30 /lib64/libcuda.so.580.1 /usr/lib/libcuda.so.580.1 ro - squashfs driver ro
64 63 0:21 /usr/lib/phos/libphos.so /usr/lib/libcuda.so.580.1 ro - ext4 /dev/vda rw
65 61 0:6 /nvidia0 /dev/nvidia0 rw - devtmpfs devtmpfs rw
66 60 0:21 /srv/c\\040d/sub /data rw - ext4 /dev/vda rw
67 60 0:21 /ctr/rootfs/a /b rw - ext4 /dev/vda rw
68 60 0:92 / /proc/acpi ro - tmpfs tmpfs ro
69 60 0:31 /box /sys/fs/cgroup/cpu ro,nosuid shared:7 master:2 - cgroup cgroup rw,cpu
70 60 0:21 /srv/c\\040d/\\212 /no-text rw - ext4 /dev/vda rw
",
        )
    }

    #[test]
    fn what_shows_the_host_and_is_in_no_configuration_was_made_late() {
        let hooks = json!({"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}]});
        let spec = json!({"hooks": hooks, "mounts": [{"destination": "/dev"}, {"destination": "/out"}], "linux": {"maskedPaths": ["/proc/acpi"]}});
        let late = mounts(&container(), &parse(HOST), &spec, Path::new("/ctr/rootfs"));
        let pairs: Vec<_> =
            late.iter().map(|m| (m.destination.to_str().unwrap(), m.source.to_str().unwrap())).collect();
        assert_eq!(
            pairs,
            [
                ("/usr/lib/libcuda.so.580.1", "/opt/driver/lib64/libcuda.so.580.1"),
                ("/usr/lib/libcuda.so.580.1", "/usr/lib/phos/libphos.so"),
                ("/dev/nvidia0", "/dev/nvidia0"),
                ("/data", "/srv/shared/sub"),
            ]
        );
        assert!(late[0].read_only && !late[2].read_only);
        assert_eq!(
            mounts(&container(), &parse(HOST), &json!({}), Path::new("/")),
            [],
            "no hooks, no late mounts"
        );
        let options = criu_options(&late);
        assert_eq!(options.lines().count(), 3, "{options}");
        assert!(options.contains("external mnt[/dev/nvidia0]:/dev/nvidia0\n"));
    }

    #[test]
    fn a_restore_gets_them_with_their_device_rules_but_not_ours() {
        let mut spec = json!({"mounts": [{"destination": "/dev"}]});
        let hooks = json!({"hooks": {"prestart": [{"path": "/x"}]}});
        let late = mounts(&container(), &parse(HOST), &hooks, Path::new("/ctr/rootfs"));
        remember(&mut spec, &late, |p| (p == Path::new("/dev/nvidia0")).then_some((195, 0)));
        let sources: Vec<_> =
            spec["mounts"].as_array().unwrap().iter().filter_map(|m| m["source"].as_str()).collect();
        assert!(
            sources.contains(&"/opt/driver/lib64/libcuda.so.580.1")
                && !sources.iter().any(|s| s.contains("phos"))
        );
        assert_eq!(spec["linux"]["resources"]["devices"][0]["major"], 195);
        assert_eq!(spec["annotations"][LATE], "true");
    }

    #[test]
    fn mounts_below_proc_are_for_criu_alone() {
        let gpu = "/proc/driver/nvidia/gpus/0000:01:00.0";
        let mount = |at: &str| LateMount { destination: at.into(), source: gpu.into(), read_only: true };
        let mut spec = json!({});
        remember(&mut spec, &[mount(gpu)], |_| None);
        assert!(spec["mounts"].is_null(), "the lower runtime would refuse it: {spec}");
        assert_eq!(spec["annotations"][LATE], "true");
        assert_eq!(restore_options(&spec), format!("external mnt[{gpu}]:{gpu}\n"));
        assert_eq!(restore_options(&json!({})), "");
        let mut hostile = json!({});
        remember(&mut hostile, &[mount("/proc/x\naction-script /evil")], |_| None);
        assert_eq!(restore_options(&hostile), "");
    }

    #[test]
    fn a_changed_copy_below_proc_gives_way_to_the_hosts_file() {
        let params = "70 60 0:99 /nvct-params /proc/driver/nvidia/params ro - tmpfs tmpfs rw\n";
        let hooks = json!({"hooks": {"createContainer": [{"path": "/usr/bin/nvidia-cdi-hook"}]}});
        let late = |text: &str| mounts(&parse(text), &parse(HOST), &hooks, Path::new("/ctr/rootfs"));
        let found = late(params);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].source, Path::new("/proc/driver/nvidia/params"));
        // CRIU saves it where the whole file system is mounted too.
        assert_eq!(late(&format!("{params}71 60 0:99 / /run/nvidia-ctk-hook1 rw - tmpfs tmpfs rw\n")), []);
        assert_eq!(late(&params.replace("/proc/driver/nvidia", "/etc")), []);
    }

    #[test]
    fn a_mounts_name_cannot_add_a_line_to_criu_s_options() {
        let container =
            parse("62 60 0:21 /var/out /out]:x\\012action-script\\040/evil rw - ext4 /dev/vda rw\n");
        assert!(container[0].at.to_string_lossy().contains("\naction-script /evil"));
        let hooks = json!({"hooks": {"prestart": [{"path": "/x"}]}});
        assert_eq!(mounts(&container, &parse(HOST), &hooks, Path::new("/ctr/rootfs")), []);
    }
}
