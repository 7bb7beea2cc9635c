//! Memory that several processes of the container share by file descriptor: found, so that it is saved once and given back
//! as one.
//!
//! The fd that a process exports, the one another process imports and the ones that their libraries hand over here are the
//! same open file, whatever way it took between them; the kernel tells whether two descriptors are (`kcmp`, which CRIU needs
//! as well). One process's entry, the *owner*, stands for the memory; the others name it.
//!
//! Memory that was imported by descriptor and that no process of the container has exported belongs to somebody else, and is
//! refused. What cannot be seen is the reverse: that a process outside has imported what one in here has exported.

use std::cell::Cell;
use std::cmp::Ordering;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use phos_protocol::message::{CLASS_IMPORTED, FLAG_INSIDE};

use super::subject::{Piece, Subject};
use crate::error::EngineError;

/// `KCMP_FILE` of linux/kcmp.h.
const KCMP_FILE: libc::c_int = 0;

/// The kernel's order of open files. Equal: the two descriptors are of the same one.
fn compare(a: RawFd, b: RawFd) -> io::Result<Ordering> {
    let pid = std::process::id();
    // SAFETY: kcmp looks at this process's own descriptors and touches no memory.
    match unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, a, b) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Groups descriptors of the same open file: indices into `fds`, in ascending order within each group.
fn groups(fds: &[RawFd]) -> io::Result<Vec<Vec<usize>>> {
    let failed = Cell::new(None);
    let order = |a: usize, b: usize| {
        compare(fds[a], fds[b]).unwrap_or_else(|e| {
            failed.set(Some(e));
            Ordering::Equal
        })
    };
    let mut indices: Vec<usize> = (0..fds.len()).collect();
    indices.sort_by(|a, b| order(*a, *b));
    let groups = indices.chunk_by(|a, b| order(*a, *b).is_eq()).map(|group| {
        let mut group = group.to_vec();
        group.sort_unstable();
        group
    });
    let groups = groups.collect();
    failed.take().map_or(Ok(groups), Err)
}

/// Finds the owner of every piece that is shared, and refuses what belongs to a process outside. Call it whenever tables
/// have changed.
pub fn resolve(subjects: &mut [Subject]) -> Result<(), EngineError> {
    if subjects.iter().all(|s| s.resolved) {
        return Ok(());
    }
    find_owners(subjects)?;
    subjects.iter_mut().for_each(|s| s.resolved = true);
    Ok(())
}

fn find_owners(subjects: &mut [Subject]) -> Result<(), EngineError> {
    subjects.iter_mut().flat_map(|s| &mut s.pieces).for_each(|p| p.owner = None);
    let imported = |p: &Piece| p.held.class == CLASS_IMPORTED;
    if !subjects.iter().flat_map(|s| &s.pieces).any(imported) {
        return Ok(());
    }
    let places: Vec<(usize, usize)> = subjects
        .iter()
        .enumerate()
        .flat_map(|(s, subject)| (0..subject.pieces.len()).map(move |p| (s, p)))
        .collect();
    let fds: Vec<RawFd> = places.iter().map(|(s, p)| subjects[*s].pieces[*p].fd.as_raw_fd()).collect();
    let groups =
        groups(&fds).map_err(|source| EngineError::Io { what: "comparing descriptors (kcmp)", source })?;
    for group in groups {
        let at = |n: &usize| -> &Piece {
            let (s, p) = places[*n];
            &subjects[s].pieces[p]
        };
        if !group.iter().any(|n| imported(at(n))) {
            continue;
        }
        let exporter = group.iter().find(|n| !imported(at(n)));
        // The exporter has ended or let go of it: one of those that use it stands for it.
        let heir = || group.iter().find(|n| at(n).held.flags & FLAG_INSIDE != 0 && at(n).held.size > 0);
        let Some(owner) = exporter.or_else(heir).copied() else {
            let subject = &subjects[places[group[0]].0];
            return Err(EngineError::Unsupported {
                pid: subject.kept.pid,
                command: subject.kept.command.clone(),
                reason: "it uses memory that a process outside the container has shared with it by file descriptor, or one that has let go of it".into(),
            });
        };
        let id = (places[owner].0 as u32, at(&owner).held.id);
        for n in group.into_iter().filter(|n| *n != owner) {
            let (s, p) = places[n];
            let piece = &mut subjects[s].pieces[p];
            piece.owner = Some(id);
            piece.region = None;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use phos_protocol::message::CLASS_VMM;

    use super::*;
    use crate::keeper::wire::{Held, KeptProcess, Phase};

    fn subject(pieces: Vec<(u64, u32, u32, &OwnedFd)>) -> Subject {
        let mut subject = Subject::new(KeptProcess {
            pid: 1,
            own_pid: 1,
            start_time: 0,
            command: "p".into(),
            has_library: true,
            phase: Phase::Running,
        });
        subject.pieces = pieces
            .into_iter()
            .map(|(id, class, flags, fd)| Piece {
                held: Held { id, device: [0; 16], address: 0, size: 2 << 20, class, flags },
                fd: fd.try_clone().unwrap(),
                region: None,
                owner: None,
            })
            .collect();
        subject
    }

    fn owners(subjects: &[Subject]) -> Vec<Vec<Option<(u32, u64)>>> {
        subjects.iter().map(|s| s.pieces.iter().map(|p| p.owner).collect()).collect()
    }

    #[test]
    fn one_stands_for_all_that_share() {
        // Files of one inode, as the descriptors of a device node are: only the open file tells them apart.
        let open = || OwnedFd::from(File::open("/dev/null").unwrap());
        let (a, b, c, d) = (open(), open(), open(), open());
        let mut subjects = [
            subject(vec![(5, CLASS_VMM, 0, &a), (6, CLASS_VMM, 0, &b), (7, CLASS_IMPORTED, 0, &c)]),
            subject(vec![(5, CLASS_IMPORTED, 0, &a), (8, CLASS_VMM, 0, &c), (9, CLASS_VMM, 0, &d)]),
        ];
        resolve(&mut subjects).unwrap();
        assert_eq!(owners(&subjects), [vec![None, None, Some((1, 8))], vec![Some((0, 5)), None, None]]);
        // The exporter lets go: who has it from outside is refused, who has it from inside inherits.
        subjects[0].pieces.remove(0);
        resolve(&mut subjects).unwrap();
        subjects[0].resolved = false;
        let error = resolve(&mut subjects).unwrap_err().to_string();
        assert!(error.contains("outside the container"), "{error}");
        subjects[1].pieces[0].held.flags = FLAG_INSIDE;
        subjects[1].resolved = false;
        subjects[0].pieces.push(subject(vec![(10, CLASS_IMPORTED, FLAG_INSIDE, &a)]).pieces.remove(0));
        resolve(&mut subjects).unwrap();
        assert_eq!(owners(&subjects), [vec![None, Some((1, 8)), None], vec![Some((0, 10)), None, None]]);
    }

    #[test]
    fn a_descriptor_that_is_none_is_no_match() {
        let file = File::open("/dev/null").unwrap();
        assert!(groups(&[file.as_raw_fd(), -1]).is_err());
    }
}
