//! `s += g^2; w -= lr * g / (sqrt(s) + eps)`, `s` for each element (Duchi et al. 2011; torch.optim.Adagrad).

use super::Hyperparameters;
use crate::kernels::touched::{Row, Rule};
use crate::kernels::{LANES, Simd};

/// Adagrad; the state of a row is the sum of squares of each element.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adagrad {
    lr: f32,
    eps: f32,
}

impl Adagrad {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { lr: values.get("lr"), eps: values.get("eps") }
    }
}

impl Rule for Adagrad {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        let Row { weights, state: [sum, _], gradient } = row;
        let (lr, eps) = (simd.splat(self.lr), simd.splat(self.eps));
        let mut at = 0;
        while at < weights.len() {
            let g = simd.load_at(gradient, at);
            let s = simd.add(simd.load_at(sum, at), simd.mul(g, g));
            simd.store_at(sum, at, s);
            let step = simd.div(simd.mul(lr, g), simd.add(simd.sqrt(s), eps));
            let w = simd.sub(simd.load_at(weights, at), step);
            simd.store_at(weights, at, w);
            at += LANES;
        }
    }
}
