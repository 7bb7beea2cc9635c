//! What a restore has begun that comes to nothing is undone, by the keeper if the foreground cannot.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::start::lock_file;
use super::words::Words;
use crate::job::{CommandLine, Timeouts};
use crate::lower;

/// How long the lower runtime's `delete` may take.
const DELETE: Duration = Duration::from_secs(60);

/// How a restore is undone that comes to nothing.
#[derive(Debug, Default)]
pub struct Undo {
    /// The lower runtime's own folder of the container.
    pub folder: PathBuf,
    /// CRIU's working folder.
    pub work: PathBuf,
    /// The lower runtime's command that deletes the container by force.
    pub delete: CommandLine,
}

impl Undo {
    /// The words that a keeper gets on its command line.
    pub(super) fn words(&self) -> impl Iterator<Item = OsString> {
        let folders = [&self.folder, &self.work].map(|f| f.clone().into_os_string());
        folders.into_iter().chain([self.delete.program()]).chain(self.delete.args())
    }

    /// What [`Undo::words`] said.
    pub(super) fn from_words(words: &[OsString]) -> Option<Self> {
        let [folder, work, delete @ ..] = words else { return None };
        let delete = CommandLine::new(delete.iter().cloned());
        Some(Undo { folder: folder.into(), work: work.into(), delete })
    }

    /// Deletes what there is of the container. The lower runtime may still be at work: `words` says how long.
    pub(super) fn carry_out(&self, words: &mut Words, state_dir: &Path) {
        let deadline = Instant::now() + Duration::from_millis(Timeouts::default().lower_ms);
        loop {
            words.hear();
            let late = Instant::now() > deadline;
            if late && let Some(lower) = words.lower() {
                let _ = kill(Pid::from_raw(lower), Signal::SIGKILL);
            }
            let ended = words.closed || late;
            // Processes that a killed CRIU has left have the lower runtime wait for ever. Without them, that fails and cleans up
            // after itself.
            if ended || words.waits_in_vain() {
                words.started.end();
            }
            // In the middle of its work it has the root file system mounted in what `delete` removes.
            if ended {
                lower::release(&self.folder);
            }
            if ended || (self.folder.join("state.json").exists() && !lower::is_mounted(&self.folder)) {
                let _ = lower::run(&self.delete, DELETE);
            }
            if ended {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        words.started.clear(&self.work);
        remove(state_dir);
    }
}

/// Removes a state folder and its lock, which this process holds.
pub(super) fn remove(state_dir: &Path) {
    lower::remove_folder(state_dir);
    let _ = std::fs::remove_file(lock_file(state_dir));
}
