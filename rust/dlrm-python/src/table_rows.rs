//! The rows of one table outside a set: made of other rows, of packed ones or of their parts, to be put into a set.

use std::sync::{Mutex, MutexGuard, PoisonError};

use dlrm_core::{Encoded, Encoding, Layout, Result, RowFormat, ScaleFormat, TableSpec};
use half::f16;
use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::arrays::array_input;
use crate::call::call;
use crate::error::BindingError;
use crate::views::{Kept, borrowed};

type Any<'a, 'py> = &'a Bound<'py, PyAny>;
/// Rows, the relative error of each, and the largest absolute error.
pub(crate) type WithErrors<'py> = (TableRows, Bound<'py, PyAny>, f32);

/// Empty once its rows are in a set.
#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
pub(crate) struct TableRows(Mutex<Option<dlrm_core::TableRows>>);

impl TableRows {
    pub(crate) fn new(rows: dlrm_core::TableRows) -> Self {
        Self(Mutex::new(Some(rows)))
    }

    pub(crate) fn with_errors(py: Python<'_>, encoded: Encoded) -> PyResult<WithErrors<'_>> {
        let errors = Kept::new(encoded.errors.kept()).view::<f32, _>(py, [encoded.errors.len()])?;
        Ok((Self::new(encoded.rows), errors, encoded.largest_error))
    }

    /// The rows, which are gone from here then.
    pub(crate) fn take(&self) -> PyResult<dlrm_core::TableRows> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        rows.ok_or_else(|| PyValueError::new_err("rows: expected rows, got those that a table has taken"))
    }
}

/// Memory of rows that are gone, for the next.
#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
#[derive(Default)]
pub(crate) struct Spare(Mutex<dlrm_core::Spare>);

impl Spare {
    pub(crate) fn lock(&self) -> MutexGuard<'_, dlrm_core::Spare> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Spare {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn retire(&self, py: Python<'_>, rows: &TableRows) -> PyResult<()> {
        let rows = rows.take()?;
        py.detach(|| self.lock().retire(rows));
        Ok(())
    }
}

#[pymethods]
impl TableRows {
    #[staticmethod]
    fn encode<'py>(
        py: Python<'py>,
        name: String,
        source: Any<'_, 'py>,
        row_format: &str,
        method: &str,
        scale_format: Option<&str>,
        zero_not_finite: bool,
    ) -> PyResult<WithErrors<'py>> {
        let encoding = encoding(row_format, method, scale_format, zero_not_finite)?;
        let source = array_input::<f32>("source", source)?;
        let [rows, dim] = two_dimensions("source", &source)?;
        let spec = TableSpec { name, rows, dim, format: encoding.format };
        let source = source.as_slice()?;
        let encoded = call(py, |ctx| dlrm_core::TableRows::encode(source, &spec, encoding, ctx))?;
        Self::with_errors(py, encoded)
    }

    #[staticmethod]
    fn unpack(
        py: Python<'_>,
        name: String,
        packed: Any<'_, '_>,
        embedding_dim: usize,
        row_format: &str,
        layout: &str,
    ) -> PyResult<Self> {
        let (format, layout) = parse_two::<RowFormat, Layout>(row_format, layout)?;
        let packed = array_input::<u8>("packed", packed)?;
        let [rows, row_bytes] = two_dimensions("packed", &packed)?;
        let spec = TableSpec { name, rows, dim: embedding_dim, format };
        let packed = packed.as_slice()?;
        call(py, |ctx| dlrm_core::TableRows::unpack(packed, &spec, layout, row_bytes, ctx)).map(Self::new)
    }

    #[staticmethod]
    fn from_parts(
        py: Python<'_>,
        name: String,
        embedding_dim: usize,
        row_format: &str,
        codes: Any<'_, '_>,
        scales: Any<'_, '_>,
        codebook: Option<Vec<f32>>,
    ) -> PyResult<Self> {
        let format = row_format.parse().map_err(BindingError)?;
        let codes = array_input::<u8>("codes", codes)?;
        let [rows, _] = two_dimensions("codes", &codes)?;
        let spec = TableSpec { name, rows, dim: embedding_dim, format };
        let scales = ScaleArray::new(scales)?;
        let codebook = sixteen(codebook)?;
        let (codes, pairs) = (codes.as_slice()?, scales.bytes()?);
        let made = call(py, |_| dlrm_core::TableRows::from_parts(&spec, codes, pairs, codebook.as_ref()))?;
        Ok(Self::new(made))
    }

    fn put_hot_rows(
        &self,
        py: Python<'_>,
        name: &str,
        rows: Any<'_, '_>,
        ids: Any<'_, '_>,
        counts: Any<'_, '_>,
    ) -> PyResult<()> {
        let (rows, ids) = (array_input::<f32>("hot_rows", rows)?, array_input::<i64>("hot_ids", ids)?);
        let counts = array_input::<u8>("hot_counts", counts)?;
        let (rows, ids, counts) = (rows.as_slice()?, ids.as_slice()?, counts.as_slice()?);
        let mut own = self.take()?;
        let put = call(py, |ctx| own.put_cache(rows, ids, counts, name, ctx));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(own);
        put
    }

    #[staticmethod]
    fn borrow(
        name: String,
        embedding_dim: usize,
        row_format: &str,
        elements: Any<'_, '_>,
        scales: Option<Any<'_, '_>>,
        codebook: Option<Vec<f32>>,
    ) -> PyResult<Self> {
        let format = row_format.parse().map_err(BindingError)?;
        let rows = elements.len()?;
        let spec = TableSpec { name, rows, dim: embedding_dim, format };
        let scales = scales
            .map(|array| Ok::<_, PyErr>((ScaleArray::new(array)?.format(), borrowed("scales", array)?)));
        let (elements, scales) = (borrowed("rows", elements)?, scales.transpose()?);
        let made = dlrm_core::TableRows::borrow(&spec, elements, scales, sixteen(codebook)?.as_ref());
        Ok(Self::new(made.map_err(BindingError)?))
    }
}

fn sixteen(codebook: Option<Vec<f32>>) -> PyResult<Option<[f32; 16]>> {
    let array = codebook.map(|numbers| {
        let got = format!("codebook: expected 16 numbers, got {}", numbers.len());
        <[f32; 16]>::try_from(numbers).map_err(|_| PyValueError::new_err(got))
    });
    array.transpose()
}

/// How rows are to be encoded, by its names.
pub(crate) fn encoding(
    row_format: &str,
    method: &str,
    scale_format: Option<&str>,
    zero_not_finite: bool,
) -> PyResult<Encoding> {
    let parsed = || -> Result<_> {
        let scales = scale_format.map(str::parse).transpose()?;
        Ok(Encoding { format: row_format.parse()?, method: method.parse()?, scales, zero_not_finite })
    };
    Ok(parsed().map_err(BindingError)?)
}

fn parse_two<A, B>(a: &str, b: &str) -> PyResult<(A, B)>
where
    A: std::str::FromStr<Err = dlrm_core::Error>,
    B: std::str::FromStr<Err = dlrm_core::Error>,
{
    Ok((a.parse().map_err(BindingError)?, b.parse().map_err(BindingError)?))
}

fn two_dimensions<T: numpy::Element>(name: &str, array: &PyReadonlyArrayDyn<'_, T>) -> PyResult<[usize; 2]> {
    array.shape().try_into().map_err(|_| {
        PyValueError::new_err(format!("{name}: expected two dimensions, got shape {:?}", array.shape()))
    })
}

/// Scales and biases, in any scale format.
enum ScaleArray<'py> {
    Fp32(PyReadonlyArrayDyn<'py, f32>),
    Fp16(PyReadonlyArrayDyn<'py, f16>),
    Bf16(PyReadonlyArrayDyn<'py, i16>),
}

impl<'py> ScaleArray<'py> {
    fn new(array: Any<'_, 'py>) -> PyResult<Self> {
        if let Ok(array) = array_input("scales", array) {
            return Ok(Self::Fp32(array));
        }
        if let Ok(array) = array_input("scales", array) {
            return Ok(Self::Fp16(array));
        }
        let wrong =
            |_| PyTypeError::new_err("scales: expected a C-contiguous array of float32, float16 or int16");
        array_input("scales", array).map(Self::Bf16).map_err(wrong)
    }

    fn format(&self) -> ScaleFormat {
        match self {
            Self::Fp32(_) => ScaleFormat::Fp32,
            Self::Fp16(_) => ScaleFormat::Fp16,
            Self::Bf16(_) => ScaleFormat::Bf16,
        }
    }

    fn bytes(&self) -> PyResult<(ScaleFormat, &[u8])> {
        let bytes = match self {
            Self::Fp32(array) => bytemuck::cast_slice(array.as_slice()?),
            Self::Fp16(array) => bytemuck::cast_slice(array.as_slice()?),
            Self::Bf16(array) => bytemuck::cast_slice(array.as_slice()?),
        };
        Ok((self.format(), bytes))
    }
}
