//! Makes every fault there is, one after the other, and says what came of each. Run it in a sandbox:
//! `integration/scripts/sandbox.sh target/debug/fault-matrix [--sampled] [--only TEXT] [--except TEXT] [--results FILE] [--table FILE]`.
//!
//! `--only`: faults whose description contains TEXT, or one of several texts with ; between them (given twice: both);
//! `--except`: those whose description does not. `--results`: the figures, in the form of `integration/results/`.
//! `--table`: the table of `contrib/docs/faults.md`. Ends with an error if something was lost or left behind.

use std::path::PathBuf;
use std::time::Instant;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use phos_engine::fault::Point;
use phos_integration::container::Place;
use phos_integration::faults::matrix::{self, Breadth};
use phos_integration::faults::run::Bench;
use phos_integration::faults::{Case, Outcome, Row};
use phos_integration::tools::{Tools, word};
use serde_json::json;

fn results(rows: &[Row]) -> Result<String> {
    let commit = match env::var("PHOS_COMMIT") {
        Ok(commit) => commit,
        Err(_) => word("git", &["rev-parse", "--short", "HEAD"])?,
    };
    let date = word("date", &["+%F"])?;
    let struck = || rows.iter().filter(|r| r.struck);
    let lost = struck().filter(|r| matches!(r.outcome, Outcome::Lost(_))).count();
    let leaked = struck().filter(|r| !r.leaked.is_empty()).count();
    let figures =
        [("points", Point::all().len()), ("outcomes", struck().count()), ("lost", lost), ("leaked", leaked)];
    let lines = figures.map(|(metric, value)| {
        json!({
            "bench": "faults", "workload": "sample", "system": "phos-runc", "metric": metric, "value": value,
            "stat": "single", "n": 1, "device": "simcuda", "driver": "", "commit": commit, "date": date,
            "note": "",
        })
        .to_string()
    });
    Ok(lines.join("\n") + "\n")
}

fn main() -> Result<()> {
    let (mut breadth, mut only, mut except) = (Breadth::Full, Vec::<String>::new(), None::<String>);
    let (mut to_results, mut to_table) = (None::<PathBuf>, None::<PathBuf>);
    let mut words = env::args().skip(1);
    while let Some(w) = words.next() {
        let mut value = || words.next().with_context(|| format!("{w} needs a value"));
        match w.as_str() {
            "--sampled" => breadth = Breadth::Sampled,
            "--only" => only.push(value()?),
            "--except" => except = Some(value()?),
            "--results" => to_results = Some(value()?.into()),
            "--table" => to_table = Some(value()?.into()),
            _ => bail!("unknown option {w}"),
        }
    }
    let tools = Tools::find()?;
    let place = Place::new(&tools)?;
    let mut bench = Bench::new(&place)?;
    let begin = Instant::now();
    let (seen, mut rows) = matrix::look(&mut bench)?;
    let unreached = matrix::unreached(&seen);
    bench.restore_all = breadth == Breadth::Full;
    let cases = matrix::cases(&seen, breadth);
    eprintln!(
        "{} faults, {} s to find them; not reached: {unreached:?}",
        cases.len(),
        begin.elapsed().as_secs()
    );
    let mut wrong: Vec<_> = rows.iter().filter_map(matrix::wrong).collect();
    wrong.iter().for_each(|w| eprintln!("WRONG {w}"));
    let wanted = |case: &&Case| {
        let (text, among) =
            (case.to_string(), |list: &str, text: &str| list.split(';').any(|o| text.contains(o)));
        only.iter().all(|o| among(o, &text)) && !except.as_ref().is_some_and(|e| among(e, &text))
    };
    for case in cases.iter().filter(wanted) {
        let begin = Instant::now();
        let row = bench.run(case).with_context(|| case.to_string())?;
        let mark = if row.struck { "" } else { " (not reached)" };
        eprintln!("{:5.1} s  {case} → {}{mark}  [{}]", begin.elapsed().as_secs_f64(), row.outcome, row.said);
        if let Some(text) = matrix::wrong(&row) {
            eprintln!("        WRONG {text}");
            wrong.push(text);
        }
        rows.push(row);
    }
    eprintln!("{} faults in {} s", rows.len(), begin.elapsed().as_secs());
    if let Some(path) = to_results {
        fs::write(path, results(&rows)?)?;
    }
    if let Some(path) = to_table {
        fs::write(path, matrix::table(&rows))?;
    }
    ensure!(unreached.is_empty(), "no job reaches {unreached:?}");
    ensure!(wrong.is_empty(), "{} faults went wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}
