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

/// Times that the engine asks for each look at the clock, which takes longer than a table's rows of a small call do.
const ASKED: u32 = 8;

/// Runs `f` without the GIL on this process's level and threads. A Python signal handler that raises ends it.
pub(crate) fn call<R: Send>(py: Python<'_>, f: impl FnOnce(&Context<'_>) -> Result<R> + Send) -> PyResult<R> {
    py.detach(|| {
        let signals =
            Signals { looked: Cell::new(Instant::now()), asked: Cell::new(0), raised: RefCell::new(None) };
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
    looked: Cell<Instant>,
    asked: Cell<u32>,
    raised: RefCell<Option<PyErr>>,
}

impl Signals {
    /// Whether a signal handler raised; Python runs them only when asked, and only on the main thread. A Python that is
    /// shutting down is not asked.
    fn raised(&self) -> bool {
        self.asked.set(self.asked.get().wrapping_add(1));
        if !self.asked.get().is_multiple_of(ASKED) || self.looked.get().elapsed() < PERIOD {
            return false;
        }
        let raised = Python::try_attach(|py| py.check_signals().err()).flatten();
        self.looked.set(Instant::now());
        let any = raised.is_some();
        *self.raised.borrow_mut() = raised;
        any
    }
}
