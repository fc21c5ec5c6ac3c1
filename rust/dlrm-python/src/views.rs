//! Memory of tables as NumPy arrays, without a copy.

#![expect(unsafe_code, reason = "NumPy views of memory that Rust owns")]

use dlrm_core::{RowFormat, ScaleFormat, TableRows};
use half::f16;
use numpy::ndarray::{ArrayView, IntoDimension};
use numpy::{Element, PyArray};
use pyo3::prelude::*;

use crate::error::BindingError;

/// What keeps a view's memory in place: the view's base object.
#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
struct Keeper(#[expect(dead_code, reason = "it is held, not used")] dlrm_core::Keeper);

/// Memory that a view can be made of after the lock of its table is gone.
pub(crate) struct Kept {
    start: usize,
    bytes: usize,
    keeper: dlrm_core::Keeper,
}

impl Kept {
    pub(crate) fn new<T>((slice, keeper): (&[T], dlrm_core::Keeper)) -> Self {
        Self { start: slice.as_ptr() as usize, bytes: size_of_val(slice), keeper }
    }

    /// A writable array of it.
    ///
    /// # Panics
    /// When it is not of as many elements as `shape` says.
    pub(crate) fn view<T: Element, S: IntoDimension + Copy>(
        self,
        py: Python<'_>,
        shape: S,
    ) -> PyResult<Bound<'_, PyAny>> {
        let elements = shape.into_dimension();
        let elements: usize = numpy::ndarray::Dimension::size(&elements);
        assert_eq!(elements * size_of::<T>(), self.bytes, "a view of all of the memory");
        let keeper = Bound::new(py, Keeper(self.keeper))?;
        // SAFETY: 1. the memory is of `elements` elements, aligned to at least 64 bytes, any bits of which are a `T`
        // (integers and floats); 2. the keeper, which is the array's base, keeps it mapped; 3. NumPy's aliasing rules
        // are Python's, not those of the Rust view, which ends here.
        let array = unsafe {
            let rows = ArrayView::from_shape_ptr(shape, self.start as *const T);
            PyArray::borrow_from_array(&rows, keeper.into_any())
        };
        Ok(array.into_any())
    }
}

/// Rows that are numbers, `(N, D)`: float32, float16, or int16 with the bits of bfloat16.
pub(crate) fn numbers(
    py: Python<'_>,
    format: RowFormat,
    kept: Kept,
    shape: [usize; 2],
) -> PyResult<Bound<'_, PyAny>> {
    match format {
        RowFormat::Fp32 => kept.view::<f32, _>(py, shape),
        RowFormat::Fp16 => kept.view::<f16, _>(py, shape),
        RowFormat::Bf16 => kept.view::<i16, _>(py, shape),
        other => Err(BindingError(dlrm_core::Error::Argument {
            argument: "weight".to_owned(),
            expected: "rows of fp32, fp16 or bf16".to_owned(),
            got: other.to_string(),
        })
        .into()),
    }
}

/// Scale and bias of every row, `(N, 2)`, in the same types.
pub(crate) fn scales(
    py: Python<'_>,
    format: ScaleFormat,
    kept: Kept,
    rows: usize,
) -> PyResult<Bound<'_, PyAny>> {
    let numbers_of = match format {
        ScaleFormat::Fp32 => RowFormat::Fp32,
        ScaleFormat::Fp16 => RowFormat::Fp16,
        ScaleFormat::Bf16 => RowFormat::Bf16,
    };
    numbers(py, numbers_of, kept, [rows, 2])
}

/// The format of rows, and where their elements and scales are.
pub(crate) fn parts(rows: &TableRows) -> (RowFormat, ScaleFormat, Kept, Kept) {
    (rows.format(), rows.scale_format(), Kept::new(rows.elements()), Kept::new(rows.scales()))
}
