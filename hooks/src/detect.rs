//! Does a container use a GPU, and how does its owner want it treated?

use std::str::FromStr;

use serde_json::Value;

/// The annotation that says what was done.
pub const INJECTED: &str = "phos.injected";

/// The annotation that decides about injection.
pub const ANNOTATION: &str = "phos.inject";

/// How `libphos.so` gets in front of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Mounted over the container's `libcuda.so.1`: only programs that use CUDA see it.
    #[default]
    Mount,
    /// `LD_PRELOAD`: for programs that bring their own `libcuda.so.1` along.
    Preload,
    /// Not at all.
    Off,
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "mount" => Ok(Mode::Mount),
            "preload" => Ok(Mode::Preload),
            "off" => Ok(Mode::Off),
            other => Err(format!(
                "{ANNOTATION}={other} is unknown: use mount, preload or off; nothing was injected"
            )),
        }
    }
}

/// The mode for a container. Its annotation is an order; without one, only a container that uses a GPU is touched.
/// `toolkit_below` says that a GPU toolkit's runtime will edit the configuration after this program.
pub fn mode(spec: &Value, default: Mode, toolkit_below: bool) -> Result<Mode, String> {
    match spec["annotations"][ANNOTATION].as_str() {
        Some(text) => text.parse(),
        None if uses_gpu(spec) || toolkit_below && toolkit_is_asked(spec) => Ok(default),
        None => Ok(Mode::Off),
    }
}

/// How `libphos.so` was put into the container that ran with this configuration.
pub fn injected(effective: &Value) -> Mode {
    effective["annotations"][INJECTED].as_str().and_then(|m| m.parse().ok()).unwrap_or(Mode::Off)
}

/// Whether a path is a GPU's device node: NVIDIA's, or the simulated driver's.
fn is_gpu_node(path: &str) -> bool {
    let Some(name) = path.strip_prefix("/dev/") else { return false };
    let numbered = |prefix: &str| {
        name.strip_prefix(prefix).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    name == "nvidiactl" || numbered("nvidia") || numbered("simgpu")
}

/// Whether a path names a CUDA driver library.
pub(crate) fn is_libcuda(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    name.strip_prefix("libcuda.so").is_some_and(|rest| {
        rest.is_empty() || rest.starts_with('.') && rest.bytes().all(|b| b == b'.' || b.is_ascii_digit())
    })
}

/// Paths of the hooks that run before a container's program, in their order.
fn hooks(spec: &Value) -> impl Iterator<Item = &str> {
    let kinds = ["prestart", "createRuntime", "createContainer"];
    let lists = kinds.into_iter().filter_map(|k| spec["hooks"][k].as_array());
    lists.flatten().filter_map(|h| h["path"].as_str())
}

/// Whether a program is a GPU toolkit's, a hook or a runtime: NVIDIA's all carry the name.
pub fn is_toolkits(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|name| name.contains("nvidia"))
}

/// Whether a hook may mount what the configuration does not name.
pub fn has_hooks(spec: &Value) -> bool {
    hooks(spec).any(|p| !p.ends_with("/phos-hook"))
}

/// Whether a toolkit that sees this configuration will give the container GPUs. It goes by this variable, or by the
/// annotations that name CDI devices.
fn toolkit_is_asked(spec: &Value) -> bool {
    let wanted = |e: &str| {
        e.strip_prefix("NVIDIA_VISIBLE_DEVICES=").is_some_and(|v| !["", "void", "none"].contains(&v))
    };
    let by_name = |(key, value): (&String, &Value)| {
        key.starts_with("cdi.k8s.io/") && value.as_str().is_some_and(|v| v.contains("/gpu="))
    };
    spec["process"]["env"].as_array().into_iter().flatten().any(|e| e.as_str().is_some_and(wanted))
        || spec["annotations"].as_object().into_iter().flatten().any(by_name)
}

/// Whether the container is given a GPU.
pub fn uses_gpu(spec: &Value) -> bool {
    if toolkit_is_asked(spec) && hooks(spec).any(is_toolkits) {
        return true;
    }
    let texts = |list: &Value, key: &str| -> Vec<String> {
        let items = list.as_array().into_iter().flatten();
        items.filter_map(|i| Some(i[key].as_str()?.to_string())).collect()
    };
    let devices = texts(&spec["linux"]["devices"], "path");
    let mounts = texts(&spec["mounts"], "destination");
    devices.iter().chain(&mounts).any(|p| is_gpu_node(p)) || mounts.iter().any(|m| is_libcuda(m))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn gpus_are_recognised_by_their_nodes_and_libraries() {
        for (spec, expected) in [
            (json!({}), false),
            (json!({"linux": {"devices": [{"path": "/dev/fuse"}, {"path": "/dev/nvidia-uvm"}]}}), false),
            (json!({"linux": {"devices": [{"path": "/dev/nvidia0"}]}}), true),
            (json!({"linux": {"devices": [{"path": "/dev/simgpu0"}]}}), true),
            (json!({"mounts": [{"destination": "/dev/nvidiactl"}]}), true),
            (json!({"mounts": [{"destination": "/usr/lib/libcuda.so.580.65.06"}]}), true),
            (
                json!({"mounts": [{"destination": "/usr/lib/libcudart.so.12"}, {"destination": "/x/libcuda.so.bak"}]}),
                false,
            ),
        ] {
            assert_eq!(uses_gpu(&spec), expected, "{spec}");
        }
    }

    #[test]
    fn a_toolkits_hook_and_variable_together_mean_a_gpu() {
        let spec = |hook: &str, value: &str| json!({"hooks": {"prestart": [{"path": hook}]}, "process": {"env": [format!("NVIDIA_VISIBLE_DEVICES={value}")]}});
        let toolkit = "/usr/bin/nvidia-container-runtime-hook";
        assert!(uses_gpu(&spec(toolkit, "all")));
        for no in [
            spec(toolkit, "void"),
            spec("/usr/bin/other", "all"),
            json!({"hooks": {"prestart": [{"path": toolkit}]}}),
        ] {
            assert!(!uses_gpu(&no), "{no}");
        }
    }

    #[test]
    fn the_annotation_decides() {
        let with = |v: &str| json!({"annotations": {ANNOTATION: v}});
        let mode = |spec: &Value, default| mode(spec, default, false);
        assert_eq!(mode(&json!({}), Mode::Mount), Ok(Mode::Off));
        assert_eq!(mode(&json!({"mounts": [{"destination": "/dev/nvidia0"}]}), Mode::Mount), Ok(Mode::Mount));
        assert_eq!(mode(&with("off"), Mode::Mount), Ok(Mode::Off));
        assert_eq!(mode(&with("preload"), Mode::Off), Ok(Mode::Preload));
        assert!(mode(&with("yes"), Mode::Mount).unwrap_err().contains("phos.inject=yes"));
    }

    #[test]
    fn a_toolkits_runtime_below_does_what_it_is_asked_for() {
        let env = |value: &str| json!({"process": {"env": [format!("NVIDIA_VISIBLE_DEVICES={value}")]}});
        let cdi = |value: &str| json!({"annotations": {"cdi.k8s.io/plugin_id": value}});
        for (spec, expected) in [
            (env("0"), Mode::Mount),
            (env("void"), Mode::Off),
            (cdi("nvidia.com/gpu=all"), Mode::Mount),
            (cdi("vendor.com/nic=1"), Mode::Off),
            (json!({}), Mode::Off),
        ] {
            assert_eq!(mode(&spec, Mode::Mount, true), Ok(expected), "{spec}");
            assert_eq!(mode(&spec, Mode::Mount, false), Ok(Mode::Off), "nobody is below: {spec}");
        }
    }
}
