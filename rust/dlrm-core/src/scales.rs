//! The scale and the bias of every row of a quantized table: how they are stored, and how they are read.
//!
//! They lie beside the rows and not in them: a row of 64 int8 elements then is one cache line, and 16 or 8 rows share a
//! line of scales (`benches/record` has the measurement).

use std::fmt;
use std::str::FromStr;

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};

use crate::{Error, Result, named};

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

    /// The nearest number that is stored, ties to even.
    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            Self::Fp32 => x,
            Self::Fp16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
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
            Self::Fp16(pairs) => pairs[row].map(finite_fp16),
            Self::Bf16(pairs) => pairs[row].map(|x| f32::from_bits(u32::from(x) << 16)),
        }
    }

    /// Where a row's are, for prefetching only.
    #[inline(always)]
    pub(crate) fn address(self, row: usize) -> *const u8 {
        match self {
            Self::Fp32(pairs) => pairs.as_ptr().wrapping_add(row).cast(),
            Self::Fp16(pairs) | Self::Bf16(pairs) => pairs.as_ptr().wrapping_add(row).cast(),
        }
    }
}

/// A number of half precision that is neither infinite nor NaN, as no scale is.
///
/// Its exponent is too large by 127 - 15 where the bits are read as single precision's; a multiplication mends that
/// for denormal numbers too.
#[inline(always)]
fn finite_fp16(x: u16) -> f32 {
    const MEND: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let magnitude = f32::from_bits((u32::from(x) & 0x7FFF) << 13) * MEND;
    f32::from_bits(magnitude.to_bits() | (u32::from(x) & 0x8000) << 16)
}

/// Stores scale and bias of row `row`; both are numbers that the format has.
#[inline(always)]
pub(crate) fn store(format: ScaleFormat, bytes: &mut [u8], row: usize, [scale, bias]: [f32; 2]) {
    match format {
        ScaleFormat::Fp32 => cast_slice_mut::<_, [f32; 2]>(bytes)[row] = [scale, bias],
        ScaleFormat::Fp16 => {
            let pair = [scale, bias].map(|x| f16::from_f32(x).to_bits());
            cast_slice_mut::<_, [u16; 2]>(bytes)[row] = pair;
        }
        ScaleFormat::Bf16 => {
            let pair = [scale, bias].map(|x| bf16::from_f32(x).to_bits());
            cast_slice_mut::<_, [u16; 2]>(bytes)[row] = pair;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_fp16_is_read_as_it_is() {
        for bits in 0..=u16::MAX {
            let expected = f16::from_bits(bits);
            if expected.is_finite() {
                assert_eq!(finite_fp16(bits).to_bits(), expected.to_f32().to_bits(), "{expected}");
            }
        }
    }

    #[test]
    fn what_is_stored_is_read() {
        for format in ScaleFormat::ALL {
            let pairs = [[1.5, -2.0], [0.0, 3.25], [2.0_f32.powi(-14), 1024.0]];
            let mut bytes = vec![0_u32; 3 * format.pair_bytes() / 4];
            let bytes = cast_slice_mut(&mut bytes);
            for (row, &pair) in pairs.iter().enumerate() {
                store(format, bytes, row, pair);
            }
            for (row, &pair) in pairs.iter().enumerate() {
                assert_eq!(Scales::new(format, bytes).get(row), pair);
            }
        }
    }
}
