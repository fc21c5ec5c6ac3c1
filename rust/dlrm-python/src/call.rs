//! How the engine is called: without the GIL, and so that Ctrl-C ends a long call.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use dlrm_core::{Context, Error, Result};
use pyo3::prelude::*;

use crate::error::BindingError;

/// Between two looks at the signals; a look takes the GIL.
const PERIOD: Duration = Duration::from_millis(50);

/// Runs `f` without the GIL on this process's level and threads. A Python signal handler that raises ends it.
pub(crate) fn call<R: Send>(py: Python<'_>, f: impl FnOnce(&Context<'_>) -> Result<R> + Send) -> PyResult<R> {
    py.detach(|| {
        let signals = Signals { looked: Cell::new(Instant::now()), raised: RefCell::new(None) };
        let poll = || signals.raised();
        let context = Context { poll: &poll, ..Context::new().map_err(BindingError)? };
        match (f(&context), signals.raised.take()) {
            (Err(Error::Interrupted), Some(raised)) => Err(raised),
            (result, _) => Ok(result.map_err(BindingError)?),
        }
    })
}

struct Signals {
    looked: Cell<Instant>,
    raised: RefCell<Option<PyErr>>,
}

impl Signals {
    /// Whether a signal handler raised; Python runs them only when asked, and only on the main thread. A Python that is
    /// shutting down is not asked.
    fn raised(&self) -> bool {
        if self.looked.get().elapsed() < PERIOD {
            return false;
        }
        let raised = Python::try_attach(|py| py.check_signals().err()).flatten();
        self.looked.set(Instant::now());
        let any = raised.is_some();
        *self.raised.borrow_mut() = raised;
        any
    }
}
