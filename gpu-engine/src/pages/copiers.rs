//! Threads that copy what CRIU sends to its place.
//!
//! Whoever reads the socket takes the pages out of it without copying them (`splice`), and hands them to these threads in turn,
//! each through a pipe of its own: one thread copies more slowly than CRIU sends. The pages are the program's own; they do not
//! change, since the program stands still until CRIU is told that all is saved.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};

use super::file::Mapping;

/// More threads do not copy faster: memory itself is the limit then.
const MOST: usize = 4;
/// Bytes that a pipe holds: the most that anyone may ask for (`pipe(7)`).
const PIPE: usize = 1 << 20;

/// Bytes that lie in a copier's pipe, and where they belong.
#[derive(Debug)]
struct Piece {
    into: Arc<Mapping>,
    offset: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Copier {
    pieces: Sender<Piece>,
    pipe: PipeWriter,
    thread: JoinHandle<io::Result<()>>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Copiers {
    copiers: Vec<Copier>,
    next: usize,
}

impl Copiers {
    /// As many as are of use on this machine.
    pub fn start() -> io::Result<Self> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self::with(MOST.min(processors / 2))
    }

    /// `count` threads.
    pub fn with(count: usize) -> io::Result<Self> {
        let copiers = (0..count).map(|_| {
            let (from, pipe) = io::pipe()?;
            // Also what is shorter works.
            if let Err(e) = fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(PIPE as i32)) {
                tracing::debug!(error = %e, "a short pipe for CRIU's pages");
            }
            let (pieces, told) = mpsc::channel();
            let thread = thread::Builder::new().name("pages".into()).spawn(move || copy(from, &told))?;
            Ok(Copier { pieces, pipe, thread })
        });
        Ok(Copiers { copiers: copiers.collect::<io::Result<_>>()?, next: 0 })
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.copiers.is_empty()
    }

    /// Takes up to `most` bytes from the socket, which will lie at `offset` of the mapping when [`Copiers::finish`] returns.
    /// Returns how many; 0 where nothing more will come.
    pub fn take(
        &mut self,
        from: &UnixStream,
        into: &Arc<Mapping>,
        offset: usize,
        most: usize,
    ) -> io::Result<usize> {
        let index = self.next % self.copiers.len();
        self.next = index + 1;
        let copier = &self.copiers[index];
        let bytes = splice(from, None, &copier.pipe, None, most.min(PIPE), SpliceFFlags::SPLICE_F_MOVE)?;
        let piece = Piece { into: Arc::clone(into), offset, bytes };
        copier
            .pieces
            .send(piece)
            .map_err(|_| io::Error::other("a thread that copies CRIU's pages is gone"))?;
        Ok(bytes)
    }

    /// Waits until all is copied. Fails if something could not be.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for Copier { pieces, pipe, thread } in self.copiers.drain(..) {
            drop((pieces, pipe));
            let copied = thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread that copies CRIU's pages panicked")));
            result = result.and(copied);
        }
        result
    }
}

/// One thread's work. Takes everything out of the pipe, also what cannot be saved: whoever fills it would wait for ever.
fn copy(mut from: PipeReader, told: &Receiver<Piece>) -> io::Result<()> {
    let mut saved = Ok(());
    for Piece { into, mut offset, bytes } in told {
        let end = offset + bytes;
        while offset < end && saved.is_ok() {
            match into.read(from.as_fd(), offset, end - offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => offset += got,
                Err(e) => saved = Err(e),
            }
        }
        io::copy(&mut (&mut from).take((end - offset) as u64), &mut io::sink())?;
    }
    saved
}
