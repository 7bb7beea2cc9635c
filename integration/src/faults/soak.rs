//! Several containers at the same time, each of which goes through one event after the other that a seed has chosen: a checkpoint,
//! a stop and restore, a fault. Events of one round happen at the same time; what came of them is looked at when all is quiet.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::leaks::{Inventory, wait_until_quiet};
use super::matrix::{self, Breadth};
use super::run::Bench;
use super::{Action, Case, Outcome, Place, Row, Way};
use crate::bundle::Gpu;
use crate::container::Place as Folder;
use crate::tools::Tools;

/// Containers.
const CONTAINERS: usize = 3;
/// How much later than the first the last event of a round may begin, milliseconds.
const STAGGER: u64 = 150;
/// When the last process of a job may be killed, milliseconds after its start.
const MOMENTS: u64 = 600;
/// How long what is at work at the end may take.
const QUIET: Duration = Duration::from_secs(30);

/// Numbers that follow from a seed (SplitMix64).
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Chance(seed)
    }

    /// One below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.below(of.len() as u64) as usize).cloned()
    }
}

/// What happens to a container in a round.
#[derive(Debug, Clone)]
struct Event {
    case: Case,
    /// Milliseconds after the round has begun.
    delay: u64,
    /// Whether the image is restored though the program runs on.
    restores: bool,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.case, if self.restores { ", then restored" } else { "" })
    }
}

/// Hangs cost seconds, and end by limits that `tests/faults.rs` tries; jobs that have a fault of their own would have a second one.
/// A GPU's own driver is not made to fail.
fn is_for_soak(case: &Case, gpu: &Gpu) -> bool {
    let possible = match &case.place {
        Place::Worker(_, code, _) | Place::Program(_, code, _) => *gpu == Gpu::Simulated && code != "hang",
        _ => true,
    };
    possible && !matches!(case.way, Way::Recovery | Way::Lost) && case.action != Action::Hang
}

/// One that is killed at any time.
fn killed(chance: &mut Chance) -> Option<Case> {
    let way = chance.one_of(&[Way::Running, Way::Stopping, Way::Precopy, Way::Again, Way::Restore])?;
    let ms = chance.below(MOMENTS) as u32;
    let (place, action) = chance.one_of(&[
        (Place::Time(ms), Action::KillForeground),
        (Place::Time(ms), Action::KillWorker),
        (Place::Time(ms), Action::KillKeeper),
        (Place::Lower(ms / 4), Action::Kill),
        (Place::Criu(ms / 4), Action::Kill),
    ])?;
    Some(Case { way, place, action })
}

fn event(chance: &mut Chance, faults: &[Case]) -> Option<Event> {
    let case = match chance.below(8) {
        0..2 => {
            let way =
                chance.one_of(&[Way::Running, Way::Running, Way::Stopping, Way::Precopy, Way::Restore])?;
            Case { way, place: Place::Nowhere, action: Action::Kill }
        }
        2..5 => killed(chance)?,
        _ => chance.one_of(faults)?,
    };
    Some(Event { case, delay: chance.below(STAGGER), restores: chance.below(4) == 0 })
}

/// How long it goes on.
#[derive(Debug, Clone, Copy)]
pub enum Length {
    /// So many events, however long they take.
    Events(usize),
    /// As long as that, and at least one round.
    Time(Duration),
}

/// What was done.
#[derive(Debug, Default)]
pub struct Done {
    /// What was lost or left behind.
    pub wrong: Vec<String>,
    /// Events.
    pub events: usize,
    /// Faults that were reached.
    pub struck: usize,
    /// Restores that the program went through.
    pub restored: usize,
    /// Containers that were deleted, or whose program was killed.
    pub gone: usize,
}

/// A round: all events at the same time, then a look at each container.
fn round(benches: &mut [Bench<'_>], events: &[Event]) -> Result<Vec<Row>> {
    let struck: Vec<_> = thread::scope(|scope| {
        let strikes = benches.iter_mut().zip(events).map(|(bench, event)| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(event.delay));
                bench.strike(&event.case)
            })
        });
        // All of them, before one is waited for.
        let strikes: Vec<_> = strikes.collect();
        strikes.into_iter().map(|s| s.join()).collect()
    });
    let mut rows = Vec::new();
    for ((bench, event), struck) in benches.iter_mut().zip(events).zip(struck) {
        let struck = struck.map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        let row = struck.and_then(|struck| {
            bench.restore_all = event.restores;
            bench.settle(struck)
        });
        rows.push(row.with_context(|| event.to_string())?);
    }
    // What a container has more may have been hidden by what another one, still to be restored, had less.
    for (bench, row) in benches.iter_mut().zip(&mut rows) {
        if row.leaked.is_empty() && !matches!(row.outcome, Outcome::Lost(_) | Outcome::Gone) {
            row.leaked = bench.beyond()?;
        }
    }
    Ok(rows)
}

/// Removes the containers, whose programs run. Nothing is left of them.
fn finish(benches: Vec<Bench<'_>>, places: &[Folder], before: &[Inventory]) -> Result<()> {
    for bench in &benches {
        bench.container()?.verb("delete", &["--force"])?;
    }
    let mut left = wait_until_quiet(QUIET);
    for (place, before) in places.iter().zip(before) {
        left.extend(Inventory::of_place(place).beyond(before));
    }
    ensure!(left.is_empty(), "left when the containers were gone: {left:?}");
    Ok(())
}

/// Goes on until it is over or something is lost. What happened is on the standard error.
pub fn run(tools: &Tools, gpu: &Gpu, seed: u64, length: Length) -> Result<Done> {
    let mut chance = Chance::new(seed);
    let place = |_| Folder::with_gpu(tools, gpu.clone());
    let places = (0..CONTAINERS).map(place).collect::<Result<Vec<_>>>()?;
    let before: Vec<_> = places.iter().map(Inventory::of_place).collect();
    // With a container of its own, which is gone afterwards.
    let (seen, _) = matrix::look(&mut Bench::new(&places[0])?)?;
    let mut benches = places.iter().map(Bench::new).collect::<Result<Vec<_>>>()?;
    let faults: Vec<_> =
        matrix::cases(&seen, Breadth::Full).into_iter().filter(|c| is_for_soak(c, gpu)).collect();
    benches.iter_mut().try_for_each(Bench::ready)?;
    benches.iter_mut().try_for_each(Bench::count)?;
    let (begun, mut done) = (Instant::now(), Done::default());
    loop {
        let over = match length {
            Length::Events(n) => done.events >= n,
            Length::Time(limit) => done.events > 0 && begun.elapsed() > limit,
        };
        if over {
            break;
        }
        let events: Option<Vec<_>> = benches.iter().map(|_| event(&mut chance, &faults)).collect();
        // What does not end is to be known, too.
        for event in events.iter().flatten() {
            eprintln!("        {event}");
        }
        let rows = round(&mut benches, &events.context("there are no faults to make")?)?;
        done.wrong.extend(rows.iter().filter_map(matrix::wrong));
        for row in &rows {
            let mark = if row.struck { "" } else { " (not reached)" };
            eprintln!(
                "{:5.1} s  {}{mark} → {}  [{}]",
                begun.elapsed().as_secs_f64(),
                row.case,
                row.outcome,
                row.said
            );
            done.events += 1;
            done.struck += usize::from(row.struck && row.case.place != Place::Nowhere);
            done.restored += usize::from(row.case.way == Way::Restore || row.outcome == Outcome::Restored);
            done.gone += usize::from(row.outcome == Outcome::Gone);
        }
        let lost = rows.iter().any(|r| matches!(r.outcome, Outcome::Lost(_)));
        ensure!(!lost, "{}", done.wrong.join("\n"));
        benches.iter_mut().try_for_each(Bench::ready)?;
    }
    finish(benches, &places, &before)?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_one_order_of_events_and_reaches_all_kinds() {
        let faults =
            [Case { way: Way::Running, place: Place::Point("state.park".into(), 1), action: Action::Panic }];
        let plan = |seed| {
            let mut chance = Chance::new(seed);
            (0..100).map(|_| event(&mut chance, &faults).unwrap().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
        for word in ["nowhere", "CRIU", "lower", "foreground", "worker", "keeper", "panic", "then restored"] {
            assert!(plan(1).iter().any(|e| e.contains(word)), "{word}");
        }
    }
}
