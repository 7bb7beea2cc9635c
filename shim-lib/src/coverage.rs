//! `entry-points.txt` against the functions of CUDA's headers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Treatment of each entry point.
fn classified() -> BTreeMap<&'static str, Vec<&'static str>> {
    let lines = include_str!("../entry-points.txt").lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    lines.map(|line| line.split(' ').collect::<Vec<_>>()).map(|w| (w[0], w[1..].to_vec())).collect()
}

/// Every list in `headers/`: version, and number of arguments by function.
fn headers() -> Vec<(String, BTreeMap<String, String>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("headers");
    let lists = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let lists = lists.filter(|path| path.extension().is_some_and(|e| e == "txt"));
    let read = lists.map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        let functions = text.lines().map(|l| l.split_once(' ').unwrap()).map(|(n, c)| (n.into(), c.into()));
        (path.file_stem().unwrap().to_string_lossy().into_owned(), functions.collect())
    });
    read.collect()
}

#[test]
fn every_function_of_every_header_is_classified() {
    let (classified, headers) = (classified(), headers());
    assert!(headers.len() >= 5, "{} lists", headers.len());
    for (version, functions) in headers {
        assert!(functions.len() > 400, "CUDA {version}: {} functions", functions.len());
        let missing: Vec<_> =
            functions.keys().filter(|name| !classified.contains_key(name.as_str())).collect();
        assert!(missing.is_empty(), "CUDA {version}: entry-points.txt lacks {missing:?}");
        for (name, count) in &functions {
            let treatment = &classified[name.as_str()];
            if matches!(treatment[0], "gate" | "launch") {
                assert_eq!(treatment[1], count, "CUDA {version}: arguments of {name}");
            }
        }
    }
}

/// What a stream's variants do is the same: a program that is compiled for per-thread default streams is no exception.
#[test]
fn variants_for_per_thread_streams_are_treated_alike() {
    let classified = classified();
    for (name, treatment) in &classified {
        if let Some(base) = name.strip_suffix("_ptsz").or(name.strip_suffix("_ptds")) {
            assert_eq!(classified.get(base), Some(treatment), "{name}");
        }
    }
}

/// Some names say that the function submits work.
#[test]
fn what_submits_work_does_not_just_pass() {
    let submits = |name: &str| {
        name.starts_with("cuMemcpy")
            || name.starts_with("cuMemset")
            || name.starts_with("cuLaunch")
            || name.ends_with("Async")
            || name.contains("Async_")
    };
    for (name, treatment) in classified() {
        assert!(!submits(name) || treatment[0] != "pass", "{name} passes");
    }
}
