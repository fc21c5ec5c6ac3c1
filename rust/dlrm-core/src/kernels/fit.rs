//! Scale and bias of a row, and what its codes mean.
//!
//! ```text
//! with n = 2^bits - 1:
//!   minmax:  bias = min, scale = (max - min) / n, both rounded to what is stored, bias first
//!   lsq:     scale and bias that bring the sum of (x - (scale * code + bias))^2 down, as they are stored: from several
//!            starts, codes and then scale and bias (by regression) are renewed in turn; minmax where that is better
//! ```
//! minmax gives the bytes of FBGEMM's `FloatOrHalfToFusedNBitRowwiseQuantizedSBHalfRef` (4 and 2 bits, fp16 scales) and
//! `FloatOrHalfToFused8BitRowwiseQuantizedSBFloatRef` (8 bits, fp32 scales), which torch's prepack operators share.

use super::{LANES, Lanes, Simd};
use crate::RowFormat;
use crate::scales::ScaleFormat;
use crate::table_rows::UNIFORM;

/// Parts of a row's range that a search starts from.
const STARTS: [f32; 4] = [1.0, 0.9, 0.8, 0.7];

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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(super) min: f32,
    pub(super) max: f32,
    pub(super) finite: bool,
}

impl Span {
    #[inline(always)]
    pub(crate) fn of<S: Simd>(simd: S, row: &[f32]) -> Self {
        let first = simd.splat(row[0]);
        let (mut min, mut max, mut sum) = (first, first, simd.splat(0.0));
        let mut at = 0;
        while at < row.len() {
            let rest = &row[at..];
            let x = if let Some(whole) = rest.first_chunk() {
                simd.load(whole)
            } else {
                let mut lanes = [row[0]; LANES];
                lanes[..rest.len()].copy_from_slice(rest);
                simd.load(&lanes)
            };
            min = simd.min(min, x);
            max = simd.max(max, x);
            sum = simd.add(sum, x);
            at += LANES;
        }
        // Zeros of either sign are equal, and which one is found depends on the order: + 0.0 makes them positive.
        Self {
            min: simd.lowest(min) + 0.0,
            max: simd.highest(max) + 0.0,
            // What is not finite makes the sum so; large numbers may, too.
            finite: simd.sum(sum).is_finite() || row.iter().all(|x| x.is_finite()),
        }
    }

    /// The largest element in size.
    #[inline(always)]
    pub(crate) fn largest(self) -> f32 {
        self.max.max(-self.min)
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
    /// The one whose codes reach from the smallest to the largest element; and whether scales are as precise as the
    /// format usually is.
    #[inline(always)]
    pub(super) fn minmax(format: RowFormat, scales: ScaleFormat, span: Span) -> (Self, bool) {
        /// Keeps the quotient finite, and is part of the format.
        const EPSILON: f32 = 1e-8;
        let n = format.largest_code();
        let bias = scales.round(span.min);
        let range = span.max - bias;
        if format == RowFormat::Int8 && scales == ScaleFormat::Fp32 {
            return (Self { scale: range / n, bias, inverse: n / (range + EPSILON) }, true);
        }
        let wanted = if range == 0.0 { 1.0 } else { range / n };
        let mut scale = scales.round(wanted);
        if scale == 0.0 || (1.0 / scale).is_infinite() {
            scale = 1.0;
        }
        // Half a step at the far end, or what the bias is rounded by.
        let tolerance = (scale.abs() / 2.0).max(span.largest() * 2.0_f32.powi(-11));
        let precise = n * (scale - wanted).abs() <= tolerance;
        (Self { scale, bias, inverse: 1.0 / scale }, precise)
    }

    #[inline(always)]
    pub(super) fn is_finite(self) -> bool {
        self.scale.is_finite() && self.bias.is_finite()
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
    pub(super) largest: f32,
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
        let mut at = 0;
        while at < row.len() {
            total = simd.add(total, centered.load(simd, at));
            at += LANES;
        }
        centered.total = simd.sum(total);
        centered
    }

    /// A vector of it, zero beyond its end.
    #[inline(always)]
    fn load<S: Simd>(self, simd: S, at: usize) -> S::V {
        let x = simd.sub(simd.load_at(self.row, at), simd.splat(self.middle));
        if at + LANES > self.row.len() { simd.first(x, self.row.len() - at) } else { x }
    }

    /// Trials that start from parts of the range; `scale` is that of all of it.
    #[inline(always)]
    pub(super) fn start<const N: usize>(self, span: Span, scale: f32, parts: [f32; N]) -> Trials<N> {
        let half = (span.max - span.min) / 2.0;
        let mut trials = Trials { scale: [0.0; N], bias: [0.0; N] };
        for i in 0..N {
            trials.scale[i] = scale * parts[i];
            trials.bias[i] = -half * parts[i];
        }
        trials
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
        // Of each trial: the sums of codes, of their squares, and of their products with the elements.
        let mut sums = [[simd.splat(0.0); 4]; N];
        let mut at = 0;
        while at < self.row.len() {
            let x = self.load(simd, at);
            for i in 0..N {
                let offset = simd.sub(x, simd.splat(trials.bias[i]));
                let y = simd.mul(offset, simd.splat(1.0 / trials.scale[i]));
                let mut c = code.nearest(simd, y);
                if at + LANES > self.row.len() {
                    c = simd.first(c, self.row.len() - at);
                }
                sums[i][0] = simd.add(sums[i][0], c);
                sums[i][1] = simd.add(sums[i][1], simd.mul(c, c));
                sums[i][2] = simd.add(sums[i][2], simd.mul(c, x));
            }
            at += LANES;
        }
        let (n, total) = (self.row.len() as f64, f64::from(self.total));
        let mut renewed = trials;
        for i in 0..N {
            let [c, cc, cx, _] = simd.sums(sums[i]);
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
    /// The best that is found, `minmax` included.
    #[inline(always)]
    pub(super) fn best<S: Simd, C: Code>(self, simd: S, code: C, minmax: Affine) -> Affine {
        let range = self.span.max - self.span.min;
        if !range.is_normal() || !(1.0 / range).is_normal() {
            return minmax;
        }
        let row = Centered::new(simd, self.row, self.span);
        let mut trials = row.start(self.span, minmax.scale.abs(), STARTS);
        for _ in 0..ROUNDS {
            let renewed = row.renewed(simd, code, trials);
            if renewed == trials {
                break;
            }
            trials = renewed;
        }
        let mut found = [minmax; STARTS.len() + 1];
        for i in 0..STARTS.len() {
            let scale = self.scale_format.round(trials.scale[i]);
            let bias = self.scale_format.round(row.middle + trials.bias[i]);
            let affine = Affine { scale, bias, inverse: 1.0 / scale };
            if affine.is_finite() && affine.inverse.is_finite() {
                found[i] = affine;
            }
        }
        let errors = self.errors(simd, code, found);
        let mut best = STARTS.len(); // minmax, unless another is better
        for i in 0..STARTS.len() {
            if errors[i] < errors[best] {
                best = i;
            }
        }
        found[best]
    }

    /// The sums of squares of what the codes are off by, in units of the row's range.
    #[inline(always)]
    fn errors<S: Simd, C: Code, const N: usize>(self, simd: S, code: C, found: [Affine; N]) -> [f32; N] {
        let unit = simd.splat(1.0 / (self.span.max - self.span.min));
        let mut squares = [simd.splat(0.0); N];
        let mut at = 0;
        while at < self.row.len() {
            let x = simd.load_at(self.row, at);
            for i in 0..N {
                let codes = code.nearest(simd, found[i].to_codes(simd, x));
                let decoded =
                    simd.add(simd.mul(codes, simd.splat(found[i].scale)), simd.splat(found[i].bias));
                let mut off = simd.mul(simd.sub(x, decoded), unit);
                if at + LANES > self.row.len() {
                    off = simd.first(off, self.row.len() - at);
                }
                squares[i] = simd.add(squares[i], simd.mul(off, off));
            }
            at += LANES;
        }
        let mut errors = [0.0; N];
        for i in 0..N {
            errors[i] = simd.sum(squares[i]);
        }
        errors
    }
}
