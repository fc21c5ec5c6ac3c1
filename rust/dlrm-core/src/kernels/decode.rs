//! Rows of any format as fp32.

use super::{Kernel, Simd};
use crate::rows::Rows;

/// Rows to be decoded.
pub(crate) struct Decode<'a, R> {
    pub(crate) rows: R,
    /// The first of them.
    pub(crate) first: usize,
    /// As many rows as it has room for.
    pub(crate) into: &'a mut [f32],
}

impl<R: Rows> Kernel for Decode<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, into) in self.into.chunks_exact_mut(self.rows.dim()).enumerate() {
            self.rows.copy(simd, self.first + i, into);
        }
    }
}
