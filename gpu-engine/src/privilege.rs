//! Capabilities: keeper and worker keep those that their own work needs (`contrib/docs/security.md` says what for).
//!
//! The lower runtime and CRIU, which the worker starts, need all of root's. They get them back by being executed as root:
//! only the bounding set, which is left alone, limits them. That also is why neither process has a seccomp filter or
//! `no_new_privs`: CRIU would inherit them, and could not work.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// What the keeper needs: more descriptors on their way through its socket than a process may have open.
pub const KEEPER: &[Capability] = &[Capability::CAP_SYS_RESOURCE];

/// The same of a restore, which may have to undo what a killed lower runtime or CRIU has left.
pub const RESTORE_KEEPER: &[Capability] = &[
    Capability::CAP_SYS_RESOURCE,
    // Mounts.
    Capability::CAP_SYS_ADMIN,
    // Processes of any user, which are known by `/proc/PID`.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_KILL,
    // Working folders of any owner.
    Capability::CAP_DAC_OVERRIDE,
];

/// What the worker needs, or the driver's library in it.
pub const WORKER: &[Capability] = &[
    // Image folders of any owner, control folders of containers in user namespaces.
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    // A lower runtime that does not end.
    Capability::CAP_KILL,
    // `/proc/PID` of the container's processes; the driver's checkpoint of them.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_CHECKPOINT_RESTORE,
    // The driver's privileged calls.
    Capability::CAP_SYS_ADMIN,
    // Page-locked buffers, huge pages, many descriptors.
    Capability::CAP_IPC_LOCK,
    Capability::CAP_SYS_NICE,
    Capability::CAP_SYS_RESOURCE,
];

/// Whether a program that this process executes as root has all of root's capabilities again.
fn comes_back() -> bool {
    // SECBIT_NOROOT of linux/securebits.h.
    const NOROOT: i32 = 1;
    // SAFETY: both only read an attribute of this process.
    let (secure, no_new) =
        unsafe { (libc::prctl(libc::PR_GET_SECUREBITS), libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)) };
    nix::unistd::geteuid().is_root() && secure >= 0 && secure & NOROOT == 0 && no_new == 0
}

/// Gives up all capabilities of this thread but those `wanted`; threads that it starts have no more. Where programs could
/// not get them back nothing is given up.
pub fn keep(wanted: &[Capability]) -> Result<(), CapsError> {
    if !comes_back() {
        return Ok(());
    }
    let have = caps::read(None, CapSet::Permitted)?;
    let rest: CapsHashSet = wanted.iter().copied().filter(|c| have.contains(c)).collect();
    // Ambient ones would be lost with the inheritable ones anyway; kernels before 4.3 have none.
    let _ = caps::clear(None, CapSet::Ambient);
    caps::set(None, CapSet::Effective, &rest)?;
    caps::set(None, CapSet::Permitted, &rest)?;
    caps::clear(None, CapSet::Inheritable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_is_gone_and_comes_back_for_programs() {
        if !comes_back() {
            return;
        }
        // A thread's capabilities are its own.
        std::thread::spawn(|| {
            let all = caps::read(None, CapSet::Permitted).unwrap();
            keep(KEEPER).unwrap();
            let left = caps::read(None, CapSet::Effective).unwrap();
            assert!(left.iter().all(|c| KEEPER.contains(c)), "{left:?}");
            assert!(caps::raise(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).is_err());
            let output = std::process::Command::new("cat").arg("/proc/self/status").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let mask = all.iter().fold(0u64, |m, c| m | c.bitmask());
            let again = text.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap().trim();
            assert_eq!(u64::from_str_radix(again, 16).unwrap(), mask);
        })
        .join()
        .unwrap();
    }
}
