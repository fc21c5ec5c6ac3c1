//! The gradients of touched rows, each the sum over the row's occurrences in the order of the call.
//!
//! ```text
//! g = 0
//! for block of BLOCK occurrences of row, in order:
//!     g += (0 + grad(o1) * scale(o1) + grad(o2) * scale(o2) + ...)
//! ```
//! The blocks have a fixed size so that the sum of a row with many occurrences has a fixed order whoever adds them up:
//! those of a hot row are summed by several threads before ([`SumBlock`]), and here only added onto each other.

use std::ops::Range;

use super::sum::{Terms, block, load, sum};
use super::touched::{ROWS, Touched, map};
use super::{Kernel, LANES, Simd};
use crate::occurrences::Run;
use crate::sources::Sources;

/// Occurrences that are added up before they are added to the row's sum.
pub(crate) const BLOCK: usize = 512;

/// Occurrences whose gradients are prefetched ahead of the one that is read.
const AHEAD: usize = 24;

/// The gradients of the next rows, and which these are.
pub(super) struct Reduce<'a> {
    pub(super) touched: &'a Touched<'a>,
    pub(super) begin: usize,
    pub(super) rows: &'a mut [usize; ROWS],
    /// Whether there is a gradient at all.
    pub(super) needed: bool,
    pub(super) into: &'a mut [f32],
}

impl Kernel for Reduce<'_> {
    /// How many rows, and the occurrence after their last.
    type Output = (usize, usize);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let Sources { scales, argmax, .. } = self.touched.sources;
        match (argmax, scales) {
            (Some(_), _) => self.rows_of::<S, 0, true, true>(simd),
            (None, Some(_)) => self.rows_of_dim::<S, true>(simd),
            (None, None) => self.rows_of_dim::<S, false>(simd),
        }
    }
}

impl Reduce<'_> {
    /// Where a row is as many vectors as registers hold, nothing about its length is asked for every occurrence.
    #[inline(always)]
    fn rows_of_dim<S: Simd, const SCALED: bool>(self, simd: S) -> (usize, usize) {
        match self.touched.target.dim {
            16 => self.rows_of::<S, 1, SCALED, false>(simd),
            32 => self.rows_of::<S, 2, SCALED, false>(simd),
            64 => self.rows_of::<S, 4, SCALED, false>(simd),
            128 if S::BLOCK >= 8 => self.rows_of::<S, 8, SCALED, false>(simd),
            _ => self.rows_of::<S, 0, SCALED, false>(simd),
        }
    }

    #[inline(always)]
    fn rows_of<S: Simd, const VECTORS: usize, const SCALED: bool, const MASKED: bool>(
        self,
        simd: S,
    ) -> (usize, usize) {
        let Touched { run, by_frequency, factor, hot, .. } = *self.touched;
        let gradients = Gradients::<VECTORS, SCALED, MASKED>::new(self.touched);
        if self.begin == 0 && self.needed {
            for k in 0..AHEAD.min(run.len()) {
                gradients.prefetch(simd, k);
            }
        }
        let mut begin = self.begin;
        let mut count = 0;
        for gradient in self.into.chunks_exact_mut(gradients.dim) {
            if begin == run.len() {
                break;
            }
            let end = run.row_end(begin);
            self.rows[count] = run.row(begin);
            if self.needed && !hot.has(self.rows[count]) {
                gradients.sum(simd, begin..end, gradient);
            }
            begin = end;
            count += 1;
        }
        if self.needed && (by_frequency || factor.to_bits() != 1.0_f32.to_bits() || hot.any()) {
            self.finish(simd, count);
        }
        (count, begin)
    }

    /// What most rows need not: apart from the loop above, which is shorter without it.
    #[inline(always)]
    fn finish<S: Simd>(self, simd: S, count: usize) {
        let Touched { run, target, by_frequency, factor, hot, .. } = *self.touched;
        let mut begin = self.begin;
        for (&row, gradient) in self.rows[..count].iter().zip(self.into.chunks_exact_mut(target.dim)) {
            if let Some(blocks) = hot.blocks(row) {
                add_up(simd, blocks, gradient);
            }
            let end = run.row_end(begin);
            if by_frequency && end - begin > 1 {
                let count = simd.splat((end - begin) as f32);
                map(simd, gradient, |g| simd.div(g, count));
            }
            if factor.to_bits() != 1.0_f32.to_bits() {
                let factor = simd.splat(factor);
                map(simd, gradient, |g| simd.mul(g, factor));
            }
            begin = end;
        }
    }
}

/// The sums of a row's blocks, one after another, added onto each other as [`Gradients::sum`] adds them.
#[inline(always)]
fn add_up<S: Simd>(simd: S, blocks: &[f32], gradient: &mut [f32]) {
    let dim = gradient.len();
    gradient.copy_from_slice(&blocks[..dim]);
    for one in blocks[dim..].chunks_exact(dim) {
        let mut at = 0;
        while at < dim {
            let sum = simd.add(simd.load_at(gradient, at), simd.load_at(one, at));
            simd.store_at(gradient, at, sum);
            at += LANES;
        }
    }
}

/// The sum of one block of a row's occurrences.
pub(crate) struct SumBlock<'a> {
    pub(crate) touched: Touched<'a>,
    pub(crate) block: Range<usize>,
    pub(crate) into: &'a mut [f32],
}

impl Kernel for SumBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        Gradients::<0, true, true>::new(&self.touched).sum(simd, self.block, self.into);
    }
}

/// The gradients of a row's occurrences, to be added up; rows are of `VECTORS` whole vectors, or of any length if 0.
///
/// Where not `SCALED`, no gradient has a scale, where not `MASKED`, none is of max pooling.
#[derive(Clone, Copy)]
struct Gradients<'a, const VECTORS: usize, const SCALED: bool, const MASKED: bool> {
    run: Run<'a>,
    sources: Sources<'a>,
    dim: usize,
    /// Whether the sum goes onto what is there.
    onto: bool,
}

impl<'a, const VECTORS: usize, const SCALED: bool, const MASKED: bool>
    Gradients<'a, VECTORS, SCALED, MASKED>
{
    #[inline(always)]
    fn new(touched: &Touched<'a>) -> Self {
        let Touched { run, sources, target, .. } = *touched;
        let dim = if VECTORS > 0 { VECTORS * LANES } else { target.dim };
        Self { run, sources: *sources, dim, onto: false }
    }

    /// The sum of some occurrences of one row, block by block.
    #[inline(always)]
    fn sum<S: Simd>(&self, simd: S, occurrences: Range<usize>, into: &mut [f32]) {
        let Range { start, end } = occurrences;
        self.add_block(simd, start..end.min(start + BLOCK), into);
        let onto = Self { onto: true, ..*self };
        let mut at = start + BLOCK;
        while at < end {
            onto.add_block(simd, at..end.min(at + BLOCK), into);
            at += BLOCK;
        }
    }

    #[inline(always)]
    fn add_block<S: Simd>(&self, simd: S, occurrences: Range<usize>, into: &mut [f32]) {
        if VECTORS > 0 {
            block::<S, _, VECTORS, true>(simd, self, occurrences, 0, into);
        } else {
            sum(simd, self, occurrences, into);
        }
    }

    /// Starts to bring the gradient of occurrence `k` near.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, k: usize) {
        let start = self.sources.start(self.run.source(k));
        let grad = self.sources.grad.as_ptr().wrapping_add(start);
        simd.prefetch_bytes(grad.cast(), self.dim * size_of::<f32>());
    }
}

impl<const VECTORS: usize, const SCALED: bool, const MASKED: bool> Terms
    for Gradients<'_, VECTORS, SCALED, MASKED>
{
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize, const WHOLE: bool>(
        &self,
        simd: S,
        k: usize,
        at: usize,
        sum: &mut [S::V; COUNT],
    ) {
        let Self { run, sources, dim, .. } = *self;
        if at == 0 && k + AHEAD < run.len() {
            self.prefetch(simd, k + AHEAD);
        }
        let source = run.source(k);
        let start = sources.start(source);
        let mut grad = load::<S, COUNT, WHOLE>(simd, &sources.grad[start..start + dim], at);
        match sources.argmax.zip(sources.places).filter(|(_, places)| MASKED && places[source] >= 0) {
            Some((argmax, places)) => {
                let argmax = load::<S, COUNT, WHOLE>(simd, &argmax[start..start + dim], at);
                let own = simd.splat(f32::from_bits(places[source] as u32));
                for i in 0..COUNT {
                    let largest = simd.same_bits(argmax[i], own);
                    grad[i] = simd.select(largest, grad[i], simd.splat(0.0));
                }
            }
            None => {
                if let Some(scales) = sources.scales.filter(|_| SCALED) {
                    let scale = simd.splat(scales[source]);
                    for grad in &mut grad {
                        *grad = simd.mul(*grad, scale);
                    }
                }
            }
        }
        for i in 0..COUNT {
            sum[i] = simd.add(sum[i], grad[i]);
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sum: S::V, out: &[f32], at: usize) -> S::V {
        if self.onto { simd.add(simd.load_at(out, at), sum) } else { sum }
    }
}
