//! `b = momentum * b + g; w -= lr * b`, or with Nesterov's `w -= lr * (g + momentum * b)` (torch.optim.SGD).
//!
//! Lazy: the momentum of a row that is not touched neither decays nor moves it.

use super::Hyperparameters;
use crate::kernels::touched::{Row, Rule};
use crate::kernels::{LANES, Simd};

/// Stochastic gradient descent with momentum; the state of a row is the momentum of each element.
#[derive(Clone, Copy, Debug)]
pub(super) struct MomentumSgd {
    lr: f32,
    momentum: f32,
    nesterov: bool,
}

impl MomentumSgd {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self {
            lr: values.get("lr"),
            momentum: values.get("momentum"),
            nesterov: values.get("nesterov") > 0.0,
        }
    }
}

impl Rule for MomentumSgd {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        let Row { weights, state: [buffer, _], gradient } = row;
        let (lr, momentum) = (simd.splat(self.lr), simd.splat(self.momentum));
        let mut at = 0;
        while at < weights.len() {
            let g = simd.load_at(gradient, at);
            let b = simd.add(simd.mul(momentum, simd.load_at(buffer, at)), g);
            simd.store_at(buffer, at, b);
            let direction = if self.nesterov { simd.add(g, simd.mul(momentum, b)) } else { b };
            let w = simd.sub(simd.load_at(weights, at), simd.mul(lr, direction));
            simd.store_at(weights, at, w);
            at += LANES;
        }
    }
}
