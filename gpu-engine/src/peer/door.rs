//! The host's door: where parked processes knock to be attached again.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Backlog, SockFlag, accept4, bind, listen};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{UnlinkatFlags, unlinkat};
use phos_protocol::{Connection, TransportError, paths};

use super::folder::seqpacket;
use super::{ANSWER, ControlDir, Library, PeerError, Result};

/// Where parked processes knock to be attached again. The socket is removed when this is dropped.
#[derive(Debug)]
pub struct AttachListener<'a> {
    dir: &'a ControlDir,
    socket: OwnedFd,
}

/// Guards the process-wide umask while a socket is bound.
static UMASK: Mutex<()> = Mutex::new(());

impl<'a> AttachListener<'a> {
    /// Starts to listen; every parked process of the container finds it within about a millisecond.
    pub fn bind(dir: &'a ControlDir) -> Result<Self> {
        let socket = seqpacket().map_err(|e| dir.error(e))?;
        dir.clear(paths::HOST_SOCKET);
        let address = dir.address(paths::HOST_SOCKET)?;
        {
            // The application may run as any user: connecting needs write permission on the socket file.
            let _guard = UMASK.lock();
            let before = umask(Mode::empty());
            let bound = bind(socket.as_raw_fd(), &address);
            umask(before);
            bound.map_err(|e| dir.error(e))?;
        }
        let listener = AttachListener { dir, socket };
        listen(&listener.socket, Backlog::MAXCONN).map_err(|e| dir.error(e))?;
        Ok(listener)
    }

    /// Waits for the next of `expected` (host pid, pid in its own namespace) until `deadline`. Connections of
    /// anyone else are closed.
    pub fn accept(&self, expected: &[(i32, i32)], deadline: Instant) -> Result<Library> {
        let first = expected.first().map_or(0, |e| e.0);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Also while others knock and knock.
                return Err(PeerError::Silent { pid: first, source: TransportError::Timeout });
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) | Err(nix::Error::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(self.dir.error(e)),
            }
            let Ok(fd) = accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { continue };
            // SAFETY: accept4 just returned this fd and nothing else owns it.
            let connection = Connection::new(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) });
            let Ok(peer) = connection.peer() else { continue };
            let Some((pid, own_pid)) = expected.iter().copied().find(|(pid, _)| *pid == peer.pid) else {
                continue;
            };
            let mut library = Library { connection, pid, own_pid, parked: true, driver: 0 };
            library.timeout(ANSWER)?;
            library.greet()?;
            return Ok(library);
        }
    }
}

impl Drop for AttachListener<'_> {
    fn drop(&mut self) {
        let _ = unlinkat(&self.dir.fd, paths::HOST_SOCKET, UnlinkatFlags::NoRemoveDir);
    }
}
