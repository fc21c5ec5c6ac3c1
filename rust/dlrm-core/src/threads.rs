//! Who runs the parts of a large call: the team that this process has joined (see `team`), where that is large enough, else
//! a pool.
//!
//! The pool belongs to this process (see `fork`) and to nobody else: it is not rayon's global one. The calling thread
//! works too; the others take parts from the same counter, so uneven parts even out. Which thread runs which part
//! never shows in a result.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::available_parallelism;

use rayon_core::{ThreadPool, ThreadPoolBuilder};

use crate::float_environment::FloatEnvironment;
use crate::fork::{ForkLocal, Stamped};
use crate::team::{self, OpenMp};
use crate::{Context, Error, Result};

/// Environment variable that sets the number of threads.
pub const ENVIRONMENT: &str = "DLRM_RS_NUM_THREADS";

const MAX: usize = 1024;

/// Work below this many cache lines (64 bytes) runs on the calling thread: what others save is lost in waiting for them.
const SMALL: usize = 4096;

static POOL: ForkLocal<ThreadPool> = ForkLocal::new();

/// The chosen number of threads; 0 where none is.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Threads that a large call uses: as [`set`], else as the environment says, else as many as the team has that this
/// process has [joined](crate::team::join), else the CPUs this process may use.
pub fn get() -> Result<usize> {
    static IN_ENVIRONMENT: OnceLock<Option<usize>> = OnceLock::new();
    static CPUS: OnceLock<usize> = OnceLock::new();

    if let n @ 1.. = CHOSEN.load(Ordering::Relaxed) {
        return Ok(n);
    }
    let in_environment = if let Some(&n) = IN_ENVIRONMENT.get() {
        n
    } else {
        let n = from_environment()?;
        *IN_ENVIRONMENT.get_or_init(|| n)
    };
    let cpus = || *CPUS.get_or_init(|| available_parallelism().map_or(1, usize::from));
    let n = in_environment.or_else(|| team::joined().map(OpenMp::size)).unwrap_or_else(cpus);
    Ok(n.min(MAX))
}

/// Uses `n` threads for large calls from now on.
pub fn set(n: i64) -> Result<()> {
    CHOSEN.store(check(n, "n", n)?, Ordering::Relaxed);
    Ok(())
}

fn from_environment() -> Result<Option<usize>> {
    let Some(text) = std::env::var_os(ENVIRONMENT) else {
        return Ok(None);
    };
    let n = text.to_str().and_then(|t| t.trim().parse().ok());
    check(n.unwrap_or(0), ENVIRONMENT, text.display()).map(Some)
}

fn check(n: i64, argument: &str, got: impl std::fmt::Display) -> Result<usize> {
    if (1..=MAX as i64).contains(&n) {
        Ok(n as usize)
    } else {
        let expected = format_args!("a number of threads from 1 to {MAX}");
        Err(Error::argument(argument, expected, got))
    }
}

/// Runs `part(0)` to `part(parts - 1)`, each once, on the threads of `ctx`; `lines` is the cache lines they touch in all.
pub(crate) fn for_each(ctx: &Context, parts: usize, lines: usize, part: impl Fn(usize) + Sync) -> Result<()> {
    let threads = if lines < SMALL { 1 } else { ctx.threads.min(parts) };
    let _standard = FloatEnvironment::standard();
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let take = || {
        let i = next.fetch_add(1, Ordering::Relaxed);
        (i < parts && !stop.load(Ordering::Relaxed)).then_some(i)
    };
    let work = || {
        while let Some(i) = take() {
            part(i);
        }
    };
    let work_and_poll = || {
        while let Some(i) = take() {
            part(i);
            if (ctx.poll)() {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    if threads <= 1 {
        work_and_poll();
    } else if let Some(team) = team::joined().filter(|team| team.size() >= threads) {
        team.run(threads - 1, &work, &work_and_poll);
    } else {
        pool(ctx.threads - 1)?.value.in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| work());
            }
            work_and_poll();
        });
    }
    if stop.into_inner() { Err(Error::Interrupted) } else { Ok(()) }
}

/// What `part(0)` to `part(parts - 1)` return, run as by [`for_each`].
pub(crate) fn map<T: Send + Sync>(
    ctx: &Context,
    parts: usize,
    lines: usize,
    part: impl Fn(usize) -> T + Sync,
) -> Result<Vec<T>> {
    let made: Vec<_> = (0..parts).map(|_| OnceLock::new()).collect();
    for_each(ctx, parts, lines, |i| drop(made[i].set(part(i))))?;
    Ok(made.into_iter().map(|one| one.into_inner().expect("every part has run")).collect())
}

/// This process's pool, of at least `workers` threads.
fn pool(workers: usize) -> Result<Arc<Stamped<ThreadPool>>> {
    POOL.get_or_try_make(
        |pool| pool.current_num_threads() >= workers,
        || {
            ThreadPoolBuilder::new()
                .num_threads(workers)
                .thread_name(|i| format!("dlrm-rs-{i}"))
                .build()
                .map_err(|error| Error::Threads { threads: workers, reason: error.to_string() })
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(threads: usize) -> Context<'static> {
        Context { threads, ..Context::default() }
    }

    #[test]
    fn every_part_runs_once() {
        for threads in [1, 2, 3, 8] {
            let counts: Vec<_> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            for_each(&context(threads), 1000, usize::MAX, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_small_call_stays_on_the_calling_thread() {
        let here = std::thread::current().id();
        for_each(&context(8), 100, SMALL - 1, |_| {
            assert_eq!(std::thread::current().id(), here);
        })
        .unwrap();
    }

    #[test]
    fn poll_ends_the_call() {
        let ctx = Context { poll: &|| true, ..context(2) };
        let done = AtomicUsize::new(0);
        let ended = for_each(&ctx, 1_000_000, usize::MAX, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ended, Err(Error::Interrupted));
        assert!(done.into_inner() < 1_000_000);
    }

    #[test]
    fn a_number_of_threads_is_checked() {
        for n in [-1, 0, MAX as i64 + 1] {
            assert!(set(n).unwrap_err().to_string().contains("from 1 to 1024"));
        }
    }
}
