//! The search for a row's scale and bias, and what its codes mean.
//!
//! ```text
//! lsq:  scale and bias that bring the sum of (x - (scale * code + bias))^2 down, as they are stored: from several starts,
//!       codes, and then scale and bias by regression, are renewed in turn; those of `minmax` where they are better
//! ```

use super::{LANES, Lanes, Simd};
use crate::RowFormat;
use crate::scales::ScaleFormat;
use crate::table_rows::UNIFORM;

/// Parts of a row's range that a search starts from.
pub(super) const STARTS: [f32; 4] = [1.0, 0.9, 0.8, 0.7];

/// The same where codes are of a codebook, which is shaped to whole rows.
pub(super) const CODEBOOK_STARTS: [f32; 2] = [1.0, 0.8];

/// Times that codes, and scale and bias, are renewed at most: more gain less than a hundredth of the error.
const ROUNDS: usize = 5;

/// The numbers that codes of 4 bits mean, and what lies half-way between them.
#[derive(Clone, Copy)]
pub(crate) struct Codebook {
    pub(crate) numbers: Lanes,
    pub(crate) middles: [f32; LANES - 1],
}

impl Codebook {
    pub(crate) fn new(numbers: Lanes) -> Self {
        Self { numbers, middles: std::array::from_fn(|k| f32::midpoint(numbers[k], numbers[k + 1])) }
    }
}

/// From where to where a row's elements reach.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Span {
    pub(super) min: f32,
    pub(super) max: f32,
}

impl Span {
    /// `None` if an element is a NaN or an infinity.
    #[inline(always)]
    pub(crate) fn of<S: Simd>(simd: S, row: &[f32]) -> Option<Self> {
        let reach = Reach::of::<true>(simd, row);
        // What is not finite makes the sum so; large numbers may, too.
        let finite = simd.sum(reach.sum).is_finite() || row.iter().all(|x| x.is_finite());
        let [max, down] = reach.ends(simd);
        let [max, down, ..] = simd.highests([max, down, max, down]);
        finite.then(|| Self::new(max, down))
    }

    /// Of up to [`LANES`] rows; `None` of those that have a NaN or an infinity.
    #[inline(always)]
    pub(super) fn of_finite_rows<S: Simd>(simd: S, rows: &[f32], dim: usize) -> [Option<Self>; LANES] {
        let finite = are_finite(simd, rows);
        let all = Self::of_rows(simd, rows, dim);
        let mut spans = [None; LANES];
        for (i, row) in rows.chunks_exact(dim).enumerate() {
            spans[i] = if finite { Some(all[i]) } else { Self::of(simd, row) };
        }
        spans
    }

    /// Of up to [`LANES`] rows; anything of those that are not finite.
    #[inline(always)]
    pub(super) fn of_rows<S: Simd>(simd: S, rows: &[f32], dim: usize) -> [Self; LANES] {
        let mut vectors = [simd.splat(0.0); 2 * LANES];
        for (i, row) in rows.chunks_exact(dim).enumerate() {
            [vectors[2 * i], vectors[2 * i + 1]] = Reach::of::<false>(simd, row).ends(simd);
        }
        let mut spans = [Self::default(); LANES];
        for (two, vectors) in spans.as_chunks_mut().0.iter_mut().zip(vectors.as_chunks().0) {
            let [max, down, next_max, next_down] = simd.highests(*vectors);
            *two = [Self::new(max, down), Self::new(next_max, next_down)];
        }
        spans
    }

    #[inline(always)]
    fn new(max: f32, down: f32) -> Self {
        // Zeros of either sign are equal, and which one is found depends on the order: + 0.0 makes them positive.
        Self { min: 0.0 - down, max: max + 0.0 }
    }

    /// The largest element in size.
    #[inline(always)]
    pub(crate) fn largest(self) -> f32 {
        self.max.max(-self.min)
    }
}

/// Whether none is a NaN or an infinity.
#[inline(always)]
fn are_finite<S: Simd>(simd: S, elements: &[f32]) -> bool {
    // A number less itself is 0, what is not finite less itself a NaN, which stays in the sum.
    let mut sum = simd.splat(0.0);
    let (whole, rest) = elements.as_chunks();
    for x in whole {
        let x = simd.load(x);
        sum = simd.add(sum, simd.sub(x, x));
    }
    let x = simd.load_at(rest, 0);
    simd.sum(simd.add(sum, simd.sub(x, x))) == 0.0
}

/// How far the elements reach that come to the same lane.
struct Reach<V> {
    min: V,
    max: V,
    /// Of all elements.
    sum: V,
}

impl<V: Copy> Reach<V> {
    #[inline(always)]
    fn of<const SUM: bool>(simd: impl Simd<V = V>, row: &[f32]) -> Self {
        let first = simd.splat(row[0]);
        let mut reach = Self { min: first, max: first, sum: simd.splat(0.0) };
        let (whole, rest) = row.as_chunks();
        for x in whole {
            reach.add::<SUM>(simd, simd.load(x));
        }
        if !rest.is_empty() {
            let mut x = [row[0]; LANES];
            x[..rest.len()].copy_from_slice(rest);
            reach.add::<SUM>(simd, simd.load(&x));
        }
        reach
    }

    #[inline(always)]
    fn add<const SUM: bool>(&mut self, simd: impl Simd<V = V>, x: V) {
        (self.min, self.max) = (simd.min(self.min, x), simd.max(self.max, x));
        if SUM {
            self.sum = simd.add(self.sum, x);
        }
    }

    /// The greatest, and how far down the least is: the greatest of all elements less than nothing.
    #[inline(always)]
    fn ends(&self, simd: impl Simd<V = V>) -> [V; 2] {
        [self.max, simd.sub(simd.splat(0.0), self.min)]
    }
}

/// What a code means in a row: `scale * code + bias`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Affine {
    pub(super) scale: f32,
    pub(super) bias: f32,
    /// By what the way back is multiplied.
    pub(super) inverse: f32,
}

impl Affine {
    #[inline(always)]
    pub(super) fn is_finite(self) -> bool {
        self.scale.is_finite() && self.bias.is_finite()
    }

    /// `scale * code + bias`, rounded once.
    #[inline(always)]
    pub(super) fn decoded<S: Simd>(self, simd: S, code: S::V) -> S::V {
        simd.mul_add(code, simd.splat(self.scale), simd.splat(self.bias))
    }

    /// `(x - bias) / scale`.
    #[inline(always)]
    pub(super) fn to_codes<S: Simd>(self, simd: S, x: S::V) -> S::V {
        simd.mul(simd.sub(x, simd.splat(self.bias)), simd.splat(self.inverse))
    }
}

/// How numbers become codes.
pub(crate) trait Code: Copy {
    /// The nearest number that is a code's.
    fn nearest<S: Simd>(self, simd: S, x: S::V) -> S::V;

    /// Its code.
    fn index<S: Simd>(self, simd: S, x: S::V) -> S::V;
}

/// Codes that are their own numbers.
#[derive(Clone, Copy)]
pub(super) struct Uniform {
    largest: f32,
}

impl Uniform {
    /// Those of a quantized format.
    #[inline(always)]
    pub(super) fn of(format: RowFormat) -> Self {
        Self { largest: format.largest_code() }
    }
}

impl Code for Uniform {
    #[inline(always)]
    fn nearest<S: Simd>(self, simd: S, x: S::V) -> S::V {
        simd.round(simd.min(simd.max(x, simd.splat(0.0)), simd.splat(self.largest)))
    }

    #[inline(always)]
    fn index<S: Simd>(self, simd: S, x: S::V) -> S::V {
        self.nearest(simd, x)
    }
}

impl Code for Codebook {
    #[inline(always)]
    fn nearest<S: Simd>(self, simd: S, x: S::V) -> S::V {
        simd.choose(x, &self.middles, &self.numbers)
    }

    #[inline(always)]
    fn index<S: Simd>(self, simd: S, x: S::V) -> S::V {
        simd.choose(x, &self.middles, &UNIFORM)
    }
}

/// A row less the middle of its range: sums of it lose no precision to a large mean.
#[derive(Clone, Copy)]
pub(super) struct Centered<'a> {
    row: &'a [f32],
    middle: f32,
    /// The sum of its elements.
    total: f32,
}

/// Scales and biases of a centered row, tried side by side: what one waits for, another can use.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Trials<const N: usize> {
    scale: [f32; N],
    bias: [f32; N],
}

impl<'a> Centered<'a> {
    #[inline(always)]
    pub(super) fn new<S: Simd>(simd: S, row: &'a [f32], span: Span) -> Self {
        let mut centered = Self { row, middle: f32::midpoint(span.min, span.max), total: 0.0 };
        let mut total = simd.splat(0.0);
        let whole = row.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            total = simd.add(total, centered.load::<S, true>(simd, at));
        }
        if whole < row.len() {
            total = simd.add(total, centered.load::<S, false>(simd, whole));
        }
        centered.total = simd.sum(total);
        centered
    }

    /// A vector of it: inside the row when `WHOLE`, else cut at its end, and zero beyond.
    #[inline(always)]
    fn load<S: Simd, const WHOLE: bool>(self, simd: S, at: usize) -> S::V {
        let x = simd.sub(load::<S, WHOLE>(simd, self.row, at), simd.splat(self.middle));
        cut::<S, WHOLE>(simd, x, self.row, at)
    }

    /// Trials that start from parts of the range; `scale` is that of all of it.
    #[inline(always)]
    pub(super) fn start<const N: usize>(self, span: Span, scale: f32, parts: [f32; N]) -> Trials<N> {
        let half = (span.max - span.min) / 2.0;
        Trials { scale: parts.map(|part| scale * part), bias: parts.map(|part| -half * part) }
    }

    /// The best scales and biases for the codes that those of `trials` give, by regression; where all codes are the same,
    /// what was.
    #[inline(always)]
    pub(super) fn renewed<S: Simd, C: Code, const N: usize>(
        self,
        simd: S,
        code: C,
        trials: Trials<N>,
    ) -> Trials<N> {
        let mut sums =
            Sums { of: [[simd.splat(0.0); 4]; N], inverse: [simd.splat(0.0); N], bias: [simd.splat(0.0); N] };
        for i in 0..N {
            sums.inverse[i] = simd.splat(1.0 / trials.scale[i]);
            sums.bias[i] = simd.splat(trials.bias[i]);
        }
        let whole = self.row.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            sums.add::<C, true>(simd, code, self, at);
        }
        if whole < self.row.len() {
            sums.add::<C, false>(simd, code, self, whole);
        }
        let (n, total) = (self.row.len() as f64, f64::from(self.total));
        let mut renewed = trials;
        for i in 0..N {
            let [c, cc, cx, _] = simd.sums(sums.of[i]);
            let [c, cc, cx] = [f64::from(c), f64::from(cc), f64::from(cx)];
            let spread = n * cc - c * c;
            let scale = (n * cx - c * total) / spread;
            if spread > 0.0 && scale > 0.0 {
                renewed.scale[i] = scale as f32;
                renewed.bias[i] = ((total - scale * c) / n) as f32;
            }
        }
        renewed
    }
}

/// What a regression adds up, for each trial side by side.
struct Sums<S: Simd, const N: usize> {
    /// Of codes, of their squares, and of their products with the elements; the fourth is not used.
    of: [[S::V; 4]; N],
    inverse: [S::V; N],
    bias: [S::V; N],
}

impl<S: Simd, const N: usize> Sums<S, N> {
    #[inline(always)]
    fn add<C: Code, const WHOLE: bool>(&mut self, simd: S, code: C, row: Centered, at: usize) {
        let x = row.load::<S, WHOLE>(simd, at);
        for i in 0..N {
            let y = simd.mul(simd.sub(x, self.bias[i]), self.inverse[i]);
            let c = cut::<S, WHOLE>(simd, code.nearest(simd, y), row.row, at);
            self.of[i][0] = simd.add(self.of[i][0], c);
            self.of[i][1] = simd.add(self.of[i][1], simd.mul(c, c));
            self.of[i][2] = simd.add(self.of[i][2], simd.mul(c, x));
        }
    }
}

/// A vector of a row: inside it when `WHOLE`, else cut at its end.
#[inline(always)]
fn load<S: Simd, const WHOLE: bool>(simd: S, row: &[f32], at: usize) -> S::V {
    let [v] = super::sum::load::<S, 1, WHOLE>(simd, row, at);
    v
}

/// `v` without the lanes beyond the row's end, unless `WHOLE`.
#[inline(always)]
fn cut<S: Simd, const WHOLE: bool>(simd: S, v: S::V, row: &[f32], at: usize) -> S::V {
    if WHOLE { v } else { simd.first(v, row.len() - at) }
}

impl<const N: usize> Trials<N> {
    /// The first scale and bias of a row, not rounded.
    #[inline(always)]
    pub(super) fn first(self, row: Centered) -> Affine {
        let scale = self.scale[0];
        Affine { scale, bias: row.middle + self.bias[0], inverse: 1.0 / scale }
    }
}

/// The search for a row's scale and bias.
#[derive(Clone, Copy)]
pub(super) struct Fit<'a> {
    pub(super) row: &'a [f32],
    pub(super) span: Span,
    pub(super) scale_format: ScaleFormat,
}

impl Fit<'_> {
    /// The best that is found from parts of the range, `minmax` included.
    #[inline(always)]
    pub(super) fn best<S: Simd, C: Code, const N: usize>(
        self,
        simd: S,
        code: C,
        minmax: Affine,
        starts: [f32; N],
    ) -> Affine {
        let range = self.span.max - self.span.min;
        if !range.is_normal() || !(1.0 / range).is_normal() {
            return minmax;
        }
        let row = Centered::new(simd, self.row, self.span);
        let mut trials = row.start(self.span, minmax.scale.abs(), starts);
        for _ in 0..ROUNDS {
            let renewed = row.renewed(simd, code, trials);
            if renewed == trials {
                break;
            }
            trials = renewed;
        }
        let mut found = [minmax; N];
        for (i, found) in found.iter_mut().enumerate() {
            let scale = self.scale_format.round(trials.scale[i]);
            let bias = self.scale_format.round(row.middle + trials.bias[i]);
            let affine = Affine { scale, bias, inverse: 1.0 / scale };
            if affine.is_finite() && affine.inverse.is_finite() {
                *found = affine;
            }
        }
        let errors = self.errors(simd, code, found);
        let [mut least] = self.errors(simd, code, [minmax]);
        let mut best = minmax;
        for i in 0..N {
            if errors[i] < least {
                (best, least) = (found[i], errors[i]);
            }
        }
        best
    }

    /// The sums of squares of what the codes are off by, in units of the row's range.
    #[inline(always)]
    fn errors<S: Simd, C: Code, const N: usize>(self, simd: S, code: C, found: [Affine; N]) -> [f32; N] {
        let mut squares = [simd.splat(0.0); N];
        let whole = self.row.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            self.add_errors::<S, C, N, true>(simd, code, &found, at, &mut squares);
        }
        if whole < self.row.len() {
            self.add_errors::<S, C, N, false>(simd, code, &found, whole, &mut squares);
        }
        let mut errors = [0.0; N];
        for i in 0..N {
            errors[i] = simd.sum(squares[i]);
        }
        errors
    }

    #[inline(always)]
    fn add_errors<S: Simd, C: Code, const N: usize, const WHOLE: bool>(
        self,
        simd: S,
        code: C,
        found: &[Affine; N],
        at: usize,
        squares: &mut [S::V; N],
    ) {
        let unit = simd.splat(1.0 / (self.span.max - self.span.min));
        let x = load::<S, WHOLE>(simd, self.row, at);
        for i in 0..N {
            let codes = code.nearest(simd, found[i].to_codes(simd, x));
            let decoded = found[i].decoded(simd, codes);
            let off = cut::<S, WHOLE>(simd, simd.mul(simd.sub(x, decoded), unit), self.row, at);
            squares[i] = simd.add(squares[i], simd.mul(off, off));
        }
    }
}
