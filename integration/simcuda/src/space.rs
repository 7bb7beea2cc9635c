//! Physical memory and the address space it is mapped into.
//!
//! Physical memory is a memfd: it lives while a descriptor of it is open anywhere, in any process, or it is mapped.
//! Device addresses are addresses of this process, so that kernels can be host functions; the table here says which
//! of them may be touched.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use crate::code::{ILLEGAL_ADDRESS, INVALID_VALUE, OUT_OF_MEMORY, Result};
use crate::device::machine;

/// Allocation granularity, bytes.
pub const GRANULARITY: u64 = 2 << 20;

thread_local! {
    /// The device whose kernel this thread runs; none for copies, which any device with access may do.
    pub static DEVICE: Cell<Option<i32>> = const { Cell::new(None) };
}

/// Bytes of physical memory this process has allocated and not freed.
static USED: AtomicU64 = AtomicU64::new(0);

/// One piece of physical memory.
pub struct Physical {
    /// None while its contents are in host memory.
    fd: Mutex<Option<OwnedFd>>,
    saved: Mutex<Option<Vec<u8>>>,
    /// Bytes.
    pub size: u64,
    /// Where it is; of imported memory it is not known and 0.
    pub device: i32,
    /// It can be exported.
    pub exportable: bool,
    /// It was exported to, or came from, another process.
    pub shared: AtomicBool,
    /// It came from another process.
    pub imported: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn memfd(size: u64) -> Result<OwnedFd> {
    // SAFETY: plain system calls; the new fd is owned by what is returned.
    unsafe {
        let fd = libc::memfd_create(c"simgpu".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(OUT_OF_MEMORY);
        }
        let fd = OwnedFd::from_raw_fd(fd);
        if libc::ftruncate(fd.as_raw_fd(), size as i64) < 0 { Err(OUT_OF_MEMORY) } else { Ok(fd) }
    }
}

impl Physical {
    /// Allocates zeroed memory.
    pub fn allocate(device: i32, size: u64, exportable: bool) -> Result<Arc<Self>> {
        let before = USED.fetch_add(size, Ordering::SeqCst);
        if before.saturating_add(size) > machine().memory {
            USED.fetch_sub(size, Ordering::SeqCst);
            return Err(OUT_OF_MEMORY);
        }
        let fd = memfd(size).inspect_err(|_| {
            USED.fetch_sub(size, Ordering::SeqCst);
        })?;
        Ok(Arc::new(Physical {
            fd: Mutex::new(Some(fd)),
            saved: Mutex::new(None),
            size,
            device,
            exportable,
            shared: AtomicBool::new(false),
            imported: false,
        }))
    }

    /// Takes in another process's memory by a copy of its fd.
    pub fn import(fd: RawFd) -> Result<Arc<Self>> {
        // SAFETY: plain system calls on the caller's fd; the copy is owned by what is returned.
        unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0);
            if copy < 0 {
                return Err(INVALID_VALUE);
            }
            let copy = OwnedFd::from_raw_fd(copy);
            // Only memfds have seals: the real driver knows its own memory from other files, too.
            let is_memory = libc::fcntl(copy.as_raw_fd(), libc::F_GET_SEALS) >= 0;
            if !is_memory || libc::fstat(copy.as_raw_fd(), &mut stat) < 0 || stat.st_size <= 0 {
                return Err(INVALID_VALUE);
            }
            Ok(Arc::new(Physical {
                fd: Mutex::new(Some(copy)),
                saved: Mutex::new(None),
                size: stat.st_size as u64,
                device: 0,
                exportable: false,
                shared: AtomicBool::new(true),
                imported: true,
            }))
        }
    }

    /// A new fd that keeps the memory alive.
    pub fn export(&self) -> Result<RawFd> {
        if !self.exportable {
            return Err(INVALID_VALUE);
        }
        self.shared.store(true, Ordering::SeqCst);
        let fd = lock(&self.fd);
        let raw = fd.as_ref().ok_or(INVALID_VALUE)?.as_raw_fd();
        // SAFETY: a plain system call on an fd that is held.
        let copy = unsafe { libc::fcntl(raw, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 { Err(OUT_OF_MEMORY) } else { Ok(copy) }
    }

    fn map_at(&self, address: u64, len: u64) -> Result<()> {
        let fd = lock(&self.fd);
        let raw = fd.as_ref().ok_or(INVALID_VALUE)?.as_raw_fd();
        // SAFETY: the caller has reserved the range, so nothing of the program's is replaced.
        let at = unsafe {
            libc::mmap(
                address as *mut _,
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                raw,
                0,
            )
        };
        if at == libc::MAP_FAILED { Err(OUT_OF_MEMORY) } else { Ok(()) }
    }

    /// Moves the contents into host memory and gives the memfd up.
    fn save(&self) {
        let mut fd = lock(&self.fd);
        let Some(held) = fd.take() else { return };
        let mut bytes = vec![0u8; self.size as usize];
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::from(held);
        let _ = file.read_exact_at(&mut bytes, 0);
        *lock(&self.saved) = Some(bytes);
    }

    /// The reverse of [`Physical::save`].
    fn load(&self) -> Result<()> {
        let Some(bytes) = lock(&self.saved).take() else { return Ok(()) };
        let file = std::fs::File::from(memfd(self.size)?);
        use std::os::unix::fs::FileExt;
        file.write_all_at(&bytes, 0).map_err(|_| OUT_OF_MEMORY)?;
        *lock(&self.fd) = Some(file.into());
        Ok(())
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        if !self.imported {
            USED.fetch_sub(self.size, Ordering::SeqCst);
        }
    }
}

/// Bytes that can still be allocated.
pub fn free() -> u64 {
    machine().memory.saturating_sub(USED.load(Ordering::SeqCst))
}

/// What is mapped at an address.
pub struct Mapping {
    /// Bytes.
    pub len: u64,
    /// What.
    pub physical: Arc<Physical>,
    /// Devices that may access it.
    pub access: Vec<i32>,
    /// Made by cuMemAlloc and its like: the driver owns it, and the address range with it.
    pub plain: bool,
}

/// The address space.
#[derive(Default)]
pub struct Space {
    /// Mappings by address.
    pub mappings: BTreeMap<u64, Mapping>,
    /// Reservations by address.
    pub reserved: BTreeMap<u64, u64>,
    /// Handles: physical memory and references.
    pub handles: HashMap<u64, (Arc<Physical>, u32)>,
    next_handle: u64,
}

/// Held for reading while anything uses device memory, for writing while the space changes.
pub static SPACE: RwLock<Option<Space>> = RwLock::new(None);

/// Changes the space. Waits for kernels and copies that are running.
pub fn change<T>(f: impl FnOnce(&mut Space) -> T) -> T {
    let mut space = SPACE.write().unwrap_or_else(|e| e.into_inner());
    f(space.get_or_insert_default())
}

/// Runs `f` while the space cannot change.
pub fn using<T>(f: impl FnOnce(&Space) -> Result<T>) -> Result<T> {
    match &*SPACE.read().unwrap_or_else(|e| e.into_inner()) {
        Some(space) => f(space),
        None => f(&Space::default()),
    }
}

/// Replaces a range by inaccessible, unbacked addresses.
fn blank(address: u64, len: u64) {
    // SAFETY: the range is reserved by this space; nothing of the program's is there.
    unsafe {
        libc::mmap(
            address as *mut _,
            len as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
}

impl Space {
    /// Reserves addresses.
    pub fn reserve(&mut self, len: u64) -> Result<u64> {
        if len == 0 || !len.is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: a new mapping somewhere; the parts around the aligned range are given back.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                (len + GRANULARITY) as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if at == libc::MAP_FAILED {
                return Err(OUT_OF_MEMORY);
            }
            let address = (at as u64).next_multiple_of(GRANULARITY);
            let before = address - at as u64;
            if before > 0 {
                libc::munmap(at, before as usize);
            }
            libc::munmap((address + len) as *mut _, (GRANULARITY - before) as usize);
            self.reserved.insert(address, len);
            Ok(address)
        }
    }

    /// Gives a whole reservation back.
    pub fn unreserve(&mut self, address: u64, len: u64) -> Result<()> {
        if self.reserved.get(&address) != Some(&len)
            || self.mappings.range(address..address + len).next().is_some()
        {
            return Err(INVALID_VALUE);
        }
        self.reserved.remove(&address);
        // SAFETY: the range was reserved by `reserve` and nothing is mapped in it.
        unsafe { libc::munmap(address as *mut _, len as usize) };
        Ok(())
    }

    /// Maps physical memory into a reservation.
    pub fn map(&mut self, address: u64, len: u64, physical: Arc<Physical>, plain: bool) -> Result<()> {
        let (start, reserved) = self.reserved.range(..=address).next_back().ok_or(INVALID_VALUE)?;
        let inside = address + len <= start + reserved && len > 0 && len.is_multiple_of(GRANULARITY);
        let overlaps =
            self.mappings.range(..address + len).next_back().is_some_and(|(a, m)| a + m.len > address);
        if !inside || overlaps || len > physical.size {
            return Err(INVALID_VALUE);
        }
        physical.map_at(address, len)?;
        let access = if plain { vec![physical.device] } else { Vec::new() };
        self.mappings.insert(address, Mapping { len, physical, access, plain });
        Ok(())
    }

    /// Unmaps whole mappings.
    pub fn unmap(&mut self, address: u64, len: u64) -> Result<()> {
        let inside: Vec<_> = self.mappings.range(address..address + len).map(|(a, m)| (*a, m.len)).collect();
        let total: u64 = inside.iter().map(|(_, n)| n).sum();
        if inside.is_empty() || total != len {
            return Err(INVALID_VALUE);
        }
        for (a, n) in inside {
            blank(a, n);
            self.mappings.remove(&a);
        }
        Ok(())
    }

    /// Allocates, reserves and maps at once.
    pub fn allocate(&mut self, device: i32, size: u64) -> Result<u64> {
        let len = size.checked_next_multiple_of(GRANULARITY).ok_or(OUT_OF_MEMORY)?;
        let physical = Physical::allocate(device, len, false)?;
        let address = self.reserve(len)?;
        self.map(address, len, physical, true)?;
        Ok(address)
    }

    /// The reverse of [`Space::allocate`].
    pub fn free(&mut self, address: u64) -> Result<()> {
        let len = self.mappings.get(&address).filter(|m| m.plain).map(|m| m.len).ok_or(INVALID_VALUE)?;
        self.unmap(address, len)?;
        self.unreserve(address, len)
    }

    /// A new handle.
    pub fn insert_handle(&mut self, physical: Arc<Physical>) -> u64 {
        self.next_handle += 1;
        self.handles.insert(self.next_handle, (physical, 1));
        self.next_handle
    }

    /// Whether every byte of the range may be touched.
    pub fn check(&self, address: u64, len: u64) -> Result<()> {
        let end = address.checked_add(len).ok_or(ILLEGAL_ADDRESS)?;
        let mut at = address;
        while at < end {
            let (start, m) = self.mappings.range(..=at).next_back().ok_or(ILLEGAL_ADDRESS)?;
            let device = DEVICE.get();
            let granted = m.access.iter().any(|d| device.is_none_or(|own| own == *d));
            if at >= start + m.len || !granted {
                return Err(ILLEGAL_ADDRESS);
            }
            at = start + m.len;
        }
        Ok(())
    }

    /// Whether the address is device memory.
    pub fn is_device(&self, address: u64) -> bool {
        self.mappings.range(..=address).next_back().is_some_and(|(a, m)| address < a + m.len)
    }

    fn pieces(&self) -> Vec<Arc<Physical>> {
        let mut pieces: Vec<Arc<Physical>> = Vec::new();
        let all = self.mappings.values().map(|m| &m.physical).chain(self.handles.values().map(|h| &h.0));
        for p in all {
            if !pieces.iter().any(|q| Arc::ptr_eq(q, p)) {
                pieces.push(p.clone());
            }
        }
        pieces
    }

    /// Moves everything into host memory. Returns whether something is shared with other processes, which cannot be
    /// brought back.
    pub fn save(&mut self) -> bool {
        let pieces = self.pieces();
        pieces.iter().for_each(|p| p.save());
        self.mappings.iter().for_each(|(address, m)| blank(*address, m.len));
        pieces.iter().any(|p| p.shared.load(Ordering::SeqCst))
    }

    /// The reverse of [`Space::save`].
    pub fn load(&mut self) -> Result<()> {
        self.pieces().iter().try_for_each(|p| p.load())?;
        self.mappings.iter().try_for_each(|(address, m)| m.physical.map_at(*address, m.len))
    }
}
