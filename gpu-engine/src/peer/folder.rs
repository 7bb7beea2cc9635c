//! The folder in which a container's sockets lie. What is in it belongs to the container.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, RenameFlags, openat, renameat2};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use phos_protocol::paths;

use super::{PeerError, Result};

/// The container's control folder, held open: what is in it belongs to the container, so it is only ever
/// reached through this descriptor and never by a path that the container could redirect.
#[derive(Debug)]
pub struct ControlDir {
    pub(super) fd: File,
    path: PathBuf,
}

impl ControlDir {
    /// Opens the folder on the host.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .map_err(|source| PeerError::Io { path: path.into(), source })?;
        Ok(ControlDir { fd, path: path.into() })
    }

    /// Tells the libraries how much host memory the container may still take; `None` is no limit.
    pub fn tell_headroom(&self, bytes: Option<u64>) -> Result<()> {
        self.clear(paths::HEADROOM);
        let Some(bytes) = bytes else { return Ok(()) };
        // The folder is the container's: whatever is there by that name is not written to.
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&self.fd, paths::HEADROOM, flags, Mode::from_bits_truncate(0o644));
        let mut file = File::from(file.map_err(|e| self.error(e))?);
        file.write_all(bytes.to_string().as_bytes()).map_err(|e| self.error(e))
    }

    /// A short path to `name` in the folder: Unix socket addresses hold 107 bytes only.
    pub(super) fn address(&self, name: &str) -> Result<UnixAddr> {
        let path = format!("{}/{name}", descriptor(&self.fd));
        UnixAddr::new(path.as_str()).map_err(|e| self.error(e))
    }

    /// The socket `name` itself, `None` if there is none. A link is none, wherever it leads.
    pub(super) fn socket(&self, name: &str) -> Result<Option<File>> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(nix::Error::ENOENT) => return Ok(None),
            Err(e) => return Err(self.error(e)),
        };
        let kind = file.metadata().map_err(|e| self.error(e))?.file_type();
        Ok(kind.is_socket().then_some(file))
    }

    /// Makes room for a file of the host's. What cannot be removed at once (a folder that somebody filled) is moved out of the way: it
    /// goes with the control folder.
    pub(super) fn clear(&self, name: &str) {
        if !matches!(unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir), Err(nix::Error::EISDIR)) {
            return;
        }
        for n in 0..u32::from(u8::MAX) {
            let aside = format!(".{name}.{n}");
            let free = renameat2(&self.fd, name, &self.fd, aside.as_str(), RenameFlags::RENAME_NOREPLACE);
            if !matches!(free, Err(nix::Error::EEXIST)) {
                return;
            }
        }
    }

    pub(super) fn error(&self, e: impl Into<io::Error>) -> PeerError {
        PeerError::Io { path: self.path.clone(), source: e.into() }
    }
}

/// A short path to what a descriptor stands for: addresses of Unix sockets hold 107 bytes only.
pub(super) fn descriptor(fd: &File) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

pub(super) fn seqpacket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}
