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
use super::touched::{PARTS, ROWS, Target, Touched, map};
use super::{Kernel, LANES, Simd};
use crate::occurrences::Run;
use crate::sources::Sources;

/// Occurrences that are added up before they are added to the row's sum.
pub(crate) const BLOCK: usize = 512;

/// Occurrences whose rows are prefetched ahead of the one that is read.
const AHEAD: usize = 24;

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

/// The streams of the weights, then of the state.
type Streams = [Stream; 2 + PARTS];

impl Target<'_> {
    #[inline(always)]
    fn streams(&self) -> Streams {
        if self.rows.is_some() {
            return [Stream::NONE; 2 + PARTS]; // they are written one after another
        }
        let [first, second] = self.weights.streams(self.dim);
        let state = |part: usize| self.state[part].streams(self.state_len[part])[0];
        [first, second, state(0), state(1)]
    }
}

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
        // Where a row is as many vectors as registers hold, nothing about its length is asked for every occurrence.
        match self.touched.target.dim {
            16 => self.rows_of::<S, 1>(simd),
            32 => self.rows_of::<S, 2>(simd),
            64 => self.rows_of::<S, 4>(simd),
            128 if S::BLOCK >= 8 => self.rows_of::<S, 8>(simd),
            _ => self.rows_of::<S, 0>(simd),
        }
    }
}

impl Reduce<'_> {
    #[inline(always)]
    fn rows_of<S: Simd, const VECTORS: usize>(self, simd: S) -> (usize, usize) {
        let Touched { run, by_frequency, factor, hot, .. } = *self.touched;
        let gradients = Gradients::<VECTORS>::new(self.touched);
        if self.begin == 0 {
            for k in 0..AHEAD.min(run.len()) {
                gradients.prefetch(simd, k);
            }
        }
        let mut begin = self.begin;
        let mut count = 0;
        for (row, gradient) in self.rows.iter_mut().zip(self.into.chunks_exact_mut(gradients.dim)) {
            if begin == run.len() {
                break;
            }
            *row = run.row(begin);
            let end = run.row_end(begin);
            if self.needed {
                match hot.blocks(*row) {
                    Some(blocks) => add_up(simd, blocks, gradient),
                    None => gradients.sum(simd, begin..end, gradient),
                }
                if by_frequency && end - begin > 1 {
                    let count = simd.splat((end - begin) as f32);
                    map(simd, gradient, |g| simd.div(g, count));
                }
                if factor.to_bits() != 1.0_f32.to_bits() {
                    let factor = simd.splat(factor);
                    map(simd, gradient, |g| simd.mul(g, factor));
                }
            }
            begin = end;
            count += 1;
        }
        (count, begin)
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
        Gradients::<0>::new(&self.touched).sum(simd, self.block, self.into);
    }
}

/// The gradients of a row's occurrences, to be added up; rows are of `VECTORS` whole vectors, or of any length if 0.
#[derive(Clone, Copy)]
struct Gradients<'a, const VECTORS: usize> {
    run: Run<'a>,
    sources: Sources<'a>,
    dim: usize,
    streams: Streams,
    /// Whether the sum goes onto what is there.
    onto: bool,
}

impl<'a, const VECTORS: usize> Gradients<'a, VECTORS> {
    #[inline(always)]
    fn new(touched: &Touched<'a>) -> Self {
        let Touched { run, sources, target, .. } = *touched;
        let dim = if VECTORS > 0 { VECTORS * LANES } else { target.dim };
        Self { run, sources: *sources, dim, streams: target.streams(), onto: false }
    }

    /// The sum of some occurrences of one row, block by block.
    #[inline(always)]
    fn sum<S: Simd>(&self, simd: S, occurrences: Range<usize>, into: &mut [f32]) {
        let mut at = occurrences.start;
        while at < occurrences.end {
            let next = occurrences.end.min(at + BLOCK);
            let terms = Self { onto: at > occurrences.start, ..*self };
            if VECTORS > 0 {
                block::<S, _, VECTORS, true>(simd, &terms, at..next, 0, into);
            } else {
                sum(simd, &terms, at..next, into);
            }
            at = next;
        }
    }

    /// Starts to bring near what occurrence `k` will need.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, k: usize) {
        let row = self.run.row(k);
        for Stream { start, row_bytes } in self.streams {
            if row_bytes > 0 {
                simd.prefetch_bytes(start.wrapping_add(row.wrapping_mul(row_bytes)), row_bytes);
            }
        }
        if let Some(&start) = self.sources.starts.get(self.run.place(k)) {
            let grad = self.sources.grad.as_ptr().wrapping_add(start);
            simd.prefetch_bytes(grad.cast(), self.dim * size_of::<f32>());
        }
    }
}

impl<const VECTORS: usize> Terms for Gradients<'_, VECTORS> {
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
        let place = run.place(k);
        let start = sources.starts[place];
        let grad = load::<S, COUNT, WHOLE>(simd, &sources.grad[start..start + dim], at);
        let scale = simd.splat(sources.scales.map_or(1.0, |scales| scales[place]));
        let masked = sources.argmax.zip(sources.places).filter(|(_, places)| places[place] >= 0);
        match masked {
            None => {
                for i in 0..COUNT {
                    sum[i] = simd.add(sum[i], simd.mul(grad[i], scale));
                }
            }
            Some((argmax, places)) => {
                let argmax = load::<S, COUNT, WHOLE>(simd, &argmax[start..start + dim], at);
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
