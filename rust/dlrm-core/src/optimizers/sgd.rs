//! `w -= lr * g`

use crate::kernels::touched::Rule;
use crate::kernels::{LANES, Simd};

/// Stochastic gradient descent.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    pub(crate) lr: f32,
}

impl Rule for Sgd {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, weights: &mut [f32], _state: &mut [f32], gradient: &[f32]) {
        let lr = simd.splat(self.lr);
        let mut at = 0;
        while at < weights.len() {
            let step = simd.mul(lr, simd.load_at(gradient, at));
            let w = simd.sub(simd.load_at(weights, at), step);
            simd.store_at(weights, at, w);
            at += LANES;
        }
    }
}
