//! Where torch's threads are.

#![expect(unsafe_code, reason = "C functions, found by their names")]

use dlrm_core::team;

/// Lets large calls run on the threads of torch's operators, if torch is loaded and has those of an OpenMP runtime.
pub(crate) fn join_torch() {
    #[cfg(unix)]
    if let Some(runtime) = of_library(c"libtorch_cpu.so") {
        // SAFETY: the functions come by their names from the one runtime that torch is linked with; torch stays loaded, as
        // Python does not unload extension modules.
        unsafe { team::join(runtime) };
    }
}

/// The runtime that a library is linked with, if the library is loaded.
#[cfg(unix)]
fn of_library(name: &std::ffi::CStr) -> Option<team::OpenMp> {
    use std::ffi::{CStr, c_void};
    use std::mem::transmute;

    // SAFETY: the name ends with a zero; nothing is loaded, and so no initializer runs.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    if library.is_null() {
        return None;
    }
    // Looks in the library, then in what it is linked with.
    let find = |symbol: &CStr| {
        // SAFETY: the library is open, the name ends with a zero.
        let address = unsafe { libc::dlsym(library, symbol.as_ptr()) };
        (!address.is_null()).then_some(address)
    };
    let (parallel, max_threads, thread_num) =
        (find(c"GOMP_parallel")?, find(c"omp_get_max_threads")?, find(c"omp_get_thread_num")?);
    // SAFETY: functions of these names have these types in every OpenMP runtime.
    Some(unsafe {
        team::OpenMp {
            parallel: transmute::<*mut c_void, team::Parallel>(parallel),
            max_threads: transmute::<*mut c_void, team::Number>(max_threads),
            thread_num: transmute::<*mut c_void, team::Number>(thread_num),
        }
    })
}
