//! Which edits put `libphos.so` in place, and how they are made.

use std::path::Path;

use phos_protocol::paths;
use serde_json::{Value, json};

use crate::Host;
use crate::detect::{INJECTED, Mode};
use crate::locate::Found;

/// One edit of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// A bind mount, appended.
    Mount {
        /// Host path.
        source: String,
        /// Container path.
        destination: String,
        /// Mount options.
        options: Vec<&'static str>,
    },
    /// A library at the front of `LD_PRELOAD`.
    Preload(String),
    /// A hook of the kind `createContainer`, behind those that are there: program and arguments.
    Hook(String, Vec<String>),
    /// An annotation.
    Annotation(&'static str, String),
}

/// The edits for a container that finds its driver at `found` (the first is the one that counts).
pub fn edits(mode: Mode, found: &[Found], host: &Host) -> Vec<Edit> {
    let library = host.library.display().to_string();
    let mount = |source: String, destination: String, options| Edit::Mount { source, destination, options };
    let read_only = || vec!["bind", "ro", "nosuid", "nodev", "private"];
    // The control folder first: the others are mounted inside it.
    let mut edits = vec![mount(
        host.control_dir.display().to_string(),
        paths::CONTROL_DIR.into(),
        vec!["bind", "rw", "nosuid", "nodev", "private"],
    )];
    if let Some(first) = found.first() {
        edits.push(mount(first.host.display().to_string(), paths::REAL_LIBCUDA.into(), read_only()));
    }
    let name = match mode {
        Mode::Off => return Vec::new(),
        Mode::Mount => {
            for f in found {
                edits.push(mount(library.clone(), f.inside.display().to_string(), read_only()));
            }
            "mount"
        }
        Mode::Preload => {
            edits.push(mount(library, paths::PRELOAD_LIBRARY.into(), read_only()));
            edits.push(Edit::Preload(paths::PRELOAD_LIBRARY.into()));
            "preload"
        }
    };
    edits.push(Edit::Annotation(INJECTED, name.into()));
    edits
}

/// The edits for a container whose driver only a hook will mount: `phos-hook` then does the rest.
pub fn late_edits(host: &Host) -> Vec<Edit> {
    let mut edits = edits(Mode::Mount, &[], host);
    let args = vec![HOOK.to_string(), "late".into(), host.library.display().to_string()];
    edits.push(Edit::Hook(host.hook.display().to_string(), args));
    edits
}

/// Name of the hook program.
pub const HOOK: &str = "phos-hook";

/// Whether a mount is one of those that [`edits`] makes.
pub fn is_ours(mount: &Value) -> bool {
    let destination = mount["destination"].as_str().unwrap_or_default();
    let below = destination.strip_prefix(paths::CONTROL_DIR);
    let library = mount["source"].as_str().is_some_and(|s| s.ends_with("/libphos.so"));
    below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) || library
}

/// The control folder that a configuration mounts, if [`apply`] has made it what it is.
pub fn control_dir(spec: &Value) -> Option<&Path> {
    let mut mounts = spec["mounts"].as_array()?.iter();
    Path::new(mounts.find(|m| m["destination"] == paths::CONTROL_DIR)?["source"].as_str()?).into()
}

/// Takes out the mounts that an earlier [`apply`] made.
pub fn remove(spec: &mut Value) {
    if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
        mounts.retain(|m| !is_ours(m));
    }
    if let Some(hooks) = spec.pointer_mut("/hooks/createContainer").and_then(Value::as_array_mut) {
        let ours = |h: &Value| h["path"].as_str().is_some_and(|p| p.ends_with("/phos-hook"));
        hooks.retain(|h| !ours(h));
    }
}

/// Makes the edits. What an earlier run put there is replaced, so that doing it twice is doing it once.
pub fn apply(spec: &mut Value, edits: &[Edit]) {
    if edits.is_empty() {
        return;
    }
    remove(spec);
    for edit in edits {
        match edit {
            Edit::Mount { source, destination, options } => {
                let mount =
                    json!({"destination": destination, "type": "bind", "source": source, "options": options});
                match spec["mounts"].as_array_mut() {
                    Some(mounts) => mounts.push(mount),
                    None => spec["mounts"] = json!([mount]),
                }
            }
            Edit::Hook(path, args) => {
                let hook = json!({"path": path, "args": args, "timeout": 10});
                match spec["hooks"]["createContainer"].as_array_mut() {
                    Some(hooks) => hooks.push(hook),
                    None => spec["hooks"]["createContainer"] = json!([hook]),
                }
            }
            Edit::Preload(library) => preload(&mut spec["process"]["env"], library),
            Edit::Annotation(key, value) => spec["annotations"][*key] = json!(value),
        }
    }
}

fn preload(env: &mut Value, library: &str) {
    if !env.is_array() {
        *env = json!([]);
    }
    for variable in env.as_array_mut().into_iter().flatten() {
        if let Some(present) = variable.as_str().and_then(|v| v.strip_prefix("LD_PRELOAD=")) {
            if !present.split([':', ' ']).any(|l| l == library) {
                *variable = json!(format!("LD_PRELOAD={library}:{present}"));
            }
            return;
        }
    }
    if let Some(list) = env.as_array_mut() {
        list.push(json!(format!("LD_PRELOAD={library}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            library: "/usr/lib/phos/libphos.so".into(),
            hook: "/usr/lib/phos/phos-hook".into(),
            control_dir: "/run/phos-runc/c-1/ctl".into(),
            default_mode: Mode::Mount,
            toolkit_below: false,
        }
    }

    fn found() -> Vec<Found> {
        vec![Found { inside: "/usr/lib/libcuda.so.580".into(), host: "/h/libcuda.so.580".into() }]
    }

    fn destinations(spec: &Value) -> Vec<&str> {
        spec["mounts"].as_array().unwrap().iter().filter_map(|m| m["destination"].as_str()).collect()
    }

    #[test]
    fn mounting_twice_is_mounting_once_and_unknown_fields_stay() {
        let original = json!({
            "ociVersion": "1.2.0", "x-vendor": {"a": [1, 2]},
            "mounts": [{"destination": "/run/phosphor", "source": "/x", "x": true}],
            "process": {"env": ["PATH=/bin"]},
        });
        let edits = edits(Mode::Mount, &found(), &host());
        let mut spec = original.clone();
        apply(&mut spec, &edits);
        let once = spec.clone();
        apply(&mut spec, &edits);
        assert_eq!(spec, once);
        let expected = ["/run/phosphor", "/run/phos", "/run/phos/libcuda.so.real", "/usr/lib/libcuda.so.580"];
        assert_eq!(destinations(&spec), expected);
        assert_eq!(spec["x-vendor"], original["x-vendor"]);
        assert_eq!(spec["mounts"][0], original["mounts"][0]);
        assert_eq!(spec["process"], original["process"]);
        assert_eq!(spec["annotations"][INJECTED], "mount");
    }

    #[test]
    fn preloading_keeps_what_was_preloaded() {
        let edits = edits(Mode::Preload, &found(), &host());
        for (env, expected) in [
            (json!([]), json!(["LD_PRELOAD=/run/phos/libphos.so"])),
            (json!(["LD_PRELOAD=/a.so"]), json!(["LD_PRELOAD=/run/phos/libphos.so:/a.so"])),
        ] {
            let mut spec = json!({"process": {"env": env}});
            apply(&mut spec, &edits);
            apply(&mut spec, &edits);
            assert_eq!(spec["process"]["env"], expected);
        }
    }

    #[test]
    fn a_late_driver_gets_a_hook_behind_the_toolkits_once() {
        let mut spec = json!({"hooks": {"createContainer": [{"path": "/usr/bin/nvidia-ctk"}]}});
        for _ in 0..2 {
            apply(&mut spec, &late_edits(&host()));
        }
        let hooks = spec["hooks"]["createContainer"].as_array().unwrap();
        let paths: Vec<_> = hooks.iter().filter_map(|h| h["path"].as_str()).collect();
        assert_eq!(paths, ["/usr/bin/nvidia-ctk", "/usr/lib/phos/phos-hook"]);
        assert_eq!(destinations(&spec), ["/run/phos"]);
        assert_eq!(hooks[1]["args"], json!(["phos-hook", "late", "/usr/lib/phos/libphos.so"]));
    }

    #[test]
    fn nothing_to_do_changes_nothing() {
        let mut spec = json!({"mounts": [{"destination": "/run/phos/x"}]});
        let before = spec.clone();
        apply(&mut spec, &edits(Mode::Off, &found(), &host()));
        assert_eq!(spec, before);
    }
}
