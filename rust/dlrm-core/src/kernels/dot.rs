//! The gradient of per-sample weights: the dot product of each id's row with the gradient of its bag.
//!
//! ```text
//! into[id] = sum over c of row[c] * grad[bag][c]   (lane c mod 16, then the lanes; / ids of the bag for a mean)
//! ```

use std::ops::Range;

use super::pool::count;
use super::{Kernel, LANES, Simd};
use crate::bags::{Bags, Id};
use crate::disjoint::Disjoint;
use crate::rows::Rows;
use crate::table_set::Slot;

/// A run of one feature's bags.
pub(crate) struct Dot<'a, R, I> {
    pub(crate) rows: R,
    pub(crate) ids: &'a [I],
    pub(crate) bags: &'a Bags<'a>,
    pub(crate) mean: bool,
    /// An id that gets zero; `u64::MAX` for none.
    pub(crate) padding: u64,
    /// The bag of unit 0.
    pub(crate) first: usize,
    pub(crate) units: Range<usize>,
    pub(crate) slot: Slot,
    pub(crate) output: &'a [f32],
    pub(crate) into: &'a Disjoint<'a, f32>,
}

impl<R: Rows, I: Id> Kernel for Dot<'_, R, I> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for unit in self.units.clone() {
            let bag = self.bags.bounds(self.first + unit);
            let ids = &self.ids[bag.clone()];
            let divisor = if self.mean { count(ids, self.padding).max(1) as f32 } else { 1.0 };
            let start = self.slot.at(unit);
            let grad = &self.output[start..start + self.rows.dim()];
            #[expect(unsafe_code, reason = "bags are disjoint")]
            // SAFETY: bags do not overlap, and each is in one piece.
            let into = unsafe { self.into.piece(bag) };
            for (dot, id) in into.iter_mut().zip(ids) {
                *dot = if id.row() == self.padding {
                    0.0
                } else {
                    self.dot(simd, id.row() as usize, grad) / divisor
                };
            }
        }
    }
}

impl<R: Rows, I: Id> Dot<'_, R, I> {
    #[inline(always)]
    fn dot<S: Simd>(&self, simd: S, row: usize, grad: &[f32]) -> f32 {
        let mut sum = simd.splat(0.0);
        let mut at = 0;
        while at < grad.len() {
            let elements = self.rows.load_at(simd, row, at);
            sum = simd.add(sum, simd.mul(elements, simd.load_at(grad, at)));
            at += LANES;
        }
        simd.sum(sum)
    }
}
