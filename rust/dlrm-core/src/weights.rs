//! Where the elements of a table's rows are while a rule changes them, and what they become before and after it.
//!
//! fp32 rows change in place. Others are decoded, changed in fp32 and encoded again.

use crate::Level;
use crate::disjoint::Disjoint;
use crate::kernels::Simd;
use crate::kernels::stochastic::{Decode, Encode, Half, HalfRows, Halves};

/// The elements of a table's rows, to be changed.
pub(crate) enum Weights<'a> {
    /// In place, `(N, D)`.
    Fp32(Disjoint<'a, f32>),
    /// Of half precision.
    Half(HalfRows<'a>),
}

impl Weights<'_> {
    /// Whether they change in place.
    pub(crate) const fn are_fp32(&self) -> bool {
        matches!(self, Self::Fp32(_))
    }

    /// Starts to bring a row near; `row` may be any number.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(&self, simd: S, row: usize, dim: usize) {
        let at = row.wrapping_mul(dim);
        match self {
            Self::Fp32(all) => simd.prefetch_bytes(all.address(at).cast(), dim * size_of::<f32>()),
            Self::Half(rows) => {
                simd.prefetch_bytes(rows.bits.address(at).cast(), dim * size_of::<u16>());
                if rows.half == Half::Split {
                    simd.prefetch_bytes(rows.low.address(at).cast(), dim * size_of::<u16>());
                }
            }
        }
    }

    /// Writes rows that are not fp32 to `into`, one after another.
    pub(crate) fn decode(&self, rows: &[usize], into: &mut [f32], level: Level) {
        match self {
            Self::Fp32(_) => {}
            Self::Half(all) => level.run(Decode { halves: Halves { all, rows }, into }),
        }
    }

    /// Writes the rows that `decode` gave back.
    pub(crate) fn encode(&self, rows: &[usize], from: &[f32], level: Level) {
        match self {
            Self::Fp32(_) => {}
            Self::Half(all) => level.run(Encode { halves: Halves { all, rows }, from }),
        }
    }
}
