//! Where the elements of a table's rows are while a rule changes them, and what they become before and after it.
//!
//! fp32 rows change in place. Others are decoded, changed in fp32 and encoded again.

use crate::Level;
use crate::disjoint::Disjoint;
use crate::kernels::Simd;
use crate::kernels::codes::{self, CodeRows};
use crate::kernels::stochastic::{Decode, Encode, Half, HalfRows, Halves};

/// The elements of a table's rows, to be changed.
pub(crate) enum Weights<'a> {
    /// In place, `(N, D)`.
    Fp32(Disjoint<'a, f32>),
    /// Of half precision.
    Half(HalfRows<'a>),
    /// Of a quantized format.
    Codes(CodeRows<'a>),
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
            Self::Codes(rows) => {
                let (row_bytes, pair_bytes) = (rows.row_bytes(), rows.scale_format.pair_bytes());
                simd.prefetch_bytes(rows.codes.address(row.wrapping_mul(row_bytes)), row_bytes);
                simd.prefetch(rows.scales.address(row.wrapping_mul(pair_bytes)));
            }
        }
    }

    /// Writes rows that are not fp32 to `into`, one after another.
    pub(crate) fn decode(&self, rows: &[usize], into: &mut [f32], level: Level) {
        match self {
            Self::Fp32(_) => {}
            Self::Half(all) => level.run(Decode { halves: Halves { all, rows }, into }),
            Self::Codes(all) => level.run(codes::Decode { all, rows, into }),
        }
    }

    /// Writes the rows that `decode` gave back, of which anything may be left.
    pub(crate) fn encode(&self, rows: &[usize], from: &mut [f32], level: Level) {
        match self {
            Self::Fp32(_) => {}
            Self::Half(all) => level.run(Encode { halves: Halves { all, rows }, from }),
            Self::Codes(all) => level.run(codes::Encode { all, rows, from }),
        }
    }
}
