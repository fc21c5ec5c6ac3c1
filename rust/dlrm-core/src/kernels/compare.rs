//! How far rows are from what they were made of.
//!
//! ```text
//! error[row] = sqrt(sum of (x - y)^2 / sum of x^2),  0 where nothing differs
//! ```
//! Both sums are taken of the row times a power of two that brings its largest element near 1, so that no square is
//! too large or too small for single precision.

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
        let zero = simd.splat(0.0);
        let mut largest = zero;
        for (i, (row, error)) in self.source.chunks_exact(self.rows.dim()).zip(self.errors).enumerate() {
            let unit = simd.splat(near_one(Span::of(simd, row).largest()));
            let (mut squares, mut off_squares) = (zero, zero);
            let mut at = 0;
            while at < row.len() {
                let x = simd.load_at(row, at);
                let off = simd.sub(x, self.rows.load_at(simd, i, at));
                largest = simd.max(largest, simd.max(off, simd.sub(zero, off)));
                let (x, off) = (simd.mul(x, unit), simd.mul(off, unit));
                squares = simd.add(squares, simd.mul(x, x));
                off_squares = simd.add(off_squares, simd.mul(off, off));
                at += LANES;
            }
            let off = simd.sum(off_squares);
            *error = if off > 0.0 { (off / simd.sum(squares)).sqrt() } else { 0.0 };
        }
        let mut lanes = [0.0; LANES];
        simd.store(&mut lanes, largest);
        lanes.into_iter().fold(0.0, f32::max)
    }
}

/// A power of two that brings `x` near 1, as far as single precision has one.
#[inline(always)]
fn near_one(x: f32) -> f32 {
    let exponent = (x.to_bits() >> 23) as i32 - 127;
    f32::from_bits(((127 - exponent.clamp(-126, 126)) as u32) << 23)
}
