//! The GPU processes a job is about, and the memory each of them holds.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use crate::copy::BlockId;
use crate::device::{Device, GpuId, Region};
use crate::error::EngineError;
use crate::fault;
use crate::keeper::wire::{Held, KeptProcess, Packet, Phase, Wire};
use crate::peer::{ControlDir, Library, PeerError, TableUpdate};
use crate::processes::{self, Process};

/// One physical allocation of a process.
pub struct Piece {
    /// What the library said about it.
    pub held: Held,
    /// Keeps it alive.
    pub fd: OwnedFd,
    /// Mapped here, once it has been needed.
    pub region: Option<Region>,
    /// The entry that stands for the same memory, if it is another one; see [`super::sharing`].
    pub owner: Option<BlockId>,
}

/// One GPU process.
pub struct Subject {
    /// As the keeper knows it.
    pub kept: KeptProcess,
    /// The conversation with its library, while there is one.
    pub library: Option<Library>,
    /// Its memory.
    pub pieces: Vec<Piece>,
    /// Table generation that `pieces` stands at.
    pub generation: u64,
    /// The owners in `pieces` are right: nothing has come or gone since they were found.
    pub resolved: bool,
}

impl Subject {
    /// A process nothing else is known of yet.
    pub fn new(kept: KeptProcess) -> Self {
        Subject { kept, library: None, pieces: Vec::new(), generation: 0, resolved: false }
    }

    /// Announces a phase to the keeper, before the step is taken.
    pub fn enter(&mut self, wire: &Wire, phase: Phase) -> Result<(), EngineError> {
        self.kept.phase = phase;
        wire.send(&Packet::Process(self.kept.clone()), &[])?;
        fault::at(phase)
    }

    /// Takes over what changed in the process's table and hands the new fds to the keeper.
    pub fn apply(&mut self, update: TableUpdate, wire: &Wire) -> Result<(), EngineError> {
        let pid = self.kept.pid;
        self.resolved &= update.added.is_empty() && update.removed.is_empty();
        if !update.removed.is_empty() {
            let removed: std::collections::HashSet<_> = update.removed.iter().collect();
            self.pieces.retain(|p| !removed.contains(&p.held.id));
            for ids in update.removed.chunks(1024) {
                wire.send(&Packet::Forget(pid, ids.to_vec()), &[])?;
            }
        }
        let added: Vec<_> = update.added.iter().map(|(e, fd)| (Held::from(e), fd.as_raw_fd())).collect();
        wire.hold(pid, &added)?;
        let piece = |(e, fd)| Piece { held: Held::from(&e), fd, region: None, owner: None };
        self.pieces.extend(update.added.into_iter().map(piece));
        self.generation = update.generation;
        if self.pieces.len() as u64 != update.live {
            let what = format!("its table has {} entries, {} came", update.live, self.pieces.len());
            return Err(crate::peer::PeerError::Protocol { pid, what }.into());
        }
        Ok(())
    }

    /// Maps every piece that stands for memory and is not mapped yet into this process.
    pub fn import(&mut self, device: &dyn Device) -> Result<(), EngineError> {
        for piece in self.pieces.iter_mut().filter(|p| p.owner.is_none()) {
            if piece.region.is_none() {
                let region = device
                    .import(GpuId(piece.held.device), piece.fd.as_fd(), piece.held.size)
                    .map_err(|source| self.kept.driver_error(source))?;
                piece.region = Some(region);
            }
        }
        Ok(())
    }

    /// The pieces that stand for memory.
    pub fn owned(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(|p| p.owner.is_none())
    }

    /// Bytes of GPU memory in `pieces`.
    pub fn bytes(&self) -> u64 {
        self.owned().map(|p| p.held.size).sum()
    }
}

/// As it stands in messages and timelines.
impl std::fmt::Display for KeptProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.command, self.pid)
    }
}

impl KeptProcess {
    /// A driver error with the process's name on it.
    pub(crate) fn driver_error(&self, source: crate::device::DeviceError) -> EngineError {
        EngineError::Driver { pid: self.pid, command: self.command.clone(), source }
    }

    /// An error of a conversation with its library, with the process's name on it where that helps.
    pub(crate) fn peer_error(&self, source: PeerError) -> EngineError {
        match source {
            PeerError::Busy { pid, text } => EngineError::Busy { pid, command: self.command.clone(), text },
            other => other.into(),
        }
    }

    /// Whether the process still is the one it was.
    pub(crate) fn is_alive(&self) -> bool {
        processes::describe(self.pid).is_some_and(|p| p.start_time == self.start_time)
    }
}

/// How long a library may take from the program's first call until it listens.
const LISTENS: Duration = Duration::from_secs(1);

/// The library in a process that uses the GPU, if it has one. One that has and does not listen is refused: its memory is
/// exported, which the driver alone would save, and then not bring the process back.
fn library_of(process: &Process, control: Option<&ControlDir>) -> Result<Option<Library>, EngineError> {
    let deadline = Instant::now() + LISTENS;
    loop {
        let library = match control {
            Some(dir) => Library::connect(dir, process.pid, process.own_pid)?,
            None => None,
        };
        if library.is_some() || !processes::has_library_loaded(process.pid) {
            return Ok(library);
        }
        if Instant::now() > deadline {
            return Err(EngineError::Unsupported {
                pid: process.pid,
                command: process.command.clone(),
                reason: "its libphos.so has no control socket any more, and the driver alone could not bring it back: \
                         restart the program"
                    .into(),
            });
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Finds the container's GPU processes and talks to their libraries. `control` is the container's control
/// folder, if it has one. GPU processes that the lower runtime will not save come back as well, for a warning.
pub fn find(
    device: &dyn Device,
    init_pid: i32,
    control: Option<&ControlDir>,
) -> Result<(Vec<Subject>, Vec<Process>), EngineError> {
    let (mut subjects, mut outsiders) = (Vec::new(), Vec::new());
    let all = processes::of_container(init_pid)?;
    for process in &all {
        if !processes::has_driver_loaded(process.pid) || device.process_state(process.pid)?.is_none() {
            continue;
        }
        if !processes::descends(process, init_pid, &all) {
            outsiders.push(process.clone());
            continue;
        }
        let library = library_of(process, control)?;
        let kept = KeptProcess {
            pid: process.pid,
            own_pid: process.own_pid,
            start_time: process.start_time,
            command: process.command.clone(),
            has_library: library.is_some(),
            phase: Phase::Running,
        };
        subjects.push(Subject { library, ..Subject::new(kept) });
    }
    Ok((subjects, outsiders))
}

/// Runs `step` for every item at the same time and returns the first error, after all have ended.
pub fn all<T: Send, R: Send>(
    items: &mut [T],
    step: impl Fn(&mut T) -> Result<R, EngineError> + Sync,
) -> Result<Vec<R>, EngineError> {
    if let [only] = items {
        return Ok(vec![step(only)?]);
    }
    thread::scope(|scope| {
        let threads: Vec<_> = items.iter_mut().map(|item| scope.spawn(|| step(item))).collect();
        let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        results
            .into_iter()
            .map(|r| r.unwrap_or(Err(EngineError::Order("a worker thread panicked"))))
            .collect()
    })
}
