//! What the engine runs on.

use dlrm_core::{Level, team, threads};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::BindingError;

#[pyfunction]
pub(crate) fn info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("simd", Level::current().map_err(BindingError)?.name())?;
    info.set_item("simd_available", Level::available().map(Level::name).collect::<Vec<_>>())?;
    info.set_item("num_threads", get_num_threads()?)?;
    info.set_item("threads_of", if team::joined().is_some() { "torch" } else { "dlrm_rs" })?;
    Ok(info)
}

#[pyfunction]
pub(crate) fn get_num_threads() -> PyResult<usize> {
    Ok(threads::get().map_err(BindingError)?)
}

#[pyfunction]
pub(crate) fn set_num_threads(n: i64) -> PyResult<()> {
    Ok(threads::set(n).map_err(BindingError)?)
}

#[pyfunction]
pub(crate) fn set_simd(level: &str) -> PyResult<()> {
    Level::from_name(level).map_err(BindingError)?.make_current();
    Ok(())
}
