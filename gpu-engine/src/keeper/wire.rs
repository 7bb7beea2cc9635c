//! What worker and keeper say to each other.
//!
//! JSON packets over one `SOCK_SEQPACKET` socket pair, fds beside them. A packet that the worker has sent is
//! safe even if the worker dies the instant after: it waits in the keeper's queue with its fds.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use phos_protocol::message::Entry;
use phos_protocol::{Connection, MAX_FDS, TransportError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::job::CheckpointJob;

/// Why the other side could not be reached.
#[derive(Debug, Error)]
pub enum WireError {
    /// The connection failed.
    #[error("keeper connection: {0}")]
    Transport(#[from] TransportError),
    /// A packet that is not of this protocol.
    #[error("keeper connection: {0}")]
    Json(#[from] serde_json::Error),
}

/// A piece of memory the keeper holds an fd of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The library's id of the entry.
    pub id: u64,
    /// `cuDeviceGetUuid` of its GPU.
    pub device: [u8; 16],
    /// First address it was mapped at.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// `CLASS_` constant of the protocol.
    pub class: u32,
    /// `FLAG_` constants of the protocol.
    pub flags: u32,
}

impl From<&Entry> for Held {
    fn from(e: &Entry) -> Self {
        Held { id: e.id, device: e.device, address: e.address, size: e.size, class: e.class, flags: e.flags }
    }
}

impl From<&Held> for Entry {
    fn from(h: &Held) -> Self {
        Entry {
            id: h.id,
            device: h.device,
            address: h.address,
            size: h.size,
            generation: 0,
            class: h.class,
            flags: h.flags,
        }
    }
}

/// How far a process has been taken away from its GPU. Written ahead: a phase is announced before the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Runs; nothing of it was touched.
    Running,
    /// Its gate may be closed; it may or may not have let go of its memory.
    Parking,
    /// The driver was asked to lock and checkpoint it.
    Detaching,
    /// Everything was given back.
    Attached,
}

/// A process as the keeper knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptProcess {
    /// Host process id.
    pub pid: i32,
    /// Process id in its own namespace.
    pub own_pid: i32,
    /// Start time, so that another process with the same id is never touched.
    pub start_time: u64,
    /// Its name, for messages and the manifest.
    pub command: String,
    /// Whether `libphos.so` is in it.
    pub has_library: bool,
    /// Where it stands.
    pub phase: Phase,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Empty if it succeeded; otherwise the one line a person reads.
    pub error: String,
    /// The report as JSON, if it succeeded.
    pub report: String,
}

/// Worker to keeper, and keeper to a worker that recovers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Packet {
    /// The job. Comes first. Split because an effective spec can be longer than a packet.
    Job(String),
    /// The job's text is complete.
    JobEnd,
    /// A process and the phase it enters.
    Process(KeptProcess),
    /// Memory of process `pid`; one fd each.
    Hold(i32, Vec<Held>),
    /// Entries of process `pid` that no longer exist.
    Forget(i32, Vec<u64>),
    /// The lower runtime's checkpoint succeeded: if the processes are gone, they are in CRIU's image.
    LowerDone,
    /// Keeper to recovering worker: that was all.
    HandedOver,
    /// The job is over. Nothing needs keeping.
    Finished(Outcome),
}

/// One end of the connection.
#[derive(Debug)]
pub struct Wire(pub Connection);

impl Wire {
    /// Sends a packet with copies of `fds`.
    pub fn send(&self, packet: &Packet, fds: &[RawFd]) -> Result<(), WireError> {
        Ok(self.0.send_bytes(&serde_json::to_vec(packet)?, fds)?)
    }

    /// Says how the job ended. It can always be said: of a report that fits no packet the timeline goes first, then all.
    pub fn finish(&self, mut outcome: Outcome) -> Result<(), WireError> {
        // JSON inside JSON may double in length, and a control character takes six bytes.
        const REPORT: usize = phos_protocol::MAX_PACKET / 3;
        outcome.error = outcome.error.chars().take(1024).collect();
        if outcome.report.len() > REPORT {
            let mut report: serde_json::Map<_, _> = serde_json::from_str(&outcome.report).unwrap_or_default();
            report.insert("spans".into(), serde_json::json!([]));
            outcome.report = serde_json::to_string(&report)?;
        }
        if outcome.report.len() > REPORT {
            outcome.report.clear();
        }
        self.send(&Packet::Finished(outcome), &[])
    }

    /// Receives a packet and its fds.
    pub fn receive(&self) -> Result<(Packet, Vec<OwnedFd>), WireError> {
        let (bytes, fds) = self.0.receive_bytes()?;
        Ok((serde_json::from_slice(&bytes)?, fds))
    }

    /// Sends a job in as many packets as it needs.
    pub fn send_job(&self, job: &CheckpointJob) -> Result<(), WireError> {
        let text = serde_json::to_string(job)?;
        let mut rest = text.as_str();
        while !rest.is_empty() {
            // JSON inside JSON may double in length; a third of a packet always fits.
            let mut end = rest.len().min(phos_protocol::MAX_PACKET / 3);
            while !rest.is_char_boundary(end) {
                end -= 1;
            }
            self.send(&Packet::Job(rest[..end].to_string()), &[])?;
            rest = &rest[end..];
        }
        self.send(&Packet::JobEnd, &[])
    }

    /// Sends memory of `pid` in as many packets as it needs.
    pub fn hold<F: AsRawFd>(&self, pid: i32, entries: &[(Held, F)]) -> Result<(), WireError> {
        for batch in entries.chunks(MAX_FDS) {
            let held = batch.iter().map(|(h, _)| *h).collect();
            let fds: Vec<_> = batch.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
            self.send(&Packet::Hold(pid, held), &fds)?;
        }
        Ok(())
    }
}
