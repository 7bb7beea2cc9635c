//! The driver's checkpoint calls.
//!
//! Every process has a control block in a memfd and a thread that serves it. A caller finds the block through
//! `/proc/PID/fd`, so it needs no name that namespaces could hide, and the block survives CRIU like any memfd.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::code::{Code, ILLEGAL_STATE, INVALID_VALUE, NOT_READY, NOT_SUPPORTED, Result, SUCCESS};
use crate::fault::{self, Outside};
use crate::{context, device, space};

const NAME: &str = "simcuda-ctl";
const LINK: &str = "/memfd:simcuda-ctl (deleted)";
const MAGIC: u32 = 0x51c0_da01;

/// `CUprocessState`.
pub const RUNNING: u32 = 0;
pub const LOCKED: u32 = 1;
pub const CHECKPOINTED: u32 = 2;
pub const FAILED: u32 = 3;

/// Requests.
pub const LOCK: u32 = 1;
pub const CHECKPOINT: u32 = 2;
pub const RESTORE: u32 = 3;
pub const UNLOCK: u32 = 4;

/// Shared with callers in other processes.
#[repr(C)]
struct Block {
    magic: AtomicU32,
    state: AtomicU32,
    request: AtomicU32,
    argument: AtomicU32,
    result: AtomicU32,
    /// Raised by the caller; a futex.
    asked: AtomicU32,
    /// Set to `asked` by the server when it is done; a futex.
    answered: AtomicU32,
    /// Faults that another process asks for, and calls that were made. Nothing of the driver.
    outside: Outside,
}

const _: () = assert!(size_of::<Block>() <= 4096);

fn futex_wait(word: &AtomicU32, value: u32, limit: Duration) {
    let time = libc::timespec { tv_sec: limit.as_secs() as _, tv_nsec: limit.subsec_nanos() as _ };
    // SAFETY: the word is in shared memory that stays mapped; `time` outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time) };
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

fn map(file: &File) -> Option<&'static Block> {
    // SAFETY: a shared mapping of a file of at least one page; it is never unmapped, so the reference stays valid, and
    // all fields are atomics.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        (at != libc::MAP_FAILED).then(|| &*at.cast::<Block>())
    }
}

/// Calls of this process's own API: how many are under way, and whether new ones must wait.
struct Calls {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}
static CALLS: Calls = Calls { state: Mutex::new((0, false)), changed: Condvar::new() };

/// Held during an API call.
pub struct Call;

/// Begins an API call; waits while the process is locked.
pub fn enter() -> Call {
    let mut state = CALLS.state.lock().unwrap_or_else(|e| e.into_inner());
    while state.1 {
        state = CALLS.changed.wait(state).unwrap_or_else(|e| e.into_inner());
    }
    state.0 += 1;
    Call
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = CALLS.state.lock().unwrap_or_else(|e| e.into_inner());
        state.0 -= 1;
        CALLS.changed.notify_all();
    }
}

/// Stops new API calls, waits for those under way and for the work they have submitted.
fn lock_process(limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    lock_calls(deadline)?;
    if context::all().iter().all(|c| c.streams.drain(deadline)) {
        return Ok(());
    }
    unlock_calls();
    Err(NOT_READY)
}

fn lock_calls(deadline: Instant) -> Result<()> {
    let mut state = CALLS.state.lock().unwrap_or_else(|e| e.into_inner());
    state.1 = true;
    while state.0 > 0 {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            state.1 = false;
            CALLS.changed.notify_all();
            return Err(NOT_READY);
        }
        state = CALLS.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
    }
    Ok(())
}

fn unlock_calls() {
    CALLS.state.lock().unwrap_or_else(|e| e.into_inner()).1 = false;
    CALLS.changed.notify_all();
}

static FD: AtomicI32 = AtomicI32::new(-1);
static BLOCK: AtomicUsize = AtomicUsize::new(0);

/// Tells this process's control block from that of the process it was restored from.
pub fn block_inode() -> u64 {
    // SAFETY: an all-zero stat is valid, and it is valid for writing.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(FD.load(Ordering::SeqCst), &mut stat) == 0 { stat.st_ino } else { 0 }
    }
}

extern "C" fn in_child() {
    let fd = FD.swap(-1, Ordering::SeqCst);
    if fd >= 0 {
        // SAFETY: the child's copy of an fd that only this module uses.
        unsafe { libc::close(fd) };
    }
}

/// Starts the serving thread.
pub fn start() {
    // SAFETY: plain system calls; the new fd is owned by `file`.
    let file = unsafe {
        let fd = libc::memfd_create(c"simcuda-ctl".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 || libc::ftruncate(fd, 4096) < 0 {
            return;
        }
        libc::pthread_atfork(None, None, Some(in_child));
        File::from_raw_fd(fd)
    };
    let Some(block) = map(&file) else { return };
    BLOCK.store(block as *const Block as usize, Ordering::SeqCst);
    fault::OUTSIDE.store(&raw const block.outside as usize, Ordering::Release);
    FD.store(file.into_raw_fd(), Ordering::SeqCst);
    thread::spawn(move || serve(block));
    block.magic.store(MAGIC, Ordering::SeqCst);
}

fn serve(block: &Block) {
    let mut shared = false;
    let mut own_state = None;
    loop {
        let asked = block.asked.load(Ordering::SeqCst);
        if block.answered.load(Ordering::SeqCst) == asked {
            // Wakes up now and then: a restored process's futex has nobody to ring it for what was asked before.
            futex_wait(&block.asked, asked, Duration::from_millis(100));
            continue;
        }
        let state = block.state.load(Ordering::SeqCst);
        let limit = Duration::from_millis(block.argument.load(Ordering::SeqCst).into());
        let result = match (block.request.load(Ordering::SeqCst), state) {
            (LOCK, RUNNING) => lock_process(limit).map(|()| LOCKED),
            (CHECKPOINT, LOCKED) => {
                shared = space::change(|s| s.save());
                device::release_node();
                OwnState::save().map(|saved| {
                    own_state = Some(saved);
                    CHECKPOINTED
                })
            }
            // What other processes share cannot come back; the process is lost.
            // The process is lost by a fault that was asked for in its own control block.
            (RESTORE, CHECKPOINTED) if fault::due("poison").is_some() => {
                block.state.store(FAILED, Ordering::SeqCst);
                Err(ILLEGAL_STATE)
            }
            (RESTORE, CHECKPOINTED) if shared => {
                block.state.store(FAILED, Ordering::SeqCst);
                Err(NOT_SUPPORTED)
            }
            (RESTORE, CHECKPOINTED) => {
                device::hold_node();
                let own = own_state.take().map_or(Ok(()), OwnState::load);
                own.and_then(|()| space::change(|s| s.load())).map(|()| LOCKED)
            }
            (UNLOCK, LOCKED) => {
                unlock_calls();
                Ok(RUNNING)
            }
            _ => Err(ILLEGAL_STATE),
        };
        if let Ok(state) = result {
            block.state.store(state, Ordering::SeqCst);
        }
        block.result.store(result.err().unwrap_or(SUCCESS), Ordering::SeqCst);
        block.answered.store(asked, Ordering::SeqCst);
        futex_wake(&block.answered);
    }
}

/// The control block of a process.
fn find(pid: i32) -> Result<(File, &'static Block)> {
    let folder = format!("/proc/{pid}/fd");
    for entry in fs::read_dir(folder).map_err(|_| INVALID_VALUE)?.flatten() {
        if fs::read_link(entry.path()).is_ok_and(|l| l.as_os_str() == LINK) {
            let file =
                File::options().read(true).write(true).open(entry.path()).map_err(|_| INVALID_VALUE)?;
            let block = map(&file).ok_or(INVALID_VALUE)?;
            if block.magic.load(Ordering::SeqCst) == MAGIC {
                return Ok((file, block));
            }
        }
    }
    debug_assert!(LINK.contains(NAME));
    Err(INVALID_VALUE)
}

fn unmap(block: &'static Block) {
    // SAFETY: mapped by `find` for this call alone; nobody uses it afterwards.
    unsafe { libc::munmap(std::ptr::from_ref(block).cast_mut().cast(), 4096) };
}

/// The state of a process.
pub fn state(pid: i32) -> Result<u32> {
    let (_, block) = find(pid)?;
    let state = block.state.load(Ordering::SeqCst);
    unmap(block);
    Ok(state)
}

/// Asks a process for something and waits. A process that is frozen does not answer; only a lock gives up then.
pub fn ask(pid: i32, request: u32, argument: u32) -> Code {
    let Ok((file, block)) = find(pid) else { return INVALID_VALUE };
    // One caller at a time; a caller that dies gives its turn up.
    // SAFETY: a plain system call on an open file.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    block.request.store(request, Ordering::SeqCst);
    block.argument.store(argument, Ordering::SeqCst);
    let asked = block.asked.load(Ordering::SeqCst).wrapping_add(1);
    block.asked.store(asked, Ordering::SeqCst);
    futex_wake(&block.asked);
    let deadline = Instant::now() + Duration::from_millis(u64::from(argument) + 1000);
    let result = loop {
        let answered = block.answered.load(Ordering::SeqCst);
        if answered == asked {
            break block.result.load(Ordering::SeqCst);
        }
        if !fs::exists(format!("/proc/{pid}/fd")).unwrap_or(false) {
            break INVALID_VALUE;
        }
        if request == LOCK && Instant::now() > deadline {
            block.asked.store(answered, Ordering::SeqCst);
            break NOT_READY;
        }
        futex_wait(&block.answered, answered, Duration::from_millis(20));
    };
    unmap(block);
    result
}

/// What a real driver has to save of itself: one mapping, taken and populated while the process stands still.
struct OwnState(*mut u8);

impl OwnState {
    const LEN: usize = 24 << 20;

    fn save() -> Result<Self> {
        // SAFETY: a new private mapping, written to within its bounds.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                Self::LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            );
            if at == libc::MAP_FAILED {
                return Err(crate::code::OUT_OF_MEMORY);
            }
            let words = std::slice::from_raw_parts_mut(at.cast::<u64>(), Self::LEN / 8);
            // Anonymous memory is zero, whoever provides it.
            if words.iter().step_by(509).any(|w| *w != 0) {
                return Err(ILLEGAL_STATE);
            }
            words.iter_mut().enumerate().for_each(|(n, w)| *w = n as u64);
            Ok(OwnState(at.cast()))
        }
    }

    fn load(self) -> Result<()> {
        // SAFETY: mapped by `save`, and unmapped here only.
        unsafe {
            let words = std::slice::from_raw_parts(self.0.cast::<u64>(), Self::LEN / 8);
            let whole = words.iter().enumerate().all(|(n, w)| *w == n as u64);
            libc::munmap(self.0.cast(), Self::LEN);
            if whole { Ok(()) } else { Err(ILLEGAL_STATE) }
        }
    }
}
