//! `u += weight_decay * w; w -= lr * |w| / |u| * u`, `u` as `moments` tells and the norms those of the row; the ratio is 1
//! where a norm is 0.
//!
//! You et al., "Large batch optimization for deep learning", 2020, algorithm 2, with a row for a layer, as FBGEMM's `LAMB`
//! and `PARTIAL_ROWWISE_LAMB`, whose ratio is 0 for a row of zeros: such a row would never move.

use super::Hyperparameters;
use super::moments::Moments;
use super::sgd::descend;
use crate::kernels::touched::{Row, Rule, norm};
use crate::kernels::{LANES, Simd};

/// LAMB; the state of a row is both moments of each element.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lamb {
    trust: Trust,
    moments: Moments,
}

/// Partial row-wise LAMB: the second moment is one number for a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartialRowWiseLamb {
    trust: Trust,
    moments: Moments,
}

/// What is done with the direction.
#[derive(Clone, Copy, Debug)]
struct Trust {
    lr: f32,
    weight_decay: f32,
}

impl Trust {
    fn new(values: &Hyperparameters) -> Self {
        Self { lr: values.get("lr"), weight_decay: values.get("weight_decay") }
    }

    #[inline(always)]
    fn descend<S: Simd>(self, simd: S, row: Row) {
        let Row { weights, gradient: direction, .. } = row;
        let decay = simd.splat(self.weight_decay);
        let mut at = 0;
        while at < direction.len() {
            let decayed = simd.mul(decay, simd.load_at(weights, at));
            let u = simd.add(simd.load_at(direction, at), decayed);
            simd.store_at(direction, at, u);
            at += LANES;
        }
        let (weight_norm, direction_norm) = (norm(simd, weights), norm(simd, direction));
        let both = weight_norm > 0.0 && direction_norm > 0.0;
        let ratio = if both { weight_norm / direction_norm } else { 1.0 };
        descend(simd, weights, direction, self.lr * ratio);
    }
}

impl Lamb {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { trust: Trust::new(values), moments: Moments::new(values) }
    }
}

impl PartialRowWiseLamb {
    pub(super) fn new(values: &Hyperparameters) -> Self {
        Self { trust: Trust::new(values), moments: Moments::new(values) }
    }
}

impl Rule for Lamb {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, mut row: Row) {
        self.moments.direct(simd, &mut row);
        self.trust.descend(simd, row);
    }
}

impl Rule for PartialRowWiseLamb {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, mut row: Row) {
        self.moments.direct_row_wise(simd, &mut row);
        self.trust.descend(simd, row);
    }
}
