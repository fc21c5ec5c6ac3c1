//! How a row is stored.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result, named};

/// How a row is stored.
///
/// A format is known to this file, which tells its size, to `rows`, which hands rows to the kernels, and to
/// `kernels/encode`, which makes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowFormat {
    /// IEEE 754 single precision.
    #[default]
    Fp32,
    /// IEEE 754 half precision: 5 bits of exponent, 10 of fraction.
    Fp16,
    /// The upper half of single precision: 8 bits of exponent, 7 of fraction.
    Bf16,
    /// A code of 8 bits for each element; `scale * code + bias`, scale and bias the row's own.
    Int8,
    /// The same with 4 bits, element 0 in the low ones, and with a codebook: `scale * codebook[code] + bias`.
    Int4,
    /// The same with 2 bits, without a codebook.
    Int2,
}

impl RowFormat {
    /// Every format.
    pub const ALL: [Self; 6] = [Self::Fp32, Self::Fp16, Self::Bf16, Self::Int8, Self::Int4, Self::Int2];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int2 => "int2",
        }
    }

    /// Bits of an element.
    #[must_use]
    pub const fn bits(self) -> usize {
        match self {
            Self::Fp32 => 32,
            Self::Fp16 | Self::Bf16 => 16,
            Self::Int8 => 8,
            Self::Int4 => 4,
            Self::Int2 => 2,
        }
    }

    /// Bytes of the elements of a row of `dim`; the last byte is filled with zero bits.
    #[must_use]
    pub const fn row_bytes(self, dim: usize) -> usize {
        dim.saturating_mul(self.bits()).div_ceil(8)
    }

    /// Whether elements are codes, and every row has a scale and a bias.
    #[must_use]
    pub const fn is_quantized(self) -> bool {
        self.bits() <= 8
    }

    /// The largest code of a quantized format.
    pub(crate) const fn largest_code(self) -> f32 {
        ((1_u32 << self.bits()) - 1) as f32
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RowFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("row format", Self::ALL, Self::name, name)
    }
}
