//! `s += mean(g^2); w -= lr * g / (sqrt(s) + eps)`, one `s` for a row (the default of DLRM and of TorchRec).
//!
//! The squares are added up in 16 lanes, element `c` in lane `c mod 16`, then the lanes: the same at every level.

use crate::kernels::touched::Rule;
use crate::kernels::{LANES, Simd};

/// Row-wise Adagrad; the state of a row is one sum of mean squares.
#[derive(Clone, Copy, Debug)]
pub struct RowWiseAdagrad {
    pub(crate) lr: f32,
    pub(crate) eps: f32,
}

impl Rule for RowWiseAdagrad {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, weights: &mut [f32], state: &mut [f32], gradient: &[f32]) {
        let mut squares = simd.splat(0.0);
        let mut at = 0;
        while at < gradient.len() {
            let g = simd.load_at(gradient, at);
            squares = simd.add(squares, simd.mul(g, g));
            at += LANES;
        }
        state[0] += simd.sum(squares) / gradient.len() as f32;
        let step = simd.splat(self.lr / (state[0].sqrt() + self.eps));
        let mut at = 0;
        while at < weights.len() {
            let step = simd.mul(step, simd.load_at(gradient, at));
            let w = simd.sub(simd.load_at(weights, at), step);
            simd.store_at(weights, at, w);
            at += LANES;
        }
    }
}
