//! The handle of a set of tables.

#![expect(clippy::too_many_arguments, reason = "they are Python's: no structure is made for each call")]
#![expect(clippy::needless_pass_by_value, reason = "a list of Python's comes as a value")]

use dlrm_core::optimizers::{Kind, Optimizer, Step};
use dlrm_core::{Feature, Gradient, Layout, TableSpec};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyMapping};

use crate::arrays::{BagArrays, Input, Number, OutputArray, input, output, vector_len};
use crate::call::call;
use crate::error::BindingError;
use crate::table_rows::{Spare, TableRows, WithErrors, encoding};
use crate::views::{self, Kept};

type Array2<'py> = Bound<'py, PyArray2<f32>>;
/// Touched rows and their gradients.
type Sparse<'py> = (Bound<'py, PyArray1<i64>>, Array2<'py>);
/// The rows of a cache, their numbers and their counts.
type HotRows<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);
type Any<'a, 'py> = &'a Bound<'py, PyAny>;
/// Table, pooling and padding of a feature.
type PyFeature = (usize, String, Option<usize>);

/// The lower halves of bf16 rows, among the parts of an optimizer's state.
const LOW_BITS: &str = "low_bits";

#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
pub(crate) struct TableSet(pub(crate) dlrm_core::TableSet);

#[pymethods]
impl TableSet {
    #[new]
    fn new(
        py: Python<'_>,
        tables: Vec<(String, usize, usize, String)>,
        features: Vec<PyFeature>,
    ) -> PyResult<Self> {
        let spec = |(name, rows, dim, format): (_, _, _, String)| -> dlrm_core::Result<_> {
            Ok(TableSpec { name, rows, dim, format: format.parse()? })
        };
        let specs = tables.into_iter().map(spec).collect::<Result<Vec<_>, _>>().map_err(BindingError)?;
        let features = parsed(features)?;
        call(py, |ctx| dlrm_core::TableSet::new(specs, features, ctx)).map(Self)
    }

    #[staticmethod]
    fn of_rows(
        py: Python<'_>,
        tables: Vec<(String, PyRef<'_, TableRows>)>,
        features: Vec<PyFeature>,
    ) -> PyResult<Self> {
        let taken = |(name, rows): (_, PyRef<'_, TableRows>)| Ok::<_, PyErr>((name, rows.take()?));
        let tables = tables.into_iter().map(taken).collect::<PyResult<Vec<_>>>()?;
        let features = parsed(features)?;
        call(py, |ctx| dlrm_core::TableSet::of_rows(tables, features, ctx)).map(Self)
    }

    fn row_format(&self, py: Python<'_>, table: usize) -> PyResult<&'static str> {
        self.spec(table)?;
        call(py, |_| self.0.read_rows(table, |rows| rows.format().name()))
    }

    fn weight<'py>(&self, py: Python<'py>, table: usize) -> PyResult<Bound<'py, PyAny>> {
        let spec = self.spec(table)?;
        let (format, _, elements, _) = call(py, |_| self.0.read_rows(table, views::parts))?;
        views::numbers(py, format, elements, [spec.rows, spec.dim])
    }

    fn codes<'py>(&self, py: Python<'py>, table: usize) -> PyResult<Bound<'py, PyAny>> {
        let spec = self.quantized(py, table)?;
        let (format, _, elements, _) = call(py, |_| self.0.read_rows(table, views::parts))?;
        elements.view::<u8, _>(py, [spec.rows, format.row_bytes(spec.dim)])
    }

    fn scales<'py>(&self, py: Python<'py>, table: usize) -> PyResult<Bound<'py, PyAny>> {
        let spec = self.quantized(py, table)?;
        let (_, format, _, scales) = call(py, |_| self.0.read_rows(table, views::parts))?;
        views::scales(py, format, scales, spec.rows)
    }

    fn codebook<'py>(&self, py: Python<'py>, table: usize) -> PyResult<Option<Bound<'py, PyArray1<f32>>>> {
        self.spec(table)?;
        let codebook = |rows: &dlrm_core::TableRows| rows.has_codebook().then(|| *rows.codebook());
        let codebook = call(py, |_| self.0.read_rows(table, codebook))?;
        Ok(codebook.map(|numbers| PyArray1::from_slice(py, &numbers)))
    }

    fn add_hot_rows(&self, py: Python<'_>, table: usize, rows: usize) -> PyResult<()> {
        self.spec(table)?;
        call(py, |ctx| self.0.add_cache(table, rows, ctx))
    }

    fn hot_rows<'py>(&self, py: Python<'py>, table: usize) -> PyResult<Option<HotRows<'py>>> {
        let spec = self.spec(table)?;
        let parts = |rows: &dlrm_core::TableRows| {
            let cache = rows.cache()?;
            Some((cache.ids.0.len(), Kept::new(cache.rows), Kept::new(cache.ids), Kept::new(cache.counts)))
        };
        let Some((ways, rows, ids, counts)) = call(py, |_| self.0.read_rows(table, parts))? else {
            return Ok(None);
        };
        let rows = rows.view::<f32, _>(py, [ways, spec.dim])?;
        Ok(Some((rows, ids.view::<i64, _>(py, [ways])?, counts.view::<u8, _>(py, [ways])?)))
    }

    fn encode<'py>(
        &self,
        py: Python<'py>,
        table: usize,
        row_format: &str,
        method: &str,
        scale_format: Option<&str>,
        zero_not_finite: bool,
        spare: Option<PyRef<'py, Spare>>,
    ) -> PyResult<WithErrors<'py>> {
        self.spec(table)?;
        let encoding = encoding(row_format, method, scale_format, zero_not_finite)?;
        let spare = spare.as_deref();
        let encoded = call(py, |ctx| match spare {
            Some(spare) => self.0.encode_in(&mut spare.lock(), table, encoding, ctx),
            None => self.0.encode(table, encoding, ctx),
        })?;
        TableRows::with_errors(py, encoded)
    }

    fn check_encoding(
        &self,
        py: Python<'_>,
        table: usize,
        row_format: &str,
        method: &str,
        scale_format: Option<&str>,
        zero_not_finite: bool,
    ) -> PyResult<()> {
        self.spec(table)?;
        let encoding = encoding(row_format, method, scale_format, zero_not_finite)?;
        call(py, |ctx| self.0.check_encoding(table, encoding, ctx))
    }

    fn swap_rows(&self, py: Python<'_>, table: usize, rows: &TableRows) -> PyResult<TableRows> {
        self.spec(table)?;
        let rows = rows.take()?;
        call(py, |_| self.0.swap_rows(table, rows)).map(TableRows::new)
    }

    fn write_rows(&self, py: Python<'_>, table: usize, first: usize, rows: Any<'_, '_>) -> PyResult<()> {
        self.spec(table)?;
        let rows = input("rows", rows)?;
        let rows = rows.as_slice()?;
        call(py, |ctx| self.0.write_rows(table, first, rows, ctx))
    }

    fn pack<'py>(
        &self,
        py: Python<'py>,
        table: usize,
        layout: &str,
        row_alignment: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let spec = self.quantized(py, table)?;
        let layout: Layout = layout.parse().map_err(BindingError)?;
        let format = call(py, |_| self.0.read_rows(table, dlrm_core::TableRows::format))?;
        let row_bytes = layout.row_bytes(format, spec.dim).next_multiple_of(row_alignment.max(1));
        let packed = zeros(py, (spec.rows, row_bytes), "uint8")?;
        let mut array = output::<u8>("packed", &packed)?;
        let into = array.as_slice_mut()?;
        call(py, |ctx| self.0.read_rows(table, |rows| rows.pack(into, spec, layout, row_bytes, ctx))?)?;
        Ok(packed)
    }

    fn clear_optimizer(&self, py: Python<'_>) -> PyResult<()> {
        call(py, |ctx| self.0.clear_optimizer(ctx))
    }

    fn set_optimizer(
        &self,
        py: Python<'_>,
        name: &str,
        split_bf16: bool,
        state_format: &str,
    ) -> PyResult<()> {
        let kind = name.parse().map_err(BindingError)?;
        let state = state_format.parse().map_err(BindingError)?;
        call(py, |ctx| self.0.set_optimizer(kind, split_bf16, state, ctx))
    }

    fn optimizer_state<'py>(&self, py: Python<'py>, table: usize) -> PyResult<Bound<'py, PyDict>> {
        let spec = self.spec(table)?;
        let state = PyDict::new(py);
        let parts = self.0.optimizer().map_or(&[][..], Kind::state);
        for (i, part) in parts.iter().enumerate() {
            let read = |format, bytes: &[u8], keeper| (format, Kept::new((bytes, keeper)));
            let (format, kept) = call(py, |_| self.0.read_state(table, i, read))?;
            let view = if part.row_wise {
                views::numbers(py, format, kept, [spec.rows])?
            } else {
                views::numbers(py, format, kept, [spec.rows, spec.dim])?
            };
            state.set_item(part.name, view)?;
        }
        let low = call(py, |_| self.0.read_low(table, |low, keeper| (low.len(), Kept::new((low, keeper)))))?;
        if low.0 > 0 {
            state.set_item(LOW_BITS, low.1.view::<i16, _>(py, [spec.rows, spec.dim])?)?;
        }
        Ok(state)
    }

    fn put_optimizer_state(
        &self,
        py: Python<'_>,
        table: usize,
        name: &str,
        array: Any<'_, '_>,
    ) -> PyResult<()> {
        self.spec(table)?;
        let parts = self.0.optimizer().map_or(&[][..], Kind::state);
        let part = parts.iter().position(|part| part.name == name);
        if part.is_none() && name != LOW_BITS {
            let names: Vec<_> = parts.iter().map(|part| part.name).collect();
            return Err(PyValueError::new_err(format!(
                "name: expected a part of the state, {names:?}, got {name:?}"
            )));
        }
        let memory = views::borrowed("array", array)?;
        call(py, |_| self.0.put_state(table, part, memory))
    }

    fn batch_size(
        &self,
        indices: Any<'_, '_>,
        offsets: Any<'_, '_>,
        per_sample_weights: Option<Any<'_, '_>>,
    ) -> Option<usize> {
        let integers = [i32::KIND, i64::KIND];
        let ids = vector_len(indices, &integers)?;
        let bags = vector_len(offsets, &integers)?.checked_sub(1)?;
        if per_sample_weights.is_some_and(|weights| vector_len(weights, &[f32::KIND]) != Some(ids)) {
            return None;
        }
        let batch = bags.checked_div(self.0.features().len())?;
        (batch * self.0.features().len() == bags).then_some(batch)
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
        let mut out = OutputArray::new("out", out)?;
        let mut argmax = argmax.map(|a| output("argmax", a)).transpose()?;
        let out = out.output()?;
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
        scale_grad_by_freq: Vec<bool>,
        factor: f32,
        groups: Vec<Bound<'_, PyMapping>>,
    ) -> PyResult<()> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let gradient = GradientArrays::new(argmax, grad, trainable, scale_grad_by_freq)?;
        let gradient = Gradient { factor, ..gradient.gradient()? };
        let optimizers = fused_optimizers(&self.0, &groups)?;
        call(py, |ctx| self.0.update(&slices.bags(&self.0, batch_size)?, &gradient, &optimizers, ctx))
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
        scale_grad_by_freq: Vec<bool>,
    ) -> PyResult<Vec<Option<Bound<'py, PyAny>>>> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let gradient = GradientArrays::new(argmax, grad, trainable, scale_grad_by_freq)?;
        let gradient = gradient.gradient()?;
        let wanted = self.0.specs().iter().zip(gradient.trainable);
        let zeros = |(spec, trainable): (&TableSpec, &bool)| {
            trainable.then(|| zeros(py, (spec.rows, spec.dim), "float32"))
        };
        let into = wanted.map(|table| zeros(table).transpose()).collect::<PyResult<Vec<_>>>()?;
        let mut arrays =
            into.iter().flatten().map(|a| output::<f32>("gradient", a)).collect::<PyResult<Vec<_>>>()?;
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
        scale_grad_by_freq: Vec<bool>,
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
        let into = zeros(py, slices.ids.len(), "float32")?;
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
            dict.set_item("scales", table.scales)?;
            dict.set_item("hot", table.cache)?;
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

    /// The same of a table whose rows are quantized.
    fn quantized(&self, py: Python<'_>, table: usize) -> PyResult<&TableSpec> {
        let spec = self.spec(table)?;
        let format = call(py, |_| self.0.read_rows(table, dlrm_core::TableRows::format))?;
        if format.is_quantized() {
            return Ok(spec);
        }
        let message = format!("table '{}': expected int8, int4 or int2 rows, got {format}", spec.name);
        Err(PyValueError::new_err(message))
    }
}

fn parsed(features: Vec<PyFeature>) -> PyResult<Vec<Feature>> {
    let feature = |(table, pooling, padding): PyFeature| -> dlrm_core::Result<_> {
        Ok(Feature { table, pooling: pooling.parse()?, padding })
    };
    Ok(features.into_iter().map(feature).collect::<Result<Vec<_>, _>>().map_err(BindingError)?)
}

/// What describes the gradient of a lookup's output.
pub(crate) struct GradientArrays<'py> {
    argmax: Option<Input<'py, i32>>,
    grad: Input<'py, f32>,
    trainable: Vec<bool>,
    scale_by_frequency: Vec<bool>,
}

impl<'py> GradientArrays<'py> {
    pub(crate) fn new(
        argmax: Option<Any<'_, 'py>>,
        grad: Any<'_, 'py>,
        trainable: Vec<bool>,
        scale_by_frequency: Vec<bool>,
    ) -> PyResult<Self> {
        let argmax = argmax.map(|a| input("argmax", a)).transpose()?;
        Ok(Self { argmax, grad: input("grad", grad)?, trainable, scale_by_frequency })
    }

    pub(crate) fn gradient(&self) -> PyResult<Gradient<'_>> {
        Ok(Gradient {
            output: self.grad.as_slice()?,
            argmax: self.argmax.as_ref().map(|a| a.as_slice()).transpose()?,
            trainable: &self.trainable,
            scale_by_frequency: &self.scale_by_frequency,
            factor: 1.0,
        })
    }
}

/// The fused optimizer of every table with the numbers of its parameter group; tables in a row mostly share one.
pub(crate) fn fused_optimizers(
    set: &dlrm_core::TableSet,
    groups: &[Bound<'_, PyMapping>],
) -> PyResult<Vec<Optimizer>> {
    let kind = set.optimizer().ok_or_else(|| PyValueError::new_err("update: call set_optimizer first"))?;
    let mut made: Vec<Optimizer> = Vec::with_capacity(groups.len());
    for (t, group) in groups.iter().enumerate() {
        let optimizer = match made.last() {
            Some(last) if group.is(&groups[t - 1]) => *last,
            _ => {
                let values = kind.hyperparameters().iter().map(|name| hyperparameter(group, name));
                let values = values.collect::<PyResult<Vec<f64>>>()?;
                // The count has this step already.
                let step = Step { number: integer(group, "step", 1)?, seed: integer(group, "seed", 0)? };
                check_momentum(kind, group)?;
                Optimizer::new(kind, &values, step).map_err(BindingError)?
            }
        };
        made.push(optimizer);
    }
    Ok(made)
}

/// Refuses a momentum that would not be used.
fn check_momentum(kind: Kind, group: &Bound<'_, PyMapping>) -> PyResult<()> {
    // Schedulers set it where a group has it, as torch's SGD does.
    if kind == Kind::Sgd && group.get_item("momentum")?.ne(0)? {
        return Err(PyValueError::new_err(format!(
            "momentum: expected 0 in the parameter group of an optimizer that was made without momentum and has no state \
             for it, got {}; make it with one above 0, or give the scheduler cycle_momentum=False",
            group.get_item("momentum")?.repr()?
        )));
    }
    Ok(())
}

/// An integer of a parameter group, `added` more than what the user sees there between steps.
fn integer(group: &Bound<'_, PyMapping>, name: &str, added: u64) -> PyResult<u64> {
    let value = group.get_item(name)?;
    if let Ok(number) = value.extract::<u64>()
        && number >= added
    {
        return Ok(number);
    }
    let got = value.sub(added).unwrap_or(value);
    let message =
        format!("{name}: expected an int from 0 to below 2**64 in the parameter group, got {}", got.repr()?);
    Err(if got.is_instance_of::<PyInt>() {
        PyValueError::new_err(message)
    } else {
        PyTypeError::new_err(message)
    })
}

/// A number of a parameter group; the betas are one pair there, and a bound that is `None` is infinity.
fn hyperparameter(group: &Bound<'_, PyMapping>, name: &str) -> PyResult<f64> {
    let value = match name {
        "beta1" => group.get_item("betas").and_then(|betas| betas.get_item(0)),
        "beta2" => group.get_item("betas").and_then(|betas| betas.get_item(1)),
        _ => group.get_item(name),
    };
    if ["clip_norm", "clip_value", "max_norm"].contains(&name)
        && value.as_ref().is_ok_and(PyAnyMethods::is_none)
    {
        return Ok(f64::INFINITY);
    }
    let number = value.as_ref().ok().and_then(|value| value.extract().ok());
    number.ok_or_else(|| {
        let got = value.map_or("nothing".to_owned(), |value| value.to_string());
        PyTypeError::new_err(format!("{name}: expected a number in the parameter group, got {got}"))
    })
}

/// NumPy's own, which raises where the memory cannot be had.
fn zeros<'py>(py: Python<'py>, shape: impl IntoPyObject<'py>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("numpy")?.call_method1("zeros", (shape, dtype))
}
