//! Memory of tables as NumPy arrays, and of NumPy arrays as tables, without a copy.

#![expect(unsafe_code, reason = "the same memory seen by NumPy and by Rust")]

use dlrm_core::{Borrowed, RowFormat, ScaleFormat, TableRows};
use half::f16;
use numpy::ndarray::{ArrayView, IntoDimension};
use numpy::{Element, PyArray, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
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

/// Rows that are numbers, `(N, D)` or as `shape` says: float32, float16, or int16 with the bits of bfloat16.
pub(crate) fn numbers<S: IntoDimension + Copy>(
    py: Python<'_>,
    format: RowFormat,
    kept: Kept,
    shape: S,
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

/// The memory of a C-contiguous, writable array of any dtype, which it keeps alive.
pub(crate) fn borrowed(name: &str, array: &Bound<'_, PyAny>) -> PyResult<Borrowed> {
    let array = array
        .cast::<PyUntypedArray>()
        .map_err(|_| PyTypeError::new_err(format!("{name}: expected an array, got {}", array.get_type())))?;
    // SAFETY: NumPy's own description of the array, which `array` keeps alive.
    let (start, flags) = unsafe {
        let fields = &raw const (*array.as_array_ptr()).fields;
        ((*fields).data, (*fields).flags)
    };
    if !array.is_c_contiguous() || flags & numpy::npyffi::NPY_ARRAY_WRITEABLE == 0 {
        return Err(PyValueError::new_err(format!("{name}: expected a writable, C-contiguous array")));
    }
    let bytes = array.len() * array.dtype().itemsize();
    // SAFETY: 1. a contiguous array has as many bytes, which NumPy keeps where they are as long as the array is referred
    // to; 2. as of every table, it is Python's to keep out of a running call.
    Ok(unsafe { Borrowed::new(start.cast(), bytes, array.clone().unbind()) })
}
