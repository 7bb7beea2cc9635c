//! A checkpoint by a worker that can have no context while the program has one: the GPU is full, or in exclusive mode. The
//! program's own context goes with the driver's checkpoint; then there is room until it comes back.

use std::time::Instant;

use super::{Checkpoint, ms};
use crate::copy::{self, Ledger};
use crate::device::{self, Device};
use crate::error::EngineError;
use crate::image::ImageWriter;
use crate::progress::State;
use crate::worker::folder::ImageFolder;
use crate::worker::save;
use crate::worker::subject::Subject;

/// Everything that is written, and where.
type Saved = (ImageWriter, Ledger);

impl Checkpoint<'_> {
    /// Everything behind preflight.
    pub(super) fn save_without_room(&mut self, folder: &ImageFolder) -> Result<(), EngineError> {
        if self.job.pre_dump {
            return Err(EngineError::NoRoom);
        }
        let bytes: u64 = self.subjects.iter().map(Subject::bytes).sum();
        folder.require(self.job.bytes_in_files(bytes))?;
        self.subjects.iter_mut().flat_map(|s| &mut s.pieces).for_each(|p| p.region = None);
        self.prepare_pages(bytes);
        let stopped = Instant::now();
        match self.stand_still_without_room() {
            Ok(None) => {}
            Ok(Some((cause, saved))) => return self.rescue(cause, |c| c.commit_saved(saved)),
            Err(cause) => return Err(self.woken_after(cause)),
        }
        if self.job.leave_running {
            self.report.pause_ms = ms(stopped.elapsed());
        }
        self.report.warnings.push(format!(
            "the GPU had no room for a second process: {} MiB were copied out while the program stood still, in {:.0} ms",
            bytes >> 20,
            self.report.copy_ms
        ));
        Ok(())
    }

    /// Returns why the container could not be woken although everything is saved.
    fn stand_still_without_room(&mut self) -> Result<Option<(EngineError, Saved)>, EngineError> {
        self.park()?;
        self.detach()?;
        // A driver of its own, so that its contexts can go before the program's come back.
        let device = device::cuda::open()?;
        let copied = self.copy_everything(device.as_ref());
        self.subjects.iter_mut().flat_map(|s| &mut s.pieces).for_each(|p| p.region = None);
        device.close();
        let saved = copied?;
        if !self.job.leave_running {
            self.commit_saved(saved)?;
            self.dump()?;
            return Ok(None);
        }
        self.dump()?;
        match self.wake(|| ()) {
            Ok(woken) => {
                self.report.driver_restore_ms = ms(woken.driver);
                self.report.attach_ms = ms(woken.attach_wall);
                self.commit_saved(saved)?;
                Ok(None)
            }
            Err(cause) => Ok(Some((cause, saved))),
        }
    }

    fn commit_saved(&mut self, saved: Saved) -> Result<(), EngineError> {
        self.progress.step(State::Commit, 0)?;
        self.trim_pages();
        let (device, job) = (self.device.clone(), self.job);
        save::commit(device.as_ref(), saved, None, job, &self.subjects, &mut self.report)?;
        self.image_is_complete()
    }

    fn copy_everything(&mut self, device: &dyn Device) -> Result<Saved, EngineError> {
        self.subjects.iter_mut().try_for_each(|s| s.import(device))?;
        let mut ledger = Ledger::default();
        save::update(&mut ledger, &self.subjects);
        let lanes = copy::lane_count();
        let writer = ImageWriter::create(&self.job.image, lanes, self.job.compression)?;
        let mut session = copy::Session::prepare(device, self.progress, writer, lanes, ledger)?;
        let quiesced = session.quiesce()?;
        session.sink().sync()?;
        self.report.copy_ms = ms(quiesced.copy);
        self.report.dirty_bytes = quiesced.dirty_bytes;
        self.report.straight_bytes = quiesced.straight_bytes;
        Ok(session.finish())
    }
}
