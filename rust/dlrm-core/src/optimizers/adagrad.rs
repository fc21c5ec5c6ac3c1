//! `s += g^2; w -= lr * g / (sqrt(s) + eps)`, `s` for each element (Duchi et al. 2011; torch.optim.Adagrad).

use crate::kernels::touched::Rule;
use crate::kernels::{LANES, Simd};

/// Adagrad; the state of a row is the sum of squares of each element.
#[derive(Clone, Copy, Debug)]
pub struct Adagrad {
    pub(crate) lr: f32,
    pub(crate) eps: f32,
}

impl Rule for Adagrad {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, weights: &mut [f32], state: &mut [f32], gradient: &[f32]) {
        let (lr, eps) = (simd.splat(self.lr), simd.splat(self.eps));
        let mut at = 0;
        while at < weights.len() {
            let g = simd.load_at(gradient, at);
            let s = simd.add(simd.load_at(state, at), simd.mul(g, g));
            simd.store_at(state, at, s);
            let step = simd.div(simd.mul(lr, g), simd.add(simd.sqrt(s), eps));
            let w = simd.sub(simd.load_at(weights, at), step);
            simd.store_at(weights, at, w);
            at += LANES;
        }
    }
}
