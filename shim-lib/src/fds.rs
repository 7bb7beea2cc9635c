//! Keeping the library's file descriptors out of the application's way.

use std::os::fd::RawFd;

/// Moves an fd to a high number and makes it close-on-exec. Returns the same fd if there is no room above.
///
/// Programs count on low numbers (`dup2(…, 3)`) and loop over them (daemons that close everything up to 1024).
pub fn raise(fd: RawFd) -> RawFd {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    let floor = (limit.rlim_cur.min(1 << 20) / 2) as RawFd;
    // SAFETY: plain system calls on an fd this library owns.
    unsafe {
        let high = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, floor);
        if high >= 0 {
            libc::close(fd);
            return high;
        }
        libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
    }
    fd
}

/// Closes an fd of this library; negative ones are passed over.
pub fn close(fd: RawFd) {
    if fd >= 0 {
        // SAFETY: the caller owns it and forgets it.
        unsafe { libc::close(fd) };
    }
}
