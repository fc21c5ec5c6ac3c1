//! Where torch's threads are.

#![expect(unsafe_code, reason = "C functions, found by their names")]

use dlrm_core::team;

/// Lets large calls run on the threads of torch's operators, if torch is loaded and has those of an OpenMP runtime.
pub(crate) fn join_torch() {
    #[cfg(unix)]
    if !is_forked()
        && let Some(runtime) = of_library(c"libtorch_cpu.so")
    {
        // SAFETY: the functions come by their names from the one runtime that torch is linked with; torch stays loaded, as
        // Python does not unload extension modules.
        unsafe { team::join(runtime) };
    }
}

/// Whether this process is the child of a `fork` that has run no program since: a runtime that its parent used would wait
/// for threads that are not here.
#[cfg(unix)]
fn is_forked() -> bool {
    const FORKED_NO_EXEC: u64 = 0x40; // of Linux; the flags are the seventh field after the name in parentheses
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let flags =
        stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & FORKED_NO_EXEC != 0)
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
    // torch's own answer first, `int at::get_num_threads()`: OpenMP's default is each thread's own, and torch sets it in a
    // thread only when that first asks.
    let max_threads = find(c"_ZN2at15get_num_threadsEv").or_else(|| find(c"omp_get_max_threads"))?;
    let (parallel, thread_num) = (find(c"GOMP_parallel")?, find(c"omp_get_thread_num")?);
    // SAFETY: functions of these names have these types in every OpenMP runtime and every torch.
    Some(unsafe {
        team::OpenMp {
            parallel: transmute::<*mut c_void, team::Parallel>(parallel),
            max_threads: transmute::<*mut c_void, team::Number>(max_threads),
            thread_num: transmute::<*mut c_void, team::Number>(thread_num),
        }
    })
}
