//! The gradient of per-sample weights: the dot product of each id's row with the gradient of its bag.
//!
//! ```text
//! into[id] = sum over c of row[c] * grad[c]   (in lane c mod 16, then the lanes; / ids of the bag for a mean)
//! ```

use super::{Kernel, LANES, Simd};
use crate::bags::Id;
use crate::rows::Rows;

/// Some ids of one bag.
pub(crate) struct Dot<'a, R, I> {
    pub(crate) rows: R,
    /// Below the number of rows.
    pub(crate) ids: &'a [I],
    /// An id that gets zero; `u64::MAX` for none.
    pub(crate) padding: u64,
    /// Of the bag's output row.
    pub(crate) grad: &'a [f32],
    pub(crate) divisor: f32,
    pub(crate) into: &'a mut [f32],
}

impl<R: Rows, I: Id> Kernel for Dot<'_, R, I> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (into, id) in self.into.iter_mut().zip(self.ids) {
            *into = 0.0;
            if id.row() != self.padding {
                *into = dot(simd, self.rows, id.row() as usize, self.grad) / self.divisor;
            }
        }
    }
}

#[inline(always)]
fn dot<S: Simd, R: Rows>(simd: S, rows: R, row: usize, grad: &[f32]) -> f32 {
    let mut sum = simd.splat(0.0);
    let mut at = 0;
    while at < grad.len() {
        let elements = rows.load_at(simd, row, at);
        sum = simd.add(sum, simd.mul(elements, simd.load_at(grad, at)));
        at += LANES;
    }
    simd.sum(sum)
}
