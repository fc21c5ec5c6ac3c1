//! What every optimizer can have: gradients clipped by value (`clip` has the norm, which comes before), weight decay, and a
//! largest norm of rows.
//!
//! ```text
//! g = clamp(g, -clip_value, clip_value)
//! g += weight_decay * w             L2
//! w *= 1 - lr * weight_decay        decoupled (Loshchilov and Hutter 2019)
//! the optimizer's rule
//! w *= max_norm / |w|               where |w| > max_norm
//! ```

use super::Hyperparameters;
use crate::kernels::touched::{Row, Rule, map, norm};
use crate::kernels::{LANES, Simd};

/// A rule with what goes before and after it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adjusted<R> {
    pub(super) rule: R,
    pub(super) adjustment: Adjustment,
}

/// What goes before and after a rule.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adjustment {
    /// Whether there is anything to adjust at all: asked for every row, in place of four questions.
    any: bool,
    clip_value: f32,
    l2: f32,
    decay: f32,
    max_norm: f32,
}

impl Adjustment {
    /// `own_decay` tells that the rule has the weight decay in its formula.
    pub(super) fn new(values: &Hyperparameters, own_decay: bool) -> Self {
        let weight_decay = if own_decay { 0.0 } else { values.precise("weight_decay") };
        let decoupled = !own_decay && values.get("decoupled_weight_decay") > 0.0;
        let (clip_value, max_norm) = (values.get("clip_value"), values.get("max_norm"));
        Self {
            any: weight_decay > 0.0 || clip_value < f32::INFINITY || max_norm < f32::INFINITY,
            clip_value,
            l2: if decoupled { 0.0 } else { weight_decay as f32 },
            decay: if decoupled { (1.0 - values.precise("lr") * weight_decay) as f32 } else { 1.0 },
            max_norm,
        }
    }

    #[inline(always)]
    fn before<S: Simd>(&self, simd: S, weights: &mut [f32], gradient: &mut [f32]) {
        if self.clip_value < f32::INFINITY {
            let (low, high) = (simd.splat(-self.clip_value), simd.splat(self.clip_value));
            map(simd, gradient, |g| simd.max(low, simd.min(high, g))); // in this order NaN stays NaN
        }
        if self.l2 > 0.0 {
            let l2 = simd.splat(self.l2);
            let mut at = 0;
            while at < weights.len() {
                let decay = simd.mul(l2, simd.load_at(weights, at));
                let g = simd.add(simd.load_at(gradient, at), decay);
                simd.store_at(gradient, at, g);
                at += LANES;
            }
        }
        if self.decay < 1.0 {
            let decay = simd.splat(self.decay);
            map(simd, weights, |w| simd.mul(w, decay));
        }
    }

    #[inline(always)]
    fn after<S: Simd>(&self, simd: S, weights: &mut [f32]) {
        if self.max_norm < f32::INFINITY {
            let norm = norm(simd, weights);
            if norm > self.max_norm {
                let factor = simd.splat(self.max_norm / norm);
                map(simd, weights, |w| simd.mul(w, factor));
            }
        }
    }
}

impl<R: Rule> Rule for Adjusted<R> {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, row: Row) {
        if !self.adjustment.any {
            return self.rule.apply(simd, row);
        }
        let Row { weights, state, gradient } = row;
        self.adjustment.before(simd, weights, gradient);
        self.rule.apply(simd, Row { weights: &mut *weights, state, gradient });
        self.adjustment.after(simd, weights);
    }
}
