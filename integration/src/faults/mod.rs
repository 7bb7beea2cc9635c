//! Faults made on purpose, one after the other, and what came of each: the program runs on with every byte right, or it is
//! stopped and a complete image of it exists, which restores; and nothing is left behind.
//!
//! The list of points comes from the engine ([`phos_engine::fault::Point::all`]) and from what a job of each kind reaches; the
//! list of driver calls from what the simulated driver has seen.

pub mod driver;
pub mod leaks;
pub mod matrix;
pub mod run;
pub mod soak;
pub mod wrappers;

use std::fmt;

/// What is done when a point is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// The process that reaches it is killed.
    Kill,
    /// Its thread panics.
    Panic,
    /// Its thread never goes on.
    Hang,
    /// The error number comes back.
    Error(i32),
    /// The runtime's foreground is killed.
    KillForeground,
    /// The foreground and the lower runtime are killed, and CRIU, which is where that is done.
    KillAll,
    /// The engine's shim is killed, and takes the foreground with it.
    KillShim,
    /// The keeper is killed.
    KillKeeper,
    /// The worker is killed.
    KillWorker,
    /// The image folder is removed with what is in it.
    RemoveImage,
    /// The container's cgroup is frozen.
    Freeze,
    /// The program is killed.
    KillProgram,
    /// The container is deleted by force.
    Delete,
    /// A second checkpoint is asked for.
    Checkpoint,
    /// A process is started in the container.
    Exec,
}

impl Action {
    /// What stands in `PHOS_FAULT` for it.
    pub fn rule(self) -> String {
        match self {
            Action::Kill => "kill".into(),
            Action::Panic => "panic".into(),
            Action::Hang => "hang".into(),
            Action::Error(number) => number.to_string(),
            // From outside, while the process waits.
            _ => "wait".into(),
        }
    }

    /// Done from outside.
    pub fn is_outside(self) -> bool {
        self.rule() == "wait"
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Action::Kill => "process killed",
            Action::Panic => "panic",
            Action::Hang => "hangs",
            Action::Error(libc::EIO) => "EIO",
            Action::Error(libc::ENOSPC) => "ENOSPC",
            Action::Error(n) => return write!(f, "error {n}"),
            Action::KillForeground => "foreground killed",
            Action::KillAll => "foreground and lower runtime killed",
            Action::KillShim => "shim killed",
            Action::KillKeeper => "keeper killed",
            Action::KillWorker => "worker killed",
            Action::RemoveImage => "image folder removed",
            Action::Freeze => "cgroup frozen",
            Action::KillProgram => "program killed",
            Action::Delete => "container deleted",
            Action::Checkpoint => "second checkpoint",
            Action::Exec => "exec",
        };
        f.write_str(text)
    }
}

/// A kind of job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// A checkpoint that leaves the container running.
    Running,
    /// One that ends it.
    Stopping,
    /// As `Running`, with rounds of copying before.
    Precopy,
    /// As `Running`, of a container that its engine has frozen, in a folder with an earlier image.
    Again,
    /// As `Running`, in a folder with an earlier image; the worker dies while the driver saves its state, so that another
    /// one takes over.
    Recovery,
    /// As `Running`; the worker dies after the dump, and the driver brings nothing back.
    Lost,
    /// A restore.
    Restore,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 7] =
        [Way::Running, Way::Stopping, Way::Precopy, Way::Again, Way::Recovery, Way::Lost, Way::Restore];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Running => "leave running",
            Way::Stopping => "stop",
            Way::Precopy => "leave running, pre-copy",
            Way::Again => "frozen, earlier image",
            Way::Recovery => "second worker",
            Way::Lost => "second worker, driver fails",
            Way::Restore => "restore",
        })
    }
}

/// Where a fault is made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Nowhere.
    Nowhere,
    /// Wherever the job is so many milliseconds after its start.
    Time(u32),
    /// A point of the engine: its name, and the arrival.
    Point(String, u32),
    /// A call of the worker into the driver: function, code (`hang` is one, `hangN` one that takes N seconds longer), and whether
    /// always.
    Worker(String, String, bool),
    /// A call of the library in the program, likewise.
    Program(String, String, bool),
    /// The lower runtime, so many milliseconds after its start.
    Lower(u32),
    /// CRIU, likewise.
    Criu(u32),
    /// CRIU, when it has come to where it runs its action scripts with this word.
    CriuAt(&'static str),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let often = |always: &bool| if *always { "always" } else { "once" };
        match self {
            Place::Nowhere => write!(f, "nowhere"),
            Place::Time(ms) => write!(f, "after {ms} ms"),
            Place::Point(name, 1) => write!(f, "{name}"),
            Place::Point(name, n) => write!(f, "{name}, arrival {n}"),
            Place::Worker(call, code, always) => write!(f, "worker: {call} = {code}, {}", often(always)),
            Place::Program(call, code, always) => write!(f, "program: {call} = {code}, {}", often(always)),
            Place::Lower(ms) => write!(f, "lower runtime after {ms} ms"),
            Place::Criu(ms) => write!(f, "CRIU after {ms} ms"),
            Place::CriuAt(action) => write!(f, "CRIU at {action}"),
        }
    }
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// In which job.
    pub way: Way,
    /// Where.
    pub place: Place,
    /// What.
    pub action: Action,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} | {} | {}", self.way, self.place, self.action)
    }
}

/// What came of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The program runs on, and there is no image.
    Runs,
    /// The program runs on, and the image is complete.
    RunsWithImage,
    /// The program was stopped, and its image restored.
    Restored,
    /// What was asked for took the container away.
    Gone,
    /// The program never comes back from a call into the driver, or the driver never gives it its memory back, and there is no dump.
    /// That was said, its memory was kept, and nothing was left once the container was deleted.
    Stuck,
    /// Neither. Why.
    Lost(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Runs => write!(f, "runs on"),
            Outcome::RunsWithImage => write!(f, "runs on, image complete"),
            Outcome::Restored => write!(f, "stopped, image restored"),
            Outcome::Gone => write!(f, "container gone, as asked"),
            Outcome::Stuck => write!(f, "stuck in the driver, deleted"),
            Outcome::Lost(why) => write!(f, "LOST: {why}"),
        }
    }
}

/// A fault and what came of it.
#[derive(Debug, Clone)]
pub struct Row {
    /// The fault.
    pub case: Case,
    /// Whether it was reached.
    pub struck: bool,
    /// What came of it.
    pub outcome: Outcome,
    /// What was left behind.
    pub leaked: Vec<String>,
    /// What the command said.
    pub said: String,
    /// Points that were reached, in that order.
    pub reached: Vec<String>,
    /// Functions of the driver that the worker called.
    pub worker_calls: Vec<String>,
    /// Functions of the driver that the program and the library in it called.
    pub program_calls: Vec<String>,
}
