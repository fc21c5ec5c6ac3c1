//! Update: the gradients of every touched row summed, then a rule applied to the row once.
//!
//! ```text
//! for row in run:
//!     g = the sum of its gradients      (see `reduce`)
//!     g /= occurrences of row           (only when scaled by frequency)
//!     g *= factor                       (only when it is not 1)
//!     rule(weights[row], state[row], g)
//! ```
//! [`ROWS`] rows at a time go through kernels of their own for the sum, for rows that are not fp32, and for the rule: so
//! an optimizer costs one small kernel for each level, and a row format two, not one for every pair of them.

use std::mem;

use super::reduce::Reduce;
use super::{Kernel, LANES, Simd};
use crate::Level;
use crate::disjoint::Disjoint;
use crate::hot::HotRows;
use crate::occurrences::Run;
use crate::sources::Sources;
use crate::weights::Weights;

/// Bytes of a cache line, and of a vector.
const LINE: usize = 64;

/// Rows that are reduced before the rule is applied to them: few, so that they are in the nearest cache still.
pub(crate) const ROWS: usize = 16;

/// Parts of the state of a row, at most.
pub(crate) const PARTS: usize = 2;

/// A row that a rule changes, and its gradient.
pub(crate) struct Row<'a> {
    pub(crate) weights: &'a mut [f32],
    /// The parts that the optimizer has, the others empty.
    pub(crate) state: [&'a mut [f32]; PARTS],
    pub(crate) gradient: &'a mut [f32],
}

/// What happens to a touched row.
pub(crate) trait Rule: Sync {
    /// Whether `apply` looks at the gradient.
    const NEEDS_GRADIENT: bool = true;

    /// Changes a row; `#[inline(always)]`, as all that a [`Kernel`] calls.
    fn apply<S: Simd>(&self, simd: S, row: Row);
}

/// Where a rule's rows are.
pub(crate) struct Target<'a> {
    pub(crate) weights: Weights<'a>,
    /// Kept as rows of `state_len` elements are.
    pub(crate) state: [Weights<'a>; PARTS],
    pub(crate) dim: usize,
    pub(crate) state_len: [usize; PARTS],
    /// The rows that `weights` holds, ascending; `None` when it holds all.
    pub(crate) rows: Option<&'a [i64]>,
}

/// Places for a row each, side by side in memory, that are to be brought near.
#[derive(Clone, Copy)]
pub(crate) struct Stream {
    pub(crate) start: *const u8,
    /// 0 for no places: a prefetch of memory that is not there costs a walk of the page tables.
    pub(crate) row_bytes: usize,
}

impl Stream {
    pub(crate) const NONE: Self = Self { start: std::ptr::null(), row_bytes: 0 };
}

/// Rows that come next, brought near one by one while others are worked on.
#[derive(Clone, Copy)]
pub(crate) struct Next<'a> {
    streams: [Stream; 1 + PARTS],
    rows: &'a [usize],
}

impl<'a> Next<'a> {
    pub(crate) const NONE: Self = Self { streams: [Stream::NONE; 1 + PARTS], rows: &[] };

    /// Those of some streams, of which those that there are become the first.
    #[inline(always)]
    pub(crate) fn new(of: [Stream; 1 + PARTS], rows: &'a [usize]) -> Self {
        let mut streams = [Stream::NONE; 1 + PARTS];
        let there = of.into_iter().filter(|stream| stream.row_bytes > 0);
        streams.iter_mut().zip(there).for_each(|(stream, there)| *stream = there);
        Self { streams, rows }
    }

    /// Starts to bring those from the `i`th on near.
    #[inline(always)]
    pub(super) fn prefetch_from<S: Simd>(&self, simd: S, i: usize) {
        (i..self.rows.len()).for_each(|i| self.prefetch(simd, i));
    }

    /// Starts to bring the `i`th near, if there is one.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, simd: S, i: usize) {
        self.prefetch_vectors::<S, 0>(simd, i);
    }

    /// The same; most of it is `VECTORS` vectors long, or of any length if 0.
    #[inline(always)]
    fn prefetch_vectors<S: Simd, const VECTORS: usize>(&self, simd: S, i: usize) {
        let Some(&row) = self.rows.get(i) else { return };
        for &Stream { start, row_bytes } in &self.streams {
            if row_bytes == 0 {
                break;
            }
            let at = start.wrapping_add(row.wrapping_mul(row_bytes));
            if row_bytes == VECTORS * LINE {
                (0..VECTORS).for_each(|line| simd.prefetch(at.wrapping_add(line * LINE)));
            } else {
                simd.prefetch_bytes(at, row_bytes);
            }
        }
    }
}

impl Target<'_> {
    /// What changes of a row, and how many elements of it.
    fn parts(&self) -> [(&Weights<'_>, usize); 1 + PARTS] {
        let [first, second] = &self.state;
        [(&self.weights, self.dim), (first, self.state_len[0]), (second, self.state_len[1])]
    }

    /// Of these rows, what is changed in place.
    #[inline(always)]
    fn next_in_place<'a>(&self, rows: &'a [usize]) -> Next<'a> {
        let [weights, first, second] = self.parts();
        let stream =
            |(of, len): (&Weights, usize)| if of.in_place() { of.streams(len)[0] } else { Stream::NONE };
        Next::new([stream(weights), stream(first), stream(second)], rows)
    }
}

/// Some touched rows of a table.
#[derive(Clone, Copy)]
pub(crate) struct Touched<'a> {
    pub(crate) run: Run<'a>,
    pub(crate) sources: &'a Sources<'a>,
    pub(crate) target: &'a Target<'a>,
    pub(crate) by_frequency: bool,
    pub(crate) factor: f32,
    pub(crate) hot: HotRows<'a>,
}

/// Rows whose gradients have been summed.
struct Batch<'a> {
    rows: [usize; ROWS],
    count: usize,
    /// `(ROWS, D)`.
    gradients: &'a mut [f32],
}

impl<'a> Batch<'a> {
    fn new(gradients: &'a mut [f32]) -> Self {
        Self { rows: [0; ROWS], count: 0, gradients }
    }

    fn rows(&self) -> &[usize] {
        &self.rows[..self.count]
    }
}

impl Touched<'_> {
    /// Applies a rule to all of them.
    ///
    /// While it is applied to some, or these are encoded, the next ones, whose gradients have been summed before, are brought
    /// near: the sum waits for gradients, the rule for rows, and neither has to wait for what both would ask of the memory at
    /// once.
    pub(crate) fn apply<R: Rule>(self, rule: &R, level: Level) {
        let Self { run, target, .. } = self;
        let mut gradients = Vec::new();
        let (first, second) = aligned(&mut gradients, 2 * ROWS * target.dim).split_at_mut(ROWS * target.dim);
        let (mut now, mut next) = (Batch::new(first), Batch::new(second));
        let mut decoded = target.weights.scratch(ROWS * target.dim);
        let mut state = [0, 1].map(|part| target.state[part].scratch(ROWS * target.state_len[part]));
        let mut packed = target.rows.filter(|_| run.len() > 0).map(|rows| {
            let first = run.row(0) as i64;
            rows.partition_point(|&row| row < first)..rows.len()
        });
        let mut sum = |begin, batch: &mut Batch| {
            let end = self.sum_next(begin, batch, R::NEEDS_GRADIENT, level);
            for (row, place) in batch.rows[..batch.count].iter_mut().zip(packed.iter_mut().flatten()) {
                *row = place;
            }
            end
        };
        let mut begin = sum(0, &mut now);
        if target.rows.is_none() {
            for (weights, len) in target.parts() {
                level.run(Prefetch(weights.next(len, now.rows())));
            }
        }
        while now.count > 0 {
            begin = sum(begin, &mut next);
            let (rows, gradients) = (&now.rows[..now.count], &mut *now.gradients);
            // Packed rows are written one after another.
            let coming = if target.rows.is_some() { &[] } else { next.rows() };
            target.weights.decode(rows, &mut decoded, level);
            for (part, decoded) in target.state.iter().zip(&mut state) {
                part.decode(rows, decoded, level);
            }
            let (decoded, decoded_state) = (&mut decoded, &mut state);
            level.run(Apply { rule, target, rows, next: coming, gradients, decoded, decoded_state });
            for (part, decoded) in target.state.iter().zip(&mut state) {
                part.encode(rows, decoded, coming, level);
            }
            target.weights.encode(rows, decoded, coming, level);
            mem::swap(&mut now, &mut next);
        }
    }

    /// The sum of the squares of their gradients.
    pub(crate) fn squares(self, level: Level) -> f64 {
        let mut gradients = Vec::new();
        let mut batch = Batch::new(aligned(&mut gradients, ROWS * self.target.dim));
        let (mut begin, mut sum) = (0, 0.0);
        while begin < self.run.len() {
            begin = self.sum_next(begin, &mut batch, true, level);
            sum += level.run(Squares { of: &batch.gradients[..batch.count * self.target.dim] });
        }
        sum
    }

    /// Sums the gradients of the rows from occurrence `begin` on, as far as a batch has room, if they are `needed`; returns
    /// the occurrence after them.
    fn sum_next(&self, begin: usize, batch: &mut Batch, needed: bool, level: Level) -> usize {
        let (rows, into) = (&mut batch.rows, &mut *batch.gradients);
        let end;
        (batch.count, end) = level.run(Reduce { touched: self, begin, rows, needed, into });
        end
    }
}

/// The sum of squares in float64, where that of no float32 overflows.
struct Squares<'a> {
    of: &'a [f32],
}

impl Kernel for Squares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> f64 {
        let mut sums = [0.0; LANES];
        for some in self.of.chunks(LANES) {
            for (sum, &x) in sums.iter_mut().zip(some) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        sums.iter().sum()
    }
}

/// `len` zeros in `memory`, from the beginning of a cache line on: vectors that cross two take twice as long.
fn aligned(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    memory.resize(len + LANES, 0.0);
    let skipped = memory.as_ptr().align_offset(LANES * size_of::<f32>()).min(LANES);
    &mut memory[skipped..skipped + len]
}

/// Changes all elements.
#[inline(always)]
pub(crate) fn map<S: Simd>(simd: S, row: &mut [f32], f: impl Fn(S::V) -> S::V) {
    let mut at = 0;
    while at < row.len() {
        let v = f(simd.load_at(row, at));
        simd.store_at(row, at, v);
        at += LANES;
    }
}

/// The sum of the squares of a row: elements in lane `c mod 16`, then the lanes, the same at every level.
#[inline(always)]
fn squares<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let mut sum = simd.splat(0.0);
    let mut at = 0;
    while at < row.len() {
        let x = simd.load_at(row, at);
        sum = simd.add(sum, simd.mul(x, x));
        at += LANES;
    }
    simd.sum(sum)
}

/// The mean of the squares of a row.
#[inline(always)]
pub(crate) fn mean_square<S: Simd>(simd: S, row: &[f32]) -> f32 {
    squares(simd, row) / row.len() as f32
}

/// The 2-norm of a row.
#[inline(always)]
pub(crate) fn norm<S: Simd>(simd: S, row: &[f32]) -> f32 {
    squares(simd, row).sqrt()
}

/// Rows to bring near.
struct Prefetch<'a>(Next<'a>);

impl Kernel for Prefetch<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.0.prefetch_from(simd, 0);
    }
}

/// A rule applied to some rows.
struct Apply<'a, R> {
    rule: &'a R,
    target: &'a Target<'a>,
    rows: &'a [usize],
    /// Those that come after them; where these are encoded, that brings them near.
    next: &'a [usize],
    gradients: &'a mut [f32],
    /// The rows, where they are not fp32 in memory.
    decoded: &'a mut [f32],
    /// Likewise the parts of their state.
    decoded_state: &'a mut [Vec<f32>; PARTS],
}

impl<R: Rule> Kernel for Apply<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Where a length is a constant, nothing about it is asked for every vector.
        match self.target.dim {
            16 => self.rows_of::<S, 1>(simd),
            32 => self.rows_of::<S, 2>(simd),
            64 => self.rows_of::<S, 4>(simd),
            128 => self.rows_of::<S, 8>(simd),
            _ => self.rows_of::<S, 0>(simd),
        }
    }
}

impl<R: Rule> Apply<'_, R> {
    /// To rows of `VECTORS` whole vectors, or of any length if 0.
    #[inline(always)]
    fn rows_of<S: Simd, const VECTORS: usize>(self, simd: S) {
        let Target { weights, state: [first, second], state_len, .. } = self.target;
        let dim = if VECTORS > 0 { VECTORS * LANES } else { self.target.dim };
        let [decoded_first, decoded_second] = self.decoded_state;
        let decoded = [&mut **decoded_first, &mut **decoded_second, self.decoded].map(Disjoint::new);
        let first = Places::new(first, &decoded[0], state_len[0]);
        let second = Places::new(second, &decoded[1], state_len[1]);
        let weights = Places::new(weights, &decoded[2], dim);
        let next = self.target.next_in_place(self.next);
        let gradients = self.gradients.chunks_exact_mut(dim);
        for (i, (&row, gradient)) in self.rows.iter().zip(gradients).enumerate() {
            next.prefetch_vectors::<S, VECTORS>(simd, i);
            let state = [first.of(row, i), second.of(row, i)];
            let weights = weights.of(row, i);
            self.rule.apply(simd, Row { weights, state, gradient });
        }
    }
}

/// Where the elements of rows are changed: in place, or where they have been decoded, one after another.
struct Places<'a> {
    memory: &'a Disjoint<'a, f32>,
    in_place: bool,
    len: usize,
}

impl<'a> Places<'a> {
    /// Of rows of `len` elements.
    #[inline(always)]
    fn new(of: &'a Weights, decoded: &'a Disjoint<'a, f32>, len: usize) -> Self {
        match of {
            Weights::Fp32(memory) => Self { memory, in_place: true, len },
            Weights::Half(_) | Weights::Codes(_) => Self { memory: decoded, in_place: false, len },
        }
    }

    /// Those of a row, which was decoded as the `i`th.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "rows are disjoint")]
    fn of(&self, row: usize, i: usize) -> &mut [f32] {
        if self.len == 0 {
            return &mut [];
        }
        let at = self.len * if self.in_place { row } else { i };
        // SAFETY: different rows do not overlap; a row is in one run, and there once, since its occurrences are together
        // and `rows_in` never parts them. What is decoded is this batch's alone.
        unsafe { self.memory.piece(at..at + self.len) }
    }
}
