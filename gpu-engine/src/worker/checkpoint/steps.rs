//! What happens while the program stands still, step by step: its processes are parked, their driver state is saved, the lower
//! runtime dumps them, and they are woken again.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use nix::sys::memfd::{MFdFlags, memfd_create};
use phos_protocol::message::{Entry, PARK_LOW_STACK, PARK_PREFAULT, Timings};

use super::{Checkpoint, ENGINE, ms};
use crate::error::EngineError;
use crate::fault::{self, Moment};
use crate::freezer::Freezer;
use crate::image::INVENTORY;
use crate::keeper::wire::{Packet, Phase};
use crate::lower::{self, Extra, LowerError};
use crate::pages;
use crate::peer::AttachListener;
use crate::processes;
use crate::progress::State;
use crate::service::LowerOutput;
use crate::worker::sharing;
use crate::worker::subject::{Subject, all};
use crate::worker::wake::{GRACE, Sleeper, Woken, wake};

/// Names the file of options that CRIU reads.
const CRIU_CONFIG: &str = "CRIU_CONFIG_FILE";

/// What receives CRIU's pages.
pub(super) struct Pages {
    receiver: pages::Receiver,
    /// CRIU's options for it, in a file without a name: nothing can be left behind.
    options: OwnedFd,
}

/// Longest wait for processes that may give memory back before they are dumped.
const TRIM: Duration = Duration::from_secs(1);

impl Checkpoint<'_> {
    /// The driver moves its own state into the processes' host memory.
    pub(super) fn detach(&mut self) -> Result<(), EngineError> {
        self.progress.step(State::Detach, 0)?;
        let begin = Instant::now();
        let (device, wire, progress) = (self.device.clone(), self.wire, self.progress);
        let (lock_timeout, limit) = (self.job.timeouts.lock(), self.job.timeouts.driver());
        all(&mut self.subjects, |subject| {
            subject.enter(wire, Phase::Detaching)?;
            let process = &subject.kept;
            let _limit =
                progress.allow(format!("the driver's checkpoint of process {process}"), lock_timeout + limit);
            device.lock(process.pid, lock_timeout).map_err(|e| process.driver_error(e))?;
            fault::at(Moment::Locked)?;
            device.checkpoint(process.pid).map_err(|e| process.driver_error(e))?;
            fault::at(Moment::DriverSaved)?;
            progress.span("driver checkpoint", &process.to_string(), begin, begin.elapsed());
            Ok(())
        })?;
        self.report.driver_checkpoint_ms = ms(begin.elapsed());
        self.trim();
        fault::at(Moment::Trimmed)
    }

    /// Has the libraries give back what the driver saved as zeros. What does not work costs time, and nothing else.
    pub(super) fn trim(&mut self) {
        let begin = Instant::now();
        let parked = self.subjects.iter().map(|s| &s.kept).filter(|p| p.has_library);
        let mut expected: Vec<_> = parked.map(|p| (p.pid, p.own_pid)).collect();
        let Some(listener) = self.control.as_ref().and_then(|c| AttachListener::bind(c).ok()) else { return };
        let mut libraries = Vec::new();
        while !expected.is_empty() {
            match listener.accept(&expected, begin + TRIM) {
                Ok(library) => {
                    expected.retain(|(pid, _)| *pid != library.pid);
                    libraries.push(library);
                }
                Err(e) => {
                    tracing::warn!(error = %e, "not trimmed");
                    break;
                }
            }
        }
        match all(&mut libraries, |library| Ok(library.trim()?)) {
            Ok(bytes) => self.report.trimmed_bytes = bytes.into_iter().sum(),
            Err(e) => tracing::warn!(error = %e, "not trimmed"),
        }
        // The door goes before the conversations end, so that nobody knocks again while CRIU looks.
        drop(listener);
        drop(libraries);
        self.report.trim_ms = ms(begin.elapsed());
        self.progress.span("trim", ENGINE, begin, begin.elapsed());
    }

    /// Closes every gate, then takes everything over. Until the second half, dropping the conversations
    /// undoes it all.
    pub(super) fn park(&mut self) -> Result<(), EngineError> {
        self.progress.step(State::Park, 0)?;
        let (wire, drain, limit) = (self.wire, self.job.timeouts.drain(), self.job.timeouts.attach());
        let begin = Instant::now();
        for subject in &mut self.subjects {
            subject.enter(wire, Phase::Parking)?;
        }
        let progress = self.progress;
        all(&mut self.subjects, |subject| {
            let Some(library) = &subject.library else { return Ok(()) };
            let update = {
                let _limit =
                    progress.allow(format!("process {} to stand still", subject.kept), drain + GRACE);
                let flags = PARK_LOW_STACK | PARK_PREFAULT;
                library.park(subject.generation, drain, flags).map_err(|e| subject.kept.peer_error(e))?
            };
            fault::at(Moment::Drained)?;
            subject.apply(update, wire)?;
            fault::at(Moment::Held)
        })?;
        // Refused here, nothing has been taken away yet.
        sharing::resolve(&mut self.subjects)?;
        let timings = all(&mut self.subjects, |subject| match subject.library.take() {
            Some(library) => {
                let _limit = progress.allow(format!("process {} to park", subject.kept), limit + GRACE);
                let timings = library.taken(limit)?;
                fault::at(Moment::Taken)?;
                let drained = Duration::from_micros(timings.drain_us);
                let track = subject.kept.to_string();
                progress.span("drain", &track, begin, drained);
                progress.span("park", &track, begin + drained, begin.elapsed().saturating_sub(drained));
                Ok(timings)
            }
            None => Ok(Timings::default()),
        })?;
        let drain = Duration::from_micros(timings.iter().map(|t| t.drain_us).max().unwrap_or(0));
        self.report.drain_ms = ms(drain);
        self.report.park_ms = ms(begin.elapsed().saturating_sub(drain));
        if self.no_room {
            return Ok(());
        }
        // Late allocations are mapped here only now: the library was not kept waiting for it.
        let device = self.device.clone();
        self.subjects.iter_mut().try_for_each(|s| s.import(device.as_ref()))
    }

    pub(super) fn dump(&mut self) -> Result<(), EngineError> {
        if self.job.frozen {
            self.set_frozen(true)?;
        }
        self.progress.step(State::Dump, 0)?;
        fault::at(Moment::BeforeDump)?;
        let begin = Instant::now();
        let output = {
            let limit = self.job.timeouts.lower();
            let _limit = self.progress.allow("the lower runtime's checkpoint", limit + GRACE);
            let freezer = (!self.frozen).then(|| Freezer::of(self.job.init_pid)).flatten();
            if let Some(freezer) = &freezer {
                freezer.freeze();
            }
            let output = self.lower_checkpoint(limit);
            if let Some(freezer) = freezer {
                freezer.thaw();
            }
            output
        };
        // Whatever it says: a lower runtime that was killed may have had its CRIU save and end everything.
        let succeeded = output.as_ref().is_ok_and(|o| o.status == 0);
        self.gone = !self.job.leave_running
            && (succeeded || (!self.anyone_left() && self.job.image.join(INVENTORY).is_file()));
        match output {
            Ok(output) => self.lower = output,
            Err(e) if !self.gone => return Err(e.into()),
            Err(e) => self.report.warnings.push(e.to_string()),
        }
        self.report.criu_ms = ms(begin.elapsed());
        self.progress.span("CRIU", ENGINE, begin, begin.elapsed());
        if self.lower.status != 0 {
            if !self.gone {
                return Err(EngineError::LowerFailed(self.lower.status));
            }
            let status = std::mem::take(&mut self.lower).status;
            self.report.warnings.push(format!(
                "the lower runtime's checkpoint ended with status {status} after CRIU had saved and ended everything"
            ));
        }
        self.dumped = true;
        // Over a keeper that cannot be told this job does not fail any more: all that is left can be done without it.
        let told = fault::at(Moment::Dumped)
            .and_then(|()| Ok(self.wire.send(&Packet::LowerDone, &[])?))
            .and_then(|()| fault::at(Moment::DumpTold));
        if let Err(e) = told {
            tracing::warn!(error = %e, "the keeper does not know of the dump");
        }
        if self.gone {
            self.trim_pages();
        }
        Ok(())
    }

    /// Makes room for the host memory that CRIU is to save, as far as that can be done before.
    pub(super) fn prepare_pages(&mut self, gpu_bytes: u64) {
        let job = self.job;
        let Some(socket) = self.socket.take() else { return };
        if !pages::is_possible(&job.lower_version, &job.lower_checkpoint) {
            return;
        }
        let begin = Instant::now();
        let kept = |pid| self.subjects.iter().any(|s| s.kept.pid == pid);
        let prepared =
            processes::of_container(job.init_pid).map_err(io::Error::other).and_then(|processes| {
                let beside = job.bytes_in_files(gpu_bytes);
                let receiver = pages::Receiver::prepare(socket, &job.image, &processes, kept, beside)?;
                let own = env::var_os(CRIU_CONFIG).map(fs::read_to_string).transpose()?.unwrap_or_default();
                let mut options = File::from(memfd_create("criu-options", MFdFlags::MFD_CLOEXEC)?);
                writeln!(options, "{}\n{}", own.trim_end(), receiver.criu_options())?;
                let options = pages::inheritable(options.into())?;
                Ok(Pages { receiver, options })
            });
        match prepared {
            Ok(pages) => self.pages = Some(pages),
            // CRIU then writes its images itself.
            Err(e) => tracing::info!(error = %e, "CRIU's pages are not received"),
        }
        self.progress.span("make room", ENGINE, begin, begin.elapsed());
    }

    /// Gives the room back that CRIU's pages did not need.
    pub(super) fn trim_pages(&mut self) {
        if let Some(Err(e)) = self.received.take().map(pages::Received::trim) {
            tracing::warn!(error = %e, "an image file is longer than need be");
        }
    }

    fn lower_checkpoint(&mut self, limit: Duration) -> Result<LowerOutput, LowerError> {
        let Some(Pages { receiver, options }) = self.pages.take() else {
            return lower::run(&self.job.lower_checkpoint, limit);
        };
        let (server, far) = receiver.split();
        thread::scope(|scope| {
            let serving = scope.spawn(|| server.serve());
            // As CRIU sees it.
            let path = format!("/proc/self/fd/{}", options.as_raw_fd());
            let variable = Some((OsStr::new(CRIU_CONFIG), OsStr::new(&path)));
            let extra = Extra { variable, descriptors: &[far.as_fd(), options.as_fd()] };
            let output = lower::run_with(&self.job.lower_checkpoint, limit, extra);
            // The last one to hold it: a server whose CRIU has gone ends now.
            drop(far);
            match serving.join() {
                Ok(Ok(received)) => {
                    tracing::info!(
                        bytes = received.bytes,
                        ready = received.ready,
                        complete = received.complete,
                        "host memory"
                    );
                    self.report.host_bytes = received.bytes;
                    self.report.host_ready_bytes = received.ready;
                    self.received = Some(received);
                }
                Ok(Err(e)) => tracing::error!(error = %e, "host memory"),
                Err(_) => tracing::error!("the thread that receives host memory panicked"),
            }
            output
        })
    }

    /// Brings every process back to running. `before_attach` is called once, before any of them can touch its memory.
    pub(super) fn wake(&mut self, before_attach: impl FnOnce()) -> Result<Woken, EngineError> {
        self.progress.step(State::Wake, 0)?;
        if self.frozen {
            self.set_frozen(false)?;
        } else if !self.dumped {
            // A lower runtime that was ended in the middle of a dump leaves the container frozen. Thawing one that is not
            // frozen fails and changes nothing.
            let _ = lower::run(&self.job.lower_resume, self.job.timeouts.lower());
        }
        // Conversations that were cut short reopen the gate by their end.
        self.subjects.iter_mut().for_each(|s| s.library = None);
        let sleeper = |s: &Subject| Sleeper {
            process: s.kept.clone(),
            memory: s.pieces.iter().map(|p| (Entry::from(&p.held), p.fd.as_raw_fd())).collect(),
        };
        let away = |s: &&Subject| matches!(s.kept.phase, Phase::Parking | Phase::Detaching);
        let sleepers = self.subjects.iter().filter(away).map(sleeper).collect();
        let ready = || {
            before_attach();
            Ok(())
        };
        let woken = wake(
            self.device.as_ref(),
            self.control.as_ref(),
            sleepers,
            &self.job.timeouts,
            self.progress,
            ready,
        )?;
        for subject in &mut self.subjects {
            // They run. A keeper that cannot be told is gone.
            if let Err(e) = subject.enter(self.wire, Phase::Attached) {
                tracing::warn!(error = %e, "awake");
            }
        }
        let _ = fault::at(Moment::Awake);
        Ok(woken)
    }
}
