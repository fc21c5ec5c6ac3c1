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
//!
//! A sum of quantized rows, whose elements are `scale * code + bias`, takes the biases of some rows before it takes their
//! codes, so that an element costs one operation:
//!
//! ```text
//! for rows in the bag, 4 by 4, and what is left one by one:
//!     out[c] = out[c] + (bias1 * w1 + bias2 * w2 + ...)   (the bracket alone at first)
//!     for row in rows:
//!         out[c] = code[c] * (scale * w) + out[c]         (rounded once)
//! ```
//! All are taken one by one in a table that has cached rows, which are added as fp32 rows are; so are the elements of int4
//! rows whose codes mean the numbers of a codebook. Products with the weight and sums of biases come first: a weight that is
//! infinite makes NaN of a code that is zero, and biases near the largest number may overflow where the elements would not.

use std::marker::PhantomData;
use std::ops::Range;

use smallvec::SmallVec;

use super::{Kernel, LANES, Lanes, Simd};
use crate::bags::{Bags, Id};
use crate::disjoint::Disjoint;
use crate::lookup::{Outputs, Pooling};
use crate::rows::{Bf16, Fp16, Reading, Row, Rows, pack};
use crate::table_set::Slot;

/// How many rows, of so many cache lines each, are prefetched ahead of the one that is read: 64 lines, and 16 rows of long
/// ones, as was measured (`benches/record/2026-11-30-avx2.md`).
pub(crate) fn ahead(row_lines: usize) -> usize {
    (64 / row_lines).max(16)
}

/// Whether a table of so many bytes is in the first cache by itself, and prefetches from it only cost: a fifth of a sum of many
/// of its rows (`benches/record/2026-11-30-avx2.md`).
pub(crate) fn is_near(table_bytes: usize) -> bool {
    table_bytes <= 32 << 10
}

/// Bags whose bounds are looked up at once.
const GROUP: usize = 64;

/// A run of one feature's units.
pub(crate) struct Pool<'a, R, I> {
    pub(crate) rows: R,
    /// Of all `bags`.
    pub(crate) ids: &'a [I],
    /// Where those of `units` are; they are below the number of rows.
    pub(crate) positions: Range<usize>,
    pub(crate) bags: &'a Bags<'a>,
    pub(crate) pooling: Pooling,
    /// An id to leave out of a maximum, `u64::MAX` for none; bags to be added up have none of it.
    pub(crate) padding: u64,
    /// The bag of unit 0 (its id where nothing is pooled).
    pub(crate) first: usize,
    pub(crate) units: Range<usize>,
    /// How many rows are prefetched ahead: see [`ahead`].
    pub(crate) ahead: usize,
    /// Whether none are: see [`is_near`].
    pub(crate) near: bool,
    pub(crate) slot: Slot<'a>,
    pub(crate) out: &'a Outputs<'a>,
    pub(crate) argmax: Option<&'a Disjoint<'a, f32>>,
}

impl<R: Rows, I: Id> Kernel for Pool<'_, R, I> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // The ids up to the last that is prefetched.
        let soon = if self.near { &[] } else { &self.ids[..self.positions.end] };
        for id in soon.iter().skip(self.positions.start).take(self.ahead) {
            prefetch(simd, &self.rows, [id.row()]);
        }
        match self.pooling {
            Pooling::None => self.each(simd, soon),
            Pooling::Max => self.bags_by(simd, Max, soon),
            _ if R::Reading::IN_PAIRS => self.sums::<S, 2>(simd, soon),
            _ => self.sums::<S, 4>(simd, soon),
        }
    }
}

/// How a bag becomes a row.
trait Mode: Copy {
    /// Pools the ids at `bag` into `out`, the row of `unit`; `soon` has those that are prefetched.
    fn pool<S: Simd, R: Rows, I: Id>(
        &self,
        simd: S,
        of: &Pool<R, I>,
        unit: usize,
        bag: Range<usize>,
        soon: &[I],
        out: &mut [f32],
    );
}

impl<R: Rows, I: Id> Pool<'_, R, I> {
    /// Sum or mean of every bag, so many rows at once.
    #[inline(always)]
    fn sums<S: Simd, const AT_ONCE: usize>(&self, simd: S, soon: &[I]) {
        let rows = self.rows;
        if rows.has_cached() {
            return self.bags_by(simd, Sum { rows, adding: PhantomData::<OneByOne> }, soon);
        }
        if self.bags.weights.is_some() {
            return self.bags_by(simd, Sum { rows, adding: PhantomData::<All<AT_ONCE, true>> }, soon);
        }
        // Where a row's length is a constant, nothing about it is asked for every bag. Code for the plainest level is only
        // to be short.
        match rows.dim() {
            16 if S::BLOCK > 1 => self.unweighted::<S, AT_ONCE>(simd, rows.of_vectors(1), soon),
            32 if S::BLOCK > 1 => self.unweighted::<S, AT_ONCE>(simd, rows.of_vectors(2), soon),
            64 if S::BLOCK > 1 => self.unweighted::<S, AT_ONCE>(simd, rows.of_vectors(4), soon),
            128 if S::BLOCK > 1 => self.unweighted::<S, AT_ONCE>(simd, rows.of_vectors(8), soon),
            _ => self.unweighted::<S, AT_ONCE>(simd, rows, soon),
        }
    }

    /// The same of `rows`, none of them cached, without weights.
    #[inline(always)]
    fn unweighted<S: Simd, const AT_ONCE: usize>(&self, simd: S, rows: impl Rows, soon: &[I]) {
        let bags = self.first + self.units.start..self.first + self.units.end;
        match self.out {
            Outputs::Fp32(out) if self.bags.have_one_id(bags) => self.single(simd, &rows, soon, out),
            _ => self.bags_by(simd, Sum { rows, adding: PhantomData::<All<AT_ONCE, false>> }, soon),
        }
    }

    /// Pools every bag.
    #[inline(always)]
    fn bags_by<S: Simd, M: Mode>(&self, simd: S, mode: M, soon: &[I]) {
        let mut starts = [0; GROUP + 1];
        let mut row = self.scratch();
        let mut unit = self.units.start;
        while unit < self.units.end {
            let group = unit..self.units.end.min(unit + GROUP);
            let starts = &mut starts[..=group.len()];
            self.bags.starts(self.first + unit, starts);
            for (bounds, unit) in starts.windows(2).zip(group.clone()) {
                let into = self.place(unit, &mut row);
                mode.pool(simd, self, unit, bounds[0]..bounds[1], soon, into);
                self.round(simd, &row, unit);
            }
            unit = group.end;
        }
    }

    /// Sum or mean of bags of one id each, without weights: nothing is asked about where they are.
    #[inline(always)]
    fn single<S: Simd>(&self, simd: S, rows: &impl Rows, soon: &[I], out: &Disjoint<f32>) {
        let ids = &self.ids[self.positions.clone()][..self.units.len()];
        let soon = soon.get(self.positions.start..).unwrap_or_default();
        for (i, (unit, id)) in self.units.clone().zip(ids).enumerate() {
            if let Some(next) = soon.get(i + self.ahead) {
                prefetch(simd, rows, [next.row()]);
            }
            let out = &mut self.output(out, unit)[..rows.dim()];
            BagSum { rows, out, empty: true }.add(simd, [id.row()], [None]);
        }
    }

    /// Copies the row of every id.
    #[inline(always)]
    fn each<S: Simd>(&self, simd: S, soon: &[I]) {
        let mut row = self.scratch();
        for unit in self.units.clone() {
            let position = self.first + unit;
            self.prefetch::<S, 1>(simd, &self.rows, position, soon);
            let into = self.place(unit, &mut row);
            self.rows.copy(simd, self.ids[position].row() as usize, into);
            self.round(simd, &row, unit);
        }
    }

    /// The weights of the ids from `position` on, if they are `WEIGHTED`: 1, a product with which changes nothing, where
    /// there are none.
    #[inline(always)]
    fn weights<const COUNT: usize, const WEIGHTED: bool>(&self, position: usize) -> [Option<f32>; COUNT] {
        let weight = |i: usize| self.bags.weights.map_or(1.0, |weights| weights[position + i]);
        std::array::from_fn(|i| WEIGHTED.then(|| weight(i)))
    }

    /// Where the row of a unit goes: into the output, or into `row` where it is yet to be rounded.
    #[inline(always)]
    fn place<'b>(&'b self, unit: usize, row: &'b mut [f32]) -> &'b mut [f32] {
        match self.out {
            Outputs::Fp32(out) => self.output(out, unit),
            Outputs::Fp16(_) | Outputs::Bf16(_) => row,
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

    /// Starts to bring near the rows that come after those of the `COUNT` ids at `position`, as far ahead as is wanted;
    /// none where there are fewer of them.
    #[inline(always)]
    fn prefetch<S: Simd, const COUNT: usize>(&self, simd: S, rows: &impl Rows, position: usize, soon: &[I]) {
        if let Some(ids) = soon.get(position + self.ahead..).and_then(<[I]>::first_chunk::<COUNT>) {
            prefetch(simd, rows, ids.map(Id::row));
        }
    }
}

/// Starts to bring some rows near; they may be any numbers.
#[inline(always)]
fn prefetch<S: Simd, const COUNT: usize>(simd: S, rows: &impl Rows, some: [u64; COUNT]) {
    const LINE: usize = 64;
    let bytes = some.map(|row| rows.bytes(row).0);
    let (_, row_bytes) = rows.bytes(0);
    // Tables begin on a cache line, so rows of such lengths reach into as few lines as they can.
    if row_bytes.is_multiple_of(LINE) || row_bytes.is_power_of_two() {
        let mut line = 0;
        while line < row_bytes {
            for at in bytes {
                simd.prefetch(at.wrapping_add(line));
            }
            line += LINE;
        }
    } else {
        for at in bytes {
            simd.prefetch_bytes(at, row_bytes);
        }
    }
    for row in some {
        if let Some(scale) = rows.scale(row) {
            simd.prefetch(scale);
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
        soon: &[I],
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
                    of.prefetch::<S, 1>(simd, &of.rows, position, soon);
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

/// Sum or mean of a bag of `rows`, which [`Adding`] adds.
#[derive(Clone, Copy)]
struct Sum<R, A> {
    rows: R,
    adding: PhantomData<A>,
}

/// How the rows of a bag are added.
trait Adding: Copy {
    /// Adds the rows of a bag to `sum`; `soon` has the ids that are prefetched.
    fn add<S: Simd, R: Rows, P: Rows, I: Id>(
        simd: S,
        of: &Pool<P, I>,
        bag: Range<usize>,
        soon: &[I],
        sum: &mut BagSum<R>,
    );
}

/// All of them, `AT_ONCE` by `AT_ONCE`.
#[derive(Clone, Copy)]
struct All<const AT_ONCE: usize, const WEIGHTED: bool>;

/// One by one, cached ones from where they are.
#[derive(Clone, Copy)]
struct OneByOne;

impl<Q: Rows, A: Adding> Mode for Sum<Q, A> {
    #[inline(always)]
    fn pool<S: Simd, R: Rows, I: Id>(
        &self,
        simd: S,
        of: &Pool<R, I>,
        _unit: usize,
        bag: Range<usize>,
        soon: &[I],
        out: &mut [f32],
    ) {
        let mut sum = BagSum { rows: &self.rows, out: &mut out[..self.rows.dim()], empty: true };
        // Not `then_some`, for which every sum would turn its length into a float.
        let divisor = if of.pooling == Pooling::Mean { Some(bag.len().max(1) as f32) } else { None };
        A::add(simd, of, bag, soon, &mut sum);
        sum.finish(simd, divisor);
    }
}

impl<const AT_ONCE: usize, const WEIGHTED: bool> Adding for All<AT_ONCE, WEIGHTED> {
    #[inline(always)]
    fn add<S: Simd, R: Rows, P: Rows, I: Id>(
        simd: S,
        of: &Pool<P, I>,
        bag: Range<usize>,
        soon: &[I],
        sum: &mut BagSum<R>,
    ) {
        let (chunks, rest) = of.ids[bag.clone()].as_chunks::<AT_ONCE>();
        let mut position = bag.start;
        for ids in chunks {
            of.prefetch::<S, AT_ONCE>(simd, sum.rows, position, soon);
            sum.add(simd, ids.map(Id::row), of.weights::<AT_ONCE, WEIGHTED>(position));
            position += AT_ONCE;
        }
        for id in rest {
            of.prefetch::<S, 1>(simd, sum.rows, position, soon);
            sum.add(simd, [id.row()], of.weights::<1, WEIGHTED>(position));
            position += 1;
        }
    }
}

impl Adding for OneByOne {
    #[inline(always)]
    fn add<S: Simd, R: Rows, P: Rows, I: Id>(
        simd: S,
        of: &Pool<P, I>,
        bag: Range<usize>,
        soon: &[I],
        sum: &mut BagSum<R>,
    ) {
        for position in bag {
            of.prefetch::<S, 1>(simd, sum.rows, position, soon);
            let (id, weight) = (of.ids[position].row(), of.weights::<1, true>(position));
            match sum.rows.cached(simd, id as usize, weight[0]) {
                Some(row) => sum.add_rows(simd, &Addends { rows: [row], bias: row.bias(simd) }),
                None => sum.add(simd, [id], weight),
            }
        }
    }
}

/// The sum of a bag's rows, while it is made.
struct BagSum<'a, R> {
    rows: &'a R,
    /// The sum, unless it is `empty`.
    out: &'a mut [f32],
    empty: bool,
}

impl<R: Rows> BagSum<'_, R> {
    /// Adds some rows, times their weights if they have such.
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize>(
        &mut self,
        simd: S,
        some: [u64; COUNT],
        weights: [Option<f32>; COUNT],
    ) {
        let rows = self.rows.open_all(simd, some.map(|row| row as usize), weights);
        let mut bias = rows[0].bias(simd);
        for row in &rows[1..] {
            bias = simd.add(bias, row.bias(simd));
        }
        self.add_rows(simd, &Addends { rows, bias });
    }

    #[inline(always)]
    fn add_rows<S: Simd, Q: Reading, const COUNT: usize>(&mut self, simd: S, rows: &Addends<S, Q, COUNT>) {
        if std::mem::take(&mut self.empty) {
            rows.add_to::<true>(simd, self.out);
        } else {
            rows.add_to::<false>(simd, self.out);
        }
    }

    /// Divides by the divisor of a mean; what no row was added to is zero.
    #[inline(always)]
    fn finish<S: Simd>(self, simd: S, divisor: Option<f32>) {
        if self.empty {
            self.out.fill(0.0);
        } else if let Some(divisor) = divisor {
            let divisor = simd.splat(divisor);
            let mut at = 0;
            while at < self.out.len() {
                let mean = simd.div(simd.load_at(self.out, at), divisor);
                simd.store_at(self.out, at, mean);
                at += LANES;
            }
        }
    }
}

/// Rows to be added to a sum in their order, all their biases before.
struct Addends<'a, S: Simd, Q: Reading, const ROWS: usize> {
    rows: [Row<'a, S, Q>; ROWS],
    bias: S::V,
}

impl<S: Simd, Q: Reading, const ROWS: usize> Addends<'_, S, Q, ROWS> {
    /// Adds all of them to `out`, or to nothing if that is `EMPTY`.
    #[inline(always)]
    fn add_to<const EMPTY: bool>(&self, simd: S, out: &mut [f32]) {
        let (out, cut) = out.as_chunks_mut();
        // So the compiler knows that all are as long.
        let vectors = self.rows[0].vectors();
        let out = &mut out[..vectors];
        let mut at = 0;
        while Q::IN_PAIRS && at + 1 < vectors {
            self.add_vectors::<EMPTY, 2>(simd, at, out);
            at += 2;
        }
        while at < vectors {
            self.add_vectors::<EMPTY, 1>(simd, at, out);
            at += 1;
        }
        if !cut.is_empty() {
            self.add_cut::<EMPTY>(simd, cut);
        }
    }

    #[inline(always)]
    fn add_vectors<const EMPTY: bool, const COUNT: usize>(&self, simd: S, at: usize, out: &mut [Lanes]) {
        let mut sum = [self.bias; COUNT];
        if !EMPTY {
            for i in 0..COUNT {
                sum[i] = self.onto(simd, simd.load(&out[at + i]));
            }
        }
        for row in &self.rows {
            row.add(simd, at, &mut sum);
        }
        for i in 0..COUNT {
            simd.store(&mut out[at + i], sum[i]);
        }
    }

    #[inline(always)]
    fn add_cut<const EMPTY: bool>(&self, simd: S, out: &mut [f32]) {
        let mut sum = [self.bias];
        if !EMPTY {
            sum = [self.onto(simd, simd.load_partial(out))];
        }
        for row in &self.rows {
            row.add_cut(simd, &mut sum);
        }
        simd.store_partial(out, sum[0]);
    }

    /// `sum` and the biases.
    #[inline(always)]
    fn onto(&self, simd: S, sum: S::V) -> S::V {
        if Q::BIASED { simd.add(sum, self.bias) } else { sum }
    }
}
