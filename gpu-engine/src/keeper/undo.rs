//! What a restore has begun that comes to nothing is undone, by the keeper if the foreground cannot.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::start::lock_file;
use super::words::Words;
use crate::job::CommandLine;
use crate::lower;

/// How long the lower runtime's `delete` may take.
const DELETE: Duration = Duration::from_secs(60);

/// The bundle's configuration as it was, in the state folder, once the restore has changed it.
pub const CONFIG_BEFORE: &str = "config.before";

/// How a restore is undone that comes to nothing.
#[derive(Debug, Default)]
pub struct Undo {
    /// How long the lower runtime may be at work.
    pub limit: Duration,
    /// The bundle's configuration file.
    pub config: PathBuf,
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
        let limit = OsString::from(self.limit.as_millis().to_string());
        let paths = [&self.config, &self.folder, &self.work].map(|f| f.clone().into_os_string());
        [limit].into_iter().chain(paths).chain([self.delete.program()]).chain(self.delete.args())
    }

    /// What [`Undo::words`] said.
    pub(super) fn from_words(words: &[OsString]) -> Option<Self> {
        let [limit, config, folder, work, delete @ ..] = words else { return None };
        let limit = Duration::from_millis(limit.to_str()?.parse().ok()?);
        let delete = CommandLine::new(delete.iter().cloned());
        Some(Undo { limit, config: config.into(), folder: folder.into(), work: work.into(), delete })
    }

    /// Deletes what there is of the container. The lower runtime may still be at work: `words` says how long.
    pub(super) fn carry_out(&self, words: &mut Words, state_dir: &Path) {
        let deadline = Instant::now() + self.limit;
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
        put_back(&state_dir.join(CONFIG_BEFORE), &self.config);
        remove(state_dir);
    }
}

/// Gives the bundle its configuration back, if it was changed. A file of another file system cannot be moved there at once.
fn put_back(before: &Path, config: &Path) {
    if !before.is_file() {
        return;
    }
    let mut new = config.as_os_str().to_os_string();
    new.push(".phos");
    let result = fs::copy(before, &new).and_then(|_| fs::rename(&new, config));
    if let Err(e) = result {
        tracing::error!(config = %config.display(), error = %e, "not put back");
        let _ = fs::remove_file(new);
    }
}

/// Removes a state folder and its lock, which this process holds.
pub(super) fn remove(state_dir: &Path) {
    lower::remove_folder(state_dir);
    let _ = std::fs::remove_file(lock_file(state_dir));
}
