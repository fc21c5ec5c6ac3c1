//! `v = alpha * v + (1 - alpha) * mean(g^2); w -= lr * g / (sqrt(v) + eps)`, one `v` for a row: `torch.optim.RMSprop` on
//! the mean of a row's squares.

use super::Hyperparameters;
use super::sgd::descend;
use crate::kernels::Simd;
use crate::kernels::touched::{Row, Rule, mean_square};

/// Row-wise `RMSprop`; the state of a row is one mean of mean squares.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowWiseRmsprop {
    lr: f32,
    alpha: f32,
    rest: f32,
    eps: f32,
}

impl RowWiseRmsprop {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        let alpha = values.precise("alpha");
        Self { lr: values.get("lr"), alpha: alpha as f32, rest: (1.0 - alpha) as f32, eps: values.get("eps") }
    }
}

impl Rule for RowWiseRmsprop {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        let Row { weights, state: [mean, _], gradient } = row;
        mean[0] = self.alpha * mean[0] + self.rest * mean_square(simd, gradient);
        descend(simd, weights, gradient, self.lr / (mean[0].sqrt() + self.eps));
    }
}
