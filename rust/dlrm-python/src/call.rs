//! How the engine is called: without the GIL, and so that Ctrl-C ends a long call.
//!
//! Whatever takes the lock of tables goes through [`call`]. A call that holds the lock may wait for the GIL, to look at
//! the signals; who waited for the lock with the GIL would wait for ever.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use dlrm_core::{Context, Error, Result};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::BindingError;

/// Between two looks at the signals; a look takes the GIL.
const PERIOD: Duration = Duration::from_millis(50);

/// Where the engine asks again within this, it is answered a few times without a look at the clock, which takes as long as
/// some rows do.
const BRIEF: Duration = Duration::from_millis(1);
const UNSEEN: u32 = 7;

/// Runs `f` without the GIL on this process's level and threads. A Python signal handler that raises ends it.
pub(crate) fn call<R: Send>(py: Python<'_>, f: impl FnOnce(&Context<'_>) -> Result<R> + Send) -> PyResult<R> {
    py.detach(|| {
        let signals = Signals::new();
        let poll = || signals.raised();
        let context = Context { poll: &poll, ..Context::new().map_err(BindingError)? };
        let result = catch_unwind(AssertUnwindSafe(|| f(&context))).map_err(failed)?;
        match (result, signals.raised.take()) {
            (Err(Error::Interrupted), Some(raised)) => Err(raised),
            (result, _) => Ok(result.map_err(BindingError)?),
        }
    })
}

/// The engine panics only when arrays that it reads change meanwhile; no table has been written then.
fn failed(panic: Box<dyn Any + Send>) -> PyErr {
    let text = panic.downcast::<String>().map_or_else(|_| "panic".to_owned(), |text| *text);
    PyRuntimeError::new_err(format!(
        "expected indices and offsets to stay as they are during a call, and the engine failed: {text}"
    ))
}

struct Signals {
    /// When signals were looked at.
    looked: Cell<Instant>,
    /// When the clock was.
    seen: Cell<Instant>,
    /// Questions that are answered without.
    unseen: Cell<u32>,
    raised: RefCell<Option<PyErr>>,
}

impl Signals {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            looked: Cell::new(now),
            seen: Cell::new(now),
            unseen: Cell::new(0),
            raised: RefCell::new(None),
        }
    }

    /// Whether a signal handler raised; Python runs them only when asked, and only on the main thread. A Python that is
    /// shutting down is not asked.
    fn raised(&self) -> bool {
        if let Some(left) = self.unseen.get().checked_sub(1) {
            self.unseen.set(left);
            return false;
        }
        let now = Instant::now();
        let brief = now.duration_since(self.seen.replace(now)) < BRIEF;
        self.unseen.set(if brief { UNSEEN } else { 0 });
        if now.duration_since(self.looked.get()) < PERIOD {
            return false;
        }
        let raised = Python::try_attach(|py| py.check_signals().err()).flatten();
        self.looked.set(Instant::now());
        let any = raised.is_some();
        *self.raised.borrow_mut() = raised;
        any
    }
}
