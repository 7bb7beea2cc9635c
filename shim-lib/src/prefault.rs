//! Memory for what the driver saves of itself, faulted in while the program still runs.
//!
//! At a checkpoint the driver takes one large anonymous mapping with `MAP_POPULATE` and saves its own state there. The
//! kernel then finds and zeroes hundreds of megabytes, page by page, while the program stands still: 190 of 415 ms for a
//! PyTorch process on driver 580. So the driver's import of `mmap` is pointed at [`answer`], and a region in huge pages is
//! ready before the program is stopped.

use std::ffi::{CStr, c_int, c_void};
use std::fs;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use phos_protocol::paths;

/// Bytes to have ready as long as no checkpoint has shown how many are needed: what a PyTorch process needs, and a half.
const FIRST_GUESS: usize = 512 << 20;
/// Smaller mappings are none of the driver's saved state.
const SMALLEST: usize = 8 << 20;
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// A region that is mapped and faulted in.
struct Pool {
    at: usize,
    len: usize,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);
/// What the driver was answered with. It is the driver's until its restore.
static GIVEN: Mutex<Option<Pool>> = Mutex::new(None);
/// Whether the driver may be answered from the pool: from park to attach.
static ARMED: AtomicBool = AtomicBool::new(false);
/// Bytes the driver asked for last; 0: it has not asked yet.
static WANTED: AtomicUsize = AtomicUsize::new(0);
/// A whole checkpoint went by without the driver asking: this one works in another way.
static USELESS: AtomicBool = AtomicBool::new(false);

fn pool() -> std::sync::MutexGuard<'static, Option<Pool>> {
    POOL.lock().unwrap_or_else(|e| e.into_inner())
}

fn unmap(at: usize, len: usize) {
    if len > 0 {
        // SAFETY: part of a pool that nobody else knows of.
        unsafe { libc::munmap(at as *mut c_void, len) };
    }
}

/// Stands in for the driver's `mmap`.
///
/// # Safety
/// As `mmap`.
unsafe extern "C" fn answer(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> *mut c_void {
    let saving = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    if ARMED.load(Ordering::Acquire)
        && address.is_null()
        && fd == -1
        && flags & saving == saving
        && flags & libc::MAP_FIXED == 0
        && protection == libc::PROT_READ | libc::PROT_WRITE
        && len >= SMALLEST
    {
        WANTED.store(len, Ordering::Relaxed);
        if let Some(at) = take(len) {
            return at as *mut c_void;
        }
    }
    // SAFETY: the caller's own arguments.
    unsafe { libc::mmap(address, len, protection, flags, fd, offset) }
}

/// Cuts `len` bytes out of the pool; what is left of it goes back to the system.
fn take(len: usize) -> Option<usize> {
    let mut pool = pool();
    let Pool { at, len: have } = pool.take()?;
    let len = len.next_multiple_of(PAGE);
    if have < len {
        unmap(at, have);
        return None;
    }
    unmap(at + len, have - len);
    *GIVEN.lock().unwrap_or_else(|e| e.into_inner()) = Some(Pool { at, len });
    Some(at)
}

/// Bytes that this process may still take, as far as its cgroup and the machine say.
fn headroom() -> usize {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    // A container need not see its own cgroup; the host does.
    let told = crate::control::folder()
        .and_then(|f| number(f.join(paths::HEADROOM).to_str()?))
        .unwrap_or(usize::MAX);
    let left = |limit: &str, used: &str| Some(number(limit)?.saturating_sub(number(used)?));
    let cgroup = left("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
        .or_else(|| {
            let folder = "/sys/fs/cgroup/memory/memory.";
            left(&format!("{folder}limit_in_bytes"), &format!("{folder}usage_in_bytes"))
        })
        .unwrap_or(usize::MAX);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = memory.lines().find_map(|l| {
        let kib: usize = l.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok()?;
        Some(kib << 10)
    });
    cgroup.min(told).min(available.unwrap_or(0))
}

/// Makes the pool, unless there is one, or memory is short: the driver will take as much once more if the pool does not
/// fit.
pub fn prepare() {
    let off = std::env::var_os("PHOS_PREFAULT").is_some_and(|v| v == "0");
    if off || USELESS.load(Ordering::Relaxed) || pool().is_some() || !interpose() {
        return;
    }
    let known = WANTED.load(Ordering::Relaxed);
    let wanted = if known == 0 { FIRST_GUESS } else { known + known / 16 };
    let len = wanted.next_multiple_of(HUGE_PAGE);
    if headroom() < 3 * len {
        return;
    }
    // SAFETY: a new mapping of this library's own, every part of which stays within it.
    unsafe {
        let all = libc::mmap(
            ptr::null_mut(),
            len + HUGE_PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if all == libc::MAP_FAILED {
            return;
        }
        let at = (all as usize).next_multiple_of(HUGE_PAGE);
        unmap(all as usize, at - all as usize);
        unmap(at + len, all as usize + HUGE_PAGE - at);
        libc::madvise(at as *mut c_void, len, libc::MADV_HUGEPAGE);
        if libc::madvise(at as *mut c_void, len, libc::MADV_POPULATE_WRITE) != 0 {
            // Kernels before 5.14.
            for page in (at..at + len).step_by(PAGE) {
                ptr::write_volatile(page as *mut u8, 0);
            }
        }
        *pool() = Some(Pool { at, len });
    }
}

/// From here on the driver is answered from the pool.
pub fn arm() {
    ARMED.store(true, Ordering::Release);
}

/// The driver has saved its state and is away: gives back the part of it that is zeros. Returns its bytes.
pub fn trim() -> u64 {
    let given = GIVEN.lock().unwrap_or_else(|e| e.into_inner());
    match &*given {
        // SAFETY: mapped by `prepare` and the driver's alone, which unmaps it at its restore: that comes after this.
        Some(Pool { at, len }) => unsafe { crate::trim::trim(*at, *len) },
        None => 0,
    }
}

/// The program runs again, or there will be no checkpoint: what is left of the pool goes back to the system.
pub fn disarm() {
    if ARMED.swap(false, Ordering::AcqRel) && WANTED.load(Ordering::Relaxed) == 0 {
        USELESS.store(true, Ordering::Relaxed);
    }
    GIVEN.lock().unwrap_or_else(|e| e.into_inner()).take();
    if let Some(Pool { at, len }) = pool().take() {
        unmap(at, len);
    }
}

/// Points the driver's import of `mmap` at [`answer`]; whether that worked.
fn interpose() -> bool {
    static DONE: Mutex<Option<bool>> = Mutex::new(None);
    let mut done = DONE.lock().unwrap_or_else(|e| e.into_inner());
    *done.get_or_insert_with(|| {
        let slots = crate::real::map().map(|map| imports(map, &[c"mmap", c"mmap64"])).unwrap_or_default();
        slots.iter().filter(|slot| replace(**slot, answer as *const () as usize)).count() > 0
    })
}

/// Writes `value` to a slot of the import table.
fn replace(slot: usize, value: usize) -> bool {
    let page = slot & !(PAGE - 1);
    // SAFETY: the slot is an 8-byte aligned word of a loaded library's import table; other threads read it as a whole.
    unsafe {
        if libc::mprotect(page as *mut c_void, PAGE, libc::PROT_READ | libc::PROT_WRITE) != 0 {
            return false;
        }
        (*(slot as *const AtomicUsize)).store(value, Ordering::Release);
    }
    true
}

/// A loaded library: what `dlinfo` says of it, the beginning of glibc's `struct link_map`.
#[repr(C)]
pub struct LinkMap {
    base: usize,
    name: *const libc::c_char,
    dynamic: *const Dynamic,
}

/// `Elf64_Dyn`.
#[repr(C)]
struct Dynamic {
    tag: i64,
    value: usize,
}

/// `Elf64_Rela`.
#[repr(C)]
struct Relocation {
    offset: usize,
    info: u64,
    addend: i64,
}

/// Tags of the dynamic section (System V ABI, "Dynamic Section").
mod tag {
    pub const PLT_BYTES: i64 = 2;
    pub const STRINGS: i64 = 5;
    pub const SYMBOLS: i64 = 6;
    pub const RELOCATIONS: i64 = 7;
    pub const RELOCATION_BYTES: i64 = 8;
    pub const PLT: i64 = 23;
}
/// `R_X86_64_GLOB_DAT` and `R_X86_64_JUMP_SLOT`: words that hold a function's address.
const SLOTS: [u64; 2] = [6, 7];
/// Bytes of an `Elf64_Sym`; the name's offset in the string table is its first word.
const SYMBOL_BYTES: usize = 24;

/// Addresses of the import slots of these functions.
fn imports(map: &LinkMap, names: &[&CStr]) -> Vec<usize> {
    // SAFETY: the dynamic section of a loaded library ends with a null tag; the tables it names are mapped as long as
    // the library is, which is never unloaded.
    unsafe {
        let value = |wanted| {
            let mut entry = map.dynamic;
            while (*entry).tag != 0 {
                if (*entry).tag == wanted {
                    return Some((*entry).value);
                }
                entry = entry.add(1);
            }
            None
        };
        // glibc has made addresses of these; other loaders leave offsets.
        let address = |wanted| value(wanted).map(|v| if v < map.base { v + map.base } else { v });
        let (Some(strings), Some(symbols)) = (address(tag::STRINGS), address(tag::SYMBOLS)) else {
            return Vec::new();
        };
        let mut slots = Vec::new();
        for (table, bytes) in [(tag::PLT, tag::PLT_BYTES), (tag::RELOCATIONS, tag::RELOCATION_BYTES)] {
            let (Some(table), Some(bytes)) = (address(table), value(bytes)) else { continue };
            let all = std::slice::from_raw_parts(table as *const Relocation, bytes / size_of::<Relocation>());
            for r in all.iter().filter(|r| SLOTS.contains(&(r.info & 0xffff_ffff))) {
                let symbol = symbols + (r.info >> 32) as usize * SYMBOL_BYTES;
                let name =
                    CStr::from_ptr((strings + *(symbol as *const u32) as usize) as *const libc::c_char);
                if names.contains(&name) {
                    slots.push(map.base + r.offset);
                }
            }
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(len: usize, flags: c_int) -> usize {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new private mapping.
        unsafe { answer(ptr::null_mut(), len, protection, flags, -1, 0) as usize }
    }

    fn is_mapped(at: usize) -> bool {
        let mut there = 0u8;
        // SAFETY: `there` is valid for one page's answer.
        unsafe { libc::mincore(at as *mut c_void, PAGE, &mut there) == 0 }
    }

    #[test]
    fn the_driver_is_answered_from_the_pool_once_and_the_rest_goes_back() {
        let make = |len: usize| {
            // SAFETY: a new private mapping.
            let at = unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            } as usize;
            *pool() = Some(Pool { at, len });
            at
        };
        let saving = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let at = make(32 << 20);
        assert_ne!(ask(16 << 20, saving), at, "not armed");
        arm();
        assert_ne!(ask(16 << 20, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS), at, "another kind of mapping");
        assert_ne!(ask(1 << 20, saving), at, "too small to be the driver's state");
        assert_eq!(ask((16 << 20) - 5, saving), at);
        assert!(
            is_mapped(at + (16 << 20) - PAGE) && !is_mapped(at + (16 << 20)),
            "exactly what was asked for"
        );
        assert_ne!(ask(16 << 20, saving), at, "once");
        // Too small a pool is given back before the driver takes its own.
        let at = make(16 << 20);
        ask(32 << 20, saving);
        assert!(pool().is_none());
        let _ = at;
        make(16 << 20);
        disarm();
        assert!(pool().is_none());
        assert!(!USELESS.load(Ordering::Relaxed));
    }

    #[test]
    fn an_import_is_found_and_replaced() {
        // SAFETY: libm is a library like any other; it is not unloaded.
        let map = unsafe {
            let handle = libc::dlopen(c"libstdc++.so.6".as_ptr(), libc::RTLD_NOW);
            assert!(!handle.is_null(), "the C++ library, which imports malloc");
            crate::real::link_map(handle).unwrap()
        };
        let slots = imports(map, &[c"malloc"]);
        assert!(!slots.is_empty());
        // SAFETY: slots of a loaded library.
        let target = unsafe { *(slots[0] as *const usize) };
        assert_ne!(target, 0);
        assert!(replace(slots[0], target), "written with what it had");
    }
}
