//! The handle of a set of tables.

#![expect(unsafe_code, reason = "NumPy views of memory that Rust owns")]
#![expect(clippy::too_many_arguments, reason = "they are Python's: no structure is made for each call")]

use dlrm_core::optimizers::{Kind, Optimizer};
use dlrm_core::{Feature, Gradient, TableSpec};
use numpy::ndarray::{ArrayView, Dimension, IntoDimension};
use numpy::{PyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};

use crate::arrays::{BagArrays, input, output};
use crate::call::call;
use crate::error::BindingError;

type Array2<'py> = Bound<'py, PyArray2<f32>>;
/// Touched rows and their gradients.
type Sparse<'py> = (Bound<'py, PyArray1<i64>>, Array2<'py>);
type Any<'a, 'py> = &'a Bound<'py, PyAny>;

#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
pub(crate) struct TableSet(dlrm_core::TableSet);

#[pymethods]
impl TableSet {
    #[new]
    fn new(
        py: Python<'_>,
        tables: Vec<(String, usize, usize, String)>,
        features: Vec<(usize, String, Option<usize>)>,
    ) -> PyResult<Self> {
        let spec = |(name, rows, dim, format): (_, _, _, String)| -> dlrm_core::Result<_> {
            Ok(TableSpec { name, rows, dim, format: format.parse()? })
        };
        let feature = |(table, pooling, padding): (_, String, _)| -> dlrm_core::Result<_> {
            Ok(Feature { table, pooling: pooling.parse()?, padding })
        };
        let specs = tables.into_iter().map(spec).collect::<Result<Vec<_>, _>>().map_err(BindingError)?;
        let features =
            features.into_iter().map(feature).collect::<Result<Vec<_>, _>>().map_err(BindingError)?;
        call(py, |ctx| dlrm_core::TableSet::new(specs, features, ctx)).map(Self)
    }

    fn weight<'py>(slf: &Bound<'py, Self>, table: usize) -> PyResult<Array2<'py>> {
        let this = slf.get();
        let spec = this.spec(table)?;
        let start = call(slf.py(), |_| this.0.write(table, |rows| rows.as_mut_ptr() as usize))?;
        // SAFETY: the rows of a table are `rows * dim` floats that stay where they are while the set lives.
        Ok(unsafe { view(slf, start, [spec.rows, spec.dim]) })
    }

    fn set_optimizer(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let kind = name.parse().map_err(BindingError)?;
        call(py, |ctx| self.0.set_optimizer(kind, ctx))
    }

    fn optimizer_state<'py>(slf: &Bound<'py, Self>, table: usize) -> PyResult<Bound<'py, PyDict>> {
        let this = slf.get();
        let spec = this.spec(table)?;
        let start = call(slf.py(), |_| this.0.write_state(table, |state| state.as_mut_ptr() as usize))?;
        let state = PyDict::new(slf.py());
        // SAFETY: the state is `rows * state_len` floats, allocated once, that stay where they are while the set lives.
        unsafe {
            match this.0.optimizer() {
                Some(Kind::Adagrad) => state.set_item("sum", view(slf, start, [spec.rows, spec.dim]))?,
                Some(Kind::RowWiseAdagrad) => state.set_item("sum", view(slf, start, [spec.rows]))?,
                _ => {}
            }
        }
        Ok(state)
    }

    fn lookup(
        &self,
        py: Python<'_>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        out: Any<'_, '_>,
        argmax: Option<Any<'_, '_>>,
    ) -> PyResult<()> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let mut out = output("out", out)?;
        let mut argmax = argmax.map(|a| output("argmax", a)).transpose()?;
        let out = out.as_slice_mut()?;
        let argmax = argmax.as_mut().map(|a| a.as_slice_mut()).transpose()?;
        call(py, |ctx| self.0.lookup(&slices.bags(&self.0, batch_size)?, out, argmax, ctx))
    }

    fn touch(
        &self,
        py: Python<'_>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
    ) -> PyResult<u64> {
        let arrays = BagArrays::new(indices, offsets, None)?;
        let slices = arrays.slices()?;
        call(py, |ctx| self.0.touch(&slices.bags(&self.0, batch_size)?, ctx))
    }

    fn renorm(
        &self,
        py: Python<'_>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        max_norm: f64,
        norm_type: f64,
    ) -> PyResult<()> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        call(py, |ctx| self.0.renorm(&slices.bags(&self.0, batch_size)?, max_norm, norm_type, ctx))
    }

    fn update(
        &self,
        py: Python<'_>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        argmax: Option<Any<'_, '_>>,
        grad: Any<'_, '_>,
        trainable: Vec<bool>,
        scale_grad_by_freq: bool,
        hyperparameters: &Bound<'_, PyMapping>,
    ) -> PyResult<()> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let gradient = GradientArrays::new(argmax, grad, trainable, scale_grad_by_freq)?;
        let gradient = gradient.gradient()?;
        let kind =
            self.0.optimizer().ok_or_else(|| PyValueError::new_err("update: call set_optimizer first"))?;
        let values = kind.hyperparameters().iter().map(|name| hyperparameter(hyperparameters, name));
        let values = values.collect::<PyResult<Vec<f64>>>()?;
        let optimizer = Optimizer::new(kind, &values).map_err(BindingError)?;
        call(py, |ctx| self.0.update(&slices.bags(&self.0, batch_size)?, &gradient, &optimizer, ctx))
    }

    fn dense_gradient<'py>(
        &self,
        py: Python<'py>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        argmax: Option<Any<'_, '_>>,
        grad: Any<'_, '_>,
        trainable: Vec<bool>,
        scale_grad_by_freq: bool,
    ) -> PyResult<Vec<Option<Bound<'py, PyAny>>>> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let gradient = GradientArrays::new(argmax, grad, trainable, scale_grad_by_freq)?;
        let gradient = gradient.gradient()?;
        let wanted = self.0.specs().iter().zip(gradient.trainable);
        let zeros =
            |(spec, trainable): (&TableSpec, &bool)| trainable.then(|| zeros(py, (spec.rows, spec.dim)));
        let into = wanted.map(|table| zeros(table).transpose()).collect::<PyResult<Vec<_>>>()?;
        let mut arrays =
            into.iter().flatten().map(|a| output("gradient", a)).collect::<PyResult<Vec<_>>>()?;
        let mut written = arrays.iter_mut().map(|a| a.as_slice_mut());
        let mut tables = Vec::with_capacity(into.len());
        for array in &into {
            tables.push(array.as_ref().and_then(|_| written.next()).transpose()?);
        }
        call(py, |ctx| {
            self.0.dense_gradient(&slices.bags(&self.0, batch_size)?, &gradient, &mut tables, ctx)
        })?;
        Ok(into)
    }

    fn sparse_gradient<'py>(
        &self,
        py: Python<'py>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        argmax: Option<Any<'_, '_>>,
        grad: Any<'_, '_>,
        trainable: Vec<bool>,
        scale_grad_by_freq: bool,
    ) -> PyResult<Vec<Option<Sparse<'py>>>> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let gradient = GradientArrays::new(argmax, grad, trainable, scale_grad_by_freq)?;
        let gradient = gradient.gradient()?;
        let sparse =
            call(py, |ctx| self.0.sparse_gradient(&slices.bags(&self.0, batch_size)?, &gradient, ctx))?;
        let array = |(table, spec): (Option<dlrm_core::SparseRows>, &TableSpec)| {
            let Some(table) = table else { return Ok(None) };
            let shape = [table.rows.len(), spec.dim];
            let values = PyArray1::from_vec(py, table.values).reshape(shape)?;
            Ok(Some((PyArray1::from_vec(py, table.rows), values)))
        };
        sparse.into_iter().zip(self.0.specs()).map(array).collect()
    }

    fn per_sample_weights_gradient<'py>(
        &self,
        py: Python<'py>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        grad: Any<'_, '_>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arrays = BagArrays::new(indices, offsets, None)?;
        let slices = arrays.slices()?;
        let grad = input("grad", grad)?;
        let grad = grad.as_slice()?;
        let into = zeros(py, slices.ids.len())?;
        let mut array = output("gradient", &into)?;
        let slice = array.as_slice_mut()?;
        call(py, |ctx| {
            self.0.per_sample_weights_gradient(&slices.bags(&self.0, batch_size)?, grad, slice, ctx)
        })?;
        Ok(into)
    }

    fn memory_report<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let tables = call(py, |_| self.0.memory_report())?;
        let dict = |table: dlrm_core::TableMemory| {
            let dict = PyDict::new(py);
            dict.set_item("payload", table.payload)?;
            dict.set_item("state", table.state)?;
            dict.set_item("overhead", table.overhead)?;
            Ok(dict)
        };
        tables.into_iter().map(dict).collect()
    }
}

impl TableSet {
    fn spec(&self, table: usize) -> PyResult<&TableSpec> {
        let tables = self.0.specs().len();
        let missing = || PyIndexError::new_err(format!("table: expected below {tables}, got {table}"));
        self.0.specs().get(table).ok_or_else(missing)
    }
}

/// What describes the gradient of a lookup's output.
struct GradientArrays<'py> {
    argmax: Option<PyReadonlyArrayDyn<'py, i32>>,
    grad: PyReadonlyArrayDyn<'py, f32>,
    trainable: Vec<bool>,
    scale_by_frequency: bool,
}

impl<'py> GradientArrays<'py> {
    fn new(
        argmax: Option<Any<'_, 'py>>,
        grad: Any<'_, 'py>,
        trainable: Vec<bool>,
        scale_by_frequency: bool,
    ) -> PyResult<Self> {
        let argmax = argmax.map(|a| input("argmax", a)).transpose()?;
        Ok(Self { argmax, grad: input("grad", grad)?, trainable, scale_by_frequency })
    }

    fn gradient(&self) -> PyResult<Gradient<'_>> {
        Ok(Gradient {
            output: self.grad.as_slice()?,
            argmax: self.argmax.as_ref().map(|a| a.as_slice()).transpose()?,
            trainable: &self.trainable,
            scale_by_frequency: self.scale_by_frequency,
        })
    }
}

fn hyperparameter(group: &Bound<'_, PyMapping>, name: &str) -> PyResult<f64> {
    let value = group.get_item(name);
    let number = value.as_ref().ok().and_then(|value| value.extract().ok());
    number.ok_or_else(|| {
        let got = value.map_or("nothing".to_owned(), |value| value.to_string());
        PyTypeError::new_err(format!("{name}: expected a number in the parameter group, got {got}"))
    })
}

/// NumPy's own, which raises where the memory cannot be had.
fn zeros<'py>(py: Python<'py>, shape: impl IntoPyObject<'py>) -> PyResult<Bound<'py, PyAny>> {
    py.import("numpy")?.call_method1("zeros", (shape, "float32"))
}

/// A NumPy array over memory of the set, which it keeps alive.
///
/// # Safety
/// At the address `start` are as many floats as `shape` says, in one place while the set lives.
unsafe fn view<'py, S: IntoDimension>(
    set: &Bound<'py, TableSet>,
    start: usize,
    shape: S,
) -> Bound<'py, PyArray<f32, S::Dim>>
where
    S::Dim: Dimension,
{
    let shape = shape.into_dimension();
    // SAFETY: as the caller promises; NumPy's aliasing rules are Python's, not those of the view, which ends here.
    unsafe {
        let rows = ArrayView::from_shape_ptr(shape, start as *const f32);
        PyArray::borrow_from_array(&rows, set.clone().into_any())
    }
}
