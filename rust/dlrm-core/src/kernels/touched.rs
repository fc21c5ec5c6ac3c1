//! Update: the gradients of every touched row summed, then a rule applied to the row once.
//!
//! ```text
//! for row in run:
//!     g = 0
//!     for block of BLOCK occurrences of row, in order:
//!         g += (0 + grad(o1) * scale(o1) + grad(o2) * scale(o2) + ...)
//!     g /= occurrences of row           (only when scaled by frequency)
//!     g *= factor                       (only when it is not 1)
//!     rule(weights[row], state[row], g)
//! ```
//! The blocks have a fixed size so that the sum of a row with many occurrences has a fixed order whoever adds them up.
//!
//! [`ROWS`] rows at a time go through kernels of their own for the sum, for rows that are not fp32, and for the rule: so
//! an optimizer costs one small kernel for each level, and a row format two, not one for every pair of them.

use super::sum::{Terms, load, sum};
use super::{Kernel, LANES, Simd};
use crate::Level;
use crate::disjoint::Disjoint;
use crate::occurrences::Run;
use crate::sources::Sources;
use crate::weights::Weights;

/// Occurrences that are added up before they are added to the row's sum.
pub(crate) const BLOCK: usize = 512;

/// Rows that are reduced before the rule is applied to them: few, so that they are in the nearest cache still.
const ROWS: usize = 16;

/// Occurrences whose rows are prefetched ahead of the one that is read.
const AHEAD: usize = 24;

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
    pub(crate) state: [Disjoint<'a, f32>; PARTS],
    pub(crate) dim: usize,
    pub(crate) state_len: [usize; PARTS],
    /// The rows that `weights` holds, ascending; `None` when it holds all.
    pub(crate) rows: Option<&'a [i64]>,
}

/// Some touched rows of a table.
#[derive(Clone, Copy)]
pub(crate) struct Touched<'a> {
    pub(crate) run: Run<'a>,
    pub(crate) sources: &'a Sources<'a>,
    pub(crate) target: &'a Target<'a>,
    pub(crate) by_frequency: bool,
    pub(crate) factor: f32,
}

impl Touched<'_> {
    /// Applies a rule to all of them.
    pub(crate) fn apply<R: Rule>(self, rule: &R, level: Level) {
        let Self { run, target, .. } = self;
        let mut gradients = vec![0.0; ROWS * target.dim];
        let mut decoded = vec![0.0; if target.weights.are_fp32() { 0 } else { ROWS * target.dim }];
        let mut rows = [0; ROWS];
        let mut packed = target.rows.filter(|_| run.len() > 0).map_or(0, |rows| {
            let first = run.row(0) as i64;
            rows.partition_point(|&row| row < first)
        });
        let mut begin = 0;
        while begin < run.len() {
            let reduce = Reduce {
                touched: &self,
                begin,
                rows: &mut rows,
                needed: R::NEEDS_GRADIENT,
                into: &mut gradients,
            };
            let (count, end) = level.run(reduce);
            if target.rows.is_some() {
                for row in &mut rows[..count] {
                    *row = packed;
                    packed += 1;
                }
            }
            let rows = &rows[..count];
            target.weights.decode(rows, &mut decoded, level);
            level.run(Apply { rule, target, rows, gradients: &mut gradients, decoded: &mut decoded });
            target.weights.encode(rows, &mut decoded, level);
            begin = end;
        }
    }

    /// Starts to bring near what occurrence `k` will need.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, k: usize) {
        let Target { weights, state, dim, state_len, rows } = self.target;
        if rows.is_none() {
            let row = self.run.row(k);
            weights.prefetch(simd, row, *dim);
            for (part, &len) in state.iter().zip(state_len).filter(|(_, len)| **len > 0) {
                simd.prefetch_bytes(part.address(row.wrapping_mul(len)).cast(), len * size_of::<f32>());
            }
        }
        if let Some(&start) = self.sources.starts.get(self.run.place(k)) {
            let grad = self.sources.grad.as_ptr().wrapping_add(start);
            simd.prefetch_bytes(grad.cast(), dim * size_of::<f32>());
        }
    }
}

/// The gradients of the next rows, and which these are.
struct Reduce<'a> {
    touched: &'a Touched<'a>,
    begin: usize,
    rows: &'a mut [usize; ROWS],
    /// Whether there is a gradient at all.
    needed: bool,
    into: &'a mut [f32],
}

impl Kernel for Reduce<'_> {
    /// How many rows, and the occurrence after their last.
    type Output = (usize, usize);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let Touched { run, target, .. } = *self.touched;
        if self.begin == 0 {
            for k in 0..AHEAD.min(run.len()) {
                self.touched.prefetch(simd, k);
            }
        }
        let mut begin = self.begin;
        let mut count = 0;
        for (row, gradient) in self.rows.iter_mut().zip(self.into.chunks_exact_mut(target.dim)) {
            if begin == run.len() {
                break;
            }
            *row = run.row(begin);
            let end = run.row_end(begin);
            if self.needed {
                self.touched.reduce(simd, begin, end, gradient);
            }
            begin = end;
            count += 1;
        }
        (count, begin)
    }
}

impl Touched<'_> {
    /// The gradient of the row whose occurrences are `begin..end`.
    #[inline(always)]
    fn reduce<S: Simd>(&self, simd: S, begin: usize, end: usize, gradient: &mut [f32]) {
        let mut at = begin;
        while at < end {
            let next = end.min(at + BLOCK);
            let terms = Gradients { touched: self, onto: at > begin };
            sum(simd, &terms, at..next, gradient);
            at = next;
        }
        if self.by_frequency && end - begin > 1 {
            let count = simd.splat((end - begin) as f32);
            map(simd, gradient, |g| simd.div(g, count));
        }
        if self.factor.to_bits() != 1.0_f32.to_bits() {
            let factor = simd.splat(self.factor);
            map(simd, gradient, |g| simd.mul(g, factor));
        }
    }
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

/// The gradients of a row's occurrences, to be added up.
struct Gradients<'a> {
    touched: &'a Touched<'a>,
    /// Whether the sum goes onto what is there.
    onto: bool,
}

impl Terms for Gradients<'_> {
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize, const WHOLE: bool>(
        &self,
        simd: S,
        k: usize,
        at: usize,
        sum: &mut [S::V; COUNT],
    ) {
        let Touched { run, sources, target, .. } = self.touched;
        if at == 0 && k + AHEAD < run.len() {
            self.touched.prefetch(simd, k + AHEAD);
        }
        let place = run.place(k);
        let start = sources.starts[place];
        let grad = load::<S, COUNT, WHOLE>(simd, &sources.grad[start..start + target.dim], at);
        let scale = simd.splat(sources.scales.map_or(1.0, |scales| scales[place]));
        let masked = sources.argmax.zip(sources.places).filter(|(_, places)| places[place] >= 0);
        match masked {
            None => {
                for i in 0..COUNT {
                    sum[i] = simd.add(sum[i], simd.mul(grad[i], scale));
                }
            }
            Some((argmax, places)) => {
                let argmax = load::<S, COUNT, WHOLE>(simd, &argmax[start..start + target.dim], at);
                let own = simd.splat(f32::from_bits(places[place] as u32));
                for i in 0..COUNT {
                    let largest = simd.same_bits(argmax[i], own);
                    sum[i] = simd.add(sum[i], simd.select(largest, grad[i], simd.splat(0.0)));
                }
            }
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sum: S::V, out: &[f32], at: usize) -> S::V {
        if self.onto { simd.add(simd.load_at(out, at), sum) } else { sum }
    }
}

/// A rule applied to some rows.
struct Apply<'a, R> {
    rule: &'a R,
    target: &'a Target<'a>,
    rows: &'a [usize],
    gradients: &'a mut [f32],
    /// The rows, where they are not fp32 in memory.
    decoded: &'a mut [f32],
}

impl<R: Rule> Kernel for Apply<'_, R> {
    type Output = ();

    #[inline(always)]
    #[expect(unsafe_code, reason = "rows are disjoint")]
    fn run<S: Simd>(self, simd: S) {
        let Target { weights, state, dim, state_len, .. } = self.target;
        let gradients = self.gradients.chunks_exact_mut(*dim);
        for (i, (&row, gradient)) in self.rows.iter().zip(gradients).enumerate() {
            // SAFETY: different rows do not overlap; a row is in one run, and there once, since its occurrences are
            // together and `rows_in` never parts them.
            let state = unsafe {
                [0, 1].map(|part| state[part].piece(row * state_len[part]..(row + 1) * state_len[part]))
            };
            let weights = match weights {
                // SAFETY: as above.
                Weights::Fp32(all) => unsafe { all.piece(row * dim..(row + 1) * dim) },
                Weights::Half(_) | Weights::Codes(_) => &mut self.decoded[i * dim..(i + 1) * dim],
            };
            self.rule.apply(simd, Row { weights, state, gradient });
        }
    }
}
