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

/// Parts of a row's span that a search starts from.
const STARTS: [f32; 4] = [1.0, 0.9, 0.8, 0.7];

/// Times that codes, and scale and bias, are renewed at most.
const ROUNDS: usize = 8;

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
        let (mut min, mut max, mut nan) = (first, first, simd.splat(0.0));
        let mut at = 0;
        while at < row.len() {
            let rest = &row[at..];
            let x = match rest.first_chunk() {
                Some(whole) => simd.load(whole),
                None => {
                    let mut lanes = [row[0]; LANES];
                    lanes[..rest.len()].copy_from_slice(rest);
                    simd.load(&lanes)
                }
            };
            min = simd.min(min, x);
            max = simd.max(max, x);
            nan = simd.add(nan, simd.sub(x, x)); // of an infinity too
            at += LANES;
        }
        let mut lanes = [[0.0; LANES]; 2];
        simd.store(&mut lanes[0], min);
        simd.store(&mut lanes[1], max);
        // Zeros of either sign are equal, and which one is found depends on the order: + 0.0 makes them positive.
        let min = lanes[0].iter().fold(lanes[0][0], |a, &b| if b < a { b } else { a }) + 0.0;
        let max = lanes[1].iter().fold(lanes[1][0], |a, &b| if b > a { b } else { a }) + 0.0;
        Self { min, max, finite: simd.sum(nan) == 0.0 }
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

    /// The best for the codes that this one gives; `None` where all are the same.
    #[inline(always)]
    pub(super) fn renewed<S: Simd, C: Code>(self, simd: S, code: C, row: &[f32]) -> Option<Self> {
        let [factor, offset] = regress(simd, code, row, self)?;
        let scale = self.scale * factor;
        Some(Self { scale, bias: self.bias + self.scale * offset, inverse: 1.0 / scale })
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

impl Codebook {
    /// `of[code]` of the nearest number's code.
    #[inline(always)]
    fn choose<S: Simd>(self, simd: S, x: S::V, of: &Lanes) -> S::V {
        let mut chosen = simd.splat(of[0]);
        for k in 0..LANES - 1 {
            let beyond = simd.greater(x, simd.splat(self.middles[k]));
            chosen = simd.select(beyond, simd.splat(of[k + 1]), chosen);
        }
        chosen
    }
}

impl Code for Codebook {
    #[inline(always)]
    fn nearest<S: Simd>(self, simd: S, x: S::V) -> S::V {
        self.choose(simd, x, &self.numbers)
    }

    #[inline(always)]
    fn index<S: Simd>(self, simd: S, x: S::V) -> S::V {
        self.choose(simd, x, &UNIFORM)
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
        let mut best = minmax;
        let mut least = self.error(simd, code, minmax);
        for start in STARTS {
            let outer = range * (1.0 - start) / 2.0;
            // minmax's scale is that of the whole range, whatever its codes are.
            let found = self.descend(simd, code, minmax.scale.abs() * start, self.span.min + outer);
            if !found.is_finite() || !found.inverse.is_finite() {
                continue;
            }
            let error = self.error(simd, code, found);
            if error < least {
                (best, least) = (found, error);
            }
        }
        best
    }

    /// Renews codes, and scale and bias, in turn, and rounds what comes out.
    #[inline(always)]
    fn descend<S: Simd, C: Code>(self, simd: S, code: C, mut scale: f32, mut bias: f32) -> Affine {
        for _ in 0..ROUNDS {
            let now = Affine { scale, bias, inverse: 1.0 / scale };
            let Some(renewed) = now.renewed(simd, code, self.row).filter(|&renewed| renewed != now) else {
                break;
            };
            Affine { scale, bias, .. } = renewed;
        }
        let scale = self.scale_format.round(scale);
        Affine { scale, bias: self.scale_format.round(bias), inverse: 1.0 / scale }
    }

    /// The sum of squares of what the codes are off by, in units of the row's range.
    #[inline(always)]
    fn error<S: Simd, C: Code>(self, simd: S, code: C, affine: Affine) -> f32 {
        let (scale, bias) = (simd.splat(affine.scale), simd.splat(affine.bias));
        let unit = simd.splat(1.0 / (self.span.max - self.span.min));
        let mut squares = simd.splat(0.0);
        let mut at = 0;
        while at < self.row.len() {
            let x = simd.load_at(self.row, at);
            let decoded = simd.mul(code.nearest(simd, affine.to_codes(simd, x)), scale);
            let mut off = simd.mul(simd.sub(x, simd.add(decoded, bias)), unit);
            if at + LANES > self.row.len() {
                off = simd.first(off, self.row.len() - at);
            }
            squares = simd.add(squares, simd.mul(off, off));
            at += LANES;
        }
        simd.sum(squares)
    }
}

/// `[a, b]` that bring the sum of `(y - (a * code + b))^2` down to the least, `y` being the row in units of codes and
/// `code` the nearest to it; `None` where all have the same code.
#[inline(always)]
fn regress<S: Simd, C: Code>(simd: S, code: C, row: &[f32], affine: Affine) -> Option<[f32; 2]> {
    let mut sums = [simd.splat(0.0); 4];
    let mut at = 0;
    while at < row.len() {
        let mut y = affine.to_codes(simd, simd.load_at(row, at));
        let mut c = code.nearest(simd, y);
        if at + LANES > row.len() {
            (y, c) = (simd.first(y, row.len() - at), simd.first(c, row.len() - at));
        }
        sums[0] = simd.add(sums[0], c);
        sums[1] = simd.add(sums[1], simd.mul(c, c));
        sums[2] = simd.add(sums[2], y);
        sums[3] = simd.add(sums[3], simd.mul(c, y));
        at += LANES;
    }
    let [c, cc] = [f64::from(simd.sum(sums[0])), f64::from(simd.sum(sums[1]))];
    let [y, cy] = [f64::from(simd.sum(sums[2])), f64::from(simd.sum(sums[3]))];
    let n = row.len() as f64;
    let spread = n * cc - c * c;
    if spread <= 0.0 {
        return None;
    }
    let a = (n * cy - c * y) / spread;
    let b = (y - a * c) / n;
    (a > 0.0).then_some([a as f32, b as f32])
}
