//! A value that many calls read or one call changes, behind a lock that survives `fork`.
//!
//! The lock orders this crate's calls. It cannot order those who were given the address of the memory inside, as torch is
//! of a table's rows: they keep out of a running call by themselves.

#![expect(
    unsafe_code,
    reason = "the lock and the value are apart, so that a forked child can replace the lock alone"
)]

use std::cell::{RefCell, UnsafeCell};
use std::sync::{Arc, PoisonError, RwLock};

use crate::fork::{ForkLocal, Stamped};
use crate::{Error, Result};

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
        let made: std::result::Result<_, std::convert::Infallible> =
            self.lock.get_or_try_make(|_| true, || Ok(RwLock::new(())));
        match made {
            Ok(lock) => lock,
        }
    }

    /// Calls `f` with the value while no other call changes it.
    pub(crate) fn read<R>(&self, f: impl FnOnce(&T) -> R) -> Result<R> {
        let _entered = Entered::new(self.address())?;
        let lock = self.lock();
        let _held = lock.value.read().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: 1. every `&mut T` is made in `write` under the write lock, which `_held` excludes; 2. `lock` keeps
        // the lock alive; 3. it is this process's only lock of the value, since a process replaces it only right after
        // a fork, when it has no other thread that could hold the one before.
        Ok(f(unsafe { &*self.value.get() }))
    }

    /// Calls `f` with the value while no other call has it.
    pub(crate) fn write<R>(&self, f: impl FnOnce(&mut T) -> R) -> Result<R> {
        let _entered = Entered::new(self.address())?;
        let lock = self.lock();
        let _held = lock.value.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as in `read`; the write lock excludes every other reference.
        Ok(f(unsafe { &mut *self.value.get() }))
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

thread_local! {
    /// The values that this thread has in use, by address.
    static IN_USE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// This thread's use of a value. A second one would wait for the first for ever.
struct Entered(usize);

impl Entered {
    fn new(address: usize) -> Result<Self> {
        IN_USE.with_borrow_mut(|in_use| {
            if in_use.contains(&address) {
                return Err(Error::Reentered);
            }
            in_use.push(address);
            Ok(Self(address))
        })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        IN_USE.with_borrow_mut(|in_use| in_use.retain(|&address| address != self.0));
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
                scope.spawn(|| (0..1000).for_each(|_| count.write(|c| *c += 1).unwrap()));
            }
        });
        assert_eq!(count.read(|&c| c), Ok(4000));
    }

    #[test]
    fn a_thread_that_enters_twice_gets_an_error() {
        let value = Guarded::new(1);
        assert_eq!(value.read(|_| value.write(|_| ())), Ok(Err(Error::Reentered)));
        assert_eq!(value.write(|_| ()), Ok(()));
    }
}
