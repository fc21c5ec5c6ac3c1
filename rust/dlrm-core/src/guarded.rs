//! A value that many calls read or one call changes, behind a lock that survives `fork`.

#![expect(
    unsafe_code,
    reason = "the lock and the value are apart, so that a forked child can replace the lock alone"
)]

use std::cell::UnsafeCell;
use std::sync::{Arc, PoisonError, RwLock};

use crate::fork::{ForkLocal, Stamped};

/// A readers-writer lock whose state a forked child does not inherit: a lock that another thread of the parent held
/// at the `fork` is free in the child, whose copy of the value is then as that thread left it.
pub(crate) struct Guarded<T> {
    lock: ForkLocal<RwLock<()>>,
    value: UnsafeCell<T>,
}

// SAFETY: `read` shares `&T` and `write` lends `&mut T` among threads, as `RwLock<T>` does, under its bounds.
unsafe impl<T: Send + Sync> Sync for Guarded<T> {}

impl<T> Guarded<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { lock: ForkLocal::new(), value: UnsafeCell::new(value) }
    }

    fn lock(&self) -> Arc<Stamped<RwLock<()>>> {
        let made: Result<_, std::convert::Infallible> =
            self.lock.get_or_try_make(|_| true, || Ok(RwLock::new(())));
        match made {
            Ok(lock) => lock,
        }
    }

    /// Calls `f` with the value while no other call changes it.
    pub(crate) fn read<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        let lock = self.lock();
        let _held = lock.value.read().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: 1. every `&mut T` is made in `write` under the write lock, which `_held` excludes; 2. `lock` keeps
        // the lock alive; 3. it is this process's only lock of the value, since a process replaces it only right after
        // a fork, when it has no other thread that could hold the one before.
        f(unsafe { &*self.value.get() })
    }

    /// Calls `f` with the value while no other call has it.
    pub(crate) fn write<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let lock = self.lock();
        let _held = lock.value.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as in `read`; the write lock excludes every other reference.
        f(unsafe { &mut *self.value.get() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_exclude_each_other() {
        let count = Guarded::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| count.write(|c| *c += 1)));
            }
        });
        assert_eq!(count.read(|&c| c), 4000);
    }
}
