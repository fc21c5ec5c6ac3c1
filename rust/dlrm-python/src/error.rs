//! Engine errors as Python exceptions.

use dlrm_core::Error;
use pyo3::PyErr;
use pyo3::exceptions::{
    PyFloatingPointError, PyIndexError, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyRuntimeError,
    PyValueError,
};

/// An engine error on its way to Python.
pub(crate) struct BindingError(pub(crate) Error);

impl From<Error> for BindingError {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<BindingError> for PyErr {
    fn from(BindingError(error): BindingError) -> Self {
        let message = error.to_string();
        match error {
            Error::Id { .. } => PyIndexError::new_err(message),
            Error::Argument { .. } => PyValueError::new_err(message),
            Error::NotFinite { .. } => PyFloatingPointError::new_err(message),
            Error::Memory { .. } => PyMemoryError::new_err(message),
            Error::Threads { .. } => PyOSError::new_err(message),
            Error::Reentered => PyRuntimeError::new_err(message),
            Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        }
    }
}
