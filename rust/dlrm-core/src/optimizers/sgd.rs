//! `w -= lr * g`

use super::Hyperparameters;
use crate::kernels::touched::{Row, Rule};
use crate::kernels::{LANES, Simd};

/// Stochastic gradient descent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sgd {
    lr: f32,
}

impl Sgd {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { lr: values.get("lr") }
    }
}

impl Rule for Sgd {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        descend(simd, row.weights, row.gradient, self.lr);
    }
}

/// `w -= rate * direction`
#[inline(always)]
pub(super) fn descend<S: Simd>(simd: S, weights: &mut [f32], direction: &[f32], rate: f32) {
    let rate = simd.splat(rate);
    let mut at = 0;
    while at < weights.len() {
        let step = simd.mul(rate, simd.load_at(direction, at));
        let w = simd.sub(simd.load_at(weights, at), step);
        simd.store_at(weights, at, w);
        at += LANES;
    }
}
