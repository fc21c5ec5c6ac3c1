//! The rows of one table in memory, in one row format.

use crate::cache::{Cache, CachedRows};
use crate::encode::{Encoding, Method};
use crate::kernels::{LANES, Lanes};
use crate::memory::{Borrowed, Keeper, Memory};
use crate::packed::check_codebook;
use crate::rows::{Packing, PlainRows, QuantizedRows, Reading};
use crate::scales::{ScaleFormat, Scales};
use crate::{Context, Error, Result, RowFormat, TableSpec};

/// The codebook in which a code of 4 bits means its own number.
pub(crate) const UNIFORM: Lanes = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// The rows of a table, `(N, D)`.
///
/// A table set has one for each table; [`TableRows::encode`](crate::TableRows::encode) makes another of it, and
/// [`TableSet::swap_rows`](crate::TableSet::swap_rows) puts it in its place.
pub struct TableRows {
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    pub(crate) format: RowFormat,
    /// `row_bytes` bytes for each row.
    pub(crate) elements: Memory,
    /// The lower halves of bf16 rows, where an optimizer keeps them; else empty.
    pub(crate) low: Memory,
    /// Scale and bias for each row; empty when the format is not quantized.
    pub(crate) scales: Memory,
    pub(crate) scale_format: ScaleFormat,
    /// What codes of 4 bits mean.
    pub(crate) codebook: Lanes,
    /// The rows that are used most in fp32, where a quantized table keeps them.
    pub(crate) cache: Option<Cache>,
}

impl TableRows {
    /// Rows of zeros for `what`, touched by the threads of `ctx`; `scales` is how a quantized format keeps scale and bias.
    pub(crate) fn zeroed(
        shape: (usize, usize),
        format: RowFormat,
        scales: ScaleFormat,
        what: &str,
        ctx: &Context,
    ) -> Result<Self> {
        let mut rows = Self::mapped(shape, format, scales, what)?;
        rows.elements.touch(ctx)?;
        rows.scales.touch(ctx)?;
        Ok(rows)
    }

    /// The same, untouched, for what will write all of it.
    pub(crate) fn mapped(
        shape: (usize, usize),
        format: RowFormat,
        scales: ScaleFormat,
        what: &str,
    ) -> Result<Self> {
        Self::made_of(shape, format, scales, |rows, row_bytes| Memory::mapped(rows, row_bytes, what))
    }

    /// Rows in memory that `memory` gives, for a number of rows and the bytes of each: elements first, then scales.
    pub(crate) fn made_of(
        (rows, dim): (usize, usize),
        format: RowFormat,
        scales: ScaleFormat,
        mut memory: impl FnMut(usize, usize) -> Result<Memory>,
    ) -> Result<Self> {
        Ok(Self {
            rows,
            dim,
            format,
            elements: memory(rows, format.row_bytes(dim))?,
            low: no_memory()?,
            scales: memory(rows, pair_bytes(format, scales))?,
            scale_format: scales,
            codebook: UNIFORM,
            cache: None,
        })
    }

    /// Rows of `spec` that are in memory already, and are used where they are.
    ///
    /// `scales` are those of a quantized format alone, and `codebook`, of int4 rows, is as of
    /// [`TableRows::from_parts`](crate::TableRows::from_parts). Nothing is read: scales that are not finite decode to what is
    /// not.
    pub fn borrow(
        spec: &TableSpec,
        elements: Borrowed,
        scales: Option<(ScaleFormat, Borrowed)>,
        codebook: Option<&Lanes>,
    ) -> Result<Self> {
        spec.check_dim()?;
        let TableSpec { rows, dim, format, ref name } = *spec;
        if scales.is_some() != format.is_quantized() {
            let got = if scales.is_some() { "some" } else { "none" };
            return Err(Error::argument(format!("scales of table '{name}'"), "those of quantized rows", got));
        }
        let borrowed = |part: &str, memory: Borrowed, row_bytes: usize, align: usize| {
            memory.checked(rows as u128 * row_bytes as u128, align, &format!("{part} of table '{name}'"))
        };
        let (scale_format, scales) = match scales {
            Some((format, memory)) => (format, borrowed("scales", memory, format.pair_bytes(), 4)?),
            None => (ScaleFormat::Fp32, no_memory()?),
        };
        let align = format.bits().div_ceil(8);
        let elements = borrowed("rows", elements, format.row_bytes(dim), align)?;
        Ok(Self {
            rows,
            dim,
            format,
            elements,
            low: no_memory()?,
            scales,
            scale_format,
            codebook: check_codebook(spec, codebook)?,
            cache: None,
        })
    }

    /// What a table of these rows is.
    pub(crate) fn spec(&self, name: String) -> TableSpec {
        TableSpec { name, rows: self.rows, dim: self.dim, format: self.format }
    }

    /// How a row is stored.
    #[must_use]
    pub fn format(&self) -> RowFormat {
        self.format
    }

    /// How scales and biases are stored; of no meaning when the format is not quantized.
    #[must_use]
    pub fn scale_format(&self) -> ScaleFormat {
        self.scale_format
    }

    /// What the codes of int4 rows mean.
    #[must_use]
    pub fn codebook(&self) -> &[f32; LANES] {
        &self.codebook
    }

    /// Whether the codes of int4 rows mean other numbers than their own.
    #[must_use]
    pub fn has_codebook(&self) -> bool {
        self.codebook != UNIFORM
    }

    /// The elements, `(N, RowFormat::row_bytes(D))` bytes, and what keeps them in memory for whoever keeps the address.
    #[must_use]
    pub fn elements(&self) -> (&[u8], Keeper) {
        (self.elements.as_slice(), self.elements.keeper())
    }

    /// Scale and bias of every row, `(N, 2)` in [`TableRows::scale_format`], likewise.
    #[must_use]
    pub fn scales(&self) -> (&[u8], Keeper) {
        (self.scales.as_slice(), self.scales.keeper())
    }

    /// How fp32 rows become rows like these.
    pub(crate) fn encoding(&self) -> Encoding {
        Encoding {
            format: self.format,
            method: Method::MinMax,
            scales: Some(self.scale_format),
            zero_not_finite: false,
        }
    }

    /// Zeros for the lower halves of bf16 rows of a table, if they are to be kept; nothing for others.
    pub(crate) fn new_low(&self, split: bool, table: &str) -> Result<Memory> {
        let row_bytes = if split && self.format == RowFormat::Bf16 { size_of::<u16>() * self.dim } else { 0 };
        Memory::mapped(self.rows, row_bytes, &format!("the lower bits of table '{table}'"))
    }

    /// Copies rows of the same dim, format, scale format and codebook over those from `first` on.
    pub(crate) fn overwrite(&mut self, first: usize, rows: &Self) {
        let row_bytes = self.format.row_bytes(self.dim);
        let pair_bytes = self.pair_bytes();
        let into = |bytes: usize| first * bytes..(first + rows.rows) * bytes;
        self.elements.as_mut_slice::<u8>()[into(row_bytes)].copy_from_slice(rows.elements.as_slice());
        self.scales.as_mut_slice::<u8>()[into(pair_bytes)].copy_from_slice(rows.scales.as_slice());
        if let Some(cache) = &mut self.cache {
            cache.forget(first..first + rows.rows);
        }
    }

    /// Bytes of a row's scale and bias.
    pub(crate) fn pair_bytes(&self) -> usize {
        pair_bytes(self.format, self.scale_format)
    }

    /// All of it, to be read.
    pub(crate) fn as_ref(&self) -> RowsRef<'_> {
        RowsRef {
            format: self.format,
            dim: self.dim,
            elements: self.elements.as_slice(),
            scales: self.scales.as_slice(),
            scale_format: self.scale_format,
            codebook: &self.codebook,
            cache: self.cache.as_ref().map_or(CachedRows::NONE, Cache::as_ref),
        }
    }
}

/// What stands where there is nothing.
fn no_memory() -> Result<Memory> {
    Memory::mapped(0, 0, "nothing")
}

/// Bytes of a row's scale and bias: none unless its format is quantized.
pub(crate) const fn pair_bytes(format: RowFormat, scales: ScaleFormat) -> usize {
    if format.is_quantized() { scales.pair_bytes() } else { 0 }
}

/// Some rows of a table, to be read.
#[derive(Clone, Copy)]
pub(crate) struct RowsRef<'a> {
    pub(crate) format: RowFormat,
    pub(crate) dim: usize,
    pub(crate) elements: &'a [u8],
    pub(crate) scales: &'a [u8],
    pub(crate) scale_format: ScaleFormat,
    pub(crate) codebook: &'a Lanes,
    pub(crate) cache: CachedRows<'a>,
}

impl<'a> RowsRef<'a> {
    /// Rows of fp32.
    pub(crate) fn fp32(rows: &'a [f32], dim: usize) -> Self {
        Self {
            format: RowFormat::Fp32,
            dim,
            elements: bytemuck::cast_slice(rows),
            scales: &[],
            scale_format: ScaleFormat::Fp32,
            codebook: &UNIFORM,
            cache: CachedRows::NONE,
        }
    }

    pub(crate) fn plain<P: Packing>(self, packing: P) -> PlainRows<'a, P> {
        PlainRows { packing, data: bytemuck::cast_slice(self.elements), dim: self.dim }
    }

    pub(crate) fn quantized<R: Reading>(self, reading: R) -> QuantizedRows<'a, R> {
        QuantizedRows {
            reading,
            codes: self.elements,
            scales: Scales::new(self.scale_format, self.scales),
            pair_bytes: self.scale_format.pair_bytes(),
            row_bytes: self.format.row_bytes(self.dim),
            dim: self.dim,
            cache: self.cache,
        }
    }
}

/// Some rows of a table, to be written.
pub(crate) struct RowsMut<'a> {
    pub(crate) format: RowFormat,
    pub(crate) dim: usize,
    pub(crate) elements: &'a mut [u8],
    pub(crate) scales: &'a mut [u8],
    pub(crate) scale_format: ScaleFormat,
}
