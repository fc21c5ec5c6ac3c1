//! Update: the gradients of every touched row summed, then a rule applied to the row once.
//!
//! ```text
//! for row in run:
//!     g = 0
//!     for block of BLOCK occurrences of row, in order:
//!         g += (0 + grad(o1) * scale(o1) + grad(o2) * scale(o2) + ...)
//!     g /= occurrences of row           (only when scaled by frequency)
//!     rule(weights[row], state[row], g)
//! ```
//! The blocks have a fixed size so that the sum of a row with many occurrences has a fixed order whoever adds them up.

use super::sum::{Terms, load, sum};
use super::{Kernel, LANES, Simd};
use crate::disjoint::Disjoint;

use crate::occurrences::Run;
use crate::sources::Sources;

/// Occurrences that are added up before they are added to the row's sum.
const BLOCK: usize = 512;

/// Occurrences whose rows are prefetched ahead of the one that is read.
const AHEAD: usize = 32;

/// What happens to a touched row.
pub(crate) trait Rule: Sync {
    /// Whether `apply` looks at the gradient.
    const NEEDS_GRADIENT: bool = true;

    /// Changes a row; `#[inline(always)]`, as all that a [`Kernel`] calls.
    fn apply<S: Simd>(&self, simd: S, weights: &mut [f32], state: &mut [f32], gradient: &[f32]);
}

/// Where a rule's rows are.
pub(crate) struct Target<'a> {
    pub(crate) weights: Disjoint<'a, f32>,
    pub(crate) state: Disjoint<'a, f32>,
    pub(crate) dim: usize,
    pub(crate) state_len: usize,
    /// The rows that `weights` holds, ascending; `None` when it holds all.
    pub(crate) rows: Option<&'a [i64]>,
}

/// Applies a rule to the rows of a run.
pub(crate) struct Touched<'a, R> {
    pub(crate) run: Run<'a>,
    pub(crate) sources: &'a Sources<'a>,
    pub(crate) target: &'a Target<'a>,
    pub(crate) by_frequency: bool,
    pub(crate) rule: &'a R,
}

impl<R: Rule> Kernel for Touched<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut gradient = vec![0.0; self.target.dim];
        let mut begin = 0;
        let mut packed = self.target.rows.filter(|_| self.run.len() > 0).map_or(0, |rows| {
            let first = self.run.row(0) as i64;
            rows.partition_point(|&row| row < first)
        });
        while begin < self.run.len() {
            let row = self.run.row(begin);
            let end = self.run.row_end(begin);
            if R::NEEDS_GRADIENT {
                self.reduce(simd, begin, end, &mut gradient);
            }
            let place = if self.target.rows.is_some() { packed } else { row };
            let (weights, state) = self.row(place);
            self.rule.apply(simd, weights, state, &gradient);
            packed += 1;
            begin = end;
        }
    }
}

impl<R: Rule> Touched<'_, R> {
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "rows are disjoint")]
    fn row(&self, place: usize) -> (&mut [f32], &mut [f32]) {
        let Target { weights, state, dim, state_len, .. } = self.target;
        // SAFETY: different rows do not overlap; a row is in one run, and there once, since its occurrences are
        // together and `rows_in` never parts them.
        unsafe {
            (
                weights.piece(place * dim..(place + 1) * dim),
                state.piece(place * state_len..(place + 1) * state_len),
            )
        }
    }

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
            let mut at = 0;
            while at < gradient.len() {
                let mean = simd.div(simd.load_at(gradient, at), count);
                simd.store_at(gradient, at, mean);
                at += LANES;
            }
        }
    }

    /// Starts to bring near what the occurrence [`AHEAD`] of `k` will need.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, k: usize) {
        let k = k + AHEAD;
        if k < self.run.len() {
            let Target { weights, state, dim, state_len, rows } = self.target;
            if rows.is_none() {
                let row = self.run.row(k);
                simd.prefetch_bytes(weights.address(row.wrapping_mul(*dim)).cast(), dim * size_of::<f32>());
                simd.prefetch_bytes(
                    state.address(row.wrapping_mul(*state_len)).cast(),
                    state_len * size_of::<f32>(),
                );
            }
            let start = self.sources.starts[self.run.place(k)];
            simd.prefetch_bytes(
                self.sources.grad.as_ptr().wrapping_add(start).cast(),
                dim * size_of::<f32>(),
            );
        }
    }
}

/// The gradients of a row's occurrences, to be added up.
struct Gradients<'a, R> {
    touched: &'a Touched<'a, R>,
    /// Whether the sum goes onto what is there.
    onto: bool,
}

impl<R: Rule> Terms for Gradients<'_, R> {
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize, const WHOLE: bool>(
        &self,
        simd: S,
        k: usize,
        at: usize,
        sum: &mut [S::V; COUNT],
    ) {
        let Touched { run, sources, target, .. } = self.touched;
        if at == 0 {
            self.touched.prefetch(simd, k);
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
