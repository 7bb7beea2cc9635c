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

/// An fd that keeps memory alive, with what it was when it was made: a program may close fds that are not its own, and
/// use their numbers for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    fd: RawFd,
    device: u64,
    inode: u64,
}

/// Device and inode of an open fd.
fn identity(fd: RawFd) -> Option<(u64, u64)> {
    // SAFETY: an all-zero stat is valid, and is only written to.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        (libc::fstat(fd, &mut stat) == 0).then_some((stat.st_dev, stat.st_ino))
    }
}

impl Kept {
    /// No fd.
    pub const NONE: Kept = Kept { fd: -1, device: 0, inode: 0 };

    /// Takes over an fd and moves it out of the application's way.
    pub fn new(fd: RawFd) -> Self {
        let fd = raise(fd);
        match identity(fd) {
            Some((device, inode)) => Kept { fd, device, inode },
            None => Kept::NONE,
        }
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.fd < 0
    }

    /// The fd, if it still is what it was.
    pub fn get(&self) -> Option<RawFd> {
        (!self.is_none() && identity(self.fd) == Some((self.device, self.inode))).then_some(self.fd)
    }

    /// Closes it, unless its number has become somebody else's.
    pub fn close(&mut self) {
        if let Some(fd) = self.get() {
            close(fd);
        }
        *self = Kept::NONE;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_number_that_became_another_file_is_left_alone() {
        let open = |path: &str| std::fs::File::open(path).unwrap().into_raw_fd();
        let mut kept = Kept::new(open("/dev/null"));
        let number = kept.get().unwrap();
        assert!(number > 100, "{number} is out of the way");
        // The program closes it and the number is used again.
        let other = open("/proc/self/status");
        // SAFETY: dup2 onto a number this test owns.
        unsafe { libc::dup2(other, number) };
        assert_eq!(kept.get(), None);
        kept.close();
        assert!(identity(number).is_some(), "the program's file was closed");
        assert!(kept.is_none());
        let mut mine = Kept::new(other);
        mine.close();
        close(number);
        assert_eq!(Kept { fd: number, ..Kept::NONE }.get(), None);
    }
}
