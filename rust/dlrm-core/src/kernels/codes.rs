//! Rows of codes read before a rule and written after it.
//!
//! ```text
//! with n = 2^bits - 1:  bias = the largest number that is stored up to the smallest element
//!                       scale = the smallest from (largest element - bias) / n on; 1 where that is too small to divide by
//!                       code = one of the two integers around (x - bias) / scale, each with a probability so that the
//!                              mean is that
//! ```
//! So scale and bias reach around all elements, and the mean of what an element can become is the element. Elements that
//! the stored numbers cannot reach become the nearest that they can; a row with a NaN or an infinity becomes NaN, scale,
//! bias and all. Random bits are those of `stochastic`.

use super::fit::{Affine, Span};
use super::stochastic::{Random, numbers, random_bits};
use super::touched::Next;
use super::{Kernel, LANES, Lanes, Simd};
use crate::RowFormat;
use crate::cache::{CachedRows, Ways};
use crate::disjoint::Disjoint;
use crate::rows::{Int2, Int4, Int8, Map, Packing, Rows, Scaled, pack_mapped};
use crate::scales::{self, ScaleFormat};
use crate::table_rows::{RowsRef, UNIFORM};

/// Rows of evenly spaced codes, where they are.
pub(crate) struct CodeRows<'a> {
    pub(crate) format: RowFormat,
    /// Bytes of a row's codes.
    pub(crate) row_bytes: usize,
    pub(crate) codes: Disjoint<'a, u8>,
    pub(crate) scales: Disjoint<'a, u8>,
    pub(crate) scale_format: ScaleFormat,
    pub(crate) dim: usize,
    pub(crate) random: Random,
    /// Where the rows are that are not in codes; the kernels here know nothing of them.
    pub(crate) ways: Option<Ways<'a>>,
}

impl CodeRows<'_> {
    /// The codes of a row, and its scale and bias.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "rows are disjoint")]
    pub(crate) fn row(&self, row: usize) -> (&mut [u8], &mut [u8]) {
        let (codes, pair) = (self.row_bytes, self.scale_format.pair_bytes());
        // SAFETY: a row belongs to one piece of a call, which decodes and encodes it once, one after the other.
        unsafe {
            (
                self.codes.piece(row * codes..(row + 1) * codes),
                self.scales.piece(row * pair..(row + 1) * pair),
            )
        }
    }

    /// Writes a row's elements to `into`.
    #[inline(always)]
    fn decode<S: Simd, P: Packing<Unit = u8>>(&self, simd: S, packing: P, row: usize, into: &mut [f32]) {
        let (codes, pair) = self.row(row);
        let &Self { format, dim, scale_format, .. } = self;
        let (codebook, cache) = (&UNIFORM, CachedRows::NONE);
        let one = RowsRef { format, dim, elements: codes, scales: pair, scale_format, codebook, cache };
        one.quantized(Scaled(packing)).copy(simd, 0, into);
    }

    /// Writes a row of these elements.
    #[inline(always)]
    fn encode<S: Simd, P: Packing<Unit = u8>>(
        &self,
        simd: S,
        packing: P,
        row: usize,
        elements: &[f32],
        affine: Affine,
    ) {
        let (codes, pair) = self.row(row);
        scales::store(self.scale_format, pair, 0, [affine.scale, affine.bias]);
        let (largest, key) = (self.format.largest_code(), self.random.of_row(row));
        pack_mapped(simd, packing, elements, codes, &mut Draw { affine, largest, key, words: numbers(simd) });
    }
}

/// Scales and biases that reach around rows, side by side.
struct Around {
    scale: Lanes,
    bias: Lanes,
    inverse: Lanes,
}

impl Around {
    /// Those of up to [`LANES`] rows; NaN where there is no telling from where to where one reaches.
    #[inline(always)]
    fn of<S: Simd>(simd: S, spans: &[Option<Span>; LANES], stored: ScaleFormat, largest_code: f32) -> Self {
        /// Elements up to this size have a range, and decode to what is finite.
        const LARGEST: f32 = f32::from_bits((127 + 125) << 23);
        let (mut min, mut max) = ([f32::NAN; LANES], [f32::NAN; LANES]);
        for i in 0..LANES {
            if let Some(span) = spans[i] {
                (min[i], max[i]) = (span.min, span.max);
            }
        }
        let (min, max) = (simd.load(&min), simd.load(&max));
        let (zero, one, nan) = (simd.splat(0.0), simd.splat(1.0), simd.splat(f32::NAN));
        let limit = simd.splat(if stored == ScaleFormat::Fp16 { 65504.0 } else { LARGEST });
        let clamped = simd.min(simd.max(min, simd.sub(zero, limit)), limit);
        let bias = stored.at_most(simd, clamped);
        let range = simd.sub(simd.min(max, simd.splat(LARGEST)), bias);
        let step = simd.min(simd.div(range, simd.splat(largest_code)), limit);
        let scale = stored.at_least(simd, step);
        let inverse = simd.div(one, scale);
        let size = simd.max(inverse, simd.sub(zero, inverse));
        let divides = simd.greater(simd.splat(f32::INFINITY), size);
        let known = simd.greater(simd.splat(f32::INFINITY), min);
        let (scale, inverse) = (simd.select(divides, scale, one), simd.select(divides, inverse, one));
        Self {
            scale: simd.lanes(simd.select(known, scale, nan)),
            bias: simd.lanes(simd.select(known, bias, nan)),
            inverse: simd.lanes(simd.select(known, inverse, nan)),
        }
    }

    /// Of row `i`.
    #[inline(always)]
    fn get(&self, i: usize) -> Affine {
        Affine { scale: self.scale[i], bias: self.bias[i], inverse: self.inverse[i] }
    }
}

/// Elements of a row, in their order, become codes.
struct Draw<I> {
    affine: Affine,
    largest: f32,
    key: [u32; 2],
    /// The numbers of the random words that are next, each for two elements.
    words: I,
}

impl<S: Simd> Map<S> for Draw<S::I> {
    #[inline(always)]
    fn map(&mut self, simd: S, x: S::V, _len: usize) -> S::V {
        /// The upper bits of a word are for the element 8 lanes on.
        const SHIFTS: [u32; LANES] = [0, 0, 0, 0, 0, 0, 0, 0, 17, 17, 17, 17, 17, 17, 17, 17];
        // In this order NaN becomes 0.
        let x = simd.max(self.affine.to_codes(simd, x), simd.splat(0.0));
        let x = simd.min(x, simd.splat(self.largest));
        let words = simd.lower_twice(random_bits(simd, self.key, self.words));
        self.words = simd.add_int(self.words, simd.splat_int(LANES as u32 / 2));
        drawn(simd, x, simd.and(simd.shr(words, simd.load_int(&SHIFTS)), simd.splat_int(0x7FFF)))
    }
}

/// One of the two integers around numbers from 0 to 255, whose fraction is taken to 15 bits; so many are random.
#[inline(always)]
fn drawn<S: Simd>(simd: S, x: S::V, random: S::I) -> S::V {
    /// Numbers from here to twice this differ by 2^-15, which is their lowest bit.
    const BEGIN: f32 = 256.0;
    let fixed = simd.sub_int(simd.bits(simd.add(x, simd.splat(BEGIN))), simd.splat_int(BEGIN.to_bits()));
    simd.to_floats(simd.shr(simd.add_int(fixed, random), simd.splat_int(15)))
}

/// Brings rows into fp32.
pub(crate) struct Decode<'a> {
    pub(crate) all: &'a CodeRows<'a>,
    pub(crate) rows: &'a [usize],
    pub(crate) into: &'a mut [f32],
}

/// Writes rows of fp32 back.
pub(crate) struct Encode<'a> {
    pub(crate) all: &'a CodeRows<'a>,
    pub(crate) rows: &'a [usize],
    pub(crate) from: &'a [f32],
    pub(crate) next: Next<'a>,
}

/// Runs `$body` with `$packing` that of the rows.
macro_rules! with_packing {
    ($format:expr, |$packing:ident| $body:expr) => {
        match $format {
            RowFormat::Int8 => {
                let $packing = Int8;
                $body
            }
            RowFormat::Int4 => {
                let $packing = Int4;
                $body
            }
            RowFormat::Int2 => {
                let $packing = Int2;
                $body
            }
            RowFormat::Fp32 | RowFormat::Fp16 | RowFormat::Bf16 => unreachable!("rows of codes"),
        }
    };
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { all, rows, into } = self;
        with_packing!(all.format, |packing| {
            for (&row, into) in rows.iter().zip(into.chunks_exact_mut(all.dim)) {
                all.decode(simd, packing, row, into);
            }
        });
    }
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { all, rows, from, next } = self;
        let mut begun = 0;
        with_packing!(all.format, |packing| {
            for (rows, from) in rows.chunks(LANES).zip(from.chunks(LANES * all.dim)) {
                let spans = Span::of_finite_rows(simd, &from[..rows.len() * all.dim], all.dim);
                let around = Around::of(simd, &spans, all.scale_format, all.format.largest_code());
                for (i, (&row, from)) in rows.iter().zip(from.chunks_exact(all.dim)).enumerate() {
                    next.prefetch(simd, begun);
                    all.encode(simd, packing, row, from, around.get(i));
                    begun += 1;
                }
            }
        });
        next.prefetch_from(simd, begun);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table_rows::pair_bytes;
    use crate::{Context, Level};

    const DRAWS: usize = 1_000_000;

    /// What a row becomes: encoded as rows 0, 1, 2 and so on of a table, `count` of them.
    fn encoded(
        row: &[f32],
        format: RowFormat,
        scale_format: ScaleFormat,
        count: usize,
        step: u64,
        level: Level,
    ) -> Vec<f32> {
        let dim = row.len();
        let mut codes = vec![0_u8; count * format.row_bytes(dim)];
        let mut pairs = vec![0_u32; count * pair_bytes(format, scale_format) / 4];
        let all = CodeRows {
            format,
            row_bytes: format.row_bytes(dim),
            codes: Disjoint::new(&mut codes),
            scales: Disjoint::new(bytemuck::cast_slice_mut(&mut pairs)),
            scale_format,
            dim,
            random: Random::new(1, step, 2),
            ways: None,
        };
        let rows: Vec<_> = (0..count).collect();
        level.run(Encode { all: &all, rows: &rows, from: &row.repeat(count), next: Next::NONE });
        let mut decoded = vec![0.0; count * dim];
        level.run(Decode { all: &all, rows: &rows, into: &mut decoded });
        decoded
    }

    #[test]
    fn a_mean_of_a_million_roundings_is_the_number() {
        const COUNT: usize = 1000;
        for format in [RowFormat::Int8, RowFormat::Int4, RowFormat::Int2] {
            for scale_format in ScaleFormat::ALL {
                // From -1 to -1 + n / 256, whose scale and bias every scale format has; between them elements at
                // fractions of a step.
                let (step, last) = (1.0 / 256.0, format.largest_code());
                let fractions = [0.0, 0.1, 0.25, 0.5, 0.9];
                let mut row: Vec<f32> = fractions.iter().map(|f| -1.0 + (1.0 + f) * step).collect();
                row.extend([-1.0, -1.0 + last * step]);
                let mut means = vec![0.0; row.len()];
                for draw in 0..DRAWS / COUNT {
                    let all =
                        encoded(&row, format, scale_format, COUNT, draw as u64, Context::default().level);
                    for decoded in all.chunks(row.len()) {
                        for (mean, x) in means.iter_mut().zip(decoded) {
                            *mean += f64::from(*x) / DRAWS as f64;
                        }
                    }
                }
                for (i, (mean, x)) in means.iter().zip(&row).enumerate() {
                    let fraction = fractions.get(i).map_or(0.0, |f| f64::from(*f));
                    let deviation = f64::from(step) * (fraction * (1.0 - fraction) / DRAWS as f64).sqrt();
                    let error = (mean - f64::from(*x)).abs();
                    assert!(error <= 4.0 * deviation + 1e-6, "{format} {scale_format}: {mean}, expected {x}");
                }
            }
        }
    }

    #[test]
    fn a_row_becomes_one_near_it_at_every_level_alike() {
        for dim in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130] {
            for (power, offset) in [(0, 0.0), (-30, 0.0), (-3, 1.0), (100, -1e30), (14, 0.0), (-140, 0.0)] {
                let element = |i: usize| {
                    let x = (i as u32).wrapping_mul(0x9E37_79B1) as f32 / u32::MAX as f32 - 0.5;
                    x * 2.0_f32.powi(power) + offset
                };
                let row: Vec<_> = (0..dim).map(element).collect();
                for format in [RowFormat::Int8, RowFormat::Int4, RowFormat::Int2] {
                    for scale_format in ScaleFormat::ALL {
                        let of = |level| encoded(&row, format, scale_format, 3, 1, level);
                        let first = of(Context::default().level);
                        for level in Level::available() {
                            assert!(first.iter().zip(of(level)).all(|(a, b)| a.to_bits() == b.to_bits()));
                        }
                        let span = row.iter().fold([f32::MAX, f32::MIN], |[a, b], &x| [a.min(x), b.max(x)]);
                        if scale_format == ScaleFormat::Fp16 && span[0] < -65504.0 {
                            continue;
                        }
                        // What the bias is rounded by, and a step.
                        let off = span[0].abs() / 128.0 + 6e-8;
                        let step = (span[1] - span[0] + off) / format.largest_code() * 1.01 + 6e-8;
                        for (x, y) in row.iter().cycle().zip(&first) {
                            assert!((x - y).abs() <= step, "{format} {scale_format}: {x:e} became {y:e}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_makes_the_row_nan_and_what_is_too_large_the_largest() {
        for format in [RowFormat::Int8, RowFormat::Int4, RowFormat::Int2] {
            for scale_format in ScaleFormat::ALL {
                let of = |row: &[f32]| encoded(row, format, scale_format, 1, 1, Context::default().level);
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    assert!(of(&[1.0, bad, 2.0]).iter().all(|x| x.is_nan()));
                }
                let large = of(&[-f32::MAX, 0.0, f32::MAX]);
                let least = if scale_format == ScaleFormat::Fp16 { 65504.0 } else { 2.0_f32.powi(125) };
                assert!(
                    large.iter().all(|x| x.is_finite()) && large[0] <= -least && large[2] >= least,
                    "{large:?}"
                );
                assert!(of(&[f32::MAX; 3]).iter().all(|x| x.is_finite() && *x >= least));
                assert_eq!(of(&[0.25; 3]), [0.25; 3]);
                assert_eq!(of(&[-0.0; 3]), [0.0; 3]);
            }
        }
    }
}
