//! The two moments of Adam and its kin, and the direction that they give.
//!
//! ```text
//! m = beta1 * m + (1 - beta1) * g
//! v = beta2 * v + (1 - beta2) * g^2               (row-wise: of mean(g^2), one v for a row)
//! u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//! ```
//! Kingma and Ba, "Adam", 2015, algorithm 1, where `t` counts the updates of the tables. Lazy: the moments of a row that
//! is not touched stay as they are.

use super::Hyperparameters;
use crate::kernels::touched::{Row, mean_square};
use crate::kernels::{LANES, Simd};

/// How the moments move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    betas: [f32; 2],
    rests: [f32; 2],
    /// `1 / (1 - beta1^t)`.
    first: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    second: f32,
    eps: f32,
}

impl Moments {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        let betas = [values.precise("beta1"), values.precise("beta2")];
        let [first, second] = betas.map(|beta| 1.0 - beta.powf(values.step() as f64));
        Self {
            betas: betas.map(|beta| beta as f32),
            rests: betas.map(|beta| (1.0 - beta) as f32),
            first: (1.0 / first) as f32,
            second: (1.0 / second.sqrt()) as f32,
            eps: values.get("eps"),
        }
    }

    /// Moves both moments of a row, and turns its gradient into the direction.
    #[inline(always)]
    pub(super) fn direct<S: Simd>(&self, simd: S, row: &mut Row) {
        let Row { state: [m, v], gradient, .. } = row;
        let [of_first, of_second] = self.moves(simd);
        let (first, second, eps) = (simd.splat(self.first), simd.splat(self.second), simd.splat(self.eps));
        let mut at = 0;
        while at < gradient.len() {
            let g = simd.load_at(gradient, at);
            let moved_v = moved(simd, of_second, simd.load_at(v, at), simd.mul(g, g));
            let moved_m = moved(simd, of_first, simd.load_at(m, at), g);
            simd.store_at(v, at, moved_v);
            simd.store_at(m, at, moved_m);
            let divisor = simd.add(simd.mul(simd.sqrt(moved_v), second), eps);
            simd.store_at(gradient, at, simd.div(simd.mul(moved_m, first), divisor));
            at += LANES;
        }
    }

    /// The same with one second moment for the row.
    #[inline(always)]
    pub(super) fn direct_row_wise<S: Simd>(&self, simd: S, row: &mut Row) {
        let Row { state: [m, v], gradient, .. } = row;
        v[0] = self.betas[1] * v[0] + self.rests[1] * mean_square(simd, gradient);
        let [of_first, _] = self.moves(simd);
        let (first, divisor) = (simd.splat(self.first), simd.splat(v[0].sqrt() * self.second + self.eps));
        let mut at = 0;
        while at < gradient.len() {
            let moved_m = moved(simd, of_first, simd.load_at(m, at), simd.load_at(gradient, at));
            simd.store_at(m, at, moved_m);
            simd.store_at(gradient, at, simd.div(simd.mul(moved_m, first), divisor));
            at += LANES;
        }
    }

    /// `beta` and `1 - beta` of each moment.
    #[inline(always)]
    fn moves<S: Simd>(&self, simd: S) -> [[S::V; 2]; 2] {
        let Self { betas, rests, .. } = self;
        [[simd.splat(betas[0]), simd.splat(rests[0])], [simd.splat(betas[1]), simd.splat(rests[1])]]
    }
}

/// `beta * moment + (1 - beta) * x`
#[inline(always)]
fn moved<S: Simd>(simd: S, [beta, rest]: [S::V; 2], moment: S::V, x: S::V) -> S::V {
    simd.add(simd.mul(beta, moment), simd.mul(rest, x))
}
