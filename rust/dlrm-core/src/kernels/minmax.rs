//! Scale and bias from the smallest to the largest element, of [`LANES`] rows side by side.
//!
//! ```text
//! with n = 2^bits - 1:  bias = min, range = max - bias, scale = range / n, each rounded to what is stored before the next
//!                       a scale of 0, or one too small to divide by, becomes 1
//! int8 with fp32:       codes are (x - bias) * (n / (range + 1e-8)), not (x - bias) / scale
//! ```
//! These are the bytes of FBGEMM's `FloatOrHalfToFusedNBitRowwiseQuantizedSBHalfRef` (4 and 2 bits, fp16 scales) and
//! `FloatOrHalfToFused8BitRowwiseQuantizedSBFloatRef` (8 bits, fp32 scales), which torch's prepack operators share.

use super::fit::{Affine, Span};
use super::{LANES, Lanes, Simd};
use crate::RowFormat;
use crate::scales::ScaleFormat;

/// Scales and biases of rows side by side.
pub(super) struct MinMax {
    scale: Lanes,
    bias: Lanes,
    inverse: Lanes,
    /// 1 where scale and bias are as precise as the format usually is, else 0.
    precise: Lanes,
}

impl MinMax {
    /// Of up to [`LANES`] rows.
    #[inline(always)]
    pub(super) fn of<S: Simd>(
        simd: S,
        spans: &[Span; LANES],
        format: RowFormat,
        scales: ScaleFormat,
    ) -> Self {
        let (mut min, mut max) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..LANES {
            (min[i], max[i]) = (spans[i].min, spans[i].max);
        }
        let (min, max) = (simd.load(&min), simd.load(&max));
        let bias = stored(simd, scales, min);
        let range = simd.sub(max, bias);
        let n = simd.splat(format.largest_code());
        let (scale, inverse, precise) = if format == RowFormat::Int8 && scales == ScaleFormat::Fp32 {
            let inverse = simd.div(n, simd.add(range, simd.splat(1e-8)));
            (simd.div(range, n), inverse, simd.splat(1.0))
        } else {
            divided(simd, scales, range, n, simd.max(max, simd.sub(simd.splat(0.0), min)))
        };
        Self {
            scale: simd.lanes(scale),
            bias: simd.lanes(bias),
            inverse: simd.lanes(inverse),
            precise: simd.lanes(precise),
        }
    }

    /// Of row `i`, and whether it is as precise as the format usually is.
    #[inline(always)]
    pub(super) fn get(&self, i: usize) -> (Affine, bool) {
        let affine = Affine { scale: self.scale[i], bias: self.bias[i], inverse: self.inverse[i] };
        (affine, self.precise[i] > 0.0)
    }
}

/// Scale, its inverse, and whether it is precise; `largest` is the largest element in size.
#[inline(always)]
fn divided<S: Simd>(simd: S, scales: ScaleFormat, range: S::V, n: S::V, largest: S::V) -> (S::V, S::V, S::V) {
    let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
    let wanted = simd.select(simd.same_bits(range, zero), one, simd.div(range, n));
    let scale = stored(simd, scales, wanted);
    let inverse = simd.div(one, scale);
    let infinite = simd.greater(size(simd, inverse), simd.splat(f32::MAX));
    let (scale, inverse) = (simd.select(infinite, one, scale), simd.select(infinite, one, inverse));
    // Half a step at the far end, or what the bias is rounded by.
    let half_step = simd.mul(size(simd, scale), simd.splat(0.5));
    let tolerance = simd.max(half_step, simd.mul(largest, simd.splat(2.0_f32.powi(-11))));
    let off = simd.mul(n, size(simd, simd.sub(scale, wanted)));
    (scale, inverse, simd.select(simd.greater(off, tolerance), zero, one))
}

/// The nearest numbers that are stored.
#[inline(always)]
fn stored<S: Simd>(simd: S, scales: ScaleFormat, v: S::V) -> S::V {
    let mut half = [0; LANES];
    match scales {
        ScaleFormat::Fp32 => v,
        ScaleFormat::Fp16 => {
            simd.store_fp16(&mut half, v);
            simd.load_fp16(&half)
        }
        ScaleFormat::Bf16 => {
            simd.store_bf16(&mut half, v);
            simd.load_bf16(&half)
        }
    }
}

/// Without the sign.
#[inline(always)]
fn size<S: Simd>(simd: S, v: S::V) -> S::V {
    simd.max(v, simd.sub(simd.splat(0.0), v))
}
