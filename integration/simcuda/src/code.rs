//! CUDA's error codes, as many as are used here. Source: cuda.h.

/// `CUresult`.
pub type Code = u32;

macro_rules! codes {
    ($($name:ident = $value:literal, $cuda:literal;)*) => {
        $(pub const $name: Code = $value;)*
        /// The code's name, NUL-terminated.
        pub fn name(code: Code) -> Option<&'static std::ffi::CStr> {
            match code {
                $($value => std::ffi::CStr::from_bytes_with_nul(concat!($cuda, "\0").as_bytes()).ok(),)*
                _ => None,
            }
        }
    };
}

codes! {
    SUCCESS = 0, "CUDA_SUCCESS";
    INVALID_VALUE = 1, "CUDA_ERROR_INVALID_VALUE";
    OUT_OF_MEMORY = 2, "CUDA_ERROR_OUT_OF_MEMORY";
    NOT_INITIALIZED = 3, "CUDA_ERROR_NOT_INITIALIZED";
    NO_DEVICE = 100, "CUDA_ERROR_NO_DEVICE";
    INVALID_DEVICE = 101, "CUDA_ERROR_INVALID_DEVICE";
    INVALID_IMAGE = 200, "CUDA_ERROR_INVALID_IMAGE";
    INVALID_CONTEXT = 201, "CUDA_ERROR_INVALID_CONTEXT";
    INVALID_HANDLE = 400, "CUDA_ERROR_INVALID_HANDLE";
    ILLEGAL_STATE = 401, "CUDA_ERROR_ILLEGAL_STATE";
    NOT_FOUND = 500, "CUDA_ERROR_NOT_FOUND";
    NOT_READY = 600, "CUDA_ERROR_NOT_READY";
    ILLEGAL_ADDRESS = 700, "CUDA_ERROR_ILLEGAL_ADDRESS";
    PEER_ENABLED = 704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED";
    PEER_NOT_ENABLED = 705, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED";
    NOT_SUPPORTED = 801, "CUDA_ERROR_NOT_SUPPORTED";
}

/// A result in the driver's own terms.
pub type Result<T> = std::result::Result<T, Code>;

/// What an exported function returns.
pub fn of(result: Result<()>) -> Code {
    result.err().unwrap_or(SUCCESS)
}
