//! What the application holds of GPU memory, as far as this library made it parkable.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard};

use phos_protocol::message::{CLASS_PLAIN, Entry};

use crate::carve::{BLOCK, Carver};
use crate::cuda::{AccessDesc, DevicePtr, Handle};
use crate::fds::Kept;

/// One physical allocation. It lives while the application holds its handle or anything of it is mapped.
#[derive(Debug, Clone)]
pub struct Physical {
    /// The driver's handle; 0 while nobody needs it.
    pub handle: Handle,
    /// Keeps the memory alive when everything else is gone; none if the driver would not export it, or while parked.
    pub fd: Kept,
    /// Bytes.
    pub size: u64,
    /// UUID of its device.
    pub uuid: [u8; 16],
    /// `CLASS_` constant of the protocol.
    pub class: u32,
    /// `FLAG_` constants of the protocol.
    pub flags: u32,
    /// References the application holds to the handle.
    pub references: u32,
    /// Mappings of it.
    pub mappings: u32,
    /// Generation in which it was made.
    pub generation: u64,
    /// Handle types the application asked for.
    pub asked_types: u32,
    /// Another process may hold it too.
    pub shared: bool,
}

/// One mapping.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// Bytes.
    pub len: usize,
    /// Id of what is mapped.
    pub physical: u64,
    /// Access rights in the order they were first given.
    pub access: Vec<AccessDesc>,
    /// The driver has it mapped now; not so while parked.
    pub present: bool,
}

/// A plain allocation with a physical one of its own.
#[derive(Debug, Clone, Copy)]
pub struct Plain {
    /// Bytes the application asked for.
    pub size: usize,
    /// Bytes reserved and mapped.
    pub reserved: usize,
    /// The context it was made in.
    pub context: usize,
}

/// The whole table.
#[derive(Debug)]
pub struct Table {
    /// Raised by every change.
    pub generation: u64,
    last_id: u64,
    /// Physical allocations by id.
    pub physical: BTreeMap<u64, Physical>,
    /// Mappings by address.
    pub mappings: BTreeMap<DevicePtr, Mapping>,
    /// Plain allocations by address.
    pub plain: HashMap<DevicePtr, Plain>,
    /// Small allocations.
    pub small: Carver,
    /// Allocations of middle size.
    pub arenas: Carver,
    /// Address ranges that were reserved in one and hold several plain allocations: length, allocations left.
    pub ranges: BTreeMap<DevicePtr, (usize, usize)>,
    /// Bytes of plain memory, arenas included.
    pub plain_bytes: u64,
    /// What was removed: generation of its end, generation of its making, id.
    removed: Vec<(u64, u64, u64)>,
    /// Per-context stack limits to be set again at attach.
    pub stack_limits: Vec<(usize, usize)>,
}

impl Default for Table {
    fn default() -> Self {
        let (generation, last_id, physical, mappings, plain, ranges, plain_bytes, removed, stack_limits) =
            Default::default();
        let (small, arenas) = (Carver::default(), Carver::new(BLOCK));
        Table {
            generation,
            last_id,
            physical,
            mappings,
            plain,
            small,
            arenas,
            ranges,
            plain_bytes,
            removed,
            stack_limits,
        }
    }
}

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

/// Locked access.
pub struct Locked(MutexGuard<'static, Option<Table>>);

impl std::ops::Deref for Locked {
    type Target = Table;
    fn deref(&self) -> &Table {
        match &*self.0 {
            Some(t) => t,
            None => unreachable!("lock() fills it"),
        }
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut Table {
        self.0.get_or_insert_default()
    }
}

/// Locks the table. Never call the driver's blocking functions while holding it.
pub fn lock() -> Locked {
    let mut guard = TABLE.lock().unwrap_or_else(|e| e.into_inner());
    guard.get_or_insert_default();
    Locked(guard)
}

/// In a child after `fork`: closes the fds it inherited. They would keep the parent's memory alive.
pub fn close_after_fork() {
    if let Ok(mut guard) = TABLE.try_lock()
        && let Some(table) = &mut *guard
    {
        for physical in table.physical.values_mut() {
            physical.fd.close();
        }
    }
}

/// Bytes of managed memory the application has ever asked for.
pub static MANAGED: AtomicU64 = AtomicU64::new(0);
/// Bytes of plain memory that could not be made parkable.
pub static UNPARKABLE: AtomicU64 = AtomicU64::new(0);
/// Bytes taken from stream-ordered pools so far.
pub static POOLED: AtomicU64 = AtomicU64::new(0);
/// Bytes of page-locked host memory allocated so far.
pub static PINNED: AtomicU64 = AtomicU64::new(0);
/// VMM handles of kinds this library does not handle (host memory, multicast).
pub static FOREIGN: AtomicU64 = AtomicU64::new(0);
/// Legacy IPC handles given out.
pub static IPC: AtomicU64 = AtomicU64::new(0);

impl Table {
    /// Enters a physical allocation; returns its id.
    pub fn insert(&mut self, mut physical: Physical) -> u64 {
        self.generation += 1;
        self.last_id += 1;
        physical.generation = self.generation;
        if physical.class == CLASS_PLAIN {
            self.plain_bytes += physical.size;
        }
        self.physical.insert(self.last_id, physical);
        self.last_id
    }

    /// Removes a physical allocation that nothing refers to any more, and closes its fd.
    pub fn drop_if_unused(&mut self, id: u64) {
        if let Some(p) = self.physical.get_mut(&id)
            && p.references == 0
            && p.mappings == 0
        {
            p.fd.close();
            if p.class == CLASS_PLAIN {
                self.plain_bytes -= p.size;
            }
            self.generation += 1;
            self.removed.push((self.generation, p.generation, id));
            self.physical.remove(&id);
        }
    }

    /// Enters a mapping.
    pub fn insert_mapping(&mut self, address: DevicePtr, mapping: Mapping) {
        if let Some(p) = self.physical.get_mut(&mapping.physical) {
            p.mappings += 1;
        }
        self.mappings.insert(address, mapping);
    }

    /// Removes all mappings that begin in the range.
    pub fn remove_mappings(&mut self, address: DevicePtr, len: usize) {
        let gone: Vec<_> = self.mappings.range(address..address + len as u64).map(|(a, _)| *a).collect();
        for a in gone {
            if let Some(m) = self.mappings.remove(&a) {
                if let Some(p) = self.physical.get_mut(&m.physical) {
                    p.mappings -= 1;
                }
                self.drop_if_unused(m.physical);
            }
        }
    }

    /// An allocation at `address` is gone. `None`: it was not in a shared range; otherwise the range (address and bytes),
    /// if that was its last one.
    pub fn leave_range(&mut self, address: DevicePtr) -> Option<Option<(DevicePtr, usize)>> {
        let (base, (len, left)) = self.ranges.range_mut(..=address).next_back()?;
        if address - base >= *len as u64 {
            return None;
        }
        *left -= 1;
        let gone = (*left == 0).then_some((*base, *len));
        if let Some((base, _)) = gone {
            self.ranges.remove(&base);
        }
        Some(gone)
    }

    /// Records access rights for all mappings that begin in the range.
    pub fn set_access(&mut self, address: DevicePtr, len: usize, descs: &[AccessDesc]) {
        for (_, m) in self.mappings.range_mut(address..address + len as u64) {
            for desc in descs {
                if desc.flags == 0 {
                    m.access.retain(|d| d.location != desc.location);
                    continue;
                }
                match m.access.iter_mut().find(|d| d.location == desc.location) {
                    Some(known) => *known = *desc,
                    None => m.access.push(*desc),
                }
            }
        }
    }

    /// Entries made after generation `since`, with their fds.
    pub fn entries_since(&self, since: u64) -> Vec<(Entry, RawFd)> {
        let mut addresses = HashMap::new();
        for (address, m) in &self.mappings {
            addresses.entry(m.physical).or_insert(*address);
        }
        self.physical
            .iter()
            .filter(|(_, p)| p.generation > since)
            .filter_map(|(id, p)| {
                let fd = p.fd.get()?;
                let entry = Entry {
                    id: *id,
                    device: p.uuid,
                    address: addresses.get(id).copied().unwrap_or(0),
                    size: p.size,
                    generation: p.generation,
                    class: p.class,
                    flags: p.flags,
                };
                Some((entry, fd))
            })
            .collect()
    }

    /// Ids that existed at generation `since` and no longer do.
    pub fn removed_since(&self, since: u64) -> Vec<u64> {
        self.removed.iter().filter(|(end, made, _)| *end > since && *made <= since).map(|r| r.2).collect()
    }

    /// Forgets removals up to `generation`: the host has seen them, or nobody ever asked.
    pub fn trim_removed(&mut self) {
        // A host asks for changes since a table it received moments ago; older removals are of no use.
        if self.removed.len() > 1 << 16 {
            self.removed.drain(..1 << 15);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn physical() -> Physical {
        Physical {
            handle: 0,
            fd: Kept::NONE,
            size: 2 << 20,
            uuid: [0; 16],
            class: 0,
            flags: 0,
            references: 1,
            mappings: 0,
            generation: 0,
            asked_types: 0,
            shared: false,
        }
    }

    #[test]
    fn memory_lives_while_it_is_held_or_mapped() {
        let mut t = Table::default();
        let id = t.insert(physical());
        t.insert_mapping(0x1000, Mapping { len: 16, physical: id, access: vec![], present: true });
        t.insert_mapping(0x2000, Mapping { len: 16, physical: id, access: vec![], present: true });
        t.physical.get_mut(&id).unwrap().references = 0;
        t.drop_if_unused(id);
        assert!(t.physical.contains_key(&id));
        t.remove_mappings(0x1000, 16);
        assert!(t.physical.contains_key(&id));
        t.remove_mappings(0x0, 0x3000);
        assert!(!t.physical.contains_key(&id));
    }

    #[test]
    fn changes_are_told_by_generation() {
        let mut t = Table::default();
        let (a, b) = (t.insert(physical()), t.insert(physical()));
        let seen = t.generation;
        let c = t.insert(physical());
        for id in [a, c] {
            t.physical.get_mut(&id).unwrap().references = 0;
            t.drop_if_unused(id);
        }
        assert_eq!(t.removed_since(seen), vec![a], "c was never seen");
        assert_eq!(t.removed_since(0), Vec::<u64>::new());
        let file = std::fs::File::open("/dev/null").unwrap();
        t.physical.get_mut(&b).unwrap().fd = Kept::new(std::os::fd::IntoRawFd::into_raw_fd(file));
        assert_eq!(t.entries_since(0).len(), 1);
        assert!(t.entries_since(seen).is_empty());
    }
}
