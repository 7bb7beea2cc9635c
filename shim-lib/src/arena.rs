//! Plain allocations of middle size share larger pieces of memory: parking and attaching cost time for each piece, whatever
//! its size.
//!
//! What is free in an arena is no use to anyone else, so when memory runs out the arenas are dissolved: each allocation moves
//! to memory of its own at the same address, and what was free goes back.

use std::time::Duration;

use phos_protocol::message::CLASS_PLAIN;

use crate::carve::{BLOCK, Home, Piece};
use crate::cuda::{AccessDesc, DeviceOrdinal, DevicePtr, Handle, SUCCESS, Status};
use crate::drain::drain;
use crate::fds::Kept;
use crate::memory::{create, make, physical};
use crate::real::api;
use crate::table::{self, Mapping, Plain, Table};
use crate::{gate, peers};

/// Smallest and largest arena, bytes.
const SMALLEST: u64 = 32 << 20;
const LARGEST: u64 = 1 << 30;
/// How long other threads and the GPU may take to finish before arenas are dissolved. The program waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// Size of the next arena of a program that holds `held` bytes: about an eighth of that may lie idle in it.
fn arena_size(held: u64) -> u64 {
    (held / 8).next_power_of_two().clamp(SMALLEST, LARGEST)
}

/// Whether an arena of `len` bytes may be made: the last quarter of the GPU is given out as it is asked for.
fn is_roomy(len: u64) -> bool {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are valid for writing.
    let known = unsafe { (api().memory_info)(&mut free, &mut total) } == SUCCESS;
    known && free as u64 > len + total as u64 / 4
}

/// Allocates `size` bytes in an arena; `None` if they had better have memory of their own.
pub fn allocate(home: Home, size: u64) -> Option<DevicePtr> {
    let len = {
        let mut table = table::lock();
        let len = arena_size(table.plain_bytes);
        if size > len / 2 {
            return None;
        }
        if let Some(pointer) = table.arenas.allocate(home, size) {
            return Some(pointer);
        }
        len
    };
    if !is_roomy(len) {
        return None;
    }
    let peers = peers::accessors(home.0);
    let base = make(home.0, len as usize, CLASS_PLAIN, &peers.descs).ok()?;
    let mut table = table::lock();
    table.arenas.add(home, base, len);
    table.arenas.allocate(home, size)
}

/// Memory that an allocation of an arena moves to.
struct Moved {
    piece: Piece,
    len: usize,
    handle: Handle,
    fd: Kept,
}

impl Moved {
    fn undo(mut self) {
        // SAFETY: made for this allocation alone, and mapped nowhere.
        unsafe { (api().release)(self.handle) };
        self.fd.close();
    }
}

/// Maps `handle` at `address`.
fn map(address: DevicePtr, len: usize, handle: Handle, access: &[AccessDesc]) -> Result<(), Status> {
    // SAFETY: a reserved range of this library in which nothing is mapped, and a live handle of that size.
    unsafe {
        match (api().map)(address, len, 0, handle, 0) {
            SUCCESS => {}
            status => return Err(status),
        }
        match (api().set_access)(address, len, access.as_ptr(), access.len()) {
            SUCCESS => Ok(()),
            status => {
                (api().unmap)(address, len);
                Err(status)
            }
        }
    }
}

/// Copies an allocation to new memory of its own.
fn copy(device: DeviceOrdinal, piece: Piece, access: &[AccessDesc]) -> Result<Moved, Status> {
    let len = piece.size.next_multiple_of(BLOCK) as usize;
    let (handle, fd) = create(device, len)?;
    let moved = Moved { piece, len, handle, fd };
    let mut window = 0;
    // SAFETY: the window is this function's own; the GPU is idle and no other thread is inside the driver.
    let result = unsafe {
        match (api().reserve)(&mut window, len, 0, 0, 0) {
            SUCCESS => {
                let copied = map(window, len, handle, access).and_then(|()| {
                    let status = (api().copy)(window, piece.start, piece.size as usize);
                    let finished = (api().ctx_synchronize)();
                    (api().unmap)(window, len);
                    [status, finished].into_iter().find(|s| *s != SUCCESS).map_or(Ok(()), Err)
                });
                (api().unreserve)(window, len);
                copied
            }
            status => Err(status),
        }
    };
    match result {
        Ok(()) => Ok(moved),
        Err(status) => {
            moved.undo();
            Err(status)
        }
    }
}

/// Dissolves one arena. `false`: it is as it was.
fn dissolve_one(
    table: &mut Table,
    device: DeviceOrdinal,
    base: DevicePtr,
    len: u64,
    pieces: &[Piece],
) -> bool {
    let Some((id, access)) = table.mappings.get(&base).map(|m| (m.physical, m.access.clone())) else {
        return false;
    };
    let mut moved = Vec::new();
    for piece in pieces {
        match copy(device, *piece, &access) {
            Ok(m) => moved.push(m),
            Err(_) => {
                moved.into_iter().for_each(Moved::undo);
                return false;
            }
        }
    }
    let mut arena = 0;
    // SAFETY: the arena is mapped at `base`; nothing uses it, and its handle brings it back if the last step fails.
    unsafe {
        if (api().retain)(&mut arena, base as *mut std::ffi::c_void) != SUCCESS {
            moved.into_iter().for_each(Moved::undo);
            return false;
        }
        if (api().unmap)(base, len as usize) != SUCCESS {
            (api().release)(arena);
            moved.into_iter().for_each(Moved::undo);
            return false;
        }
        for (n, m) in moved.iter().enumerate() {
            if map(m.piece.start, m.len, m.handle, &access).is_err() {
                moved[..n].iter().for_each(|m| {
                    (api().unmap)(m.piece.start, m.len);
                });
                let back = map(base, len as usize, arena, &access);
                (api().release)(arena);
                moved.into_iter().for_each(Moved::undo);
                crate::log!("an arena at {base:#x} was mapped again: {back:?}");
                return false;
            }
        }
        (api().release)(arena);
    }
    table.arenas.remove(base);
    table.ranges.insert(base, (len as usize, moved.len()));
    table.remove_mappings(base, len as usize);
    debug_assert!(!table.physical.contains_key(&id));
    for m in moved {
        // SAFETY: the mapping keeps the memory.
        unsafe { (api().release)(m.handle) };
        let physical = table.insert(physical(device, m.len, CLASS_PLAIN, m.fd));
        let mapping = Mapping { len: m.len, physical, access: access.clone(), present: true };
        table.insert_mapping(m.piece.start, mapping);
        let plain = Plain { size: m.piece.size as usize, reserved: m.len, context: m.piece.home.1 };
        table.plain.insert(m.piece.start, plain);
    }
    true
}

/// Dissolves the arenas of the current context's device of which a quarter or more lies idle, those first that need least
/// memory for it. Stops the program's GPU work meanwhile. Returns whether memory was gained.
///
/// The calling thread must not be inside the gate.
pub fn dissolve() -> bool {
    let mut device = 0;
    // SAFETY: `device` is valid for writing.
    if unsafe { (api().ctx_device)(&mut device) } != SUCCESS {
        return false;
    }
    let live = |pieces: &[Piece]| pieces.iter().map(|p| p.size.next_multiple_of(BLOCK)).sum::<u64>();
    let idle = |table: &Table| {
        let mut arenas = table.arenas.on_device(device);
        arenas.retain(|(base, len, pieces)| {
            let physical = table.mappings.get(base).and_then(|m| table.physical.get(&m.physical));
            // What another process maps as well cannot move.
            live(pieces) <= len / 4 * 3 && physical.is_some_and(|p| !p.shared)
        });
        arenas.sort_by_key(|(_, _, pieces)| live(pieces));
        arenas
    };
    if idle(&table::lock()).is_empty() || !gate::close(PATIENCE) {
        return false;
    }
    let mut gained = false;
    if matches!(drain(PATIENCE), Ok(true)) && gate::settle(PATIENCE) {
        let mut table = table::lock();
        for (base, len, pieces) in idle(&table) {
            gained |= dissolve_one(&mut table, device, base, len, &pieces);
        }
    }
    gate::open();
    gained
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_grow_with_the_program() {
        assert_eq!(arena_size(0), SMALLEST);
        assert_eq!(arena_size(1 << 30), 128 << 20);
        assert_eq!(arena_size(27_000_000_000), LARGEST);
    }
}
