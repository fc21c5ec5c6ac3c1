//! Where the elements of a table's rows are while a rule changes them, and what they become before and after it; and those
//! of the state beside the rows, each part of which is kept as rows are.
//!
//! fp32 rows change in place. Others are decoded, changed in fp32 and encoded again.

use crate::Level;
use crate::disjoint::Disjoint;
use crate::kernels::codes::{self, CodeRows};
use crate::kernels::stochastic::{Decode, Encode, Half, HalfRows, Halves};
use crate::kernels::touched::{Next, Stream};

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
    /// Where to decode rows of `len` elements in all: nowhere if they change in place.
    pub(crate) fn scratch(&self, len: usize) -> Vec<f32> {
        vec![0.0; if self.in_place() { 0 } else { len }]
    }

    /// Whether rows change where they are.
    #[inline(always)]
    pub(crate) fn in_place(&self) -> bool {
        matches!(self, Self::Fp32(_))
    }

    /// Rows of `dim` elements that come next.
    #[inline(always)]
    pub(crate) fn next<'a>(&self, dim: usize, rows: &'a [usize]) -> Next<'a> {
        let [first, second] = self.streams(dim);
        Next::new([first, second, Stream::NONE], rows)
    }

    /// Where the rows of `dim` elements are.
    #[inline(always)]
    pub(crate) fn streams(&self, dim: usize) -> [Stream; 2] {
        match self {
            Self::Fp32(all) => {
                let row_bytes = dim * size_of::<f32>();
                [Stream { start: all.address(0).cast(), row_bytes }, Stream::NONE]
            }
            Self::Half(rows) => {
                let stream = |of: &Disjoint<u16>| {
                    let row_bytes = dim * size_of::<u16>();
                    Stream { start: of.address(0).cast(), row_bytes }
                };
                let low = if rows.half == Half::Split { stream(&rows.low) } else { Stream::NONE };
                [stream(&rows.bits), low]
            }
            Self::Codes(rows) => {
                let codes = Stream { start: rows.codes.address(0).cast(), row_bytes: rows.row_bytes };
                let row_bytes = rows.scale_format.pair_bytes();
                [codes, Stream { start: rows.scales.address(0).cast(), row_bytes }]
            }
        }
    }

    /// Writes rows that are not fp32 to `into`, one after another.
    pub(crate) fn decode(&self, rows: &[usize], into: &mut [f32], level: Level) {
        match self {
            Self::Fp32(_) => {}
            Self::Half(all) => level.run(Decode { halves: Halves { all, rows }, into }),
            Self::Codes(all) => {
                level.run(codes::Decode { all, rows, into: &mut *into });
                all.read_cached(rows, into);
            }
        }
    }

    /// Writes the rows that `decode` gave back, of which anything may be left; the next ones are brought near meanwhile.
    pub(crate) fn encode(&self, rows: &[usize], from: &mut [f32], next: &[usize], level: Level) {
        match self {
            Self::Fp32(_) => {}
            Self::Half(all) => {
                let next = self.next(all.dim, next);
                level.run(Encode { halves: Halves { all, rows }, from, next });
            }
            Self::Codes(all) => {
                let next = self.next(all.dim, next);
                let codes;
                let rows = if all.ways.is_some() {
                    codes = all.write_cached(rows, from);
                    &codes
                } else {
                    rows
                };
                level.run(codes::Encode { all, rows, from, next });
            }
        }
    }
}
