//! NumPy arrays as the slices that the engine takes: checked, never converted.

use dlrm_core::{Bags, Ids, Offsets, Output, Result, TableSet};
use half::f16;
use numpy::{
    Element, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Ids or offsets.
pub(crate) enum Integers<'py> {
    I32(PyReadonlyArrayDyn<'py, i32>),
    I64(PyReadonlyArrayDyn<'py, i64>),
}

impl<'py> Integers<'py> {
    fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = array.cast::<PyArrayDyn<i64>>() {
            Ok(Self::I64(readonly(name, array)?))
        } else if let Ok(array) = array.cast::<PyArrayDyn<i32>>() {
            Ok(Self::I32(readonly(name, array)?))
        } else {
            Err(wrong_type(name, "an array of int32 or int64", array))
        }
    }
}

/// What names the ids of a call.
pub(crate) struct BagArrays<'py> {
    indices: Integers<'py>,
    offsets: Option<Integers<'py>>,
    per_sample_weights: Option<PyReadonlyArrayDyn<'py, f32>>,
}

impl<'py> BagArrays<'py> {
    pub(crate) fn new(
        indices: &Bound<'py, PyAny>,
        offsets: Option<&Bound<'py, PyAny>>,
        per_sample_weights: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self {
            indices: Integers::new("indices", indices)?,
            offsets: offsets.map(|o| Integers::new("offsets", o)).transpose()?,
            per_sample_weights: per_sample_weights.map(|w| input("per_sample_weights", w)).transpose()?,
        })
    }

    pub(crate) fn slices(&self) -> PyResult<BagSlices<'_>> {
        Ok(BagSlices {
            ids: match &self.indices {
                Integers::I32(ids) => Ids::I32(ids.as_slice()?),
                Integers::I64(ids) => Ids::I64(ids.as_slice()?),
            },
            offsets: match &self.offsets {
                None => Offsets::Even,
                Some(Integers::I32(offsets)) => Offsets::I32(offsets.as_slice()?),
                Some(Integers::I64(offsets)) => Offsets::I64(offsets.as_slice()?),
            },
            per_sample_weights: self.per_sample_weights.as_ref().map(|w| w.as_slice()).transpose()?,
        })
    }
}

/// The same without Python, to be checked without the GIL.
#[derive(Clone, Copy)]
pub(crate) struct BagSlices<'a> {
    pub(crate) ids: Ids<'a>,
    offsets: Offsets<'a>,
    per_sample_weights: Option<&'a [f32]>,
}

impl<'a> BagSlices<'a> {
    pub(crate) fn bags(&self, set: &TableSet, batch_size: usize) -> Result<Bags<'a>> {
        Bags::new(self.ids, self.offsets, set.features().len(), batch_size, self.per_sample_weights)
    }
}

/// What a lookup writes to.
pub(crate) enum OutputArray<'py> {
    Fp32(PyReadwriteArrayDyn<'py, f32>),
    Fp16(PyReadwriteArrayDyn<'py, f16>),
    /// The bits, as NumPy has no such type.
    Bf16(PyReadwriteArrayDyn<'py, i16>),
}

impl<'py> OutputArray<'py> {
    pub(crate) fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        if array.cast::<PyArrayDyn<f32>>().is_ok() {
            Ok(Self::Fp32(output(name, array)?))
        } else if array.cast::<PyArrayDyn<f16>>().is_ok() {
            Ok(Self::Fp16(output(name, array)?))
        } else if array.cast::<PyArrayDyn<i16>>().is_ok() {
            Ok(Self::Bf16(output(name, array)?))
        } else {
            Err(wrong_type(name, "an array of float32, float16 or int16 (the bits of bfloat16)", array))
        }
    }

    pub(crate) fn output(&mut self) -> PyResult<Output<'_>> {
        Ok(match self {
            Self::Fp32(out) => Output::Fp32(out.as_slice_mut()?),
            Self::Fp16(out) => Output::Fp16(out.as_slice_mut()?),
            Self::Bf16(out) => Output::Bf16(bytemuck::cast_slice_mut(out.as_slice_mut()?)),
        })
    }
}

/// An array to read, of any shape.
pub(crate) fn input<'py, T: Element>(
    name: &str,
    array: &Bound<'py, PyAny>,
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    readonly(name, typed::<T>(name, array)?)
}

/// An array to write, of any shape.
pub(crate) fn output<'py, T: Element>(
    name: &str,
    array: &Bound<'py, PyAny>,
) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let array = typed::<T>(name, array)?;
    check_contiguous(name, array)?;
    let busy =
        |e| PyValueError::new_err(format!("{name}: expected a writable array that no call is using: {e}"));
    array.try_readwrite().map_err(busy)
}

fn readonly<'py, T: Element>(
    name: &str,
    array: &Bound<'py, PyArrayDyn<T>>,
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    check_contiguous(name, array)?;
    let busy = |e| PyValueError::new_err(format!("{name}: expected an array that no call is writing: {e}"));
    array.try_readonly().map_err(busy)
}

fn typed<'a, 'py, T: Element>(
    name: &str,
    array: &'a Bound<'py, PyAny>,
) -> PyResult<&'a Bound<'py, PyArrayDyn<T>>> {
    array.cast().map_err(|_| wrong_type(name, &format!("an array of {}", std::any::type_name::<T>()), array))
}

fn check_contiguous<T: Element>(name: &str, array: &Bound<'_, PyArrayDyn<T>>) -> PyResult<()> {
    let aligned = array.data().is_aligned();
    if array.is_c_contiguous() && aligned {
        return Ok(());
    }
    let (strides, aligned) = (array.strides(), if aligned { "aligned" } else { "unaligned" });
    let expected = "a C-contiguous array, aligned to its elements";
    Err(PyValueError::new_err(format!("{name}: expected {expected}, got strides {strides:?}, {aligned}")))
}

fn wrong_type(name: &str, expected: &str, got: &Bound<'_, PyAny>) -> PyErr {
    let got = match got.cast::<PyUntypedArray>() {
        Ok(array) => format!("an array of {}", array.dtype()),
        Err(_) => got.get_type().to_string(),
    };
    PyTypeError::new_err(format!("{name}: expected {expected}, got {got}"))
}
