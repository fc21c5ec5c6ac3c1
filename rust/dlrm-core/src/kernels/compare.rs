//! How far rows are from what they were made of.
//!
//! ```text
//! error[row] = sqrt(sum of (x - y)^2 / sum of x^2),  0 where nothing differs
//! ```
//! Where the squares are too large or too small for single precision, they are taken of the row times a power of two that
//! brings its largest element near 1.

use super::fit::Span;
use super::{Kernel, LANES, Simd};
use crate::rows::Rows;

/// Rows and what they were made of.
pub(crate) struct Compare<'a, R> {
    /// As many rows as `errors` has.
    pub(crate) source: &'a [f32],
    pub(crate) rows: R,
    /// The relative L2 error of each row.
    pub(crate) errors: &'a mut [f32],
}

impl<R: Rows> Kernel for Compare<'_, R> {
    /// The largest absolute error of an element.
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        /// Sums of squares between these are as precise as single precision is.
        const PRECISE: std::ops::Range<f32> = 1e-24..1e30;
        let mut largest = simd.splat(0.0);
        for (i, (row, error)) in self.source.chunks_exact(self.rows.dim()).zip(self.errors).enumerate() {
            let mut squares = sum_squares::<S, R, false>(simd, self.rows, i, row, 1.0, &mut largest);
            if !squares.iter().all(|sum| PRECISE.contains(sum)) {
                let unit = near_one(Span::of(simd, row).largest());
                squares = sum_squares::<S, R, true>(simd, self.rows, i, row, unit, &mut largest);
            }
            let [whole, off] = squares;
            *error = if off > 0.0 { (off / whole).sqrt() } else { 0.0 };
        }
        simd.highest(largest)
    }
}

/// The sums of the squares of a row's elements, and of what row `i` of `rows` is off by, both times `unit` when
/// `SCALED`; `largest` is raised to what is off most.
#[inline(always)]
fn sum_squares<S: Simd, R: Rows, const SCALED: bool>(
    simd: S,
    rows: R,
    i: usize,
    row: &[f32],
    unit: f32,
    largest: &mut S::V,
) -> [f32; 2] {
    let (zero, unit) = (simd.splat(0.0), simd.splat(unit));
    let mut sums = [zero; 4];
    let mut at = 0;
    while at < row.len() {
        let x = simd.load_at(row, at);
        let off = simd.sub(x, rows.load_at(simd, i, at));
        *largest = simd.max(*largest, simd.max(off, simd.sub(zero, off)));
        let (x, off) = if SCALED { (simd.mul(x, unit), simd.mul(off, unit)) } else { (x, off) };
        sums[0] = simd.add(sums[0], simd.mul(x, x));
        sums[1] = simd.add(sums[1], simd.mul(off, off));
        at += LANES;
    }
    let [whole, off, ..] = simd.sums(sums);
    [whole, off]
}

/// A power of two that brings `x` near 1, as far as single precision has one.
#[inline(always)]
fn near_one(x: f32) -> f32 {
    let exponent = (x.to_bits() >> 23) as i32 - 127;
    f32::from_bits(((127 - exponent.clamp(-126, 126)) as u32) << 23)
}
