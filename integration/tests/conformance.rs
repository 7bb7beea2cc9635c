//! phos-runc beside the lower runtime: the same commands on containers without a GPU, the same answers.

use std::fs;

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::Gpu;
use phos_integration::container::{Container, Place};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// What a container was asked, in order. `ID` stands for its id. Whatever writes to the container's streams is left out:
/// those would be this test's.
const CONVERSATION: [&[&str]; 29] = [
    &["state"],
    &["start"],
    &["create", "--bundle", "BUNDLE"],
    &["create", "--bundle", "BUNDLE"],
    &["state"],
    &["start"],
    &["start"],
    &["state"],
    &["list", "-q"],
    &["list", "--format", "bogus"],
    &["ps", "--format", "json"],
    &["ps"],
    &["exec", "ID", "/bin/busybox", "true"],
    &["exec", "ID", "/bin/busybox", "false"],
    &["exec", "ID", "/bin/busybox", "echo", "a b", "--c"],
    &["exec", "ID", "/does/not/exist"],
    &["events", "--stats"],
    &["update", "--pids-limit", "50"],
    &["update", "--memory", "lots"],
    &["pause"],
    &["state"],
    &["resume"],
    &["resume"],
    &["kill", "ID", "NOSUCH"],
    &["delete"],
    &["--no-such-flag", "state"],
    &["state", "--no-such-flag"],
    &["kill", "ID", "KILL"],
    &["delete", "--force"],
];

/// Verbs that end with the container's id.
fn wants_id(words: &[&str]) -> bool {
    !words.contains(&"ID") && words[0] != "list"
}

/// Digits are process ids, times and counters; the container's own id and folders differ.
fn comparable(text: &str, container: &Container<'_>) -> String {
    let own = container.bundle.path.display().to_string();
    let text = text.replace(&own, "BUNDLE").replace(&container.id, "ID");
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '0'..='9' if out.ends_with('#') => {}
            '0'..='9' => out.push('#'),
            // Columns are as wide as the numbers in them.
            ' ' if out.ends_with(' ') => {}
            c => out.push(c),
        }
    }
    out
}

/// Everything a conversation shows: exit status, output, and the lines of the log file.
fn converse(container: &Container<'_>, format: &str) -> Result<Vec<String>> {
    let place = container.place;
    let root = place.path(&format!("{}.root", container.id)).display().to_string();
    let log = place.path(&format!("{}.{format}.log", container.id)).display().to_string();
    let bundle = container.bundle.path.display().to_string();
    let mut answers = Vec::new();
    for words in CONVERSATION {
        let mut line = vec!["--root", &root, "--log", &log, "--log-format", format];
        line.extend(words.iter().map(|w| match *w {
            "ID" => container.id.as_str(),
            "BUNDLE" => bundle.as_str(),
            w => w,
        }));
        if wants_id(words) {
            line.push(&container.id);
        }
        let ended = place.command(&container.runtime, &line, words[0] == "create")?;
        if words == ["delete", "--force"] || words == ["kill", "ID", "KILL"] {
            // The lower runtime does not wait for the end.
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        let text = comparable(&ended.text, container);
        answers.push(format!("{words:?} ended with {}: {text}", ended.status));
    }
    let logged = fs::read_to_string(&log).unwrap_or_default();
    answers.extend(logged.lines().map(|l| comparable(l, container)));
    // What is without a container.
    for words in
        [&["features"][..], &["frobnicate"], &["spec", "--no-such-flag"], &["restore", "--lsm-mount-context"]]
    {
        let ended = place.command(&container.runtime, words, false)?;
        answers.push(format!(
            "{words:?} ended with {}: {}",
            ended.status,
            comparable(&ended.text, container)
        ));
    }
    Ok(answers)
}

fn side_by_side(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for format in ["text", "json"] {
        let mut answers = Vec::new();
        for runtime in [tools.runc.clone(), tools.program("phos-runc")] {
            let mut container = place.container(&["/bin/busybox", "sleep", "1000"], &Gpu::No)?;
            container.runtime = runtime;
            answers.push(converse(&container, format).context("a conversation")?);
        }
        let [lower, own] = answers.try_into().map_err(|_| anyhow::anyhow!("two runtimes"))?;
        for (lower, own) in lower.iter().zip(&own) {
            // Each names itself in its usage text.
            let (lower, own) = (lower.replace("phos-runc", "runc"), own.replace("phos-runc", "runc"));
            ensure!(lower == own, "the lower runtime:\n{lower}\nphos-runc:\n{own}");
        }
        ensure!(lower.len() == own.len(), "{} lines of the lower runtime, {} here", lower.len(), own.len());
        let good = own.iter().filter(|a| a.contains(" ended with 0:")).count();
        ensure!(good >= 15, "only {good} commands succeeded: {own:#?}");
    }
    Ok(())
}

#[test]
fn the_same_answers_as_the_lower_runtime() {
    sandboxed("the_same_answers_as_the_lower_runtime", |tools| side_by_side(tools).unwrap());
}
