//! The file that one owner's pages go to.
//!
//! Its first part is taken from the file system and mapped before the program stands still. What CRIU sends is then copied
//! once, into memory that is there already: making room for a page costs more than copying it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;

use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::linkat;

use super::copiers::Copiers;
use crate::fault::{self, Access};

/// Threads that have the file system make room.
const HELPERS: usize = 4;
/// What is received at once beyond the mapped part, bytes.
const PIECE: usize = 1 << 20;
/// What is shorter is copied at once, bytes: handing it over takes longer.
const HANDED_OVER: usize = 128 << 10;

/// Memory of a file, mapped for writing by the kernel alone: where it cannot be written, `read` says so.
#[derive(Debug)]
pub struct Mapping {
    at: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone and stays where it is; nothing in it is bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: see `Send`; the program itself has no reference to what is mapped, so that only the kernel's own writes can meet.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at a place that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(at) {
            Some(at) if at.as_ptr() != libc::MAP_FAILED => Ok(Mapping { at, bytes }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads up to `bytes` bytes from `from` to `offset`. Returns how many; `EFAULT` where there is no memory for them.
    pub fn read(&self, from: BorrowedFd<'_>, offset: usize, bytes: usize) -> io::Result<usize> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            // SAFETY: the range lies inside the mapping.
            let got = unsafe {
                libc::read(from.as_raw_fd(), self.at.as_ptr().cast::<u8>().add(offset).cast(), bytes)
            };
            match usize::try_from(got) {
                Ok(got) => return Ok(got),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }

    /// Has every page there. Kernels before 5.14 cannot; they make room when a page is written.
    fn populate(&self) {
        let part = self.bytes.div_ceil(HELPERS).next_multiple_of(1 << 21);
        let address = self.at.as_ptr() as usize;
        thread::scope(|scope| {
            for begin in (0..self.bytes).step_by(part) {
                let bytes = part.min(self.bytes - begin);
                scope.spawn(move || {
                    // SAFETY: the range lies inside the mapping; it only gets its pages.
                    unsafe {
                        libc::madvise(
                            (address + begin) as *mut libc::c_void,
                            bytes,
                            libc::MADV_POPULATE_WRITE,
                        )
                    }
                });
            }
        });
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.at.as_ptr(), self.bytes) };
    }
}

/// Writes zeros. A disk's file system makes room for large writes ten times faster than for pages that are touched one by one.
fn fill(file: &File, bytes: usize) -> io::Result<()> {
    let zeros = vec![0; PIECE];
    (0..bytes).step_by(PIECE).try_for_each(|at| file.write_all_at(&zeros[..PIECE.min(bytes - at)], at as u64))
}

/// A file of pages that has no name yet.
#[derive(Debug)]
pub struct PageFile {
    file: File,
    mapping: Option<Arc<Mapping>>,
    length: u64,
    /// Where that is received which finds no room.
    piece: Vec<u8>,
}

impl PageFile {
    /// A file in `folder` with room for `bytes`. Fails where the file system cannot make a file without a name, or has not
    /// so much room.
    pub fn reserve(folder: &Path, bytes: u64) -> io::Result<Self> {
        fault::io(Access::CreatePages)?;
        let file =
            File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(folder)?;
        let mapping = match usize::try_from(bytes) {
            Ok(bytes) if bytes > 0 => {
                fallocate(&file, FallocateFlags::empty(), 0, bytes as libc::off_t)?;
                if fstatfs(&file)?.filesystem_type() != TMPFS_MAGIC {
                    fill(&file, bytes)?;
                }
                let mapping = Mapping::new(&file, bytes)?;
                mapping.populate();
                Some(Arc::new(mapping))
            }
            _ => None,
        };
        Ok(PageFile { file, mapping, length: 0, piece: Vec::new() })
    }

    /// Bytes that there is room for.
    pub fn reserved(&self) -> u64 {
        self.mapping.as_ref().map_or(0, |m| m.bytes as u64)
    }

    /// Bytes received.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Appends the next `bytes` that `from` sends, with the help of `copiers`. All of them are taken from there, also where
    /// they cannot be saved; only what the socket itself has to say is returned as `Err` of the outer result.
    pub fn receive(
        &mut self,
        from: &mut UnixStream,
        mut bytes: u64,
        copiers: &mut Copiers,
    ) -> io::Result<io::Result<()>> {
        let mut saved = fault::io(Access::WritePages);
        while bytes > 0 {
            let room = self.reserved().saturating_sub(self.length).min(bytes) as usize;
            let taken = match &self.mapping {
                Some(mapping) if room > 0 && saved.is_ok() => {
                    let offset = self.length as usize;
                    let taken = if room >= HANDED_OVER && !copiers.is_empty() {
                        copiers.take(from, mapping, offset, room)
                    } else {
                        mapping.read(from.as_fd(), offset, room)
                    };
                    match taken {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(taken) => taken as u64,
                        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                            saved = Err(e);
                            continue;
                        }
                        Err(e) => return Err(e),
                    }
                }
                _ => {
                    self.piece.resize(PIECE, 0);
                    let piece = &mut self.piece[..PIECE.min(bytes as usize)];
                    from.read_exact(piece)?;
                    if saved.is_ok() {
                        saved = self.file.write_all_at(piece, self.length);
                    }
                    piece.len() as u64
                }
            };
            self.length += taken;
            bytes -= taken;
        }
        Ok(saved)
    }

    #[cfg(test)]
    pub fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// Cuts off what was not needed.
    pub fn trim(mut self) -> io::Result<()> {
        self.mapping = None;
        self.file.set_len(self.length)
    }

    /// Gives it a name.
    pub fn name(&self, path: &Path) -> io::Result<()> {
        let own = format!("/proc/self/fd/{}", self.file.as_fd().as_raw_fd());
        Ok(linkat(AT_FDCWD, own.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?)
    }
}
