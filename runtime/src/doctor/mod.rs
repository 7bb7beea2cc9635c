//! `doctor [--json]`: whether this host can checkpoint a container with a GPU, and what to do where it cannot.

mod checks;
mod engines;
mod facts;
mod kernel;

use anyhow::{Result, bail};

use crate::args::Args;

use checks::{Finding, Level};
use facts::Facts;

/// `doctor`. Status 1 if something prevents a checkpoint.
pub fn run(args: &Args) -> Result<i32> {
    let words: Vec<_> = args.all[args.verb_at + 1..].iter().map(|w| w.to_string_lossy()).collect();
    if let Some(word) = words.iter().find(|w| *w != "--json") {
        bail!("doctor: unknown argument {word}: usage: phos-runc doctor [--json]");
    }
    let findings = checks::all(&Facts::gather());
    let usable = findings.iter().all(|f| f.level != Level::Problem);
    if words.is_empty() {
        findings.iter().for_each(print);
    } else {
        let report = serde_json::json!({ "usable": usable, "findings": findings });
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(i32::from(!usable))
}

fn print(finding: &Finding) {
    let level = match finding.level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Problem => "PROBLEM",
    };
    println!("{level:<8} {:<14} {}", finding.check, finding.found);
    if let Some(remedy) = &finding.remedy {
        println!("{:<8} {:<14} -> {remedy}", "", "");
    }
}
