//! Calls made ready before their gradient is there, and the overlap of two of them.

#![expect(clippy::too_many_arguments, reason = "they are Python's: no structure is made for each call")]
#![expect(clippy::needless_pass_by_value, reason = "a list of Python's comes as a value")]

use dlrm_core::{Gradient, Part};
use pyo3::prelude::*;
use pyo3::types::PyMapping;

use crate::arrays::{BagArrays, OutputArray, output};
use crate::call::call;
use crate::error::BindingError;
use crate::table_set::{GradientArrays, TableSet, fused_optimizers};

type Any<'a, 'py> = &'a Bound<'py, PyAny>;

#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
pub(crate) struct Prepared {
    set: Py<TableSet>,
    trainable: Vec<bool>,
    scale_grad_by_freq: Vec<bool>,
    call: dlrm_core::Prepared,
}

#[pymethods]
impl Prepared {
    #[new]
    fn new(
        py: Python<'_>,
        tables: Py<TableSet>,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        trainable: Vec<bool>,
        scale_grad_by_freq: Vec<bool>,
    ) -> PyResult<Self> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let set = &tables.get().0;
        let prepared = call(py, |ctx| set.prepare(&slices.bags(set, batch_size)?, &trainable, ctx))?;
        Ok(Self { set: tables, trainable, scale_grad_by_freq, call: prepared })
    }

    fn overlap(
        &self,
        py: Python<'_>,
        second: &Self,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        parts_bags: bool,
    ) -> PyResult<Overlap> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let set = &self.set.get().0;
        let overlap = call(py, |ctx| {
            set.overlap(&self.call, &second.call, &slices.bags(set, batch_size)?, parts_bags, ctx)
        })?;
        Ok(Overlap { set: self.set.clone_ref(py), calls: overlap })
    }

    fn clipped_factor(
        &self,
        py: Python<'_>,
        argmax: Option<Any<'_, '_>>,
        grad: Any<'_, '_>,
        factor: f32,
        groups: Vec<Bound<'_, PyMapping>>,
    ) -> PyResult<f32> {
        let set = &self.set.get().0;
        let gradient = self.gradient(argmax, grad)?;
        let gradient = Gradient { factor, ..gradient.gradient()? };
        let optimizers = fused_optimizers(set, &groups)?;
        call(py, |ctx| set.clipped_factor(&self.call, &gradient, &optimizers, ctx))
    }

    #[pyo3(signature = (argmax, grad, factor, groups, overlap=None, part=None))]
    fn update(
        &self,
        py: Python<'_>,
        argmax: Option<Any<'_, '_>>,
        grad: Any<'_, '_>,
        factor: f32,
        groups: Vec<Bound<'_, PyMapping>>,
        overlap: Option<&Overlap>,
        part: Option<&str>,
    ) -> PyResult<()> {
        let set = &self.set.get().0;
        let gradient = self.gradient(argmax, grad)?;
        let gradient = Gradient { factor, ..gradient.gradient()? };
        let optimizers = fused_optimizers(set, &groups)?;
        let part = part.map(str::parse::<Part>).transpose().map_err(BindingError)?;
        let part = overlap.zip(part).map(|(overlap, part)| (&overlap.calls, part));
        call(py, |ctx| set.update_prepared(&self.call, part, &gradient, &optimizers, ctx))
    }
}

impl Prepared {
    fn gradient<'py>(
        &self,
        argmax: Option<Any<'_, 'py>>,
        grad: Any<'_, 'py>,
    ) -> PyResult<GradientArrays<'py>> {
        GradientArrays::new(argmax, grad, self.trainable.clone(), self.scale_grad_by_freq.clone())
    }
}

#[pyclass(frozen, module = "dlrm_rs._dlrm_rs")]
pub(crate) struct Overlap {
    set: Py<TableSet>,
    calls: dlrm_core::Overlap,
}

#[pymethods]
impl Overlap {
    fn lookup(
        &self,
        py: Python<'_>,
        part: &str,
        indices: Any<'_, '_>,
        offsets: Option<Any<'_, '_>>,
        batch_size: usize,
        per_sample_weights: Option<Any<'_, '_>>,
        out: Any<'_, '_>,
        argmax: Option<Any<'_, '_>>,
    ) -> PyResult<()> {
        let arrays = BagArrays::new(indices, offsets, per_sample_weights)?;
        let slices = arrays.slices()?;
        let part = part.parse().map_err(BindingError)?;
        let mut out = OutputArray::new("out", out)?;
        let mut argmax = argmax.map(|a| output("argmax", a)).transpose()?;
        let out = out.output()?;
        let argmax = argmax.as_mut().map(|a| a.as_slice_mut()).transpose()?;
        let set = &self.set.get().0;
        call(py, |ctx| set.lookup_part(&self.calls, part, &slices.bags(set, batch_size)?, out, argmax, ctx))
    }
}
