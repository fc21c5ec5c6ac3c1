//! The threads of another library's OpenMP, lent to large calls.
//!
//! torch's operators run on such threads. One that has nothing left to do keeps its core busy for some milliseconds, so as
//! not to miss the next operator, and threads of our own would have to wait for the core: on 2 cores a lookup right after
//! an operator takes twice as long on them. So calls go to the threads that are there.
//!
//! The entries are those of GCC's runtime, which LLVM's and Intel's have as well (<https://gcc.gnu.org/onlinedocs/libgomp>).

#![expect(unsafe_code, reason = "C functions, and a context that goes through them as a pointer")]

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock};

use crate::float_environment::FloatEnvironment;
use crate::fork;

/// What every thread of a team calls.
type Member = extern "C" fn(*mut c_void);

/// `GOMP_parallel(function, data, num_threads, flags)`: every thread of a team, of the default size where `num_threads` is 0,
/// calls `function(data)`; the calling thread is one of them, and number 0.
pub type Parallel = unsafe extern "C" fn(Member, *mut c_void, c_uint, c_uint);

/// The default size of a team, as `omp_get_max_threads()` tells it, or `omp_get_thread_num()`, which of its team the caller is.
pub type Number = unsafe extern "C" fn() -> c_int;

/// The entries of an OpenMP runtime.
#[derive(Clone, Copy, Debug)]
pub struct OpenMp {
    /// `GOMP_parallel`.
    pub parallel: Parallel,
    /// `omp_get_max_threads`, or what the owner of the threads has in its place.
    pub max_threads: Number,
    /// `omp_get_thread_num`.
    pub thread_num: Number,
}

/// The team of this process, with the generation that joined it: its threads are not in the child of a `fork`.
static JOINED: OnceLock<(u64, OpenMp)> = OnceLock::new();

/// Lets large calls run on the threads of `runtime` from now on, where it has enough; the first runtime stays.
///
/// # Safety
/// The functions are those of the names that are said in [`OpenMp`], of one runtime, and are never unloaded.
pub unsafe fn join(runtime: OpenMp) {
    JOINED.get_or_init(|| (fork::generation(), runtime));
}

/// The team that this process has joined.
pub fn joined() -> Option<&'static OpenMp> {
    JOINED.get().filter(|(generation, _)| *generation == fork::generation()).map(|(_, runtime)| runtime)
}

impl OpenMp {
    /// How many threads a team has, for this caller.
    #[must_use]
    pub fn size(&self) -> usize {
        // SAFETY: by `join`, the function of that name, which may be called at any time.
        unsafe { (self.max_threads)() }.max(1) as usize
    }

    /// Calls `here` on the calling thread and `work` on up to `others` more of the team, and returns when all have
    /// returned. A panic of any goes on in the caller.
    pub(crate) fn run(&self, others: usize, work: &(impl Fn() + Sync), here: &impl Fn()) {
        let job = Job { team: *self, others, work, here, panic: Mutex::new(None) };
        let data = (&raw const job).cast_mut().cast();
        // SAFETY: by `join`, the function of that name; it returns when every member has, so `job` outlives its uses.
        unsafe { (self.parallel)(member, data, 0, 0) };
        if let Ok(Some(panic)) = job.panic.into_inner() {
            resume_unwind(panic);
        }
    }
}

struct Job<'a> {
    team: OpenMp,
    others: usize,
    work: &'a (dyn Fn() + Sync),
    /// For the calling thread alone.
    here: &'a dyn Fn(),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

extern "C" fn member(data: *mut c_void) {
    // SAFETY: `OpenMp::run` passes a `Job` that lives until every member has returned. All of it but `here` is shared by
    // reference only, and may be; `here` is touched by number 0 alone, the thread that made it.
    let job = unsafe { &*data.cast::<Job>() };
    // SAFETY: by `join`, the function of that name, which may be called at any time.
    let number = unsafe { (job.team.thread_num)() } as usize;
    if number > job.others {
        return;
    }
    let _standard = FloatEnvironment::standard();
    // Unwinding must not reach the runtime's frames.
    let outcome = catch_unwind(AssertUnwindSafe(|| if number == 0 { (job.here)() } else { (job.work)() }));
    if let (Err(panic), Ok(mut first)) = (outcome, job.panic.lock()) {
        first.get_or_insert(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    const SIZE: usize = 3;

    thread_local!(static NUMBER: Cell<c_int> = const { Cell::new(0) });

    struct Data(*mut c_void);
    // SAFETY: what OpenMP does with a member's data, it may do here.
    unsafe impl Sync for Data {}

    /// A runtime whose teams are made for every call.
    const PLAIN: OpenMp = OpenMp { parallel, max_threads, thread_num };

    unsafe extern "C" fn parallel(function: Member, data: *mut c_void, _: c_uint, _: c_uint) {
        let data = &Data(data);
        thread::scope(|scope| {
            for number in 1..SIZE as c_int {
                scope.spawn(move || {
                    NUMBER.set(number);
                    function(data.0);
                });
            }
            function(data.0);
        });
    }

    unsafe extern "C" fn max_threads() -> c_int {
        SIZE as c_int
    }

    unsafe extern "C" fn thread_num() -> c_int {
        NUMBER.get()
    }

    #[test]
    fn as_many_work_as_are_asked_for() {
        for others in 0..5 {
            let (here, elsewhere) = (Cell::new(0), AtomicUsize::new(0));
            let caller = thread::current().id();
            let work = || {
                assert_ne!(thread::current().id(), caller);
                elsewhere.fetch_add(1, Ordering::Relaxed);
            };
            PLAIN.run(others, &work, &|| here.set(here.get() + 1));
            assert_eq!((here.get(), elsewhere.into_inner()), (1, others.min(SIZE - 1)));
        }
        assert_eq!(PLAIN.size(), SIZE);
    }

    #[test]
    fn a_panic_goes_on_in_the_caller_when_all_have_returned() {
        let done = AtomicUsize::new(0);
        let work = || {
            done.fetch_add(1, Ordering::Relaxed);
            panic!("of a member");
        };
        let panic = catch_unwind(AssertUnwindSafe(|| PLAIN.run(2, &work, &|| ()))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"of a member"));
        assert_eq!(done.into_inner(), 2);
    }

    #[test]
    fn members_compute_as_the_standard_says() {
        let work = || {
            let halved_and_doubled = std::hint::black_box(f32::MIN_POSITIVE) / 2.0 * 2.0;
            assert_eq!(halved_and_doubled.to_bits(), f32::MIN_POSITIVE.to_bits());
        };
        PLAIN.run(2, &work, &work);
    }
}
