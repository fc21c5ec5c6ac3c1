//! One round of the training of a codebook: the mean of the elements that are nearest to each of its numbers.
//!
//! ```text
//! for row:
//!     scale, bias = minmax, renewed ROUNDS times
//!     weight = scale^2 / sum of x^2            (so that every row's relative error counts alike)
//!     for x in row:
//!         y = (x - bias) / scale
//!         sums[nearest(y)] += [weight, weight * y]
//! ```

use super::fit::{Centered, Codebook, Span};
use super::{Kernel, LANES, Simd};

/// Times that a row's scale and bias are renewed.
const ROUNDS: usize = 4;

/// Rows to be averaged, and the codebook that they choose from.
pub(crate) struct Train<'a> {
    pub(crate) rows: &'a [f32],
    pub(crate) dim: usize,
    pub(crate) codebook: Codebook,
}

impl Kernel for Train<'_> {
    /// For every number, the weight of what is nearest to it, and the weighted sum.
    type Output = [[f64; 2]; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let mut sums = [[0.0; 2]; LANES];
        for row in self.rows.chunks_exact(self.dim) {
            let Some(span) = Span::of(simd, row) else {
                continue; // which is refused later
            };
            let scale = (span.max - span.min) / (LANES - 1) as f32;
            if !scale.is_normal() {
                continue; // any codebook suits a constant row
            }
            let centered = Centered::new(simd, row, span);
            let mut trials = centered.start(span, scale, [1.0]);
            for _ in 0..ROUNDS {
                trials = centered.renewed(simd, self.codebook, trials);
            }
            let affine = trials.first(centered);
            let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let weight = f64::from(affine.scale) * f64::from(affine.scale) / squares;
            if weight.is_finite() {
                for &x in row {
                    let y = (x - affine.bias) * affine.inverse;
                    let sum = &mut sums[self.codebook.middles.partition_point(|&middle| middle < y)];
                    *sum = [sum[0] + weight, sum[1] + weight * f64::from(y)];
                }
            }
        }
        sums
    }
}
