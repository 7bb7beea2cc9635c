//! What a checkpoint of GPU state needs of the user who asks for it.

use std::fs;

use anyhow::{Result, bail};
use nix::unistd::{Uid, geteuid};

/// Why this process cannot be let at other processes' GPU state.
fn lack(user: Uid, uid_map: &str) -> Option<String> {
    if !user.is_root() {
        return Some(format!("phos-runc runs as user {user}"));
    }
    // Only the host's own namespace maps every user to itself.
    let words: Vec<&str> = uid_map.split_whitespace().collect();
    (words != ["0", "0", "4294967295"]).then(|| "phos-runc runs in a user namespace (rootless)".into())
}

/// The reason why checkpoint and restore of GPU state are not possible here, if there is one.
pub fn lacking() -> Option<String> {
    lack(geteuid(), &fs::read_to_string("/proc/self/uid_map").unwrap_or_default())
}

/// Refuses where [`lacking`] has a reason.
pub fn require(verb: &str) -> Result<()> {
    match lacking() {
        Some(reason) => bail!("{verb} of GPU state needs the host's root, for CRIU and the driver: {reason}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_root_lacks_nothing() {
        let whole = "         0          0 4294967295\n";
        assert_eq!(lack(Uid::from_raw(0), whole), None);
        assert!(lack(Uid::from_raw(1000), whole).unwrap().contains("as user 1000"));
        for map in ["0 1000 1\n", "0 1000 1\n1 100000 65536\n", "0 100000 65536\n", ""] {
            assert!(lack(Uid::from_raw(0), map).unwrap().contains("user namespace"), "{map}");
        }
    }
}
