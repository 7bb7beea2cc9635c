//! Whether a configuration has the shape that editing it takes for granted. One that has not is nobody's container: the
//! lower runtime could not read it either.

use serde_json::Value;

/// Places that hold objects, and places that hold lists, as JSON pointers. None of them need be there.
const OBJECTS: [&str; 7] = ["", "/annotations", "/hooks", "/linux", "/linux/resources", "/process", "/root"];
const LISTS: [&str; 7] = [
    "/hooks/createContainer",
    "/hooks/createRuntime",
    "/hooks/prestart",
    "/linux/devices",
    "/linux/resources/devices",
    "/mounts",
    "/process/env",
];

/// Says in one line what is wrong with a configuration.
pub fn check(spec: &Value) -> Result<(), String> {
    let wrong = |places: &[&'static str], fits: fn(&Value) -> bool| {
        places.iter().copied().find(|p| spec.pointer(p).is_some_and(|v| !fits(v)))
    };
    match wrong(&OBJECTS, |v| v.is_object() || v.is_null()) {
        Some("") => return Err("it is not an object".into()),
        Some(place) => return Err(format!("'{}' is not an object", name(place))),
        None => {}
    }
    match wrong(&LISTS, |v| v.is_array() || v.is_null()) {
        Some(place) => Err(format!("'{}' is not a list", name(place))),
        None => Ok(()),
    }
}

/// A pointer as people write it.
fn name(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cannot_be_edited_is_named() {
        for good in [json!({}), json!(null), json!({"mounts": null, "hooks": {"prestart": []}})] {
            assert_eq!(check(&good), Ok(()));
        }
        for (bad, word) in [
            (json!([]), "it is not an object"),
            (json!({"annotations": []}), "'annotations' is not an object"),
            (json!({"hooks": {"createContainer": {}}}), "'hooks.createContainer' is not a list"),
            (json!({"linux": {"resources": {"devices": 1}}}), "'linux.resources.devices' is not a list"),
            (json!({"mounts": "x"}), "'mounts' is not a list"),
        ] {
            assert_eq!(check(&bad).unwrap_err(), word);
        }
    }
}
