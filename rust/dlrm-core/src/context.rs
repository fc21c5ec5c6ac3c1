//! On what a call runs.

use crate::{Level, Result, fork, threads};

/// On what a call runs: the level, the number of threads, and who may end it early.
///
/// None of these changes a result.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The instruction set of the kernels.
    pub level: Level,
    /// Threads that a large call uses, the calling one included; small calls run on the calling thread.
    pub threads: usize,
    /// Asked by the calling thread every few hundred microseconds of a long call; `true` ends the call with
    /// [`Error::Interrupted`](crate::Error::Interrupted), unless it has begun to write to a table.
    pub poll: &'a dyn Fn() -> bool,
}

impl Context<'_> {
    /// The level and threads chosen for this process; nobody ends a call.
    pub fn new() -> Result<Self> {
        fork::generation(); // from now on forks are counted
        Ok(Self { level: Level::current()?, threads: threads::get()?, poll: &never })
    }

    /// The same without `poll`, for work that must not stop half-way.
    pub(crate) fn uninterrupted(&self) -> Self {
        Self { poll: &never, ..*self }
    }
}

impl Default for Context<'_> {
    /// The best level of this CPU, on one thread.
    fn default() -> Self {
        Self { level: Level::best(), threads: 1, poll: &never }
    }
}

fn never() -> bool {
    false
}
