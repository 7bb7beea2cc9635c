//! Faults made on purpose.
//!
//! Every state of a job, every phase of a process, every moment at which something has just been given away or taken over, and
//! every access to an image's files passes [`at`] or [`io`] with its name. Tests make them fail there, one after the other
//! ([`Point::all`] is their list: what is added to the state machine is on it by itself, since a state can only be
//! entered by its name).
//!
//! `PHOS_FAULT=POINT[@N][!]=ACTION[,…]`, with `PHOS_FAULT_DIR` a folder: at the Nth arrival (1) at POINT in one process the
//! ACTION is taken, once; with `!` at every arrival from then on, in every process.
//!
//! | action | what happens |
//! | --- | --- |
//! | `kill` | the process kills itself |
//! | `panic` | the thread panics |
//! | `hang` | the thread never goes on |
//! | a number | that error number comes back |
//! | `wait` | the thread goes on when the folder has a file `go` |
//!
//! The folder gets `reached` (a line for each arrival) and `struck0` (the process id, once the first rule's action was taken).
//!
//! Only builds with debug assertions look; in a release build every function here is empty. It is no cargo feature because
//! those are one for a whole workspace: a test build would be another program than the one that is tested everywhere else.

use std::io;

use crate::error::EngineError;
use crate::keeper::wire::Phase;
use crate::progress::State;

/// Declares an enum of names, with a list of all of them.
macro_rules! named {
    ($(#[$about:meta])* pub enum $Name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $Name { $($(#[$doc])* $variant,)* }

        impl $Name {
            /// All of them.
            pub const ALL: &'static [$Name] = &[$($Name::$variant),*];
            /// As it is shown.
            pub fn name(self) -> &'static str {
                match self { $($Name::$variant => $text),* }
            }
        }
    };
}
pub(crate) use named;

named! {
    /// Something has just been done, and nobody else knows it yet.
    pub enum Moment {
        /// The foreground has the container's lock and has started a keeper.
        KeeperStarted = "keeper-started",
        /// The foreground can speak with the worker.
        Connected = "connected",
        /// The foreground has its answer.
        Answered = "answered",
        /// The keeper has started a worker.
        WorkerStarted = "worker-started",
        /// The keeper has handed everything over to a worker that recovers.
        HandedOver = "handed-over",
        /// The keeper has the job.
        JobKept = "job-kept",
        /// The image folder is ready.
        FolderReady = "folder-ready",
        /// The container's GPU processes are known.
        ProcessesFound = "processes-found",
        /// Their memory is mapped here and held by the keeper.
        TablesTaken = "tables-taken",
        /// Everything that can be allocated before the stop is.
        BuffersReady = "buffers-ready",
        /// A process stands still; its last table is here, and not with the keeper yet.
        Drained = "drained",
        /// The keeper holds all its memory.
        Held = "held",
        /// It has let go of its memory.
        Taken = "taken",
        /// The driver has locked it.
        Locked = "locked",
        /// The driver's state of it is in its own memory.
        DriverSaved = "driver-saved",
        /// The libraries have given back what the driver saved as zeros.
        Trimmed = "trimmed",
        /// All memory is saved or in spare memory.
        MemorySaved = "memory-saved",
        /// The lower runtime is about to be asked.
        BeforeDump = "before-dump",
        /// All host memory is saved, and CRIU does not know.
        PagesReceived = "pages-received",
        /// The lower runtime has succeeded, and the keeper does not know.
        Dumped = "dumped",
        /// The keeper knows.
        DumpTold = "dump-told",
        /// The driver has given its state back to a process.
        DriverRestored = "driver-restored",
        /// The driver has unlocked it.
        Unlocked = "unlocked",
        /// A parked process has knocked.
        Knocked = "knocked",
        /// A process has its memory again.
        Attached = "attached",
        /// All processes run, and the keeper knows.
        Awake = "awake",
        /// Spare memory is in the image.
        SnapshotDrained = "snapshot-drained",
        /// The image is complete.
        Committed = "committed",
        /// The job is done, and the keeper does not know.
        Done = "done",
        /// The keeper knows how it ended.
        DoneTold = "done-told",
        /// The image to restore has been opened.
        ImageOpened = "image-opened",
        /// GPU memory for it is allocated.
        Allocated = "allocated",
        /// It is loaded.
        Loaded = "loaded",
        /// The lower runtime's restore has been started.
        LowerStarted = "lower-started",
        /// The processes are there again.
        Rebuilt = "rebuilt",
        /// A worker that recovers has everything.
        Inherited = "inherited",
        /// It has brought the container back to running.
        BroughtBack = "brought-back",
        /// It has put the image folder back.
        Undone = "undone",
    }
}

named! {
    /// An access to an image's folder or files.
    pub enum Access {
        /// Making the folder.
        MakeFolder = "make-folder",
        /// Trying whether it can be written.
        Probe = "probe",
        /// Moving one file of an earlier image out of the way.
        SetAside = "set-aside",
        /// Moving one back.
        PutBack = "put-back",
        /// Removing one of a failed image.
        Clear = "clear",
        /// Removing the earlier image.
        Forget = "forget",
        /// Making a data file.
        CreateData = "create-data",
        /// Writing chunks.
        WriteData = "write-data",
        /// Making them durable.
        SyncData = "sync-data",
        /// Taking room for host memory.
        CreatePages = "create-pages",
        /// Writing host memory.
        WritePages = "write-pages",
        /// Making the chunk table or the manifest's first file.
        CreateTable = "create-table",
        /// Writing it.
        WriteTable = "write-table",
        /// Making it durable.
        SyncTable = "sync-table",
        /// Making the folder's entries durable.
        SyncFolder = "sync-folder",
        /// Giving the manifest its name.
        Rename = "rename",
        /// Opening a file of an image.
        Open = "open",
        /// Reading manifest or chunk table.
        ReadTable = "read-table",
        /// Reading chunks.
        ReadData = "read-data",
    }
}

/// A place where a fault can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    /// A job enters a state.
    State(State),
    /// The keeper knows that a process enters a phase.
    Phase(Phase),
    /// See [`Moment`].
    Moment(Moment),
    /// See [`Access`].
    File(Access),
}

impl Point {
    /// All of them.
    pub fn all() -> Vec<Point> {
        let states = State::ALL.iter().copied().map(Point::State);
        // A process is running before it is looked at: that phase is not entered.
        let phases = Phase::ALL.iter().copied().filter(|p| *p != Phase::Running).map(Point::Phase);
        let moments = Moment::ALL.iter().copied().map(Point::Moment);
        states.chain(phases).chain(moments).chain(Access::ALL.iter().copied().map(Point::File)).collect()
    }

    /// As it stands in `PHOS_FAULT`.
    pub fn name(self) -> String {
        let (kind, name) = match self {
            Point::State(s) => ("state", s.name()),
            Point::Phase(p) => ("phase", p.name()),
            Point::Moment(m) => ("at", m.name()),
            Point::File(a) => ("file", a.name()),
        };
        format!("{kind}.{}", name.replace(' ', "-"))
    }
}

impl From<State> for Point {
    fn from(s: State) -> Self {
        Point::State(s)
    }
}
impl From<Phase> for Point {
    fn from(p: Phase) -> Self {
        Point::Phase(p)
    }
}
impl From<Moment> for Point {
    fn from(m: Moment) -> Self {
        Point::Moment(m)
    }
}
impl From<Access> for Point {
    fn from(a: Access) -> Self {
        Point::File(a)
    }
}

/// A point whose error is one of a system call on a file.
#[inline(always)]
pub fn io(point: impl Into<Point>) -> io::Result<()> {
    #[cfg(debug_assertions)]
    strike::reach(point.into())?;
    #[cfg(not(debug_assertions))]
    let _ = point;
    Ok(())
}

/// A point in a job.
#[inline(always)]
pub fn at(point: impl Into<Point>) -> Result<(), EngineError> {
    io(point).map_err(|source| EngineError::Io { what: "a step of the job", source })
}

#[cfg(debug_assertions)]
mod strike {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::io::{self, Write};
    use std::path::PathBuf;
    use std::sync::{Mutex, OnceLock};
    use std::time::Duration;

    use super::Point;

    #[derive(Debug, PartialEq, Eq, Clone)]
    enum Action {
        Kill,
        Panic,
        Hang,
        Wait,
        Error(i32),
    }

    #[derive(Debug, PartialEq, Eq, Clone)]
    struct Rule {
        point: String,
        /// Arrivals in this process until it strikes.
        after: u32,
        always: bool,
        action: Action,
    }

    struct Plan {
        rules: Vec<Rule>,
        folder: PathBuf,
        arrivals: Mutex<BTreeMap<Point, u32>>,
    }

    fn parse(text: &str) -> Option<Rule> {
        let (place, action) = text.split_once('=')?;
        let (place, always) = match place.strip_suffix('!') {
            Some(place) => (place, true),
            None => (place, false),
        };
        let (point, after) = match place.split_once('@') {
            Some((point, n)) => (point, n.parse().ok().filter(|n| *n > 0)?),
            None => (place, 1),
        };
        let action = match action {
            "kill" => Action::Kill,
            "panic" => Action::Panic,
            "hang" => Action::Hang,
            "wait" => Action::Wait,
            number => Action::Error(number.parse().ok()?),
        };
        Some(Rule { point: point.into(), after, always, action })
    }

    fn plan() -> Option<&'static Plan> {
        static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
        PLAN.get_or_init(|| {
            let folder = std::env::var_os("PHOS_FAULT_DIR").filter(|f| !f.is_empty())?.into();
            let text = std::env::var("PHOS_FAULT").unwrap_or_default();
            let rules = text.split(',').filter_map(parse).collect();
            Some(Plan { rules, folder, arrivals: Mutex::default() })
        })
        .as_ref()
    }

    pub(super) fn reach(point: Point) -> io::Result<()> {
        let Some(plan) = plan() else { return Ok(()) };
        let name = point.name();
        if let Ok(mut log) = File::options().create(true).append(true).open(plan.folder.join("reached")) {
            let _ = log.write_all(format!("{name}\n").as_bytes());
        }
        let arrival = {
            let mut arrivals = plan.arrivals.lock().unwrap_or_else(|e| e.into_inner());
            let n = arrivals.entry(point).or_default();
            *n += 1;
            *n
        };
        for (number, rule) in plan.rules.iter().enumerate().filter(|(_, r)| r.point == name) {
            if arrival < rule.after || (arrival > rule.after && !rule.always) {
                continue;
            }
            let mark = plan.folder.join(format!("struck{number}"));
            match File::options().write(true).create_new(true).open(mark) {
                Ok(mut file) => {
                    let _ = write!(file, "{}", std::process::id());
                }
                Err(_) if rule.always => {}
                Err(_) => continue,
            }
            act(rule, plan)?;
        }
        Ok(())
    }

    fn act(rule: &Rule, plan: &Plan) -> io::Result<()> {
        match rule.action {
            Action::Kill => {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
                Ok(())
            }
            Action::Panic => panic!("a fault at {}", rule.point),
            Action::Hang => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            Action::Wait => {
                while !plan.folder.join("go").exists() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            }
            Action::Error(number) => Err(io::Error::from_raw_os_error(number)),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn rules_are_read_as_documented() {
            let rule =
                |after, always, action| Some(Rule { point: "state.park".into(), after, always, action });
            assert_eq!(parse("state.park=kill"), rule(1, false, Action::Kill));
            assert_eq!(parse("state.park@3!=5"), rule(3, true, Action::Error(5)));
            assert_eq!(parse("state.park@2=wait"), rule(2, false, Action::Wait));
            for bad in ["state.park", "state.park@0=kill", "state.park@x=kill", "state.park=never"] {
                assert_eq!(parse(bad), None, "{bad}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = Point::all().into_iter().map(Point::name).collect();
        assert_eq!(names.len(), Point::all().len());
        assert!(names.contains("state.driver-checkpoint") && names.contains("phase.parking"));
        assert!(names.iter().all(|n| !n.contains([' ', '=', '@', '!'])));
    }
}
