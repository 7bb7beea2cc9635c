//! Memory of a stream-ordered pool between two uses. Pure bookkeeping: marks behind the work of streams are made, asked and
//! destroyed by the caller.
//!
//! What was freed on a stream may be used again at once for work queued on the same stream: it runs later. For any other
//! stream it becomes usable when the work that was queued before the free is done.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::cuda::DevicePtr;

/// A stream: its context and its number, which the driver never uses twice.
pub type StreamId = (usize, u64);

/// A stretch of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Address.
    pub start: DevicePtr,
    /// Bytes, as they were cut.
    pub len: u64,
    /// Cut from a block, not a piece of its own.
    pub small: bool,
}

/// Freed behind work that may still be running.
#[derive(Debug)]
struct Pending<M> {
    stretch: Stretch,
    mark: M,
}

/// What is free, and what will be.
#[derive(Debug)]
pub struct Cache<M> {
    pending: HashMap<StreamId, VecDeque<Pending<M>>>,
    /// Of streams whose number the driver does not tell.
    nameless: Vec<Pending<M>>,
    /// Free pieces by length.
    idle: BTreeMap<u64, Vec<DevicePtr>>,
}

impl<M> Default for Cache<M> {
    fn default() -> Self {
        Cache { pending: HashMap::new(), nameless: Vec::new(), idle: BTreeMap::new() }
    }
}

/// Longest piece that is used for `need` bytes: an eighth may be wasted.
fn longest(need: u64) -> u64 {
    need + need / 8
}

impl<M> Cache<M> {
    /// Takes what was freed on this stream, newest first, if it fits.
    pub fn reuse(&mut self, stream: StreamId, need: u64, small: bool) -> Option<(Stretch, M)> {
        let queue = self.pending.get_mut(&stream)?;
        let fits = |s: &Stretch| {
            s.small == small && if small { s.len == need } else { (need..=longest(need)).contains(&s.len) }
        };
        let at = queue.iter().rposition(|p| fits(&p.stretch))?;
        queue.remove(at).map(|p| (p.stretch, p.mark))
    }

    /// Adds what was freed; `mark` stands behind the work of the stream.
    pub fn free(&mut self, stream: Option<StreamId>, stretch: Stretch, mark: M) {
        let pending = Pending { stretch, mark };
        match stream {
            Some(stream) => self.pending.entry(stream).or_default().push_back(pending),
            None => self.nameless.push(pending),
        }
    }

    /// Adds a piece that nothing uses.
    pub fn add_idle(&mut self, start: DevicePtr, len: u64) {
        self.idle.entry(len).or_default().push(start);
    }

    /// Makes usable everywhere what is behind finished work. Returns the marks, and the small stretches for the caller to
    /// give back.
    pub fn retire(&mut self, done: impl Fn(&M) -> bool) -> (Vec<M>, Vec<DevicePtr>) {
        let mut finished: Vec<Pending<M>> = Vec::new();
        self.pending.retain(|_, queue| {
            // A stream's work ends in order.
            let running = queue.iter().position(|p| !done(&p.mark)).unwrap_or(queue.len());
            finished.extend(queue.drain(..running));
            !queue.is_empty()
        });
        finished.extend(self.nameless.extract_if(.., |p| done(&p.mark)));
        let (mut marks, mut small) = (Vec::new(), Vec::new());
        for Pending { stretch, mark } in finished {
            marks.push(mark);
            if stretch.small {
                small.push(stretch.start);
            } else {
                self.add_idle(stretch.start, stretch.len);
            }
        }
        (marks, small)
    }

    /// Takes a free piece for `need` bytes.
    pub fn take_idle(&mut self, need: u64) -> Option<(DevicePtr, u64)> {
        let (len, list) = self.idle.range_mut(need..=longest(need)).next()?;
        let (len, start) = (*len, list.pop()?);
        if list.is_empty() {
            self.idle.remove(&len);
        }
        Some((start, len))
    }

    /// Takes free pieces of at least `bytes` together, or all there are, the longest first.
    pub fn trim(&mut self, bytes: u64) -> Vec<(DevicePtr, u64)> {
        let (mut gone, mut sum) = (Vec::new(), 0);
        while sum < bytes
            && let Some((len, list)) = self.idle.pop_last()
        {
            let mut list = list;
            while sum < bytes
                && let Some(start) = list.pop()
            {
                gone.push((start, len));
                sum += len;
            }
            if !list.is_empty() {
                self.idle.insert(len, list);
            }
        }
        gone
    }

    /// Every mark, for the caller to change.
    pub fn marks(&mut self) -> impl Iterator<Item = &mut M> {
        self.pending.values_mut().flatten().chain(&mut self.nameless).map(|p| &mut p.mark)
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.nameless.is_empty() && self.idle.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const A: StreamId = (1, 1);
    const B: StreamId = (1, 2);

    fn piece(start: u64, mib: u64) -> Stretch {
        Stretch { start, len: mib * MIB, small: false }
    }

    #[test]
    fn memory_changes_streams_only_behind_finished_work() {
        let mut cache = Cache::default();
        cache.free(Some(A), piece(0x1000, 4), 1);
        assert!(cache.reuse(B, 4 * MIB, false).is_none(), "another stream");
        assert_eq!(cache.take_idle(4 * MIB), None, "its work is not done");
        assert_eq!(cache.retire(|_| false), (vec![], vec![]));
        assert_eq!(cache.reuse(A, 4 * MIB, false), Some((piece(0x1000, 4), 1)));
        cache.free(Some(A), piece(0x1000, 4), 2);
        assert_eq!(cache.retire(|m| *m == 2).0, vec![2]);
        assert!(cache.reuse(A, 4 * MIB, false).is_none(), "free for all by now");
        assert_eq!(cache.take_idle(4 * MIB), Some((0x1000, 4 * MIB)));
        assert!(cache.is_empty());
    }

    #[test]
    fn a_nameless_stream_waits_for_its_own_mark() {
        let mut cache = Cache::default();
        cache.free(None, piece(0x1000, 2), 1);
        cache.free(None, Stretch { start: 0x2000, len: 512, small: true }, 2);
        assert_eq!(cache.retire(|m| *m == 2), (vec![2], vec![0x2000]));
        assert_eq!(cache.take_idle(2 * MIB), None);
        assert_eq!(cache.retire(|_| true).0, vec![1]);
        assert_eq!(cache.take_idle(2 * MIB), Some((0x1000, 2 * MIB)));
    }

    #[test]
    fn pieces_are_not_wasted() {
        let mut cache: Cache<()> = Cache::default();
        for (n, mib) in [16, 2, 18, 64].into_iter().enumerate() {
            cache.add_idle(n as u64, mib * MIB);
        }
        assert_eq!(cache.take_idle(4 * MIB), None, "16 MiB for 4 is too much");
        assert_eq!(cache.take_idle(17 * MIB), Some((2, 18 * MIB)));
        assert_eq!(cache.trim(65 * MIB), vec![(3, 64 * MIB), (0, 16 * MIB)]);
        assert_eq!(cache.trim(u64::MAX), vec![(1, 2 * MIB)]);
    }
}
