//! Sending and receiving packets with file descriptors.
//!
//! Plain system calls: this code also runs inside the application, where it may not log, spawn or panic.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use thiserror::Error;

use crate::message::{DecodeError, Message};
use crate::{MAX_FDS, MAX_PACKET};

/// Why a packet did not go over.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came within the connection's timeout.
    #[error("no answer within the time allowed")]
    Timeout,
    /// The packet is not one of this protocol.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The packet or its fds were larger than the protocol allows and were cut by the kernel.
    #[error("packet larger than the protocol allows")]
    Oversized,
    /// A system call failed.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for TransportError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => TransportError::Timeout,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => TransportError::Closed,
            _ => TransportError::Io(e),
        }
    }
}

/// One end of a `SOCK_SEQPACKET` connection. All fds it makes are close-on-exec.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Control-message buffer, aligned as the kernel wants it.
#[repr(align(8))]
struct Control([u8; 1024]);

const fn control_len(fds: usize) -> usize {
    // SAFETY: CMSG_SPACE is arithmetic on its argument.
    unsafe { libc::CMSG_SPACE((fds * size_of::<RawFd>()) as u32) as usize }
}

const _: () = assert!(control_len(MAX_FDS) <= 1024);

impl Connection {
    /// Takes over a connected socket.
    pub fn new(fd: OwnedFd) -> Self {
        Connection(fd)
    }

    /// Limits how long [`Connection::receive`] and [`Connection::send`] wait; `None` waits for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), TransportError> {
        let t = timeout.unwrap_or(Duration::ZERO);
        let tv = libc::timeval { tv_sec: t.as_secs() as _, tv_usec: t.subsec_micros() as _ };
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            // SAFETY: `tv` is a valid timeval for the length given.
            let r = unsafe {
                libc::setsockopt(
                    self.0.as_raw_fd(),
                    libc::SOL_SOCKET,
                    option,
                    (&raw const tv).cast(),
                    size_of::<libc::timeval>() as u32,
                )
            };
            if r < 0 {
                return Err(io::Error::last_os_error().into());
            }
        }
        Ok(())
    }

    /// Process id, user id and group id of the other side as the kernel knows them, seen from this process's
    /// namespaces (pid 0 if it is in none of them).
    pub fn peer(&self) -> Result<libc::ucred, TransportError> {
        let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: `cred` and `len` are valid for writing and `len` holds the size of `cred`.
        let r = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut cred).cast(),
                &mut len,
            )
        };
        if r < 0 { Err(io::Error::last_os_error().into()) } else { Ok(cred) }
    }

    /// Sends one packet and copies of `fds`, at most [`MAX_FDS`].
    pub fn send(&self, message: &Message, fds: &[RawFd]) -> Result<(), TransportError> {
        self.send_bytes(&message.encode(), fds)
    }

    /// Receives one packet and its fds.
    pub fn receive(&self) -> Result<(Message, Vec<OwnedFd>), TransportError> {
        let (bytes, fds) = self.receive_bytes()?;
        Ok((Message::decode(&bytes)?, fds))
    }

    /// Sends a packet of at most [`MAX_PACKET`] bytes with copies of `fds`, at most [`MAX_FDS`].
    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> Result<(), TransportError> {
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(TransportError::Oversized);
        }
        let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
        let mut control = Control([0; 1024]);
        // SAFETY: an all-zero msghdr is valid.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &mut iov;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = control_len(fds.len()) as _;
            // SAFETY: the control buffer has room for one header and MAX_FDS fds (checked at compile time),
            // and `fds.len() <= MAX_FDS` was checked above.
            unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&header);
                (*cmsg).cmsg_level = libc::SOL_SOCKET;
                (*cmsg).cmsg_type = libc::SCM_RIGHTS;
                (*cmsg).cmsg_len = libc::CMSG_LEN(size_of_val(fds) as u32) as _;
                std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(cmsg), size_of_val(fds));
            }
        }
        loop {
            // SAFETY: `header` points to buffers that outlive the call.
            let n = unsafe { libc::sendmsg(self.0.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
            if n >= 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e.into());
            }
        }
    }

    /// Receives a packet's bytes and its fds.
    pub fn receive_bytes(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), TransportError> {
        let mut bytes = vec![0u8; MAX_PACKET];
        let mut control = Control([0; 1024]);
        let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: an all-zero msghdr is valid.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = control.0.len() as _;
        let n = loop {
            // SAFETY: `header` points to buffers that outlive the call.
            let n = unsafe { libc::recvmsg(self.0.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
            if n >= 0 {
                break n as usize;
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e.into());
            }
        };
        // First take ownership of every fd that came, so that none leaks whatever is wrong with the packet.
        let mut fds = Vec::new();
        // SAFETY: the kernel filled `header` and `control`; CMSG_* walk only what it reports.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(&header);
            while !cmsg.is_null() {
                if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                    let len = (*cmsg).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                    for i in 0..len / size_of::<RawFd>() {
                        let fd = libc::CMSG_DATA(cmsg).cast::<RawFd>().add(i).read_unaligned();
                        fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                cmsg = libc::CMSG_NXTHDR(&header, cmsg);
            }
        }
        if n == 0 {
            return Err(TransportError::Closed);
        }
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 || fds.len() > MAX_FDS {
            return Err(TransportError::Oversized);
        }
        bytes.truncate(n);
        Ok((bytes, fds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, Connection) {
        let mut fds = [0; 2];
        // SAFETY: `fds` has room for two.
        let r = unsafe {
            libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
        };
        assert_eq!(r, 0);
        // SAFETY: the kernel just gave these fds to us.
        unsafe {
            (Connection::new(OwnedFd::from_raw_fd(fds[0])), Connection::new(OwnedFd::from_raw_fd(fds[1])))
        }
    }

    #[test]
    fn fds_arrive_in_order() {
        let (a, b) = pair();
        let files: Vec<_> = (0..MAX_FDS).map(|_| tempfile::tempfile().unwrap()).collect();
        for (i, f) in files.iter().enumerate() {
            f.set_len(i as u64).unwrap();
        }
        let raw: Vec<_> = files.iter().map(|f| f.as_raw_fd()).collect();
        a.send(&Message::Taken, &raw).unwrap();
        let (message, got) = b.receive().unwrap();
        assert_eq!(message, Message::Taken);
        assert_eq!(got.len(), MAX_FDS);
        for (i, fd) in got.into_iter().enumerate() {
            assert_eq!(std::fs::File::from(fd).metadata().unwrap().len(), i as u64);
        }
    }

    #[test]
    fn silence_and_hang_up_are_told_apart() {
        let (a, b) = pair();
        b.set_timeout(Some(Duration::from_millis(10))).unwrap();
        assert!(matches!(b.receive(), Err(TransportError::Timeout)));
        drop(a);
        assert!(matches!(b.receive(), Err(TransportError::Closed)));
    }
}
