//! Faults are made at every point of the engine's state machine, at every access to an image's files and in every driver call:
//! nothing is lost, nothing is left behind. `fault-matrix` makes all combinations.

use anyhow::{Context, Result, ensure};
use phos_integration::container::Place;
use phos_integration::faults::matrix::{self, Breadth};
use phos_integration::faults::run::Bench;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

fn sampled(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let mut bench = Bench::new(&place)?;
    let (seen, rows) = matrix::look(&mut bench)?;
    let unreached = matrix::unreached(&seen);
    ensure!(unreached.is_empty(), "no job reaches {unreached:?}");
    let (mut struck, mut wrong) = (0, rows.iter().filter_map(matrix::wrong).collect::<Vec<_>>());
    for case in matrix::cases(&seen, Breadth::Sampled) {
        let row = bench.run(&case).with_context(|| case.to_string())?;
        struck += usize::from(row.struck);
        wrong.extend(matrix::wrong(&row));
    }
    ensure!(wrong.is_empty(), "{} faults went wrong:\n{}", wrong.len(), wrong.join("\n"));
    eprintln!("{struck} faults, none lost, none leaked");
    Ok(())
}

#[test]
fn nothing_is_lost_and_nothing_is_left_behind() {
    sandboxed("nothing_is_lost_and_nothing_is_left_behind", |tools| sampled(tools).unwrap());
}
