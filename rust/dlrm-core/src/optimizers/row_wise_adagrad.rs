//! `s += mean(g^2); w -= lr * g / (sqrt(s) + eps)`, one `s` for a row (the default of DLRM and of TorchRec).

use super::Hyperparameters;
use super::sgd::descend;
use crate::kernels::Simd;
use crate::kernels::touched::{Row, Rule, mean_square};

/// Row-wise Adagrad; the state of a row is one sum of mean squares.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowWiseAdagrad {
    lr: f32,
    eps: f32,
}

impl RowWiseAdagrad {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { lr: values.get("lr"), eps: values.get("eps") }
    }
}

impl Rule for RowWiseAdagrad {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        let Row { weights, state: [sum, _], gradient } = row;
        sum[0] += mean_square(simd, gradient);
        descend(simd, weights, gradient, self.lr / (sum[0].sqrt() + self.eps));
    }
}
