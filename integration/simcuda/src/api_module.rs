//! Modules.

use std::ffi::{CStr, c_char, c_void};

use crate::api_system::{export, put, text};
use crate::code::{INVALID_VALUE, Result};
use crate::{context, module};

type Handle = *mut c_void;

fn load(to: *mut Handle, image: *const c_void) -> Result<()> {
    context::usable()?;
    if image.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: PTX is NUL-terminated text; anything else (a cubin) is refused by what it does not contain.
    let ptx = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy();
    put(to, module::load(&ptx)? as Handle)
}

export! {
    fn cuModuleLoadData(to: *mut Handle, image: *const c_void) { load(to, image) }
    fn cuModuleLoadDataEx(to: *mut Handle, image: *const c_void, _n: u32, _options: *mut c_void, _values: *mut c_void) {
        load(to, image)
    }
    fn cuModuleUnload(handle: Handle) { module::unload(handle as usize) }
    fn cuModuleGetFunction(to: *mut Handle, handle: Handle, name: *const c_char) {
        put(to, module::function(handle as usize, text(name)?)? as Handle)
    }
    fn cuModuleGetGlobal_v2(address: *mut u64, size: *mut usize, handle: Handle, name: *const c_char) {
        let (at, len) = module::variable(handle as usize, text(name)?)?;
        if !size.is_null() {
            put(size, len as usize)?;
        }
        put(address, at)
    }
}
