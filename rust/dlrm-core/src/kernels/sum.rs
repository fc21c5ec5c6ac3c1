//! The sum of many rows, in registers.

use std::ops::Range;

use super::{LANES, Simd};

/// Rows to be added up.
pub(crate) trait Terms {
    /// Adds elements `at..` of term number `k` onto `sum`: `COUNT` vectors inside the row when `WHOLE`, else one that is
    /// cut at the row's end.
    fn add<S: Simd, const COUNT: usize, const WHOLE: bool>(
        &self,
        simd: S,
        k: usize,
        at: usize,
        sum: &mut [S::V; COUNT],
    );

    /// What is stored for a sum; `at` is its first element.
    #[inline(always)]
    fn finish<S: Simd>(&self, _simd: S, sum: S::V, _out: &[f32], _at: usize) -> S::V {
        sum
    }
}

/// Adds up the terms of `range`, from zero and in their order, and stores all elements of the sum in `out`.
#[inline(always)]
pub(crate) fn sum<S: Simd, T: Terms>(simd: S, terms: &T, range: Range<usize>, out: &mut [f32]) {
    let mut at = 0;
    macro_rules! blocks_of {
        ($count:literal) => {
            while S::BLOCK >= $count && at + $count * LANES <= out.len() {
                block::<S, T, $count, true>(simd, terms, range.clone(), at, out);
                at += $count * LANES;
            }
        };
    }
    blocks_of!(8);
    blocks_of!(4);
    blocks_of!(2);
    blocks_of!(1);
    if at < out.len() {
        block::<S, T, 1, false>(simd, terms, range, at, out);
    }
}

/// `COUNT` vectors of the sum.
#[inline(always)]
pub(crate) fn block<S: Simd, T: Terms, const COUNT: usize, const WHOLE: bool>(
    simd: S,
    terms: &T,
    range: Range<usize>,
    at: usize,
    out: &mut [f32],
) {
    let mut sum = [simd.splat(0.0); COUNT];
    for k in range {
        terms.add::<S, COUNT, WHOLE>(simd, k, at, &mut sum);
    }
    let mut at = at;
    for v in sum {
        let v = terms.finish(simd, v, out, at);
        if WHOLE {
            simd.store_at(out, at, v);
        } else {
            simd.store_partial(&mut out[at..], v);
        }
        at += LANES;
    }
}

/// `COUNT` vectors of `row` from element `at` on when `WHOLE`; else one, cut at the row's end.
#[inline(always)]
pub(crate) fn load<S: Simd, const COUNT: usize, const WHOLE: bool>(
    simd: S,
    row: &[f32],
    at: usize,
) -> [S::V; COUNT] {
    if !WHOLE {
        return [simd.load_partial(&row[at..]); COUNT];
    }
    let (vectors, _) = row[at..at + COUNT * LANES].as_chunks();
    let mut loaded = [simd.splat(0.0); COUNT];
    for i in 0..COUNT {
        loaded[i] = simd.load(&vectors[i]);
    }
    loaded
}
