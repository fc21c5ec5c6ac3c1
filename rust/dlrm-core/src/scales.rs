//! The scale and the bias of every row of a quantized table: how they are stored, and how they are read.
//!
//! They lie beside the rows and not in them: a row of 64 int8 elements then is one cache line, and 16 or 8 rows share a
//! line of scales (`benches/record/2026-11-24-layout.md`).

use std::fmt;
use std::str::FromStr;

use crate::kernels::Simd;
use crate::{Error, Result, named};
use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;

/// How a scale or a bias is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleFormat {
    /// 4 bytes. What torch's and FBGEMM's fused 8-bit rows have.
    Fp32,
    /// 2 bytes. What their 4-bit and 2-bit rows have, and FBGEMM's rows for inference.
    Fp16,
    /// 2 bytes, for rows of any magnitude.
    Bf16,
}

impl ScaleFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Fp32, Self::Fp16, Self::Bf16];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a row's scale and bias.
    #[must_use]
    pub const fn pair_bytes(self) -> usize {
        match self {
            Self::Fp32 => 8,
            Self::Fp16 | Self::Bf16 => 4,
        }
    }

    /// The nearest number that is stored, ties to even, of one that is not NaN.
    #[inline(always)]
    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            Self::Fp32 => x,
            Self::Fp16 => nearest_fp16(x),
            Self::Bf16 => round_bits(x, 16),
        }
    }

    /// The largest numbers that are stored up to these, which are finite and at least minus the largest of all.
    #[inline(always)]
    pub(crate) fn at_most<S: Simd>(self, simd: S, x: S::V) -> S::V {
        match self {
            Self::Fp32 => x,
            Self::Fp16 => fp16_at_most(simd, x),
            Self::Bf16 => cut(simd, x, 16),
        }
    }

    /// The smallest that are stored from these on, which are not negative; one that is less by a millionth, as rounding
    /// makes it, counts.
    #[inline(always)]
    pub(crate) fn at_least<S: Simd>(self, simd: S, x: S::V) -> S::V {
        const BARELY_LESS: f32 = 1.0 - f32::EPSILON * 8.0;
        match self {
            Self::Fp32 => x,
            Self::Fp16 | Self::Bf16 => {
                let zero = simd.splat(0.0);
                let less = simd.mul(simd.sub(zero, x), simd.splat(BARELY_LESS));
                simd.sub(zero, self.at_most(simd, less))
            }
        }
    }
}

/// Numbers without the lowest `bits` of their fraction, down.
#[inline(always)]
fn cut<S: Simd>(simd: S, x: S::V, bits: u32) -> S::V {
    let below = (1 << bits) - 1;
    let x = simd.bits(x);
    let negative = simd.sub_int(simd.splat_int(0), simd.shr(x, simd.splat_int(31)));
    let away = simd.add_int(x, simd.and(negative, simd.splat_int(below)));
    simd.of_bits(simd.and(away, simd.splat_int(!below)))
}

/// The largest numbers of half precision up to these.
#[inline(always)]
fn fp16_at_most<S: Simd>(simd: S, x: S::V) -> S::V {
    /// What those that are denormal differ by.
    const STEP: f32 = f32::from_bits((127 - 24) << 23);
    const LARGEST: f32 = 65504.0;
    let x = simd.min(x, simd.splat(LARGEST));
    let steps = simd.mul(x, simd.splat(1.0 / STEP));
    let nearest = simd.round(steps);
    let less = simd.sub(nearest, simd.splat(1.0));
    let whole = simd.select(simd.greater(nearest, steps), less, nearest);
    let size = simd.max(x, simd.sub(simd.splat(0.0), x));
    let denormal = simd.greater(simd.splat(FP16_NORMAL), size);
    simd.select(denormal, simd.mul(whole, simd.splat(STEP)), cut(simd, x, 13))
}

/// The smallest number of half precision that is not denormal.
const FP16_NORMAL: f32 = f32::from_bits((127 - 14) << 23);

/// Without the lowest `bits` of its fraction, to the nearest, ties to even.
#[inline(always)]
fn round_bits(x: f32, bits: u32) -> f32 {
    let odd = x.to_bits() >> bits & 1;
    let rounded = x.to_bits() + ((1 << (bits - 1)) - 1 + odd);
    f32::from_bits(rounded >> bits << bits)
}

/// The nearest number of half precision.
#[inline(always)]
fn nearest_fp16(x: f32) -> f32 {
    const BEYOND: f32 = 65536.0;
    if x.abs() < FP16_NORMAL {
        // All are multiples of one step, which is the last place of numbers from 0.5 to 1.
        return ((x + 0.75) - 0.75).copysign(x);
    }
    let rounded = round_bits(x, 13);
    if rounded.abs() < BEYOND { rounded } else { f32::INFINITY.copysign(x) }
}

impl fmt::Display for ScaleFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ScaleFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("scale format", Self::ALL, Self::name, name)
    }
}

/// Scale and bias of some rows, to be read.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    Fp32(&'a [[f32; 2]]),
    Fp16(&'a [[u16; 2]]),
    Bf16(&'a [[u16; 2]]),
}

impl<'a> Scales<'a> {
    /// Those that `bytes` are.
    pub(crate) fn new(format: ScaleFormat, bytes: &'a [u8]) -> Self {
        match format {
            ScaleFormat::Fp32 => Self::Fp32(cast_slice(bytes)),
            ScaleFormat::Fp16 => Self::Fp16(cast_slice(bytes)),
            ScaleFormat::Bf16 => Self::Bf16(cast_slice(bytes)),
        }
    }

    /// Scale and bias of a row.
    #[inline(always)]
    pub(crate) fn get(self, row: usize) -> [f32; 2] {
        match self {
            Self::Fp32(pairs) => pairs[row],
            Self::Fp16(pairs) => pairs[row].map(|x| f16::from_bits(x).to_f32()),
            Self::Bf16(pairs) => pairs[row].map(|x| f32::from_bits(u32::from(x) << 16)),
        }
    }

    /// The same of some rows, each in all lanes of a vector; how they are stored is asked once for all of them.
    #[inline(always)]
    pub(crate) fn splat<S: Simd, const COUNT: usize>(
        self,
        simd: S,
        rows: [usize; COUNT],
    ) -> [[S::V; 2]; COUNT] {
        let mut all = [[simd.splat(0.0); 2]; COUNT];
        match self {
            Self::Fp32(pairs) => {
                for (pair, row) in all.iter_mut().zip(rows) {
                    *pair = [simd.splat(pairs[row][0]), simd.splat(pairs[row][1])];
                }
            }
            Self::Fp16(pairs) => {
                for (pair, row) in all.iter_mut().zip(rows) {
                    *pair = simd.splat_fp16(&pairs[row]);
                }
            }
            Self::Bf16(pairs) => {
                for (pair, row) in all.iter_mut().zip(rows) {
                    *pair = simd.splat_bf16(&pairs[row]);
                }
            }
        }
        all
    }

    /// The way of a row that a cache has, if it is [marked](mark) as one.
    #[inline(always)]
    pub(crate) fn way(self, row: usize) -> Option<usize> {
        let [scale, way] = match self {
            Self::Fp32(pairs) => pairs[row].map(|x| (x.to_bits() >> 16) as u16),
            Self::Fp16(pairs) | Self::Bf16(pairs) => pairs[row],
        };
        (scale == CACHED).then_some(usize::from(way))
    }

    /// Where the first row's are, for prefetching only.
    #[inline(always)]
    pub(crate) fn start(self) -> *const u8 {
        match self {
            Self::Fp32(pairs) => pairs.as_ptr().cast(),
            Self::Fp16(pairs) | Self::Bf16(pairs) => pairs.as_ptr().cast(),
        }
    }
}

/// The bits of a number of half precision that is not infinite.
#[inline(always)]
fn fp16_bits(x: f32) -> u16 {
    const MEND: f32 = f32::from_bits((127 + 15 - 127) << 23);
    let magnitude = (x.abs() * MEND).to_bits() >> 13;
    (magnitude | x.to_bits() >> 16 & 0x8000) as u16
}

/// Stores scale and bias of row `row`; both are numbers that the format has and finite, or NaN.
#[inline(always)]
pub(crate) fn store(format: ScaleFormat, bytes: &mut [u8], row: usize, pair: [f32; 2]) {
    match format {
        ScaleFormat::Fp32 => cast_slice_mut(bytes)[row] = pair,
        ScaleFormat::Fp16 => cast_slice_mut(bytes)[row] = pair.map(fp16_bits),
        ScaleFormat::Bf16 => cast_slice_mut(bytes)[row] = pair.map(|x| (x.to_bits() >> 16) as u16),
    }
}

/// The bits of the scale of a row that a cache has, the upper ones where there are 32: a NaN in every format, and not the
/// one that rows which are not finite get.
const CACHED: u16 = 0x7FE5;

/// Marks row `row` as one that a cache has, in way `way`, which stands in the place of the bias.
pub(crate) fn mark(format: ScaleFormat, bytes: &mut [u8], row: usize, way: usize) {
    let pair = [CACHED, way as u16];
    match format {
        ScaleFormat::Fp32 => {
            cast_slice_mut(bytes)[row] = pair.map(|half| f32::from_bits(u32::from(half) << 16));
        }
        ScaleFormat::Fp16 | ScaleFormat::Bf16 => cast_slice_mut(bytes)[row] = pair,
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::Level;
    use crate::kernels::scalar::Scalar;
    use crate::kernels::{Kernel, LANES, Lanes};

    #[test]
    fn numbers_are_rounded_as_the_standard_says() {
        for bits in
            (0..=u32::MAX).step_by(997).chain((0..=u16::MAX).map(|x| u32::from(x) << 13 | 0x3880_0000))
        {
            let x = f32::from_bits(bits);
            if !x.is_nan() {
                let [fp16, bf16] = [f16::from_f32(x).to_f32(), bf16::from_f32(x).to_f32()];
                assert_eq!(ScaleFormat::Fp16.round(x).to_bits(), fp16.to_bits(), "{x:e}");
                assert_eq!(ScaleFormat::Bf16.round(x).to_bits(), bf16.to_bits(), "{x:e}");
            }
        }
    }

    /// The number of a format that comes after `x`, which it has.
    fn after(format: ScaleFormat, x: f32) -> f32 {
        let after = |bits: u16| match bits {
            0 | 0x8000 => 1,
            1..0x8000 => bits + 1,
            _ => bits - 1,
        };
        match format {
            ScaleFormat::Fp32 => x.next_up(),
            ScaleFormat::Fp16 => f16::from_bits(after(f16::from_f32(x).to_bits())).to_f32(),
            ScaleFormat::Bf16 => bf16::from_bits(after(bf16::from_f32(x).to_bits())).to_f32(),
        }
    }

    #[test]
    fn numbers_are_rounded_down_and_up() {
        for format in ScaleFormat::ALL {
            for bits in (0..=u32::MAX).step_by(9973) {
                let x = f32::from_bits(bits);
                if x.is_nan() || x.abs() > 65504.0 {
                    continue;
                }
                let ([down, ..], [up, ..]) =
                    (format.at_most(Scalar, [x; LANES]), format.at_least(Scalar, [x; LANES]));
                assert!(
                    down <= x && format.round(down).to_bits() == down.to_bits(),
                    "{format}: {x:e} {down:e}"
                );
                let above = after(format, down);
                assert!(above > x || down.to_bits() == x.to_bits(), "{format}: {x:e} {down:e} {above:e}");
                if x >= 0.0 {
                    assert!(up >= x - x * 1.1e-6 && format.round(up).to_bits() == up.to_bits());
                    let around = [down, above].map(f32::to_bits);
                    assert!(around.contains(&up.to_bits()), "{format}: {x:e} is between {down:e} and {up:e}");
                }
            }
        }
    }

    /// Scale and bias of every pair, in all lanes.
    struct Splat<'a>(&'a [[u16; 2]]);

    impl Kernel for Splat<'_> {
        type Output = Vec<[Lanes; 2]>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut out = Vec::new();
            for row in 0..self.0.len() {
                let [[scale, bias]] = Scales::Fp16(self.0).splat(simd, [row]);
                out.push([simd.lanes(scale), simd.lanes(bias)]);
            }
            out
        }
    }

    #[test]
    fn every_fp16_is_read_as_it_is_at_every_level_and_every_finite_one_stored() {
        let pairs: Vec<_> = (0..=u16::MAX).map(|bits| [bits, !bits]).collect();
        for level in Level::available() {
            for (pair, read) in pairs.iter().zip(level.run(Splat(&pairs))) {
                let expected = pair.map(|bits| [f16::from_bits(bits).to_f32().to_bits(); LANES]);
                assert_eq!(read.map(|lanes| lanes.map(f32::to_bits)), expected, "{level:?}: {pair:x?}");
            }
        }
        for bits in (0..=u16::MAX).filter(|&bits| f16::from_bits(bits).is_finite()) {
            assert_eq!(fp16_bits(f16::from_bits(bits).to_f32()), bits);
        }
    }

    #[test]
    fn what_is_stored_is_read() {
        for format in ScaleFormat::ALL {
            let pairs = [[1.5, -2.0], [0.0, 3.25], [2.0_f32.powi(-14), 1024.0]];
            let mut bytes = vec![0_u32; 4 * format.pair_bytes() / 4];
            let bytes = cast_slice_mut(&mut bytes);
            for (row, &pair) in pairs.iter().enumerate() {
                store(format, bytes, row, pair);
            }
            for (row, &pair) in pairs.iter().enumerate() {
                assert_eq!(Scales::new(format, bytes).get(row).map(f32::to_bits), pair.map(f32::to_bits));
            }
            store(format, bytes, 3, [f32::NAN; 2]);
            assert!(Scales::new(format, bytes).get(3).iter().all(|x| x.is_nan()));
            assert!((0..4).all(|row| Scales::new(format, bytes).way(row).is_none()));
            mark(format, bytes, 3, 15);
            assert!(Scales::new(format, bytes).get(3)[0].is_nan());
            assert_eq!(Scales::new(format, bytes).way(3), Some(15));
        }
    }
}
