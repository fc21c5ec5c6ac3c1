//! Where the weights of tables are to be, and whether they are still there.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::tensors::view;

#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
pub(crate) struct Homes(Vec<Home>);

/// Address, elements and strides of a weight: of two dimensions, these tell every other place, shape or order apart.
struct Home {
    address: usize,
    elements: usize,
    strides: Vec<i64>,
}

#[pymethods]
impl Homes {
    #[new]
    fn new(addresses: Vec<usize>, elements: Vec<usize>, strides: Vec<Vec<i64>>) -> Self {
        let homes = addresses.into_iter().zip(elements).zip(strides);
        Self(homes.map(|((address, elements), strides)| Home { address, elements, strides }).collect())
    }

    /// Whether the weight of every holder is at its home.
    fn have(&self, py: Python<'_>, holders: &Bound<'_, PyList>) -> PyResult<bool> {
        let name = intern!(py, "weight");
        for (home, holder) in self.0.iter().zip(holders) {
            // One of a class of its own may answer otherwise than a dictionary.
            let Ok(holder) = holder.cast_exact::<PyDict>() else { return Ok(false) };
            match holder.get_item(name)? {
                Some(weight) if home.has(&weight) => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }
}

impl Home {
    fn has(&self, weight: &Bound<'_, PyAny>) -> bool {
        let here = view(weight, |view| {
            view.address == self.address && view.len() == self.elements && view.strides == self.strides
        });
        matches!(here, Ok(Some(true)))
    }
}
