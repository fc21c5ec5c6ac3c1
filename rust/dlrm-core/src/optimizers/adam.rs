//! `w -= lr * u`, `u` as `moments` tells (Kingma and Ba 2015; torch.optim.Adam, lazily as torch.optim.SparseAdam).
//!
//! With decoupled weight decay it is `AdamW` (Loshchilov and Hutter 2019).

use super::Hyperparameters;
use super::moments::Moments;
use super::sgd::descend;
use crate::kernels::Simd;
use crate::kernels::touched::{Row, Rule};

/// Adam; the state of a row is both moments of each element.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adam {
    lr: f32,
    moments: Moments,
}

impl Adam {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { lr: values.get("lr"), moments: Moments::new(values) }
    }
}

impl Rule for Adam {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, mut row: Row) {
        self.moments.direct(simd, &mut row);
        descend(simd, row.weights, row.gradient, self.lr);
    }
}

/// Partial row-wise Adam: the second moment is one number for a row, of the mean of its squares (FBGEMM's
/// `PARTIAL_ROWWISE_ADAM`, whose weight decay is the decoupled one).
#[derive(Clone, Copy, Debug)]
pub(super) struct PartialRowWiseAdam {
    lr: f32,
    moments: Moments,
}

impl PartialRowWiseAdam {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { lr: values.get("lr"), moments: Moments::new(values) }
    }
}

impl Rule for PartialRowWiseAdam {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, mut row: Row) {
        self.moments.direct_row_wise(simd, &mut row);
        descend(simd, row.weights, row.gradient, self.lr);
    }
}
