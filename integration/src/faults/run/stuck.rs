//! Calls in the program itself that never return, or never succeed, with its memory handed over and no dump of it. Nothing
//! outside the driver can help then.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Bench, LIMIT, Struck};
use crate::faults::leaks::{Inventory, others, wait_until_quiet};
use crate::faults::{Outcome, Place, Row, Way, driver};
use crate::status;

/// What the library calls once the process has handed its memory over, and before the driver is asked to save its own: there is
/// no image yet, and nothing wakes a process that stays inside one of these.
const PARKING: [&str; 4] = ["cuCtxGetLimit", "cuCtxSetLimit", "cuMemUnmap", "cuMemRelease"];

/// What it calls to take the memory back. Where there is a dump the image is the way out.
const ATTACHING: [&str; 3] = ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"];

/// The library waits for the GPU in a thread that it can leave behind. There must be no second one.
pub(super) const THREAD: &str = "1 more: thread of the program: phos-drain";

/// How long a program is watched that is said to stand still.
const WATCH: Duration = Duration::from_millis(500);

/// Whether a call in the program hangs for ever.
pub(super) fn never_returns(place: &Place) -> bool {
    matches!(place, Place::Program(_, code, _) if code == "hang")
}

/// How long a call in the program takes that hangs for a while.
pub(super) fn returns_after(place: &Place) -> Duration {
    let Place::Program(_, code, _) = place else { return Duration::ZERO };
    let seconds = code.strip_prefix("hang").and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0))
}

impl Bench<'_> {
    /// Says what came of a process that never goes on after it has handed its memory over. `None`: it is not one.
    pub(super) fn stuck(&mut self, struck: &Struck) -> Result<Option<Row>> {
        let Struck { case, pid, ended, .. } = struck;
        let Place::Program(call, code, always) = &case.place else { return Ok(None) };
        let (hangs, calls) = (code == "hang", |list: &[&str]| list.contains(&call.as_str()));
        let attaching = case.way == Way::Recovery && calls(&ATTACHING) && (hangs || *always);
        let possible = attaching || hangs && calls(&PARKING);
        let program_calls = driver::called(*pid).unwrap_or_default();
        if !possible || !program_calls.contains(call) || !ended.text.contains("its memory is kept") {
            return Ok(None);
        }
        let mut leaked = Vec::new();
        let outcome = match self.end_of_stuck(case.way, &mut leaked) {
            Ok(()) => Outcome::Stuck,
            Err(e) => Outcome::Lost(format!("{e:#}")),
        };
        self.container = None;
        let said = ended.text.trim().lines().last().unwrap_or_default().to_string();
        let (reached, worker_calls) = (Vec::new(), Vec::new());
        let case = case.clone();
        Ok(Some(Row { case, struck: true, outcome, leaked, said, reached, worker_calls, program_calls }))
    }

    fn end_of_stuck(&self, way: Way, leaked: &mut Vec<String>) -> Result<()> {
        let container = self.container()?;
        let before = status::read(&container.status_file())?;
        thread::sleep(WATCH);
        let after = status::read(&container.status_file())?;
        ensure!(before == after, "it was said to stand still, and goes on");
        status::check(&after)?;
        ensure!(container.state()? != "stopped", "it has ended, and there is no image");
        ensure!(others().iter().any(|(_, line)| line.contains("__keeper")), "nobody keeps its memory");
        let deleted = container.try_verb("delete", &["--force"]).context("delete")?;
        ensure!(deleted.status == 0, "it cannot be deleted: {}", deleted.text.trim());
        leaked.extend(wait_until_quiet(LIMIT).into_iter().map(|p| format!("process {p}")));
        let earlier = matches!(way, Way::Again | Way::Recovery);
        ensure!(self.image()?.is_some() == earlier, "an image of what never stood still, or no earlier one");
        leaked.extend(Inventory::of_place(self.folder).beyond(&self.before));
        Ok(())
    }
}
