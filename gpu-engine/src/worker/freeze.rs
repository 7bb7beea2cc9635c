//! The container's freezer, through the lower runtime, which keeps the container's state. An engine that has frozen the
//! container for a checkpoint thaws it as soon as it learns how that ended: also in the middle of the job, when the
//! foreground has been killed.

use std::thread;
use std::time::Duration;

use crate::job::CheckpointJob;
use crate::lower::{self, LowerError};
use crate::processes;
use crate::service::LowerOutput;

/// How often the freezer is asked.
const ATTEMPTS: u32 = 10;
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// Whether the container is frozen now.
fn is_frozen(job: &CheckpointJob) -> Result<bool, LowerError> {
    let output = lower::run(&job.lower_state, job.timeouts.lower())?;
    let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(state["status"] == "paused")
}

/// Freezes or thaws the container, unless it is so already. `Err` of the inner result is what the lower runtime said.
pub fn set(job: &CheckpointJob, frozen: bool) -> Result<Result<(), LowerOutput>, LowerError> {
    let command = if frozen { &job.lower_pause } else { &job.lower_resume };
    // The old cgroup hierarchy's freezer gives up now and then on a busy machine; asked again, it works.
    for attempt in 1.. {
        let output = lower::run(command, job.timeouts.lower())?;
        if output.status == 0 || is_frozen(job)? == frozen {
            break;
        }
        if attempt == ATTEMPTS {
            return Ok(Err(output));
        }
        thread::sleep(PAUSE);
    }
    Ok(Ok(()))
}

/// Whether a container that goes on is to be frozen in the end: if it was found so, and there still is somebody who knows.
pub fn is_to_stay(job: &CheckpointJob) -> bool {
    let (pid, start_time) = job.asked_by;
    job.frozen && processes::describe(pid).is_some_and(|p| p.start_time == start_time)
}
