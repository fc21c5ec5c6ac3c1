//! Rows of fp32 brought into another row format.
//!
//! ```text
//! fp16, bf16:        the nearest number, ties to even
//! int8, int4, int2:  code = round((x - bias) / scale), from 0 to 2^bits - 1; scale and bias as `fit` finds them
//! ```

use super::fit::{Affine, Code, Codebook, Fit, Span, Uniform};
use super::{Kernel, Simd};
use crate::RowFormat;
use crate::rows::{Bf16, Fp16, Fp32, Int2, Int4, Int8, Map, Packing, pack, pack_mapped};
use crate::scales;
use crate::table_rows::{RowsMut, UNIFORM};

/// What codes mean.
#[derive(Clone, Copy)]
pub(crate) enum Codes {
    /// Their own numbers.
    Uniform,
    /// Numbers of a codebook, ascending from 0 to 15.
    Codebook(Codebook),
}

/// How scale and bias are found.
#[derive(Clone, Copy)]
pub(crate) struct Search {
    /// Beyond minmax.
    pub(crate) least_squares: bool,
    pub(crate) codes: Codes,
}

/// Rows to be encoded.
pub(crate) struct Encode<'a> {
    /// As many rows as `into` has.
    pub(crate) source: &'a [f32],
    pub(crate) into: RowsMut<'a>,
    pub(crate) search: Search,
    /// Whether scales that the format holds only with less than its usual precision are refused.
    pub(crate) precise: bool,
}

/// The first rows, if any, that cannot be encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refused {
    /// The first with a NaN or an infinity.
    pub(crate) not_finite: Option<usize>,
    /// The first that needs numbers which the format does not hold.
    pub(crate) not_held: Option<usize>,
}

impl Kernel for Encode<'_> {
    type Output = Refused;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> Refused {
        /// The largest number that does not become infinite when it is rounded to half precision; to bfloat16.
        const FP16_LARGEST: f32 = f32::from_bits(0x477F_EFFF);
        const BF16_LARGEST: f32 = f32::from_bits(0x7F7F_7FFF);
        match self.into.format {
            RowFormat::Fp32 => self.elements(simd, Fp32, f32::MAX),
            RowFormat::Fp16 => self.elements(simd, Fp16, FP16_LARGEST),
            RowFormat::Bf16 => self.elements(simd, Bf16, BF16_LARGEST),
            RowFormat::Int8 => self.codes(simd, Int8),
            RowFormat::Int4 => self.codes(simd, Int4(&UNIFORM)),
            RowFormat::Int2 => self.codes(simd, Int2),
        }
    }
}

impl Encode<'_> {
    /// Writes rows whose elements are numbers of at most `largest` in size.
    #[inline(always)]
    fn elements<S: Simd, P: Packing>(&mut self, simd: S, packing: P, largest: f32) -> Refused {
        let mut refused = Refused::default();
        let dim = self.into.dim;
        let elements = bytemuck::cast_slice_mut(self.into.elements);
        let rows = self.source.chunks_exact(dim).zip(elements.chunks_exact_mut(dim));
        for (i, (row, into)) in rows.enumerate() {
            let span = Span::of(simd, row);
            if !span.finite {
                refused.not_finite.get_or_insert(i);
            } else if span.largest() > largest {
                refused.not_held.get_or_insert(i);
            }
            pack(simd, packing, row, into);
        }
        refused
    }

    /// Writes rows of codes.
    #[inline(always)]
    fn codes<S: Simd, P: Packing<Unit = u8>>(&mut self, simd: S, packing: P) -> Refused {
        let mut refused = Refused::default();
        let RowsMut { format, dim, scale_format, .. } = self.into;
        let elements = self.into.elements.chunks_exact_mut(format.row_bytes(dim));
        for (i, (row, into)) in self.source.chunks_exact(dim).zip(elements).enumerate() {
            let span = Span::of(simd, row);
            if !span.finite {
                refused.not_finite.get_or_insert(i);
                continue;
            }
            let (minmax, precise) = Affine::minmax(format, scale_format, span);
            if !minmax.is_finite() || (self.precise && !precise) {
                refused.not_held.get_or_insert(i);
                continue;
            }
            let fit = self.search.least_squares.then_some(Fit { row, span, scale_format });
            let affine = match self.search.codes {
                Codes::Uniform => {
                    let code = Uniform { largest: format.largest_code() };
                    encode(simd, packing, row, into, code, minmax, fit)
                }
                Codes::Codebook(code) => encode(simd, packing, row, into, code, minmax, fit),
            };
            scales::store(scale_format, self.into.scales, i, [affine.scale, affine.bias]);
        }
        refused
    }
}

/// Writes a row's codes, and tells its scale and bias.
#[inline(always)]
fn encode<S: Simd, P: Packing, C: Code>(
    simd: S,
    packing: P,
    row: &[f32],
    into: &mut [P::Unit],
    code: C,
    minmax: Affine,
    fit: Option<Fit>,
) -> Affine {
    let affine = match fit {
        Some(fit) => fit.best(simd, code, minmax),
        None => minmax,
    };
    pack_mapped(simd, packing, row, into, Coded { affine, code });
    affine
}

/// Codes.
#[derive(Clone, Copy)]
struct Coded<C> {
    affine: Affine,
    code: C,
}

impl<C: Code> Map for Coded<C> {
    #[inline(always)]
    fn map<S: Simd>(self, simd: S, x: S::V) -> S::V {
        self.code.index(simd, self.affine.to_codes(simd, x))
    }
}
