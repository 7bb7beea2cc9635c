//! Names that both sides must agree on.

/// Folder inside the container where the control sockets live: a bind mount of a folder of the host.
pub const CONTROL_DIR: &str = "/run/phos";

/// Environment variable that replaces [`CONTROL_DIR`] (a program that runs outside a container).
pub const CONTROL_DIR_ENV: &str = "PHOS_CONTROL_DIR";

/// The machine's real CUDA driver library inside the container, a bind mount below [`CONTROL_DIR`].
pub const REAL_LIBCUDA: &str = "/run/phos/libcuda.so.real";

/// Environment variable that replaces [`REAL_LIBCUDA`].
pub const REAL_LIBCUDA_ENV: &str = "PHOS_REAL_LIBCUDA";

/// Where `LD_PRELOAD` mode puts the library inside the container.
pub const PRELOAD_LIBRARY: &str = "/run/phos/libphos.so";

/// The host's listening socket, in the control folder, while a process is to be attached again.
pub const HOST_SOCKET: &str = "host.sock";

/// A file of the host's in the control folder: how many bytes of host memory the container may still take, as text.
pub const HEADROOM: &str = "headroom";

/// The library's listening socket, in the control folder. `pid` is the process id in the process's own
/// PID namespace.
pub fn library_socket(pid: i32) -> String {
    format!("{pid}.sock")
}

/// Where the library of process `pid` gives out the memory that the process shares by CUDA IPC, likewise. Only libraries
/// of the same container talk there.
pub fn sharing_socket(pid: i32) -> String {
    format!("{pid}.ipc")
}
