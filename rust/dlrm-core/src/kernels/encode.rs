//! Rows of fp32 brought into another row format.
//!
//! ```text
//! fp16, bf16:        the nearest number, ties to even
//! int8, int4, int2:  code = round((x - bias) / scale), from 0 to 2^bits - 1; scale and bias as `minmax` or `fit`
//!                    finds them
//! ```

use bytemuck::Zeroable;

use super::compare::{Group, Numbers, Stored, Worst};
use super::fit::{Affine, CODEBOOK_STARTS, Code, Codebook, Fit, STARTS, Span, Uniform};
use super::minmax::MinMax;
use super::{Kernel, LANES, Simd};
use crate::RowFormat;
use crate::rows::{Bf16, Fp16, Fp32, Int2, Int4, Int8, Packing};
use crate::scales;
use crate::table_rows::RowsMut;

/// How scale and bias are found.
#[derive(Clone, Copy)]
pub(crate) enum Search {
    /// From the smallest and the largest element.
    MinMax,
    /// By least squares.
    LeastSquares,
    /// By least squares, with codes that mean numbers of a codebook.
    Codebook(Codebook),
}

/// Rows to be encoded.
pub(crate) struct Encode<'a> {
    /// As many rows as `into` has.
    pub(crate) source: &'a [f32],
    pub(crate) into: RowsMut<'a>,
    /// The relative L2 error of each row.
    pub(crate) errors: &'a mut [f32],
    pub(crate) search: Search,
    /// Whether scales that the format holds only with less than its usual precision are refused.
    pub(crate) precise: bool,
}

/// What became of rows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) refused: Refused,
    /// The largest absolute error of an element.
    pub(crate) largest_error: f32,
}

/// The first rows, if any, that cannot be encoded.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Refused {
    /// The first with a NaN or an infinity.
    pub(crate) not_finite: Option<usize>,
    /// The first that needs numbers which the format does not hold.
    pub(crate) not_held: Option<usize>,
}

impl Refused {
    /// Counts the row at `place`.
    #[cold]
    fn add(&mut self, row: &[f32], place: usize) {
        let finite = row.iter().all(|x| x.is_finite());
        let first = if finite { &mut self.not_held } else { &mut self.not_finite };
        *first = Some(first.map_or(place, |lowest| lowest.min(place)));
    }
}

impl Kernel for Encode<'_> {
    type Output = Outcome;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> Outcome {
        /// The largest number that does not become infinite when it is rounded to half precision; to bfloat16.
        const FP16_LARGEST: f32 = f32::from_bits(0x477F_EFFF);
        const BF16_LARGEST: f32 = f32::from_bits(0x7F7F_7FFF);
        let format = self.into.format;
        match (format, self.search) {
            (RowFormat::Fp32, _) => self.elements(simd, Fp32, f32::MAX),
            (RowFormat::Fp16, _) => self.elements(simd, Fp16, FP16_LARGEST),
            (RowFormat::Bf16, _) => self.elements(simd, Bf16, BF16_LARGEST),
            (RowFormat::Int8, _) => self.codes(simd, Int8, Uniform::of(format)),
            (RowFormat::Int4, Search::Codebook(codebook)) => self.codes(simd, Int4, codebook),
            (RowFormat::Int4, _) => self.codes(simd, Int4, Uniform::of(format)),
            (RowFormat::Int2, _) => self.codes(simd, Int2, Uniform::of(format)),
        }
    }
}

impl Encode<'_> {
    /// Writes rows whose elements are numbers of at most `largest` in size.
    #[inline(always)]
    fn elements<S: Simd, P: Packing>(&mut self, simd: S, packing: P, largest: f32) -> Outcome {
        let (mut refused, mut worst) = (Refused::default(), Worst::new(simd));
        let dim = self.into.dim;
        let groups = self.source.chunks(dim * LANES).zip(self.errors.chunks_mut(LANES));
        let into = bytemuck::cast_slice_mut(self.into.elements).chunks_mut(dim * LANES);
        for (at, ((rows, errors), into)) in groups.zip(into).enumerate() {
            let mut stored = [None; LANES];
            for (i, row) in rows.chunks_exact(dim).enumerate() {
                if Span::of(simd, row).is_some_and(|span| span.largest() <= largest) {
                    stored[i] = Some(Rounded(packing));
                } else {
                    refused.add(row, at * LANES + i);
                }
            }
            worst.pack(simd, packing, &stored, Group { rows, dim, into, units: dim, errors });
        }
        Outcome { refused, largest_error: worst.largest(simd) }
    }

    /// Writes rows of codes.
    #[inline(always)]
    fn codes<S: Simd, P: Packing<Unit = u8>, C: Code>(&mut self, simd: S, packing: P, code: C) -> Outcome {
        let (mut refused, mut worst) = (Refused::default(), Worst::new(simd));
        let RowsMut { format, dim, scale_format, .. } = self.into;
        let units = format.row_bytes(dim);
        let groups = self.source.chunks(dim * LANES).zip(self.errors.chunks_mut(LANES));
        let into = self.into.elements.chunks_mut(units * LANES);
        for (at, ((rows, errors), into)) in groups.zip(into).enumerate() {
            let spans = Span::of_rows(simd, rows, dim);
            let minmax = MinMax::of(simd, &spans, format, scale_format);
            let mut stored = [None; LANES];
            for (i, row) in rows.chunks_exact(dim).enumerate() {
                let (affine, precise) = minmax.get(i);
                let place = at * LANES + i;
                if !affine.is_finite() || (self.precise && !precise) {
                    refused.add(row, place);
                    continue;
                }
                let fit = Fit { row, span: spans[i], scale_format };
                let affine = self.search.find(simd, fit, code, affine);
                scales::store(scale_format, self.into.scales, place, [affine.scale, affine.bias]);
                stored[i] = Some(Coded { affine, code });
            }
            let not_finite = worst.pack(simd, packing, &stored, Group { rows, dim, into, units, errors });
            if not_finite != 0 {
                let i = not_finite.trailing_zeros() as usize;
                refused.add(&rows[i * dim..][..dim], at * LANES + i);
            }
        }
        Outcome { refused, largest_error: worst.largest(simd) }
    }
}

impl Search {
    /// What a row's codes mean; `minmax` is what they mean without a search.
    #[inline(always)]
    fn find<S: Simd>(self, simd: S, fit: Fit, code: impl Code, minmax: Affine) -> Affine {
        match self {
            Self::MinMax => minmax,
            Self::LeastSquares => fit.best(simd, code, minmax, STARTS),
            Self::Codebook(_) => fit.best(simd, code, minmax, CODEBOOK_STARTS),
        }
    }
}

/// Elements are stored as the nearest numbers of a packing.
#[derive(Clone, Copy)]
struct Rounded<P>(P);

impl<P: Packing> Stored for Rounded<P> {
    #[inline(always)]
    fn stored<S: Simd>(self, simd: S, x: S::V) -> Numbers<S::V> {
        let mut group = P::Group::zeroed();
        self.0.store(simd, &mut group, x);
        Numbers { packed: x, read: self.0.load(simd, &group) }
    }
}

/// Elements are stored as codes.
#[derive(Clone, Copy)]
struct Coded<C> {
    affine: Affine,
    code: C,
}

impl<C: Code> Stored for Coded<C> {
    #[inline(always)]
    fn stored<S: Simd>(self, simd: S, x: S::V) -> Numbers<S::V> {
        let x = self.affine.to_codes(simd, x);
        let read = self.affine.decoded(simd, self.code.nearest(simd, x));
        Numbers { packed: self.code.index(simd, x), read }
    }
}
