//! Which faults there are to make: every point that a job of each kind reaches, every driver call that it makes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::Result;
use phos_engine::fault::Point;

use super::run::Bench;
use super::{Action, Case, Outcome, Place, Row, Way};

/// Codes that driver calls fail with: out of memory, a system call that failed, an illegal address, unknown, none at all.
const CODES: [&str; 5] = ["2", "304", "700", "999", "hang"];

/// A call of the program that takes longer than the limits of a job, and then returns.
const SLOW: &str = "hang9";

/// What the program itself calls all the time: a fault there is the program's.
const PROGRAMS_OWN: [&str; 2] = ["cuDriverGetVersion", "poison"];

/// What jobs of a kind do when nothing fails but what belongs to the kind.
#[derive(Debug, Default)]
pub struct Seen {
    /// Points, and how often each.
    pub points: BTreeMap<String, u32>,
    /// Functions of the driver that the worker calls.
    pub worker: BTreeSet<String>,
    /// Functions of the driver that only the library in the program calls, and only for the job.
    pub program: BTreeSet<String>,
}

/// How many faults are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breadth {
    /// Each point and each call at least once, in turns with what can happen to it.
    Sampled,
    /// All of them.
    Full,
}

fn counted(names: &[String]) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    names.iter().for_each(|n| *counts.entry(n.clone()).or_default() += 1);
    counts
}

/// The points of a job whose worker dies once the dump is made, and whose driver brings nothing back: those that it reaches then for
/// the first time. A fault before would be one without a dump, and the driver the second.
fn after_the_dump(names: &[String]) -> BTreeMap<String, u32> {
    let dumped = names.iter().position(|n| n == "at.dump-told").unwrap_or(names.len());
    let (before, after) = names.split_at(dumped);
    let mut counts = counted(after);
    counts.retain(|n, _| !before.contains(n));
    counts
}

/// Runs a job of each kind and looks.
pub fn look(bench: &mut Bench<'_>) -> Result<(BTreeMap<Way, Seen>, Vec<Row>)> {
    let (mut all, mut rows) = (BTreeMap::new(), Vec::new());
    for way in Way::ALL {
        let own = bench.programs_calls()?;
        let row = bench.run(&Case { way, place: Place::Nowhere, action: Action::Kill })?;
        let program =
            row.program_calls.iter().filter(|c| !own.contains(*c) && !PROGRAMS_OWN.contains(&c.as_str()));
        let seen = match way {
            Way::Lost => Seen { points: after_the_dump(&row.reached), ..Seen::default() },
            _ => Seen {
                points: counted(&row.reached),
                worker: row.worker_calls.iter().cloned().collect(),
                program: program.cloned().collect(),
            },
        };
        all.insert(way, seen);
        rows.push(row);
    }
    Ok((all, rows))
}

/// The engine's points that no kind of job reaches: there must be none.
pub fn unreached(seen: &BTreeMap<Way, Seen>) -> Vec<String> {
    let reached = |name: &String| seen.values().any(|s| s.points.contains_key(name));
    Point::all().into_iter().map(Point::name).filter(|n| !reached(n)).collect()
}

/// What can happen at a point to the process that reaches it.
fn actions(point: &str) -> Vec<Action> {
    let mut actions = vec![Action::Kill, Action::Error(libc::EIO), Action::Hang];
    if point.starts_with("file.") {
        actions.push(Action::Error(libc::ENOSPC));
    }
    if point.starts_with("state.") {
        actions.push(Action::Panic);
    }
    actions
}

/// Points at which keeper and foreground cannot hang: nothing watches them but their engine. A restore's foreground is the first to
/// open the image.
fn is_watched(way: Way, point: &str) -> bool {
    let opens = way == Way::Restore && ["file.open", "file.read-table"].contains(&point);
    !opens
        && ![
            "at.keeper-started",
            "at.connected",
            "at.answered",
            "at.worker-started",
            "at.handed-over",
            "at.lower-started",
            "at.rebuilt",
        ]
        .contains(&point)
}

/// Whether a process that is killed at a point's last arrival is the only one that has the program's memory: the worker before is dead,
/// and the keeper has yet to give everything to the next one.
fn is_last_holder(way: Way, point: &str) -> bool {
    matches!(way, Way::Recovery | Way::Lost) && point == "at.worker-started"
}

/// What operators, engines and the program may do meanwhile: kinds of job, point, action.
const OUTSIDE: [(Way, &str, Action); 20] = [
    (Way::Running, "state.preflight", Action::KillForeground),
    (Way::Running, "state.dump", Action::KillForeground),
    (Way::Stopping, "at.dumped", Action::KillForeground),
    (Way::Restore, "at.image-opened", Action::KillForeground),
    (Way::Restore, "state.wake", Action::KillForeground),
    (Way::Running, "state.park", Action::KillShim),
    (Way::Stopping, "state.dump", Action::KillShim),
    (Way::Restore, "state.wake", Action::KillShim),
    (Way::Running, "phase.detaching", Action::KillKeeper),
    (Way::Stopping, "state.dump", Action::KillKeeper),
    (Way::Running, "state.park", Action::RemoveImage),
    (Way::Running, "at.driver-saved", Action::Freeze),
    (Way::Running, "state.park", Action::KillProgram),
    (Way::Stopping, "at.trimmed", Action::KillProgram),
    (Way::Running, "at.held", Action::Delete),
    (Way::Stopping, "state.dump", Action::Delete),
    (Way::Running, "state.copy", Action::Delete),
    (Way::Stopping, "state.park", Action::Checkpoint),
    (Way::Running, "state.park", Action::Exec),
    (Way::Running, "at.trimmed", Action::Exec),
];

/// When the lower runtime and CRIU are killed, milliseconds after their start.
const MOMENTS: [u32; 6] = [5, 15, 30, 60, 90, 130];

/// Where CRIU is killed in a restore: before the first process exists, in its namespaces, and when all are there but not let go.
const CRIU_ACTIONS: [&str; 6] =
    ["pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "pre-resume", "post-resume"];

/// The faults to make.
pub fn cases(seen: &BTreeMap<Way, Seen>, breadth: Breadth) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut turn = 0;
    let full = breadth == Breadth::Full;
    let mut had = BTreeSet::new();
    for (way, seen) in seen {
        for (point, arrivals) in &seen.points {
            let first = had.insert(point.clone());
            // Points that a job of another kind has reached are made to fail there.
            if !full && !first {
                continue;
            }
            let possible: Vec<_> = actions(point)
                .into_iter()
                .filter(|a| *a != Action::Hang || is_watched(*way, point))
                .collect();
            for (n, action) in possible.iter().enumerate() {
                // Sampled: killed always, the rest in turns, and few of those that take long.
                let others = turn + n;
                let chosen = match action {
                    Action::Kill => true,
                    Action::Hang => others % 14 == 0,
                    _ => others % 3 == 0,
                };
                if full || chosen {
                    cases.push(Case { way: *way, place: Place::Point(point.clone(), 1), action: *action });
                }
            }
            if *arrivals > 1 && !is_last_holder(*way, point) && (full || turn % 5 == 0) {
                let place = Place::Point(point.clone(), *arrivals);
                cases.push(Case { way: *way, place, action: Action::Kill });
            }
            turn += 1;
        }
    }
    for (way, point, action) in OUTSIDE {
        cases.push(Case { way, place: Place::Point(point.into(), 1), action });
    }
    type ByCall = fn(String, String, bool) -> Place;
    type Calls = fn(&Seen) -> &BTreeSet<String>;
    let calls: [(ByCall, Calls); 2] = [(Place::Worker, |s| &s.worker), (Place::Program, |s| &s.program)];
    for (place, of) in calls {
        let mut had = BTreeSet::new();
        for (way, seen) in seen {
            for call in of(seen) {
                if !full && !had.insert(call.clone()) {
                    continue;
                }
                let slow = full && matches!(place(String::new(), String::new(), false), Place::Program(..));
                for (n, code) in CODES.iter().chain(slow.then_some(&SLOW)).enumerate() {
                    for always in [false, true] {
                        // A hang is for ever anyway.
                        let chosen = (turn + n) % CODES.len() == 0 && always == (turn % 2 == 0);
                        let hangs = code.starts_with("hang");
                        if full && !(always && hangs) || chosen && !hangs {
                            let place = place(call.clone(), code.to_string(), always);
                            cases.push(Case { way: *way, place, action: Action::Error(0) });
                        }
                    }
                }
                turn += 1;
            }
        }
    }
    for way in [Way::Running, Way::Stopping, Way::Restore] {
        for (n, ms) in MOMENTS.into_iter().enumerate() {
            for (m, place) in [Place::Lower(ms), Place::Criu(ms)].into_iter().enumerate() {
                if full || n % 3 == m {
                    cases.push(Case { way, place, action: Action::Kill });
                }
            }
        }
    }
    for (_, action) in CRIU_ACTIONS.into_iter().enumerate().filter(|(n, _)| full || n % 2 == 1) {
        cases.push(Case { way: Way::Restore, place: Place::CriuAt(action), action: Action::Kill });
    }
    for (n, action) in CRIU_ACTIONS.into_iter().enumerate() {
        for (m, who) in [Action::KillForeground, Action::KillAll].into_iter().enumerate() {
            if full || n % 3 == m {
                cases.push(Case { way: Way::Restore, place: Place::CriuAt(action), action: who });
            }
        }
    }
    if !full {
        // The driver never gives a process back, or does not let it go, and does not say so.
        for call in ["cuCheckpointProcessRestore", "cuCheckpointProcessUnlock"] {
            let place = Place::Worker(call.into(), "hang".into(), false);
            cases.push(Case { way: Way::Running, place, action: Action::Error(0) });
        }
        // In the program: while it waits for the GPU, and when its memory has been handed over.
        for (call, code) in [("cuCtxSynchronize", "hang"), ("cuMemUnmap", "hang"), ("cuMemUnmap", SLOW)] {
            let place = Place::Program(call.into(), code.into(), false);
            cases.push(Case { way: Way::Running, place, action: Action::Error(0) });
        }
    }
    // The driver gives a process up for good.
    let place = Place::Program("poison".into(), "999".into(), true);
    cases.push(Case { way: Way::Running, place, action: Action::Error(0) });
    cases
}

/// What is wrong with a row; a fault that was not reached in time is none.
pub fn wrong(row: &Row) -> Option<String> {
    match &row.outcome {
        Outcome::Lost(why) => Some(format!("{}: lost: {why}", row.case)),
        _ if !row.leaked.is_empty() => Some(format!("{}: leaked: {}", row.case, row.leaked.join("; "))),
        _ => None,
    }
}

/// The table for people: one line a place, one column a kind of job.
pub fn table(rows: &[Row]) -> String {
    let mut lines = BTreeMap::<String, BTreeMap<Way, BTreeMap<String, usize>>>::new();
    for row in rows.iter().filter(|r| r.struck) {
        let place = match &row.case.place {
            Place::Point(name, _) if row.case.action.is_outside() => format!("{name}: {}", row.case.action),
            Place::Point(name, _) => format!("{name}: killed, fails, hangs"),
            Place::Worker(call, ..) => format!("worker: {call}"),
            Place::Program(call, ..) => format!("program: {call}"),
            Place::Lower(_) => "lower runtime killed".into(),
            Place::Criu(_) | Place::CriuAt(_) => match row.case.action {
                Action::Kill => "CRIU killed".into(),
                action => format!("CRIU killed, {action}"),
            },
            Place::Nowhere | Place::Time(_) => continue,
        };
        let outcome = row.outcome.to_string();
        let outcome = outcome.split(':').next().unwrap_or_default().to_string();
        *lines.entry(place).or_default().entry(row.case.way).or_default().entry(outcome).or_default() += 1;
    }
    let mut text = String::from("| fault |");
    Way::ALL.iter().for_each(|w| {
        let _ = write!(text, " {w} |");
    });
    text.push_str("\n| --- |");
    Way::ALL.iter().for_each(|_| text.push_str(" --- |"));
    for (place, by_way) in lines {
        let _ = write!(text, "\n| {place} |");
        for way in Way::ALL {
            let counts = by_way.get(&way).into_iter().flatten();
            let cell: Vec<_> = counts.map(|(outcome, n)| format!("{n} × {outcome}")).collect();
            let _ = write!(text, " {} |", cell.join(", "));
        }
    }
    text.push('\n');
    text
}
