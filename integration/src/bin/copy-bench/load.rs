//! An image → GPU.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Result, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use phos_engine::copy::{self, Session, Tuning};
use phos_engine::device::Pinned;
use phos_engine::image::{Codec, Image, ImageWriter, data_file};
use phos_engine::progress::Progress;
use phos_integration::memory;

use crate::save::fresh;
use crate::{BLOCK, Bench, Folder, RUNS, buffers, gb_s};

impl Bench {
    /// An image loaded as a restore loads it, allocations and proof included, and the same files merely read.
    pub fn load_from(&self, folder: &Folder, codec: Codec) -> Result<()> {
        let bytes = folder.blocks as u64 * BLOCK;
        let files = self.write_image(folder, codec)?;
        let tunings = if codec == Codec::None { &folder.tunings[..] } else { &folder.tunings[..1] };
        let packed = if codec == Codec::None { String::new() } else { format!(", {codec}") };
        for tuning in tunings {
            let (mut plain, mut own) = (Vec::new(), Vec::new());
            for _ in 0..RUNS {
                self.evict(folder, &files)?;
                if codec == Codec::None {
                    plain.push(gb_s(bytes, self.read(&files, *tuning)?));
                }
                self.evict(folder, &files)?;
                let begin = Instant::now();
                let image = Image::open(&folder.path)?;
                let regions = copy::regions(&image);
                let progress = Progress::default();
                copy::load(self.device.as_ref(), &image, &regions, *tuning, &progress, || ())?;
                own.push(gb_s(bytes, begin.elapsed()));
            }
            let note = format!("from {}, {}{packed}", folder.kind, buffers(*tuning));
            self.report("phos-runc", "load_gb_s", folder.blocks, own, &note);
            if codec == Codec::None {
                let note = format!("the same files read without a GPU, {note}");
                self.report("plain", "load_gb_s", folder.blocks, plain, &note);
            }
        }
        Ok(())
    }

    /// An image of the memory; its data files.
    fn write_image(&self, folder: &Folder, codec: Codec) -> Result<Vec<PathBuf>> {
        fresh(&folder.path)?;
        let regions = &self.regions[..folder.blocks];
        let writer = ImageWriter::create(&folder.path, self.lanes, codec)?;
        let progress = Progress::default();
        let ledger = memory::ledger(regions, BLOCK);
        let mut session = Session::prepare(self.device.as_ref(), &progress, writer, self.lanes, ledger)?;
        let copied = session.quiesce()?.copy;
        if codec != Codec::None {
            let note = format!("to {}, {} threads, {codec}", folder.kind, self.lanes);
            self.report(
                "phos-runc",
                "copy_gb_s",
                folder.blocks,
                vec![gb_s(folder.blocks as u64 * BLOCK, copied)],
                &note,
            );
        }
        let (writer, ledger) = session.finish();
        let table = ledger.all().into_iter().map(|c| ledger.saved(c)).collect();
        writer.commit(memory::manifest(&self.gpu, regions, BLOCK), table)?;
        Ok((0..self.lanes).map(|n| folder.path.join(data_file(n))).collect())
    }

    /// Files on a disk are read from there, not from memory.
    fn evict(&self, folder: &Folder, files: &[PathBuf]) -> Result<()> {
        if folder.kind != "tmpfs" {
            for path in files {
                let file = File::open(path)?;
                file.sync_all()?;
                posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
        }
        Ok(())
    }

    /// Reads the files with as many threads, each into two buffers.
    fn read(&self, files: &[PathBuf], tuning: Tuning) -> Result<Duration> {
        // Piece after piece of every file, as what many threads have written lies in their files.
        let lengths = files.iter().map(|f| Ok(fs::metadata(f)?.len())).collect::<Result<Vec<_>>>()?;
        let mut pieces = Vec::new();
        for at in (0..lengths.iter().copied().max().unwrap_or(0)).step_by(tuning.piece) {
            let of_file =
                |(n, len): (usize, &u64)| Some((n, at, tuning.piece.min(len.checked_sub(at)? as usize)));
            pieces.extend(lengths.iter().enumerate().filter_map(of_file));
        }
        let next = AtomicUsize::new(0);
        let opened: Vec<_> = files.iter().map(File::open).collect::<Result<_, _>>()?;
        let mut rings = Vec::new();
        for _ in 0..tuning.lanes {
            rings.push([self.device.pinned(tuning.piece)?, self.device.pinned(tuning.piece)?]);
        }
        let begin = Instant::now();
        thread::scope(|scope| {
            let (pieces, opened, next) = (&pieces, &opened, &next);
            let read = |mut ring: [Box<dyn Pinned>; 2]| {
                scope.spawn(move || {
                    let mut turn = 0;
                    while let Some((file, at, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                        opened[*file].read_exact_at(&mut ring[turn].bytes_mut()[..*len], *at)?;
                        turn ^= 1;
                    }
                    Ok::<_, io::Error>(())
                })
            };
            let threads: Vec<_> = rings.into_iter().map(read).collect();
            threads.into_iter().try_for_each(|t| match t.join() {
                Ok(result) => Ok(result?),
                Err(_) => bail!("a thread panicked"),
            })
        })?;
        Ok(begin.elapsed())
    }
}
