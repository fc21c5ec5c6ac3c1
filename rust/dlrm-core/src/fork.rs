//! What must not be carried over a `fork`: threads, and locks that another thread may hold at that moment.
//!
//! The child of a `fork` has the parent's memory but only the forking thread. [`ForkLocal`] holds a value that every
//! process makes for itself: the child leaves the parent's value alone (it is leaked there, never dropped) and makes
//! its own on first use. After the first [`generation`], which [`Context::new`](crate::Context::new) asks for when the
//! engine is loaded, nothing here takes a lock.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

/// A value that each process makes for itself, on first use.
pub(crate) struct ForkLocal<T> {
    slot: ArcSwapOption<Stamped<T>>,
}

/// A value with the process generation that made it.
pub(crate) struct Stamped<T> {
    generation: u64,
    pub(crate) value: T,
}

impl<T> ForkLocal<T> {
    pub(crate) const fn new() -> Self {
        Self { slot: ArcSwapOption::const_empty() }
    }

    /// This process's value; `make` makes it when there is none yet or when `keep` refuses the present one.
    pub(crate) fn get_or_try_make<E>(
        &self,
        keep: impl Fn(&T) -> bool,
        make: impl Fn() -> Result<T, E>,
    ) -> Result<Arc<Stamped<T>>, E> {
        let generation = generation();
        loop {
            let present = self.slot.load();
            if let Some(stamped) = &*present
                && stamped.generation == generation
                && keep(&stamped.value)
            {
                return Ok(Arc::clone(stamped));
            }
            if let Some(stale) = present.as_ref().filter(|s| s.generation != generation) {
                // The parent's threads and lock holders are not here: joining or unlocking would wait for ever.
                std::mem::forget(Arc::clone(stale));
            }
            let value = make()?;
            let made = Arc::new(Stamped { generation, value });
            self.slot.compare_and_swap(&present, Some(made));
        }
    }
}

#[cfg(unix)]
mod imp {
    #![expect(unsafe_code, reason = "pthread_atfork has no safe wrapper")]

    use std::sync::Once;
    use std::sync::atomic::{AtomicU64, Ordering};

    static GENERATION: AtomicU64 = AtomicU64::new(0);
    static REGISTER: Once = Once::new();

    extern "C" fn in_child() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn generation() -> u64 {
        REGISTER.call_once(|| {
            // SAFETY: the handler only adds to an atomic, which is async-signal-safe, and is never unloaded: Python
            // does not unload extension modules.
            let failed = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
            assert_eq!(failed, 0, "pthread_atfork: out of memory");
        });
        GENERATION.load(Ordering::Relaxed)
    }
}

#[cfg(not(unix))]
mod imp {
    pub(super) fn generation() -> u64 {
        0
    }
}

/// How many forks lie between this process and the one that first called this.
pub(crate) fn generation() -> u64 {
    imp::generation()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_value_is_made_once_and_a_refused_one_again() {
        let local = ForkLocal::new();
        let made = |value| local.get_or_try_make(|_| true, || Ok::<_, ()>(value));
        assert_eq!(made(1).unwrap().value, 1);
        assert_eq!(made(2).unwrap().value, 1);
        let remade = local.get_or_try_make(|&v| v == 3, || Ok::<_, ()>(3));
        assert_eq!(remade.unwrap().value, 3);
    }

    #[test]
    fn a_failure_leaves_the_value() {
        let local = ForkLocal::new();
        assert!(local.get_or_try_make(|_: &i32| true, || Err("no")).is_err());
        assert!(local.get_or_try_make(|_| true, || Ok::<_, ()>(7)).is_ok());
    }
}
