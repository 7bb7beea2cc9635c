//! This very process as a CUDA program under `libphos.so`, on the simulated driver, and as the host that parks it: what the
//! library does can be tested call by call, without a container.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{CString, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phos_engine::peer::{AttachListener, ControlDir, Library};
use phos_protocol::message::{Entry, Timings};
use tempfile::TempDir;

use crate::tools;

/// Longest any step of parking and attaching may take.
const LIMIT: Duration = Duration::from_secs(10);

/// `CUresult`.
pub type Code = u32;

struct Loaded {
    library: *mut c_void,
    driver: *mut c_void,
    control: PathBuf,
    /// Removed with this process, unless another one shares its own.
    _folder: Option<TempDir>,
}

/// Environment variable: the control folder of another process, which this one shares.
pub const SHARED_CONTROL: &str = "PHOS_TEST_CONTROL";
// SAFETY: handles of dlopen may be used from any thread; they are never closed.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// Environment variable: a driver to use instead of the simulated one as it was built.
pub const TEST_DRIVER: &str = "PHOS_TEST_DRIVER";

fn open(path: PathBuf) -> Result<*mut c_void> {
    let name = path.display().to_string();
    let path = CString::new(path.into_os_string().into_encoded_bytes())?;
    // SAFETY: a library of this workspace; its initialisers do nothing.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    ensure!(!handle.is_null(), "{name} cannot be loaded: run cargo build --workspace");
    Ok(handle)
}

fn symbol(library: *mut c_void, name: &str) -> usize {
    let text = CString::new(name).unwrap_or_default();
    // SAFETY: a live handle and a NUL-terminated name.
    let address = unsafe { libc::dlsym(library, text.as_ptr()) };
    assert!(!address.is_null(), "{name} is not exported");
    address as usize
}

fn load() -> Result<Loaded> {
    let folder = if env::var_os(SHARED_CONTROL).is_some() { None } else { Some(tempfile::tempdir()?) };
    let control = match &folder {
        Some(folder) => folder.path().to_path_buf(),
        None => env::var_os(SHARED_CONTROL).unwrap_or_default().into(),
    };
    let driver = match env::var_os(TEST_DRIVER) {
        Some(driver) => driver.into(),
        None => tools::built("libsimcuda.so")?,
    };
    // SAFETY: before this process loads a driver; other threads of a test harness do not read the environment.
    unsafe {
        env::set_var("PHOS_REAL_LIBCUDA", &driver);
        env::set_var("PHOS_CONTROL_DIR", &control);
        env::set_var("SIMCUDA_DEVICES", "2");
    }
    Ok(Loaded {
        library: open(tools::built("libphos.so")?)?,
        driver: open(driver)?,
        control,
        _folder: folder,
    })
}

/// Memory that was taken over from the process.
pub struct Parked {
    entries: BTreeMap<u64, (Entry, OwnedFd)>,
}

impl Parked {
    /// Bytes of one `CLASS_` of memory.
    pub fn bytes(&self, class: u32) -> u64 {
        self.entries.values().filter(|(e, _)| e.class == class).map(|(e, _)| e.size).sum()
    }

    /// Number of pieces.
    pub fn pieces(&self) -> usize {
        self.entries.len()
    }
}

/// The process as a program. Tests of one program take turns.
pub struct Application {
    loaded: &'static Loaded,
    _turn: MutexGuard<'static, ()>,
}

impl Application {
    /// Loads the library, initialises CUDA and makes the first device's context current in this thread.
    pub fn start() -> Result<Self> {
        static LOADED: OnceLock<Result<Loaded, String>> = OnceLock::new();
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
        let loaded = LOADED.get_or_init(|| load().map_err(|e| format!("{e:#}")));
        let loaded = loaded.as_ref().map_err(|e| anyhow::anyhow!(e.clone()))?;
        let app = Application { loaded, _turn: turn };
        // A call that waits for ever ends the test program.
        // SAFETY: a plain system call.
        unsafe { libc::alarm(120) };
        app.ok("cuInit", &[0]);
        app.use_device(0);
        Ok(app)
    }

    /// Makes a device's primary context current in this thread.
    pub fn use_device(&self, device: usize) -> usize {
        let mut context = 0usize;
        self.ok("cuDevicePrimaryCtxRetain", &[out(&mut context), device]);
        self.ok("cuCtxSetCurrent", &[context]);
        context
    }

    /// Address of a function of the library.
    pub fn symbol(&self, name: &str) -> usize {
        symbol(self.loaded.library, name)
    }

    /// Address of a function of the simulated driver.
    pub fn driver_symbol(&self, name: &str) -> usize {
        symbol(self.loaded.driver, name)
    }

    /// Calls an exported function with integers and pointers.
    pub fn call(&self, name: &str, args: &[usize]) -> Code {
        type Word = usize;
        #[rustfmt::skip]
        type Function = unsafe extern "C" fn(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word) -> Code;
        let mut a = [0; 11];
        a[..args.len()].copy_from_slice(args);
        // SAFETY: the symbol is a function of cuda.h, whose arguments are integers and pointers; those it does not have
        // are in registers, or on the stack, where it does not read. The pointers are the caller's.
        unsafe {
            let function = std::mem::transmute::<usize, Function>(self.symbol(name));
            function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10])
        }
    }

    /// The same; panics unless the call succeeds.
    pub fn ok(&self, name: &str, args: &[usize]) {
        assert_eq!(self.call(name, args), 0, "{name}");
    }

    /// Makes calls of the driver fail; see the simulated driver's `SIMCUDA_FAIL`.
    pub fn fail(&self, rules: &str) {
        let rules = CString::new(rules).unwrap_or_default();
        // SAFETY: the simulated driver's own function of this type.
        unsafe {
            let address = self.driver_symbol("simcuda_fail");
            let fail = std::mem::transmute::<usize, unsafe extern "C" fn(*const i8) -> Code>(address);
            assert_eq!(fail(rules.as_ptr()), 0, "{rules:?}");
        }
    }

    /// `cuMemAlloc`.
    pub fn alloc(&self, size: usize) -> u64 {
        let mut address = 0;
        self.ok("cuMemAlloc_v2", &[out(&mut address), size]);
        address
    }

    /// `cuMemFree`.
    pub fn free(&self, address: u64) {
        self.ok("cuMemFree_v2", &[address as usize]);
    }

    /// Fills words of memory.
    pub fn fill(&self, address: u64, value: u32, words: usize) {
        self.ok("cuMemsetD32_v2", &[address as usize, value as usize, words]);
    }

    /// Reads memory back.
    pub fn read(&self, address: u64, words: usize) -> Vec<u32> {
        let mut data = vec![0u32; words];
        self.ok("cuMemcpyDtoH_v2", &[data.as_mut_ptr() as usize, address as usize, words * 4]);
        data
    }

    fn control(&self) -> Result<ControlDir> {
        Ok(ControlDir::open(&self.loaded.control)?)
    }

    /// The control folder.
    pub fn control_folder(&self) -> &Path {
        &self.loaded.control
    }

    /// A conversation with the library, as the host.
    pub fn library(&self) -> Result<Library> {
        self.library_of(std::process::id() as i32)
    }

    /// The same with that of another process which shares the control folder.
    pub fn library_of(&self, pid: i32) -> Result<Library> {
        let control = self.control()?;
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(library) = Library::connect(&control, pid, pid)? {
                return Ok(library);
            }
            ensure!(Instant::now() < deadline, "the library does not listen");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether the library listens: it does unless it is parked.
    pub fn listens(&self) -> Result<bool> {
        let pid = std::process::id() as i32;
        // It may be about to close its listener.
        thread::sleep(Duration::from_millis(20));
        Ok(Library::connect(&self.control()?, pid, pid)?.is_some())
    }

    /// Takes the process's memory over. What was taken is returned even if the library then failed to let go of it.
    pub fn park(&self) -> Result<(Parked, Result<Timings>)> {
        self.park_of(std::process::id() as i32)
    }

    /// The same with another process.
    pub fn park_of(&self, pid: i32) -> Result<(Parked, Result<Timings>)> {
        let library = self.library_of(pid)?;
        let update = library.park(0, LIMIT, 0)?;
        ensure!(
            update.live == update.added.len() as u64,
            "{} of {} entries",
            update.added.len(),
            update.live
        );
        let entries = update.added.into_iter().map(|(e, fd)| (e.id, (e, fd))).collect();
        Ok((Parked { entries }, library.taken(LIMIT).context("taken")))
    }

    /// Gives it back.
    pub fn attach(&self, parked: &Parked) -> Result<Timings> {
        self.attach_of(std::process::id() as i32, parked)
    }

    /// The same with another process.
    pub fn attach_of(&self, pid: i32, parked: &Parked) -> Result<Timings> {
        let control = self.control()?;
        let listener = AttachListener::bind(&control)?;
        let library = listener.accept(&[(pid, pid)], Instant::now() + LIMIT)?;
        let entries: Vec<_> = parked.entries.values().map(|(e, fd)| (*e, fd.as_raw_fd())).collect();
        Ok(library.attach(&entries, LIMIT)?)
    }

    /// Parks and attaches; returns what was parked.
    pub fn round_trip(&self) -> Result<Parked> {
        let (parked, taken) = self.park()?;
        taken?;
        self.attach(&parked)?;
        Ok(parked)
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        // SAFETY: a plain system call.
        unsafe { libc::alarm(0) };
    }
}

/// The address of a value that a call writes to.
pub fn out<T>(value: &mut T) -> usize {
    ptr::from_mut(value) as usize
}
