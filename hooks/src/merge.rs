//! For restore: an engine writes a container's configuration anew, without what a GPU toolkit or this crate had added
//! when it was created. What the image remembers fills the gaps.

use serde_json::{Value, json};

use crate::plan::is_ours;

/// Adds to `spec` what `effective` (the configuration the container really ran with) has and `spec` lacks: mounts by
/// destination, device nodes by path, device rules of the cgroup. Nothing that `spec` has is changed.
pub fn merge(spec: &mut Value, effective: &Value) {
    add(spec, "/mounts", effective, |m| (!is_ours(m)).then(|| m["destination"].clone()));
    add(spec, "/linux/devices", effective, |d| Some(d["path"].clone()));
    add(spec, "/linux/resources/devices", effective, |rule| Some(rule.clone()));
    if effective["annotations"][crate::late::LATE].is_string() {
        // What a toolkit's hook had mounted is in the list now; run again, the hook would fail or mount it twice.
        for kind in ["prestart", "createRuntime"] {
            if let Some(hooks) = spec.pointer_mut(&format!("/hooks/{kind}")).and_then(Value::as_array_mut) {
                hooks.retain(|h| !h["path"].as_str().is_some_and(crate::detect::is_toolkits));
            }
        }
    }
    // How it is injected, and which mounts its hooks had made: the next image must know that too.
    for key in [crate::detect::ANNOTATION, crate::late::LATE, crate::late::IN_PROC] {
        let value = &effective["annotations"][key];
        if !value.is_null() && spec["annotations"][key].is_null() {
            spec["annotations"][key] = value.clone();
        }
    }
}

/// Appends to the list at `path` of `spec` those items of the same list of `from` whose key no item there has.
fn add(spec: &mut Value, path: &str, from: &Value, key: impl Fn(&Value) -> Option<Value>) {
    for item in from.pointer(path).and_then(Value::as_array).into_iter().flatten() {
        let Some(wanted) = key(item) else { continue };
        let mut list = &mut *spec;
        for part in path.split('/').skip(1) {
            list = &mut list[part];
        }
        if !list.is_array() {
            *list = json!([]);
        }
        if let Some(list) = list.as_array_mut()
            && !list.iter().any(|i| key(i).as_ref() == Some(&wanted))
        {
            list.push(item.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_added() {
        let rule = |n: u64| json!({"allow": true, "major": n, "access": "rwm"});
        let effective = json!({
            "mounts": [
                {"destination": "/etc/hosts", "source": "/old/hosts"},
                {"destination": "/usr/lib/libcuda.so.580", "source": "/h/libcuda.so.580"},
                {"destination": "/run/phos", "source": "/run/phos-runc/old/ctl"},
                {"destination": "/usr/lib/libcuda.so.580", "source": "/usr/lib/phos/libphos.so"},
            ],
            "linux": {"devices": [{"path": "/dev/nvidia0"}], "resources": {"devices": [rule(1), rule(195)]}},
        });
        let mut spec = json!({
            "mounts": [{"destination": "/etc/hosts", "source": "/new/hosts"}],
            "linux": {"resources": {"devices": [rule(1)], "memory": {}}},
        });
        merge(&mut spec, &effective);
        assert_eq!(
            spec["mounts"],
            json!([
                {"destination": "/etc/hosts", "source": "/new/hosts"},
                {"destination": "/usr/lib/libcuda.so.580", "source": "/h/libcuda.so.580"},
            ])
        );
        assert_eq!(spec["linux"]["devices"], json!([{"path": "/dev/nvidia0"}]));
        assert_eq!(spec["linux"]["resources"]["devices"], json!([rule(1), rule(195)]));
        let once = spec.clone();
        merge(&mut spec, &effective);
        assert_eq!(spec, once);
    }

    #[test]
    fn a_toolkits_hook_does_not_run_again_where_its_mounts_are_known() {
        let toolkit = json!({"path": "/usr/bin/nvidia-container-runtime-hook"});
        let other = json!({"path": "/usr/bin/other"});
        let mut spec = json!({"hooks": {"prestart": [toolkit, other]}});
        merge(&mut spec, &json!({"annotations": {"phos.late": "true"}}));
        assert_eq!(spec["hooks"]["prestart"], json!([other]));
        assert_eq!(
            spec["annotations"]["phos.late"], "true",
            "an image of the restored container says so again"
        );
    }

    #[test]
    fn a_plain_container_gains_nothing() {
        let mut spec = json!({"mounts": []});
        let before = spec.clone();
        merge(&mut spec, &json!({}));
        assert_eq!(spec, before);
    }
}
