//! What the foreground tells its keeper: which processes it has to do with, and how it ends.
//!
//! One pipe is for that. The lower runtime has its other end open too, and so has all that this one starts: it is at its end
//! only when none of them is at work any more.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::processes;
use crate::started::Started;

/// Bytes of a word, which a pipe takes as a whole.
pub(super) const LENGTH: usize = 5;

/// How long CRIU may take to notice that nobody waits for its answer any more. It then takes down what it has built.
const GRACE: Duration = Duration::from_secs(2);

/// One word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// The foreground goes its own way and leaves nothing to clean up.
    Done,
    /// It leaves that to the keeper.
    CleanUp,
    /// The lower runtime is this process.
    Lower(i32),
    /// This one was started by it.
    Started(i32),
}

impl Word {
    /// As it is sent. Allocates nothing: the lower runtime says who it is between fork and exec.
    pub(super) fn bytes(self) -> [u8; LENGTH] {
        let (kind, pid) = match self {
            Word::Done => (1, 0),
            Word::CleanUp => (2, 0),
            Word::Lower(pid) => (3, pid),
            Word::Started(pid) => (4, pid),
        };
        let mut bytes = [kind; LENGTH];
        bytes[1..].copy_from_slice(&pid.to_ne_bytes());
        bytes
    }

    fn read([kind, pid @ ..]: [u8; LENGTH]) -> Option<Self> {
        let pid = i32::from_ne_bytes(pid);
        match kind {
            1 => Some(Word::Done),
            2 => Some(Word::CleanUp),
            3 => Some(Word::Lower(pid)),
            4 => Some(Word::Started(pid)),
            _ => None,
        }
    }
}

/// What was said so far.
#[derive(Debug)]
pub(super) struct Words {
    pipe: OwnedFd,
    /// The lower runtime, and when it was started.
    lower: Option<(i32, u64)>,
    /// Since when it is no more.
    gone: Option<Instant>,
    /// What has come from it.
    pub(super) started: Started,
    /// The last word of all, `Done` or `CleanUp`.
    pub(super) last: Option<Word>,
    /// Nobody has the other end any more.
    pub(super) closed: bool,
}

impl AsFd for Words {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Words {
    /// Nothing yet. Reading from `pipe` must not block.
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Words { pipe, lower: None, gone: None, started: Started::nothing(), last: None, closed: false }
    }

    /// Hears what was said in the meantime.
    pub(super) fn hear(&mut self) {
        while !self.closed {
            let mut bytes = [0; LENGTH];
            match nix::unistd::read(&self.pipe, &mut bytes) {
                Ok(LENGTH) => match Word::read(bytes) {
                    Some(Word::Lower(pid)) => {
                        self.lower = processes::describe(pid).map(|p| (pid, p.start_time));
                    }
                    Some(Word::Started(pid)) => self.started.note(pid),
                    last => self.last = last.or(self.last),
                },
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Ok(_) | Err(_) => self.closed = true,
            }
        }
    }

    /// Whether the foreground says no more.
    pub(super) fn are_over(&self) -> bool {
        self.closed || self.last.is_some()
    }

    /// The lower runtime, while it lives.
    pub(super) fn lower(&self) -> Option<i32> {
        let (pid, start) = self.lower?;
        processes::describe(pid).filter(|p| p.start_time == start).map(|p| p.pid)
    }

    /// Looks at what the lower runtime and CRIU do. `true`: what is at work waits for one of them, which was killed.
    pub(super) fn waits_in_vain(&mut self) -> bool {
        let lower = self.lower();
        let in_vain = match lower {
            Some(lower) => self.started.look(lower),
            None => self.gone.get_or_insert_with(Instant::now).elapsed() > GRACE,
        };
        if in_vain {
            let at_work = lower.map(processes::descendants).unwrap_or_default();
            let mut others = processes::writing_to(self.pipe.as_fd());
            others.retain(|pid| !at_work.contains(pid));
            others.into_iter().for_each(|pid| self.started.note(pid));
        }
        in_vain
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, write};

    use super::*;

    #[test]
    fn all_that_was_said_is_heard_and_the_end_is_noticed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let (read, end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let mut words = Words::new(read);
        words.hear();
        assert!(!words.are_over() && words.lower().is_none());
        for word in [Word::Lower(pid), Word::Started(pid)] {
            write(&end, &word.bytes()).unwrap();
        }
        words.hear();
        assert!(!words.are_over());
        assert_eq!((words.lower(), words.started.fresh()), (Some(pid), vec![pid]));
        write(&end, &Word::CleanUp.bytes()).unwrap();
        words.hear();
        assert!(words.are_over() && !words.closed);
        assert_eq!(words.last, Some(Word::CleanUp));
        drop(end);
        words.hear();
        assert!(words.closed);
        words.started.end();
        child.wait().unwrap();
        assert_eq!(words.lower(), None, "it was ended");
    }
}
