//! Receives the pages of host memory that CRIU dumps, and writes its images of them.
//!
//! CRIU by itself moves every page into a file while the program stands still, and spends most of that time on making room
//! in the file system. Here the room is there before, and CRIU hands its pages over through a socket, as to a page server of
//! its own (`--page-server --ps-socket`): they are copied once, at the speed of memory. The images are the same.
//!
//! CRIU lets go of the processes only when it is told that all is saved; by then all images are complete and have their names.
//! If the receiver ends before, CRIU fails and the processes run on.

mod copiers;
mod file;
mod protocol;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::statvfs::statvfs;
use thiserror::Error;

use copiers::Copiers;
use file::PageFile;
use protocol::{LONG, Layout, Owner, PageMap, ProtocolError, Reader, Request, Run, SHORT};

use crate::fault::{self, Moment};
use crate::job::CommandLine;
use crate::processes::Process;

/// Most bytes of page cache that are taken beforehand, over all processes. What is beyond is saved all the same.
const MOST: u64 = 8 << 30;
/// A process's driver state comes to its memory with the driver's checkpoint, bytes.
const DRIVER_STATE: u64 = 256 << 20;
/// Processes smaller than that need no preparation, bytes.
const SMALL: u64 = 4 << 20;
/// The descriptor that CRIU inherits has at least this number: the lower runtime gives it others from 3 on.
const FIRST_NUMBER: i32 = 300;

/// What may be on its way through the socket, bytes. CRIU waits for nothing then while it has something to send: waking
/// either side up takes longer than copying what fits into a socket's usual buffer.
const ON_THE_WAY: usize = 64 << 20;

/// Why pages are not received.
#[derive(Debug, Error)]
pub enum PagesError {
    /// CRIU says something else than expected.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// A system call failed.
    #[error("receiving CRIU's pages: {0}")]
    Io(#[from] io::Error),
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Received {
    /// CRIU was told that all is saved.
    pub complete: bool,
    /// Bytes of pages.
    pub bytes: u64,
    /// Of those, how many found their place ready.
    pub ready: u64,
    /// The files, longer than they need be.
    files: Vec<PageFile>,
}

impl Received {
    /// Cuts off the room that was not needed. That takes a while: do it when nobody waits. It does no harm in an image.
    pub fn trim(self) -> io::Result<()> {
        self.files.into_iter().try_for_each(PageFile::trim)
    }
}

/// The way from CRIU to here.
#[derive(Debug)]
pub struct Socket {
    own: UnixStream,
    /// CRIU's end.
    far: OwnedFd,
}

impl Socket {
    /// A pair with room for much, if this thread has the capability for that (`CAP_NET_ADMIN`).
    pub fn pair() -> io::Result<Self> {
        let (own, far) = UnixStream::pair()?;
        if let Err(e) = setsockopt(&far, sockopt::SndBufForce, &ON_THE_WAY) {
            tracing::debug!(error = %e, "a small buffer for CRIU's pages");
        }
        Ok(Socket { own, far: inheritable(far.into())? })
    }
}

/// Everything that can be done before the program stands still.
#[derive(Debug)]
pub struct Receiver {
    folder: PathBuf,
    socket: Socket,
    /// Files with room, by the process id in its own namespace.
    ready: Vec<(u64, PageFile)>,
    copiers: Copiers,
}

/// Bytes of a process's memory that CRIU would write now.
fn private_bytes(status: &str) -> u64 {
    let field = |name| {
        status.lines().find_map(|l| l.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
    };
    (field("RssAnon:").unwrap_or(0) + field("RssShmem:").unwrap_or(0)) << 10
}

/// Bytes of host memory that are free or can be made so.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// The same file under a number that the lower runtime gives to nothing else.
pub fn inheritable(file: OwnedFd) -> io::Result<OwnedFd> {
    let number = fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(FIRST_NUMBER))?;
    // SAFETY: a descriptor that was just made, and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether the lower runtime leaves CRIU a descriptor, and the checkpoint is one that needs no earlier image's pages.
pub fn is_possible(lower_version: &str, checkpoint: &CommandLine) -> bool {
    let says = |names: &[&str]| {
        checkpoint.args().any(|a| {
            let a = a.to_string_lossy();
            names.iter().any(|n| a.trim_start_matches('-').split('=').next() == Some(n))
        })
    };
    lower_version.starts_with("runc ")
        && !says(&["page-server", "lazy-pages", "parent-path", "pre-dump", "auto-dedup"])
}

impl Receiver {
    /// Takes room in the image folder for the memory of `processes`. `gpu` tells those whose driver state is still to come,
    /// `beside` is how many bytes else the folder will need room for.
    pub fn prepare(
        socket: Socket,
        folder: &Path,
        processes: &[Process],
        gpu: impl Fn(i32) -> bool,
        beside: u64,
    ) -> io::Result<Self> {
        let stat = statvfs(folder)?;
        let free = stat.blocks_available() * stat.fragment_size();
        let mut left = MOST.min(available() / 4).min(free.saturating_sub(beside) / 2);
        let mut ready = Vec::new();
        for p in processes {
            let status = fs::read_to_string(format!("/proc/{}/status", p.pid)).unwrap_or_default();
            let bytes = private_bytes(&status) + if gpu(p.pid) { DRIVER_STATE } else { 0 };
            let bytes = bytes.next_multiple_of(1 << 21).min(left & !0x1f_ffff);
            if bytes > SMALL {
                ready.push((p.own_pid as u64, PageFile::reserve(folder, bytes)?));
                left = left.saturating_sub(bytes);
            }
        }
        // Whether files without a name can be made here at all.
        drop(PageFile::reserve(folder, 0)?);
        Ok(Receiver { folder: folder.to_path_buf(), socket, ready, copiers: Copiers::start()? })
    }

    /// Options for CRIU, one a line.
    pub fn criu_options(&self) -> String {
        format!("page-server\nps-socket {}\n", self.socket.far.as_raw_fd())
    }

    /// Splits it in what serves and what CRIU gets; when the latter is closed everywhere, the former ends.
    pub fn split(self) -> (Server, OwnedFd) {
        let server = Server {
            folder: self.folder,
            socket: self.socket.own,
            ready: self.ready,
            copiers: self.copiers,
            open: None,
            files: 0,
            failed: None,
            received: Received::default(),
        };
        (server, self.socket.far)
    }
}

/// One owner's memory, under way.
#[derive(Debug)]
struct Open {
    owner: Owner,
    pages: PageFile,
    map: PageMap,
}

/// Serves one dump.
#[derive(Debug)]
pub struct Server {
    folder: PathBuf,
    socket: UnixStream,
    ready: Vec<(u64, PageFile)>,
    copiers: Copiers,
    open: Option<Open>,
    /// Page files with a name.
    files: u32,
    /// What prevented something from being saved. CRIU is told at the end: it gives up in order then, and not in the middle.
    failed: Option<io::Error>,
    received: Received,
}

impl Server {
    /// Serves until CRIU has sent everything, or is gone.
    pub fn serve(mut self) -> Result<Received, PagesError> {
        match self.requests() {
            Err(PagesError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(self.received),
            Err(e) => Err(e),
            Ok(()) => match self.failed {
                Some(e) => Err(e.into()),
                None => Ok(self.received),
            },
        }
    }

    fn requests(&mut self) -> Result<(), PagesError> {
        let mut message = [0; LONG];
        let mut first = [0; SHORT];
        self.socket.read_exact(&mut first)?;
        let layout = Layout::of(&first);
        message[..SHORT].copy_from_slice(&first);
        self.socket.read_exact(&mut message[SHORT..layout.len()])?;
        let page = page_size();
        let mut reader = Reader::default();
        loop {
            match reader.read(layout, &message)? {
                Request::Open(owner) => {
                    self.begin(owner);
                    self.socket.write_all(&[0])?;
                }
                Request::HasParent => self.socket.write_all(&0_i32.to_le_bytes())?,
                Request::Add(run) => self.add(run, page)?,
                Request::Close => {
                    self.end();
                    let copied = self.copiers.finish();
                    self.note(copied);
                    self.note(fault::io(Moment::PagesReceived));
                    self.received.complete = self.failed.is_none();
                    return Ok(self.socket.write_all(&(-i32::from(self.failed.is_some())).to_le_bytes())?);
                }
            }
            self.socket.read_exact(&mut message[..layout.len()])?;
        }
    }

    /// Keeps the first failure.
    fn note(&mut self, result: io::Result<()>) {
        if let Err(e) = result
            && self.failed.is_none()
        {
            tracing::error!(error = %e, "CRIU's pages cannot be saved");
            self.failed = Some(e);
        }
    }

    fn begin(&mut self, owner: Owner) {
        self.end();
        let ready = self.ready.iter().position(|(pid, _)| Owner::Process(*pid) == owner);
        let pages = match ready {
            Some(i) => Ok(self.ready.swap_remove(i).1),
            None => PageFile::reserve(&self.folder, 0),
        };
        self.files += 1;
        let name = self.folder.join(format!("pages-{}.img", self.files));
        let opened = pages.and_then(|pages| pages.name(&name).map(|()| pages));
        match opened {
            Ok(pages) => self.open = Some(Open { owner, pages, map: PageMap::new(self.files) }),
            Err(e) => self.note(Err(e)),
        }
    }

    fn add(&mut self, run: Run, page: u64) -> io::Result<()> {
        let bytes = if run.has_content() { u64::from(run.pages) * page } else { 0 };
        let saved = match &mut self.open {
            Some(open) => {
                open.map.add(run);
                open.pages.receive(&mut self.socket, bytes, &mut self.copiers)?
            }
            // It could not be opened, which is known.
            None => io::copy(&mut (&mut self.socket).take(bytes), &mut io::sink()).map(|_| Ok(()))?,
        };
        self.note(saved);
        Ok(())
    }

    /// Completes what is open.
    fn end(&mut self) {
        let Some(Open { owner, pages, map }) = self.open.take() else { return };
        self.received.bytes += pages.length();
        self.received.ready += pages.length().min(pages.reserved());
        let path = self.folder.join(owner.pagemap());
        let file = File::options().write(true).create_new(true).mode(0o600).open(path);
        self.note(file.and_then(|mut file| file.write_all(map.bytes())));
        self.received.files.push(pages);
    }
}

/// Bytes of a page.
fn page_size() -> u64 {
    // SAFETY: asks for a constant.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests;
