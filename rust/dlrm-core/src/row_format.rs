//! How a row is stored.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result, named};

/// How a row is stored.
///
/// A format is known to this file, which tells its size, and to `rows`, which hands rows to the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowFormat {
    /// `dim` IEEE 754 single-precision floats, rows one after another.
    #[default]
    Fp32,
}

impl RowFormat {
    /// Every format.
    pub const ALL: [Self; 1] = [Self::Fp32];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
        }
    }

    /// Bytes of a row of `dim` elements.
    #[must_use]
    pub const fn row_bytes(self, dim: usize) -> usize {
        match self {
            Self::Fp32 => dim.saturating_mul(size_of::<f32>()),
        }
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
