//! `b = momentum * b + lr * eta * |w| / (|g| + weight_decay * |w|) * (g + weight_decay * w); w -= b`, the norms those of
//! the row; the factor is `lr` alone where `|w|` or the divisor is 0.
//!
//! You, Gitman and Ginsburg, "Large batch training of convolutional networks", 2017, algorithm 1, with a row for a layer,
//! as FBGEMM's `LARS_SGD`, whose factor is 0 for a row of zeros: such a row would never move.

use super::Hyperparameters;
use crate::kernels::touched::{Row, Rule, norm};
use crate::kernels::{LANES, Simd};

/// LARS; the state of a row is the momentum of each element.
#[derive(Clone, Copy, Debug)]
pub(super) struct LarsSgd {
    lr: f32,
    eta: f32,
    momentum: f32,
    weight_decay: f32,
}

impl LarsSgd {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self {
            lr: values.get("lr"),
            eta: values.get("eta"),
            momentum: values.get("momentum"),
            weight_decay: values.get("weight_decay"),
        }
    }
}

impl Rule for LarsSgd {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        let Row { weights, state: [buffer, _], gradient } = row;
        let weight_norm = norm(simd, weights);
        let divisor = norm(simd, gradient) + self.weight_decay * weight_norm;
        let both = weight_norm > 0.0 && divisor > 0.0;
        let rate = if both { self.lr * self.eta * (weight_norm / divisor) } else { self.lr };
        let (rate, decay) = (simd.splat(rate), simd.splat(self.weight_decay));
        let momentum = simd.splat(self.momentum);
        let mut at = 0;
        while at < weights.len() {
            let w = simd.load_at(weights, at);
            let g = simd.add(simd.load_at(gradient, at), simd.mul(decay, w));
            let b = simd.add(simd.mul(momentum, simd.load_at(buffer, at)), simd.mul(rate, g));
            simd.store_at(buffer, at, b);
            simd.store_at(weights, at, simd.sub(w, b));
            at += LANES;
        }
    }
}
