//! The Python module `dlrm_rs._dlrm_rs`: converts arguments, releases the GIL, maps errors; computes nothing.
//!
//! `python/dlrm_rs/_dlrm_rs.pyi` documents it.

mod arrays;
mod call;
mod error;
mod homes;
mod openmp;
mod prepared;
mod runtime;
mod table_rows;
mod table_set;
mod tensors;
mod views;

#[pyo3::pymodule]
mod _dlrm_rs {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::homes::Homes;
    #[pymodule_export]
    use crate::prepared::{Overlap, Prepared};
    #[pymodule_export]
    use crate::runtime::{get_num_threads, info, set_num_threads, set_simd};
    #[pymodule_export]
    use crate::table_rows::{Spare, TableRows};
    #[pymodule_export]
    use crate::table_set::TableSet;
    #[pymodule_export]
    use crate::tensors::take_tensors;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::openmp::join_torch();
        // A bad environment variable is told now, not at the first lookup.
        dlrm_core::Context::new().map_err(crate::error::BindingError)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
