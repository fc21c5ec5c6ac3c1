//! FTRL-Proximal, for each element:
//!
//! ```text
//! sigma = (sqrt(n + g^2) - sqrt(n)) / lr;  z += g - sigma * w;  n += g^2
//! w = 0                                                    where |z| <= l1
//! w = -(z - sign(z) * l1) / ((beta + sqrt(n)) / lr + l2)   elsewhere
//! ```
//! H. B. `McMahan` et al., "Ad click prediction: a view from the trenches", KDD 2013, algorithm 1. An element that never had a
//! gradient (n = 0) keeps the weight that it began with; the first gradient makes z of that.

use super::Hyperparameters;
use crate::kernels::touched::{Row, Rule};
use crate::kernels::{LANES, Simd};

/// FTRL; the state of a row is `z` and `n` of each element.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ftrl {
    lr: f32,
    beta: f32,
    l1: f32,
    l2: f32,
}

impl Ftrl {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        let [lr, beta, l1, l2] = ["lr", "beta", "l1", "l2"].map(|name| values.get(name));
        Self { lr, beta, l1, l2 }
    }
}

impl Rule for Ftrl {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        let Row { weights, state: [linear, squares], gradient } = row;
        let [lr, beta, l1, l2] = [self.lr, self.beta, self.l1, self.l2].map(|x| simd.splat(x));
        let zero = simd.splat(0.0);
        let mut at = 0;
        while at < weights.len() {
            let (g, w) = (simd.load_at(gradient, at), simd.load_at(weights, at));
            let before = simd.load_at(squares, at);
            let n = simd.add(before, simd.mul(g, g));
            let root = simd.sqrt(n);
            let sigma = simd.div(simd.sub(root, simd.sqrt(before)), lr);
            let z = simd.add(simd.load_at(linear, at), simd.sub(g, simd.mul(sigma, w)));
            simd.store_at(squares, at, n);
            simd.store_at(linear, at, z);
            // By how much z is beyond l1 on either side: at most one of the two is not 0.
            let above = simd.max(simd.sub(z, l1), zero);
            let below = simd.max(simd.sub(simd.sub(zero, z), l1), zero);
            let divisor = simd.add(simd.div(simd.add(beta, root), lr), l2);
            let moved = simd.div(simd.sub(below, above), divisor);
            simd.store_at(weights, at, simd.select(simd.greater(n, zero), moved, w));
            at += LANES;
        }
    }
}
