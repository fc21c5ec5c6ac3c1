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

use smallvec::SmallVec;

use super::sum::{Terms, block, sum};
use super::{Kernel, LANES, Simd, Take};
use crate::bags::{Bags, Id};
use crate::disjoint::Disjoint;
use crate::lookup::{Outputs, Pooling};
use crate::rows::{Bf16, Fp16, Rows, pack};
use crate::table_set::Slot;

/// How many rows, of so many cache lines each, are prefetched ahead of the one that is read: 64 lines, and 16 rows of long
/// ones, as was measured (`benches/record/2026-11-30-avx2.md`).
pub(crate) fn ahead(row_lines: usize) -> usize {
    (64 / row_lines).max(16)
}

/// Bags whose bounds are looked up at once.
const GROUP: usize = 64;

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
    /// How many rows are prefetched ahead: see [`ahead`].
    pub(crate) ahead: usize,
    pub(crate) slot: Slot<'a>,
    pub(crate) out: &'a Outputs<'a>,
    pub(crate) argmax: Option<&'a Disjoint<'a, f32>>,
}

impl<R: Rows, I: Id> Kernel for Pool<'_, R, I> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let end = self.positions().end;
        match (self.pooling, self.bags.weights) {
            (Pooling::None, _) => self.each(simd, end),
            (Pooling::Max, _) => self.bags_by(simd, Max, end),
            (_, None) => self.sums::<S, false>(simd, end),
            (_, Some(_)) => self.sums::<S, true>(simd, end),
        }
    }
}

/// How a bag becomes a row.
trait Mode: Copy {
    /// Pools the ids at `bag` into `out`, the row of `unit`; `end` is where the ids of the piece end.
    fn pool<S: Simd, R: Rows, I: Id>(
        &self,
        simd: S,
        of: &Pool<R, I>,
        unit: usize,
        bag: Range<usize>,
        end: usize,
        out: &mut [f32],
    );
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

    /// Sum or mean of every bag.
    #[inline(always)]
    fn sums<S: Simd, const WEIGHTED: bool>(&self, simd: S, end: usize) {
        // Where a row's length is a constant, nothing about it is asked for every bag.
        macro_rules! rows_of {
            ($vectors:literal, $block:literal) => {{
                let rows = self.rows.of_vectors($vectors);
                self.bags_by(simd, Sum::<_, $vectors, $block, WEIGHTED> { rows }, end)
            }};
        }
        match self.rows.dim() {
            16 => rows_of!(1, 1),
            32 => rows_of!(2, 2),
            64 => rows_of!(4, 4),
            128 if S::BLOCK >= 8 => rows_of!(8, 8),
            128 => rows_of!(8, 4),
            _ => self.bags_by(simd, Sum::<_, 0, 0, WEIGHTED> { rows: self.rows }, end),
        }
    }

    /// Pools every bag.
    #[inline(always)]
    fn bags_by<S: Simd, M: Mode>(&self, simd: S, mode: M, end: usize) {
        let mut starts = [0; GROUP + 1];
        let mut row = self.scratch();
        let mut unit = self.units.start;
        while unit < self.units.end {
            let group = unit..self.units.end.min(unit + GROUP);
            let starts = &mut starts[..=group.len()];
            self.bags.starts(self.first + unit, starts);
            if unit == self.units.start {
                self.start(simd, starts[0], end);
            }
            if let Outputs::Fp32(out) = self.out {
                for (bounds, unit) in starts.windows(2).zip(group.clone()) {
                    mode.pool(simd, self, unit, bounds[0]..bounds[1], end, self.output(out, unit));
                }
            } else {
                for (bounds, unit) in starts.windows(2).zip(group.clone()) {
                    mode.pool(simd, self, unit, bounds[0]..bounds[1], end, &mut row);
                    self.round(simd, &row, unit);
                }
            }
            unit = group.end;
        }
    }

    /// Copies the row of every id.
    #[inline(always)]
    fn each<S: Simd>(&self, simd: S, end: usize) {
        let mut row = self.scratch();
        self.start(simd, self.first + self.units.start, end);
        for unit in self.units.clone() {
            let position = self.first + unit;
            self.prefetch(simd, position + self.ahead, end);
            let id = self.ids[position].row() as usize;
            if let Outputs::Fp32(out) = self.out {
                self.rows.copy(simd, id, self.output(out, unit));
            } else {
                self.rows.copy(simd, id, &mut row);
                self.round(simd, &row, unit);
            }
        }
    }

    /// Room for a row that is yet to be rounded to the output's precision.
    #[inline(always)]
    fn scratch(&self) -> SmallVec<[f32; 256]> {
        let len = if matches!(self.out, Outputs::Fp32(_)) { 0 } else { self.rows.dim() };
        SmallVec::from_elem(0.0, len)
    }

    /// Stores a row in the output's precision, where that is not fp32.
    #[inline(always)]
    fn round<S: Simd>(&self, simd: S, row: &[f32], unit: usize) {
        match self.out {
            Outputs::Fp32(_) => {}
            Outputs::Fp16(out) => pack(simd, Fp16, row, self.output(out, unit)),
            Outputs::Bf16(out) => pack(simd, Bf16, row, self.output(out, unit)),
        }
    }

    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "units are disjoint")]
    fn output<'b, T>(&self, out: &'b Disjoint<'_, T>, unit: usize) -> &'b mut [T] {
        let at = self.slot.at(unit);
        // SAFETY: output rows of different units do not overlap, every unit is in one piece, and this piece's rows are
        // taken one at a time.
        unsafe { out.piece(at..at + self.rows.dim()) }
    }

    /// Starts to bring the first rows near.
    #[inline(always)]
    fn start<S: Simd>(&self, simd: S, from: usize, end: usize) {
        for position in from..end.min(from + self.ahead) {
            self.prefetch(simd, position, end);
        }
    }

    /// Starts to bring near the row of the id at `position`, if that is before `end`.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, position: usize, end: usize) {
        if position < end {
            self.rows.prefetch::<S, 0>(simd, self.ids[position].row());
        }
    }
}

/// Elementwise maximum of a bag, and its places.
#[derive(Clone, Copy)]
struct Max;

impl Mode for Max {
    #[inline(always)]
    fn pool<S: Simd, R: Rows, I: Id>(
        &self,
        simd: S,
        of: &Pool<R, I>,
        unit: usize,
        bag: Range<usize>,
        end: usize,
        out: &mut [f32],
    ) {
        let mut at = 0;
        while at < of.rows.dim() {
            let mut max = simd.splat(0.0);
            let mut places = simd.splat(f32::from_bits(u32::MAX)); // -1
            let mut empty = true;
            for position in bag.clone() {
                let id = of.ids[position].row();
                if at == 0 {
                    of.prefetch(simd, position + of.ahead, end);
                }
                if id == of.padding {
                    continue;
                }
                let row = of.rows.load_at(simd, id as usize, at);
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
            if let Some(argmax) = of.argmax {
                simd.store_at(of.output(argmax, unit), at, places);
            }
            at += LANES;
        }
    }
}

/// Sum or mean of a bag; rows are `VECTORS` vectors, of which `BLOCK` are summed at once, or of any length where that is 0.
#[derive(Clone, Copy)]
struct Sum<R, const VECTORS: usize, const BLOCK: usize, const WEIGHTED: bool> {
    rows: R,
}

impl<Q: Rows, const VECTORS: usize, const BLOCK: usize, const WEIGHTED: bool> Mode
    for Sum<Q, VECTORS, BLOCK, WEIGHTED>
{
    #[inline(always)]
    fn pool<S: Simd, R: Rows, I: Id>(
        &self,
        simd: S,
        of: &Pool<R, I>,
        _unit: usize,
        bag: Range<usize>,
        end: usize,
        out: &mut [f32],
    ) {
        let mean = of.pooling == Pooling::Mean;
        let divisor = mean.then(|| count(&of.ids[bag.clone()], of.padding).max(1) as f32);
        let terms = BagRows::<_, _, _, VECTORS, WEIGHTED> { pool: of, rows: self.rows, end, divisor };
        if VECTORS == 0 {
            return sum(simd, &terms, bag, out);
        }
        let out = &mut out[..VECTORS * LANES];
        let mut at = 0;
        while at < VECTORS * LANES {
            block::<S, _, BLOCK, true>(simd, &terms, bag.clone(), at, out);
            at += BLOCK * LANES;
        }
    }
}

/// The rows of a bag, to be added up.
struct BagRows<'a, Q, R, I, const OF: usize, const WEIGHTED: bool> {
    pool: &'a Pool<'a, R, I>,
    rows: Q,
    /// Where the ids of the piece end.
    end: usize,
    /// By what a mean divides.
    divisor: Option<f32>,
}

impl<Q: Rows, R: Rows, I: Id, const OF: usize, const WEIGHTED: bool> Terms
    for BagRows<'_, Q, R, I, OF, WEIGHTED>
{
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize, const WHOLE: bool>(
        &self,
        simd: S,
        position: usize,
        at: usize,
        sum: &mut [S::V; COUNT],
    ) {
        let pool = self.pool;
        let next = position + pool.ahead;
        if at == 0 && next < self.end {
            self.rows.prefetch::<S, OF>(simd, pool.ids[next].row());
        }
        let id = pool.ids[position].row();
        if id == pool.padding {
            return;
        }
        let weight = match pool.bags.weights {
            Some(weights) if WEIGHTED => Some(simd.splat(weights[position])),
            _ => None,
        };
        self.rows.each::<S, COUNT, WHOLE>(simd, id as usize, at, &mut Onto { sum, weight });
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sum: S::V, _out: &[f32], _at: usize) -> S::V {
        match self.divisor {
            Some(divisor) => simd.div(sum, simd.splat(divisor)),
            None => sum,
        }
    }
}

/// What rows are added to, each times a weight if there is one.
struct Onto<'a, V, const COUNT: usize> {
    sum: &'a mut [V; COUNT],
    weight: Option<V>,
}

impl<S: Simd, const COUNT: usize> Take<S> for Onto<'_, S::V, COUNT> {
    #[inline(always)]
    fn take(&mut self, simd: S, i: usize, v: S::V) {
        let term = match self.weight {
            Some(weight) => simd.mul(v, weight),
            None => v,
        };
        self.sum[i] = simd.add(self.sum[i], term);
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
