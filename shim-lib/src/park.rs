//! Parking: GPU work is stopped, memory handed over and let go; and the way back.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use phos_protocol::message::{Entry, Message, PARK_LOW_STACK, PARK_PREFAULT, Summary, Timings, failure};
use phos_protocol::{Connection, MAX_FDS, TransportError};

use crate::contexts;
use crate::cuda::{CAPTURE_RELAXED, Context, HANDLE_FD, LIMIT_STACK_SIZE, SUCCESS, Status};
use crate::drain::drain;
use crate::fds::Kept;
use crate::gate;
use crate::prefault;
use crate::real::api;
use crate::table::{self, Table};

/// Why a request failed.
pub enum Failure {
    /// Code and text of [`Message::Failed`].
    Answer(u32, String),
    /// The same, but the process is parked: the host must give everything back.
    Parked(u32, String),
    /// The connection did.
    Connection(TransportError),
}

impl From<TransportError> for Failure {
    fn from(e: TransportError) -> Self {
        Failure::Connection(e)
    }
}

/// A call that failed.
pub fn cuda(call: &str, status: Status) -> Failure {
    Failure::Answer(failure::CUDA, format!("{call} failed with CUDA error {status}"))
}

/// A stack limit that costs the driver next to nothing to save.
const LOW_STACK: usize = 16;

/// Lets this thread call the driver while another one captures a stream.
pub fn relax_capture() {
    let mut mode = CAPTURE_RELAXED;
    // SAFETY: `mode` is valid for reading and writing.
    unsafe { (api().capture_mode)(&mut mode) };
}

/// What the process holds, and what prevents its checkpoint.
pub fn summary() -> Summary {
    let pooled = crate::pools::count();
    let mut table = table::lock();
    renew_fds(&mut table);
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let mut summary = Summary {
        entries: table.physical.len() as u64,
        driver_bytes: load(&table::UNPARKABLE) + load(&table::POOLED),
        pinned_bytes: load(&table::PINNED),
        allocations: table.plain.len() as u64 + table.small.count() + table.arenas.count() + pooled,
        launches: gate::launches(),
        unknown_functions: load(&crate::proc_address::UNKNOWN),
        ..Summary::default()
    };
    for p in table.physical.values() {
        if let Some(bytes) = summary.parked_bytes.get_mut(p.class as usize) {
            *bytes += p.size;
        }
    }
    summary.blockers = blockers(&table);
    summary
}

fn blockers(table: &Table) -> Vec<String> {
    let mut blockers = Vec::new();
    let managed = table::MANAGED.load(Ordering::Relaxed);
    if managed > 0 {
        blockers.push(format!("it has used {managed} bytes of managed memory (cuMemAllocManaged), which the driver cannot checkpoint"));
    }
    if table::FOREIGN.load(Ordering::Relaxed) > 0 {
        blockers.push("it has used virtual-memory handles of a kind that cannot be parked (host memory, fabric, multicast, or another interface's memory)".into());
    }
    if table::IPC.load(Ordering::Relaxed) > 0 {
        blockers.push("it shares memory, events or pools by handles of the driver's own (CUDA IPC)".into());
    }
    if table.physical.values().any(|p| p.fd.is_none()) {
        blockers.push("the driver did not export one of its allocations".into());
    } else if table.physical.values().any(|p| p.fd.get().is_none()) {
        blockers.push(
            "it has closed file descriptors that are not its own, among them those of its GPU memory".into(),
        );
    }
    blockers
}

/// Gets back fds that the program has closed, which are not its own, as far as the driver exports them again (it does not
/// for memory that was attached).
fn renew_fds(table: &mut Table) {
    let lost = table.physical.iter().filter(|(_, p)| !p.fd.is_none() && p.fd.get().is_none());
    let lost: Vec<u64> = lost.map(|(id, _)| *id).collect();
    for id in lost {
        let address = table.mappings.iter().find(|(_, m)| m.physical == id).map(|(address, _)| *address);
        let Some(physical) = table.physical.get_mut(&id) else { continue };
        let (mut handle, mut fd) = (physical.handle, -1);
        // SAFETY: the memory is mapped there or the handle is the driver's; both pointers are valid for writing, and a
        // handle that was made here is released.
        unsafe {
            if handle == 0
                && let Some(address) = address
            {
                (api().retain)(&mut handle, address as *mut std::ffi::c_void);
            }
            if handle != 0 && (api().export)((&raw mut fd).cast(), handle, HANDLE_FD, 0) == SUCCESS {
                physical.fd = Kept::new(fd);
            }
            if handle != 0 && physical.handle == 0 {
                (api().release)(handle);
            }
        }
    }
}

/// Sends what changed after `since`.
pub fn send_table(connection: &Connection, since: u64) -> Result<(), Failure> {
    // The fds are copied under the lock: the application may free the memory, and reuse the number, meanwhile.
    let (entries, removed, generation, live) = {
        let mut table = table::lock();
        renew_fds(&mut table);
        table.trim_removed();
        let entries: Vec<(Entry, OwnedFd)> = table
            .entries_since(since)
            .into_iter()
            .filter_map(|(entry, fd)| {
                // SAFETY: a copy of an fd this library owns; the copy is owned by what is returned.
                unsafe {
                    let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, fd);
                    (copy >= 0).then(|| (entry, std::os::fd::FromRawFd::from_raw_fd(copy)))
                }
            })
            .collect();
        (entries, table.removed_since(since), table.generation, table.physical.len() as u64)
    };
    for batch in entries.chunks(MAX_FDS) {
        let fds: Vec<_> = batch.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        connection.send(&Message::Entries(batch.iter().map(|(e, _)| *e).collect()), &fds)?;
    }
    for ids in removed.chunks(1024) {
        connection.send(&Message::Removed(ids.to_vec()), &[])?;
    }
    connection.send(&Message::TableEnd { generation, live }, &[])?;
    Ok(())
}

/// Stops all GPU work, hands the memory over and lets it go. On failure everything is as before, unless it says
/// otherwise ([`Failure::Parked`]).
pub fn park(connection: &Connection, since: u64, patience: Duration, flags: u32) -> Result<Timings, Failure> {
    relax_capture();
    let begin = Instant::now();
    if !gate::close(patience) {
        return Err(Failure::Answer(failure::BUSY, "a thread stayed inside a driver call".into()));
    }
    let result = drain(patience.saturating_sub(begin.elapsed())).and_then(|idle| {
        if !idle {
            return Err(Failure::Answer(failure::BUSY, "the GPU is still working".into()));
        }
        // A thread that sleeps inside the driver would wake up to find the driver's memory gone.
        if !gate::settle(patience.saturating_sub(begin.elapsed())) {
            return Err(Failure::Answer(failure::BUSY, "a thread stayed in a driver call that waits".into()));
        }
        let reason = {
            let mut table = table::lock();
            renew_fds(&mut table);
            blockers(&table).into_iter().next()
        };
        if let Some(reason) = reason {
            return Err(Failure::Answer(failure::UNSUPPORTED, reason));
        }
        let drained = Instant::now();
        send_table(connection, since)?;
        match connection.receive()?.0 {
            Message::Taken => Ok((drained, Instant::now())),
            _ => Err(Failure::Answer(failure::PROTOCOL, "expected Taken".into())),
        }
    });
    let (drained, taken) = match result {
        Ok(times) => times,
        Err(e) => {
            gate::open();
            return Err(e);
        }
    };
    let mut table = table::lock();
    if flags & PARK_LOW_STACK != 0 {
        lower_stacks(&mut table);
    }
    if flags & PARK_PREFAULT != 0 {
        prefault::arm();
    }
    if let Err(text) = let_go(&mut table) {
        return Err(match map_again(&mut table) {
            Ok(()) => {
                raise_stacks(&mut table);
                drop(table);
                gate::open();
                Failure::Answer(failure::CUDA, text)
            }
            // The host holds every fd: it can bring back what this process could not.
            Err(_) => {
                unmap(&mut table);
                forget(&mut table);
                Failure::Parked(failure::CUDA, text)
            }
        });
    }
    forget(&mut table);
    let us = |from: Instant, to: Instant| (to - from).as_micros() as u64;
    Ok(Timings {
        drain_us: us(begin, drained),
        transfer_us: us(drained, taken),
        map_us: us(taken, Instant::now()),
    })
}

/// Lowers every context's stack limit and remembers what it was.
fn lower_stacks(table: &mut Table) {
    let all = contexts::all();
    for context in &all.contexts {
        let mut before = 0;
        // SAFETY: `all` keeps the contexts alive; `before` is valid for writing.
        unsafe {
            if (api().ctx_set)(*context) == SUCCESS
                && (api().ctx_get_limit)(&mut before, LIMIT_STACK_SIZE) == SUCCESS
                && (api().ctx_set_limit)(LIMIT_STACK_SIZE, LOW_STACK) == SUCCESS
            {
                table.stack_limits.push((*context as usize, before));
            }
        }
    }
    // SAFETY: no context is current afterwards.
    unsafe { (api().ctx_set)(std::ptr::null_mut()) };
}

/// Sets the stack limits again.
fn raise_stacks(table: &mut Table) {
    for (context, limit) in table.stack_limits.drain(..) {
        // SAFETY: the contexts lived when the process was parked, and nothing can have destroyed them since.
        unsafe {
            if (api().ctx_set)(context as Context) == SUCCESS {
                (api().ctx_set_limit)(LIMIT_STACK_SIZE, limit);
            }
        }
    }
    // SAFETY: no context is current afterwards.
    unsafe { (api().ctx_set)(std::ptr::null_mut()) };
}

/// Unmaps everything and releases every handle, up to the first failure; says what failed. Memory that this process goes on
/// holding would make the driver's restore fail for good.
fn let_go(table: &mut Table) -> Result<(), String> {
    for (address, mapping) in table.mappings.iter_mut().filter(|(_, m)| m.present) {
        // SAFETY: mapped by this process, and no work is running that could use it.
        match unsafe { (api().unmap)(*address, mapping.len) } {
            SUCCESS => mapping.present = false,
            status => return Err(format!("cuMemUnmap of {address:#x} failed with CUDA error {status}")),
        }
    }
    for physical in table.physical.values_mut().filter(|p| p.handle != 0) {
        // SAFETY: the table holds the only reference to the driver's handle.
        match unsafe { (api().release)(physical.handle) } {
            SUCCESS => physical.handle = 0,
            status => return Err(format!("cuMemRelease failed with CUDA error {status}")),
        }
    }
    Ok(())
}

/// Unmaps what can be unmapped.
fn unmap(table: &mut Table) {
    for (address, mapping) in table.mappings.iter_mut().filter(|(_, m)| m.present) {
        // SAFETY: as in `let_go`.
        mapping.present = unsafe { (api().unmap)(*address, mapping.len) } != SUCCESS;
    }
}

/// Releases every handle and closes every fd; the host's fds alone keep the memory alive.
fn forget(table: &mut Table) {
    for physical in table.physical.values_mut() {
        if physical.handle != 0 {
            // SAFETY: the table holds the only reference to the driver's handle.
            unsafe { (api().release)(physical.handle) };
            physical.handle = 0;
        }
        physical.fd.close();
    }
}

/// Receives the fds again, maps everything where it was and opens the gate. On failure the process is parked as before,
/// and can be attached by another conversation.
pub fn attach(connection: &Connection, handles: u64) -> Result<Timings, Failure> {
    relax_capture();
    let begin = Instant::now();
    let mut table = table::lock();
    let result = receive_all(connection, handles, &mut table).and_then(|()| {
        let transferred = Instant::now();
        map_again(&mut table).map(|()| transferred)
    });
    let transferred = match result {
        Ok(transferred) => transferred,
        Err(failure) => {
            unmap(&mut table);
            forget(&mut table);
            return Err(failure);
        }
    };
    raise_stacks(&mut table);
    drop(table);
    gate::open();
    Ok(Timings {
        drain_us: 0,
        transfer_us: (transferred - begin).as_micros() as u64,
        map_us: transferred.elapsed().as_micros() as u64,
    })
}

/// Receives the fd of every one of the `handles` allocations.
fn receive_all(connection: &Connection, handles: u64, table: &mut Table) -> Result<(), Failure> {
    let protocol = |text: &str| Failure::Answer(failure::PROTOCOL, text.into());
    if handles != table.physical.len() as u64 {
        let text = format!("{handles} allocations offered, {} were parked", table.physical.len());
        return Err(protocol(&text));
    }
    let mut received = 0;
    while received < handles {
        let (message, fds) = connection.receive()?;
        let Message::Entries(entries) = message else { return Err(protocol("expected Entries")) };
        if entries.is_empty() || entries.len() != fds.len() {
            return Err(protocol("as many fds as entries must come"));
        }
        for (entry, fd) in entries.into_iter().zip(fds) {
            let Some(physical) = table.physical.get_mut(&entry.id).filter(|p| p.fd.is_none()) else {
                return Err(protocol("an allocation that was not parked"));
            };
            physical.fd = Kept::new(fd.into_raw_fd());
            received += 1;
        }
    }
    Ok(())
}

/// Imports and maps what is not mapped, with the access rights it had.
fn map_again(table: &mut Table) -> Result<(), Failure> {
    let check = |call: &str, status| if status == SUCCESS { Ok(()) } else { Err(cuda(call, status)) };
    for physical in table.physical.values_mut().filter(|p| p.handle == 0) {
        let fd = physical
            .fd
            .get()
            .ok_or_else(|| Failure::Answer(failure::SYSTEM, "a received fd is not open".into()))?;
        // SAFETY: the fd is the memory's; `handle` is valid for writing.
        let status =
            unsafe { (api().import)(&mut physical.handle, fd as usize as *mut std::ffi::c_void, HANDLE_FD) };
        check("cuMemImportFromShareableHandle", status)?;
    }
    let Table { physical, mappings, .. } = &mut *table;
    for (address, mapping) in mappings.iter_mut().filter(|(_, m)| !m.present) {
        let Some(physical) = physical.get(&mapping.physical) else { continue };
        // SAFETY: the address range is still reserved and nothing is mapped there; the descriptors are the
        // application's own.
        unsafe {
            check("cuMemMap", (api().map)(*address, mapping.len, 0, physical.handle, 0))?;
            mapping.present = true;
            if !mapping.access.is_empty() {
                let status =
                    (api().set_access)(*address, mapping.len, mapping.access.as_ptr(), mapping.access.len());
                check("cuMemSetAccess", status)?;
            }
        }
    }
    for physical in table.physical.values_mut().filter(|p| p.references == 0) {
        // SAFETY: imported above; the mappings keep the memory. A handle that stays is released when the process parks again.
        if unsafe { (api().release)(physical.handle) } == SUCCESS {
            physical.handle = 0;
        }
    }
    Ok(())
}
