//! The real driver library: found and loaded at the first CUDA call.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs};

use phos_protocol::paths;

use crate::cuda::Api;
use crate::prefault::LinkMap;

struct Library(*mut c_void);
// SAFETY: a dlopen handle may be used from any thread, and is never closed.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// Whether `PHOS_LOG` is set.
pub fn verbose() -> bool {
    static VERBOSE: OnceLock<bool> = OnceLock::new();
    *VERBOSE.get_or_init(|| env::var_os("PHOS_LOG").is_some_and(|v| !v.is_empty()))
}

/// Places where the driver may be, best first: named outright, mounted by phos-runc, then where the loader
/// would look if this library did not stand in front of it.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = env::var_os(paths::REAL_LIBCUDA_ENV).filter(|p| !p.is_empty()) {
        return vec![path.into()];
    }
    let mut found = vec![PathBuf::from(paths::REAL_LIBCUDA)];
    let listed = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = listed.as_bytes().split(|b| *b == b':').filter(|f| !f.is_empty());
    found.extend(folders.map(|f| Path::new(OsStr::from_bytes(f)).join("libcuda.so.1")));
    // The loader's cache holds paths as NUL-terminated strings; the format around them does not matter here.
    let cache = fs::read("/etc/ld.so.cache").unwrap_or_default();
    let paths = cache.split(|b| *b == 0).filter(|s| s.starts_with(b"/") && s.ends_with(b"/libcuda.so.1"));
    found.extend(paths.map(|p| PathBuf::from(OsStr::from_bytes(p))));
    for folder in ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"] {
        found.push(Path::new(folder).join("libcuda.so.1"));
    }
    found
}

/// Device and inode of the file this code was loaded from.
fn own_file() -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    // SAFETY: an all-zero Dl_info is valid.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the address is one of this library's; `info` is valid for writing.
    if unsafe { libc::dladdr(own_file as *const c_void, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr gave a NUL-terminated string.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let meta = fs::metadata(OsStr::from_bytes(path.to_bytes())).ok()?;
    Some((meta.dev(), meta.ino()))
}

fn open() -> Option<Library> {
    use std::os::unix::fs::MetadataExt;
    let own = own_file();
    for path in candidates() {
        let Ok(meta) = fs::metadata(&path) else { continue };
        if Some((meta.dev(), meta.ino())) == own {
            continue;
        }
        let Ok(name) = CString::new(path.as_os_str().as_bytes()) else { continue };
        // By its absolute path the loader takes it for another library than this one, though both have the
        // same SONAME. SAFETY: loading the driver runs its initialisers, as it would without this library.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            crate::log!("driver {}", path.display());
            return Some(Library(handle));
        }
    }
    crate::log!("no driver library found");
    None
}

fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY.get_or_init(open).as_ref()
}

/// The driver's function of this name, null if there is none.
pub fn find(name: &CStr) -> *mut c_void {
    match library() {
        // SAFETY: the handle is valid and `name` NUL-terminated.
        Some(library) => unsafe { libc::dlsym(library.0, name.as_ptr()) },
        None => std::ptr::null_mut(),
    }
}

/// What the loader knows of a library; `None` if it does not say.
///
/// # Safety
/// `handle` is of a library that is never unloaded.
pub unsafe fn link_map(handle: *mut c_void) -> Option<&'static LinkMap> {
    let mut map: *const LinkMap = std::ptr::null();
    // SAFETY: the handle is valid; `map` is valid for writing a pointer, which lives as long as the library.
    unsafe {
        match libc::dlinfo(handle, libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) {
            0 => map.as_ref(),
            _ => None,
        }
    }
}

/// What the loader knows of the driver.
pub fn map() -> Option<&'static LinkMap> {
    // SAFETY: the driver is never unloaded.
    library().and_then(|l| unsafe { link_map(l.0) })
}

/// Whether there is a driver at all.
pub fn present() -> bool {
    library().is_some()
}

/// The functions this library calls itself.
pub fn api() -> &'static Api {
    static API: OnceLock<Api> = OnceLock::new();
    // SAFETY: `find` asks the driver's own symbol table.
    API.get_or_init(|| unsafe { Api::load(find) })
}
