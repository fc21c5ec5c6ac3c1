//! Lookup: the rows of every bag pooled into one output row.
//!
//! ```text
//! for bag in units:
//!     sum:   out[c] = 0 + r1[c] * w1 + r2[c] * w2 + ...   (left to right; no `* w` without weights)
//!     mean:  out[c] = sum[c] / (ids of the bag)
//!     max:   out[c] = the first r[c] that no later one exceeds; argmax[c] = its place in the bag
//!     none:  out[c] = r[c]                                (a unit is an id)
//! ```
//! Padding ids are left out everywhere but in none; a bag with no other id gives zeros, and -1 for argmax.

use std::ops::Range;

use super::sum::{Terms, sum};
use super::{Kernel, LANES, Simd};
use crate::bags::{Bags, Id};
use crate::disjoint::Disjoint;
use crate::lookup::{Outputs, Pooling};
use crate::rows::{Bf16, Fp16, Rows, pack};
use crate::table_set::Slot;

/// Rows that are prefetched ahead of the one that is read.
pub(crate) const AHEAD: usize = 32;

/// A run of one feature's units.
pub(crate) struct Pool<'a, R, I> {
    pub(crate) rows: R,
    /// Of the whole call; those of `units` are below the number of rows.
    pub(crate) ids: &'a [I],
    pub(crate) bags: &'a Bags<'a>,
    pub(crate) pooling: Pooling,
    /// An id to leave out; `u64::MAX` for none.
    pub(crate) padding: u64,
    /// The bag of unit 0 (its id where nothing is pooled).
    pub(crate) first: usize,
    pub(crate) units: Range<usize>,
    pub(crate) slot: Slot<'a>,
    pub(crate) out: &'a Outputs<'a>,
    pub(crate) argmax: Option<&'a Disjoint<'a, f32>>,
}

impl<R: Rows, I: Id> Kernel for Pool<'_, R, I> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ids = self.positions();
        for &id in &self.ids[ids.start..ids.end.min(ids.start + AHEAD)] {
            self.rows.prefetch(simd, id.row());
        }
        let mut scratch = self.scratch();
        for unit in self.units.clone() {
            let out = match self.out {
                Outputs::Fp32(out) => self.output(out, unit),
                _ => &mut scratch[..],
            };
            match (self.pooling, self.bags.weights) {
                (Pooling::None, _) => {
                    let position = self.first + unit;
                    self.prefetch(simd, position, ids.end);
                    self.rows.copy(simd, self.ids[position].row() as usize, out);
                }
                (Pooling::Max, _) => self.max(simd, unit, ids.end, out),
                (_, None) => self.sum::<S, false>(simd, unit, ids.end, out),
                (_, Some(_)) => self.sum::<S, true>(simd, unit, ids.end, out),
            }
            match self.out {
                Outputs::Fp32(_) => {}
                Outputs::Fp16(out) => pack(simd, Fp16, &scratch, self.output(out, unit)),
                Outputs::Bf16(out) => pack(simd, Bf16, &scratch, self.output(out, unit)),
            }
        }
    }
}

impl<R: Rows, I: Id> Pool<'_, R, I> {
    /// Where the ids of all units are.
    #[inline(always)]
    pub(crate) fn positions(&self) -> Range<usize> {
        if self.pooling == Pooling::None {
            return self.first + self.units.start..self.first + self.units.end;
        }
        let last = self.first + self.units.end - 1;
        self.bags.bounds(self.first + self.units.start).start..self.bags.bounds(last).end
    }

    /// Room for a row that is yet to be rounded to the output's precision.
    #[inline(always)]
    fn scratch(&self) -> Vec<f32> {
        let len = if matches!(self.out, Outputs::Fp32(_)) { 0 } else { self.rows.dim() };
        vec![0.0; len]
    }

    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "units are disjoint")]
    fn output<'b, T>(&self, out: &'b Disjoint<'_, T>, unit: usize) -> &'b mut [T] {
        let at = self.slot.at(unit);
        // SAFETY: output rows of different units do not overlap, every unit is in one piece, and this piece's rows are
        // taken one at a time.
        unsafe { out.piece(at..at + self.rows.dim()) }
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, position: usize, end: usize) {
        if position + AHEAD < end {
            self.rows.prefetch(simd, self.ids[position + AHEAD].row());
        }
    }

    /// Sum or mean of a bag.
    #[inline(always)]
    fn sum<S: Simd, const WEIGHTED: bool>(&self, simd: S, unit: usize, end: usize, out: &mut [f32]) {
        let bag = self.bags.bounds(self.first + unit);
        let terms = BagRows::<_, _, WEIGHTED> {
            pool: self,
            end,
            divisor: (self.pooling == Pooling::Mean)
                .then(|| count(&self.ids[bag.clone()], self.padding).max(1) as f32),
        };
        sum(simd, &terms, bag, out);
    }

    /// Elementwise maximum of a bag, and its places.
    #[inline(always)]
    fn max<S: Simd>(&self, simd: S, unit: usize, end: usize, out: &mut [f32]) {
        let bag = self.bags.bounds(self.first + unit);
        let dim = self.rows.dim();
        let mut at = 0;
        while at < dim {
            let mut max = simd.splat(0.0);
            let mut places = simd.splat(f32::from_bits(u32::MAX)); // -1
            let mut empty = true;
            for position in bag.clone() {
                let id = self.ids[position].row();
                if at == 0 {
                    self.prefetch(simd, position, end);
                }
                if id == self.padding {
                    continue;
                }
                let row = self.rows.load_at(simd, id as usize, at);
                let place = simd.splat(f32::from_bits((position - bag.start) as u32));
                if empty {
                    (max, places, empty) = (row, place, false);
                } else {
                    let greater = simd.greater(row, max);
                    max = simd.select(greater, row, max);
                    places = simd.select(greater, place, places);
                }
            }
            simd.store_at(out, at, max);
            self.store_places(simd, unit, at, places);
            at += LANES;
        }
    }

    #[inline(always)]
    fn store_places<S: Simd>(&self, simd: S, unit: usize, at: usize, places: S::V) {
        if let Some(argmax) = self.argmax {
            simd.store_at(self.output(argmax, unit), at, places);
        }
    }
}

/// The rows of a bag, to be added up.
struct BagRows<'a, R, I, const WEIGHTED: bool> {
    pool: &'a Pool<'a, R, I>,
    /// Where the ids of the piece end.
    end: usize,
    /// By what a mean divides.
    divisor: Option<f32>,
}

impl<R: Rows, I: Id, const WEIGHTED: bool> Terms for BagRows<'_, R, I, WEIGHTED> {
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize, const WHOLE: bool>(
        &self,
        simd: S,
        position: usize,
        at: usize,
        sum: &mut [S::V; COUNT],
    ) {
        let pool = self.pool;
        if at == 0 {
            pool.prefetch(simd, position, self.end);
        }
        let id = pool.ids[position].row();
        if id == pool.padding {
            return;
        }
        let row = pool.rows.load::<S, COUNT, WHOLE>(simd, id as usize, at);
        match pool.bags.weights {
            Some(weights) if WEIGHTED => {
                let weight = simd.splat(weights[position]);
                for i in 0..COUNT {
                    sum[i] = simd.add(sum[i], simd.mul(row[i], weight));
                }
            }
            _ => {
                for i in 0..COUNT {
                    sum[i] = simd.add(sum[i], row[i]);
                }
            }
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sum: S::V, _out: &[f32], _at: usize) -> S::V {
        match self.divisor {
            Some(divisor) => simd.div(sum, simd.splat(divisor)),
            None => sum,
        }
    }
}

/// How many of `ids` are not `padding`.
#[inline(always)]
pub(crate) fn count<I: Id>(ids: &[I], padding: u64) -> usize {
    let mut count = 0;
    for id in ids {
        count += usize::from(id.row() != padding);
    }
    count
}
