//! NumPy arrays and torch tensors as the slices that the engine takes: checked, never converted.

#![expect(unsafe_code, reason = "a checked tensor's memory as a slice")]

use std::any::type_name;

use dlrm_core::{Bags, Ids, Offsets, Output, Result, TableSet};
use half::f16;
use numpy::{
    Element, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

use crate::tensors::{Elements, Kind, View, is_plain, view};

/// Ids or offsets.
pub(crate) enum Integers<'py> {
    I32(Input<'py, i32>),
    I64(Input<'py, i64>),
}

impl<'py> Integers<'py> {
    fn new(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let given = Given::new(name, object)?;
        if given.is::<i64>() {
            Ok(Self::I64(given.input()?))
        } else if given.is::<i32>() {
            Ok(Self::I32(given.input()?))
        } else {
            Err(given.wrong_type("an array of int32 or int64"))
        }
    }
}

/// What names the ids of a call.
pub(crate) struct BagArrays<'py> {
    indices: Integers<'py>,
    offsets: Option<Integers<'py>>,
    per_sample_weights: Option<Input<'py, f32>>,
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
    Fp32(Writable<'py, f32>),
    Fp16(Writable<'py, f16>),
    /// The bits, as NumPy has no such type.
    Bf16(Writable<'py, i16>),
}

impl<'py> OutputArray<'py> {
    pub(crate) fn new(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let given = Given::new(name, object)?;
        if given.is::<f32>() {
            Ok(Self::Fp32(given.output()?))
        } else if given.is::<f16>() {
            Ok(Self::Fp16(given.output()?))
        } else if given.is::<i16>() {
            Ok(Self::Bf16(given.output()?))
        } else {
            Err(given.wrong_type("an array of float32, float16 or int16 (the bits of bfloat16)"))
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

/// An array to read, whose shape matters: no tensor.
pub(crate) fn array_input<'py, T: Number>(
    name: &str,
    object: &Bound<'py, PyAny>,
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    Given { name, object, tensor: None }.typed::<T>()?.readonly()
}

/// An array or a tensor to read, of any shape.
pub(crate) fn input<'py, T: Number>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Input<'py, T>> {
    Given::new(name, object)?.typed::<T>()?.input()
}

/// An array or a tensor to write, of any shape.
pub(crate) fn output<'py, T: Number>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Writable<'py, T>> {
    Given::new(name, object)?.typed::<T>()?.output()
}

/// The elements of a tensor that is taken as it is: of one dimension, contiguous, of one of these kinds.
pub(crate) fn vector_len(object: &Bound<'_, PyAny>, kinds: &[Kind]) -> Option<usize> {
    let fits = |view: &View<'_>| view.shape.len() == 1 && view.is_contiguous() && kinds.contains(&view.kind);
    let len = view(object, |view| fits(&view).then(|| view.len())).ok()??;
    len.filter(|_| is_plain(object))
}

/// An element, and how `DLPack` says that it is one.
pub(crate) trait Number: Element {
    const KIND: Kind;
}

impl Number for i32 {
    const KIND: Kind = Kind(0, 32);
}

impl Number for i64 {
    const KIND: Kind = Kind(0, 64);
}

impl Number for u8 {
    const KIND: Kind = Kind(1, 8);
}

impl Number for f16 {
    const KIND: Kind = Kind(2, 16);
}

impl Number for f32 {
    const KIND: Kind = Kind(2, 32);
}

/// The bits of a bfloat16, as which tensors have them.
impl Number for i16 {
    const KIND: Kind = Kind(4, 16);
}

/// An array or a tensor to read.
pub(crate) enum Input<'py, T: Element> {
    Array(PyReadonlyArrayDyn<'py, T>),
    Tensor(Elements<'py, T>),
}

impl<T: Element> Input<'_, T> {
    pub(crate) fn as_slice(&self) -> PyResult<&[T]> {
        match self {
            Self::Array(array) => Ok(array.as_slice()?),
            Self::Tensor(elements) => Ok(elements.as_slice()),
        }
    }
}

/// An array or a tensor to write.
pub(crate) enum Writable<'py, T: Element> {
    Array(PyReadwriteArrayDyn<'py, T>),
    Tensor(Elements<'py, T>),
}

impl<T: Element> Writable<'_, T> {
    pub(crate) fn as_slice_mut(&mut self) -> PyResult<&mut [T]> {
        match self {
            Self::Array(array) => Ok(array.as_slice_mut()?),
            Self::Tensor(elements) => Ok(elements.as_slice_mut()),
        }
    }
}

/// An argument, of any type.
struct Given<'a, 'py> {
    name: &'a str,
    object: &'a Bound<'py, PyAny>,
    tensor: Option<Tensor>,
}

/// Where a tensor is.
struct Tensor {
    address: usize,
    len: usize,
    kind: Kind,
    contiguous: bool,
}

impl<'a, 'py> Given<'a, 'py> {
    fn new(name: &'a str, object: &'a Bound<'py, PyAny>) -> PyResult<Self> {
        let tensor = view(object, |view| Tensor {
            address: view.address,
            len: view.len(),
            kind: view.kind,
            contiguous: view.is_contiguous(),
        });
        let elsewhere = || {
            let expected = "a dense tensor on the CPU, with memory of its own";
            let (device, layout) = (said(object, "device"), said(object, "layout"));
            PyValueError::new_err(format!(
                "{name}: expected {expected}, got device {device}, layout {layout}"
            ))
        };
        let tensor = tensor.map_err(|_| elsewhere())?;
        if tensor.as_ref().is_some_and(|tensor| !is_plain(object) || has_no_storage(object, tensor)) {
            return Err(elsewhere());
        }
        Ok(Self { name, object, tensor })
    }

    fn is<T: Number>(&self) -> bool {
        match &self.tensor {
            Some(tensor) => tensor.kind == T::KIND,
            None => self.object.cast::<PyArrayDyn<T>>().is_ok(),
        }
    }

    fn typed<T: Number>(self) -> PyResult<Self> {
        if self.is::<T>() {
            Ok(self)
        } else {
            Err(self.wrong_type(&format!("an array of {}", type_name::<T>())))
        }
    }

    fn input<T: Number>(self) -> PyResult<Input<'py, T>> {
        match self.elements()? {
            Some(elements) => {
                self.check_sign()?;
                Ok(Input::Tensor(elements))
            }
            None => self.readonly().map(Input::Array),
        }
    }

    fn readonly<T: Number>(&self) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
        let name = self.name;
        let busy =
            |e| PyValueError::new_err(format!("{name}: expected an array that no call is writing: {e}"));
        self.contiguous()?.try_readonly().map_err(busy)
    }

    fn output<T: Number>(self) -> PyResult<Writable<'py, T>> {
        let name = self.name;
        if let Some(elements) = self.elements()? {
            return Ok(Writable::Tensor(elements));
        }
        let busy = |e| {
            PyValueError::new_err(format!("{name}: expected a writable array that no call is using: {e}"))
        };
        Ok(Writable::Array(self.contiguous()?.try_readwrite().map_err(busy)?))
    }

    /// Those of a tensor.
    fn elements<T: Number>(&self) -> PyResult<Option<Elements<'py, T>>> {
        let Some(Tensor { address, len, contiguous, .. }) = self.tensor else { return Ok(None) };
        let aligned = address.is_multiple_of(align_of::<T>());
        if !contiguous || !aligned {
            return Err(self.not_contiguous(self.object.call_method0("stride")?, aligned));
        }
        // SAFETY: as torch describes the tensor, and as checked here and, for the type, by `is`.
        Ok(Some(unsafe { Elements::new(self.object.clone(), address, len) }))
    }

    /// Refuses a tensor whose elements are the negated ones of its memory, as those of some views of complex numbers are.
    fn check_sign(&self) -> PyResult<()> {
        let real = self.tensor.as_ref().is_some_and(|tensor| tensor.kind.0 == f32::KIND.0);
        if !real || !self.object.call_method0(intern!(self.object.py(), "is_neg"))?.is_truthy()? {
            return Ok(());
        }
        let name = self.name;
        let expected = "elements as they are in memory";
        let got = "a tensor with the negative bit";
        Err(PyValueError::new_err(format!(
            "{name}: expected {expected}, got {got}; use {name}.resolve_neg()"
        )))
    }

    fn contiguous<T: Number>(&self) -> PyResult<&'a Bound<'py, PyArrayDyn<T>>> {
        let array = self.object.cast::<PyArrayDyn<T>>()?;
        let aligned = array.data().is_aligned();
        if array.is_c_contiguous() && aligned {
            return Ok(array);
        }
        Err(self.not_contiguous(format_args!("{:?}", array.strides()), aligned))
    }

    fn not_contiguous(&self, strides: impl std::fmt::Display, aligned: bool) -> PyErr {
        let (name, aligned) = (self.name, if aligned { "aligned" } else { "unaligned" });
        let expected = "a C-contiguous array, aligned to its elements";
        PyValueError::new_err(format!("{name}: expected {expected}, got strides {strides}, {aligned}"))
    }

    fn wrong_type(&self, expected: &str) -> PyErr {
        let object = self.object;
        let got = match (object.cast::<PyUntypedArray>(), &self.tensor) {
            (Ok(array), _) => format!("an array of {}", array.dtype()),
            (_, Some(_)) => format!("a tensor of {}", said(object, "dtype")),
            _ => object.get_type().to_string(),
        };
        PyTypeError::new_err(format!("{}: expected {expected}, got {got}", self.name))
    }
}

/// Whether a tensor only has an offset from nowhere, as a part of one that torch knows to be zeros.
fn has_no_storage(object: &Bound<'_, PyAny>, tensor: &Tensor) -> bool {
    const LOW: usize = 1 << 40; // no such offset is larger, most addresses are
    if tensor.len == 0 || tensor.address >= LOW {
        return false;
    }
    let offset =
        object.call_method0(intern!(object.py(), "storage_offset")).and_then(|offset| offset.extract());
    offset.map_or(true, |offset: usize| Some(tensor.address) == offset.checked_mul(tensor.kind.bytes()))
}

/// What a tensor says of itself.
fn said(tensor: &Bound<'_, PyAny>, attribute: &str) -> String {
    tensor.getattr(attribute).map_or_else(|_| "unknown".to_owned(), |value| value.to_string())
}
