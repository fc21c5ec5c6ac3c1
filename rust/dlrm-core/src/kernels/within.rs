//! Whether numbers are finite and not large, as those of nearly every table are.

use super::Kernel;
use super::Simd;
use super::fit::Span;

/// Numbers, and how large they may be.
pub(crate) struct Within<'a> {
    /// At least one.
    pub(crate) numbers: &'a [f32],
    pub(crate) largest: f32,
}

impl Kernel for Within<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        Span::of(simd, self.numbers).is_some_and(|span| span.largest() <= self.largest)
    }
}
