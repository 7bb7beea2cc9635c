//! What the running kernel offers, found out by asking for it.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Which cgroup hierarchies are mounted at /sys/fs/cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// None.
    None,
    /// Version 1, perhaps with version 2 beside it.
    V1,
    /// Version 2.
    V2,
}

/// The kernel and its features.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// See [`Cgroups`].
    pub cgroups: Cgroups,
    /// The PAGEMAP_SCAN ioctl (Linux 6.7): CRIU finds the pages to dump faster.
    pub pagemap_scan: bool,
    /// CONFIG_MEM_SOFT_DIRTY: CRIU's pre-dumps need it.
    pub soft_dirty: bool,
    /// userfaultfd(2).
    pub userfaultfd: bool,
    /// pidfd_open(2).
    pub pidfd: bool,
}

impl Kernel {
    /// Asks the kernel.
    pub fn probe() -> Self {
        let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned());
        Kernel {
            release: release.unwrap_or_default(),
            cgroups: cgroups(),
            pagemap_scan: pagemap_scan(),
            soft_dirty: soft_dirty().unwrap_or(false),
            // SAFETY: no pointers are passed; a descriptor that comes back is this function's own.
            userfaultfd: owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) }),
            // SAFETY: as above.
            pidfd: owned(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) }),
        }
    }
}

/// Closes the descriptor that a system call returned; whether it did.
fn owned(returned: libc::c_long) -> bool {
    let Ok(fd) = i32::try_from(returned) else { return false };
    // SAFETY: the caller got it from the kernel just now and keeps no copy.
    fd >= 0 && unsafe { OwnedFd::from_raw_fd(fd) }.as_raw_fd() == fd
}

fn cgroups() -> Cgroups {
    match statfs("/sys/fs/cgroup").map(|s| s.filesystem_type()) {
        Ok(CGROUP2_SUPER_MAGIC) => Cgroups::V2,
        Ok(_) if std::path::Path::new("/sys/fs/cgroup/memory").is_dir() => Cgroups::V1,
        _ => Cgroups::None,
    }
}

fn pagemap_scan() -> bool {
    // struct pm_scan_arg of linux/fs.h is twelve 64-bit words, the first its size: an empty range is asked for.
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    let mut arg = [0u64; 12];
    arg[0] = size_of_val(&arg) as u64;
    let Ok(pagemap) = File::open("/proc/self/pagemap") else { return false };
    // SAFETY: the kernel reads and writes only the 96 bytes of `arg`.
    unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, arg.as_mut_ptr()) == 0 }
}

/// A page that was just written is soft-dirty where the kernel keeps that bit (bit 55 of its pagemap entry).
fn soft_dirty() -> Option<bool> {
    const PAGE: usize = 4096;
    let written = std::hint::black_box(vec![1u8; PAGE]);
    let mut entry = [0u8; 8];
    let pagemap = File::open("/proc/self/pagemap").ok()?;
    pagemap.read_exact_at(&mut entry, (written.as_ptr() as usize / PAGE * 8) as u64).ok()?;
    Some(u64::from_ne_bytes(entry) >> 55 & 1 == 1)
}
