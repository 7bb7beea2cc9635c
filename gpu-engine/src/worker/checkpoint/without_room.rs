//! A checkpoint by a worker that can have no context while the program has one: the GPU is full, or in exclusive mode. The
//! program's own context goes with the driver's checkpoint; then there is room until it comes back.

use std::time::Instant;

use super::{Checkpoint, ms};
use crate::copy::{self, Ledger};
use crate::device::{self, Device};
use crate::error::EngineError;
use crate::image::ImageWriter;
use crate::worker::folder::ImageFolder;
use crate::worker::save;
use crate::worker::subject::Subject;

impl Checkpoint<'_> {
    /// Everything behind preflight.
    pub(super) fn save_without_room(&mut self, folder: &ImageFolder) -> Result<(), EngineError> {
        if self.job.pre_dump {
            return Err(EngineError::NoRoom);
        }
        let bytes: u64 = self.subjects.iter().map(Subject::bytes).sum();
        folder.require(self.job.bytes_in_files(bytes))?;
        self.subjects.iter_mut().flat_map(|s| &mut s.pieces).for_each(|p| p.region = None);
        let stopped = Instant::now();
        let saved = self.stand_still_without_room().map_err(|cause| self.woken_after(cause))?;
        if self.job.leave_running {
            self.report.pause_ms = ms(stopped.elapsed());
        }
        self.report.warnings.push(format!(
            "the GPU had no room for a second process: {} MiB were copied out while the program stood still, in {:.0} ms",
            bytes >> 20,
            self.report.copy_ms
        ));
        self.progress.step("commit", 0);
        save::commit(self.device.as_ref(), saved, None, self.job, &self.subjects, &mut self.report)
    }

    fn stand_still_without_room(&mut self) -> Result<(ImageWriter, Ledger), EngineError> {
        self.park()?;
        self.detach()?;
        // A driver of its own, so that its contexts can go before the program's come back.
        let device = device::cuda::open()?;
        let copied = self.copy_everything(device.as_ref());
        self.subjects.iter_mut().flat_map(|s| &mut s.pieces).for_each(|p| p.region = None);
        device.close();
        let saved = copied?;
        self.dump()?;
        if self.job.leave_running {
            let woken = self.wake(|| ())?;
            self.report.driver_restore_ms = ms(woken.driver);
            self.report.attach_ms = ms(woken.attach_wall);
        }
        Ok(saved)
    }

    fn copy_everything(&mut self, device: &dyn Device) -> Result<(ImageWriter, Ledger), EngineError> {
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
