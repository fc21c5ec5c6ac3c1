//! Quantized rows as others store them, read and written byte for byte.
//!
//! ```text
//! fused:  [codes][scale][bias]   scale and bias fp32 for int8, fp16 for int4 and int2: torch's prepack operators and
//!                                FBGEMM's fused rows (fbgemm, include/fbgemm/QuantUtils.h)
//! tbe:    [scale][bias][codes]   both fp16: FBGEMM's table-batched embeddings for inference (fbgemm_gpu,
//!                                split_table_batched_embeddings_ops_inference.py)
//! ```
//! A row may be followed by bytes that fill it up to an alignment; they are zero where this writes them.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use crate::disjoint::Disjoint;
use crate::kernels::Lanes;
use crate::scales::{self, ScaleFormat, Scales};
use crate::table_rows::{TableRows, UNIFORM, pair_bytes};
use crate::{Context, Error, Result, RowFormat, TableSpec, named, threads};

/// In which order a packed row holds its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Codes, scale, bias.
    Fused,
    /// Scale, bias, codes.
    Tbe,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 2] = [Self::Fused, Self::Tbe];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Tbe => "tbe",
        }
    }

    /// How scale and bias are stored.
    #[must_use]
    pub fn scale_format(self, format: RowFormat) -> ScaleFormat {
        match (self, format) {
            (Self::Fused, RowFormat::Int8) => ScaleFormat::Fp32,
            _ => ScaleFormat::Fp16,
        }
    }

    /// Bytes of a row, without what fills it up.
    #[must_use]
    pub fn row_bytes(self, format: RowFormat, dim: usize) -> usize {
        format.row_bytes(dim).saturating_add(self.scale_format(format).pair_bytes())
    }

    /// Where in a row its codes are, and where its scale and bias.
    fn parts(self, format: RowFormat, dim: usize) -> (Range<usize>, Range<usize>) {
        let (codes, all) = (format.row_bytes(dim), self.row_bytes(format, dim));
        match self {
            Self::Fused => (0..codes, codes..all),
            Self::Tbe => (all - codes..all, 0..all - codes),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("layout", Self::ALL, Self::name, name)
    }
}

/// Bytes of rows that a thread takes at once.
const PART: usize = 256 << 10;

impl TableRows {
    /// The rows of the table that `spec` describes, of packed ones of `row_bytes` bytes each.
    ///
    /// A scale or a bias that is not finite is an error that names its row.
    pub fn unpack(
        packed: &[u8],
        spec: &TableSpec,
        layout: Layout,
        row_bytes: usize,
        ctx: &Context,
    ) -> Result<Self> {
        let TableSpec { rows, dim, format, .. } = *spec;
        check_quantized(spec, format)?;
        check_len(spec, packed.len(), layout, format, row_bytes)?;
        let scale_format = layout.scale_format(format);
        let mut made = Self::mapped((rows, dim), format, scale_format, &spec.to_string())?;
        let (codes_at, pair_at) = layout.parts(format, dim);
        {
            let elements = Disjoint::new(made.elements.as_mut_slice::<u8>());
            let pairs = Disjoint::new(made.scales.as_mut_slice::<u8>());
            for_each_part(rows, row_bytes, ctx, |part| {
                let bytes_of = |bytes: usize| part.start * bytes..part.end * bytes;
                #[expect(unsafe_code, reason = "rows are disjoint")]
                // SAFETY: parts are of different rows, and each comes once.
                let (elements, pairs) = unsafe {
                    (elements.piece(bytes_of(codes_at.len())), pairs.piece(bytes_of(pair_at.len())))
                };
                let rows = packed[bytes_of(row_bytes)].chunks_exact(row_bytes);
                let into =
                    elements.chunks_exact_mut(codes_at.len()).zip(pairs.chunks_exact_mut(pair_at.len()));
                for (row, (codes, pair)) in rows.zip(into) {
                    codes.copy_from_slice(&row[codes_at.clone()]);
                    pair.copy_from_slice(&row[pair_at.clone()]);
                }
            })?;
        }
        made.check_scales(spec)?;
        Ok(made)
    }

    /// Packs all rows into `into`, `row_bytes` bytes each.
    ///
    /// Scales are never rounded: one that the layout cannot hold as it is, is an error that names its row. So is a
    /// codebook, for which these layouts have no place.
    pub fn pack(
        &self,
        into: &mut [u8],
        spec: &TableSpec,
        layout: Layout,
        row_bytes: usize,
        ctx: &Context,
    ) -> Result<()> {
        let Self { rows, dim, format, .. } = *self;
        check_quantized(spec, format)?;
        check_len(spec, into.len(), layout, format, row_bytes)?;
        if self.has_codebook() {
            let argument = format!("rows of table '{}'", spec.name);
            return Err(Error::argument(argument, "evenly spaced codes, which the layout has", "a codebook"));
        }
        if self.cache.is_some() {
            let argument = format!("rows of table '{}'", spec.name);
            let got = "hot rows in fp32; quantize the module with hot_rows=0 first";
            return Err(Error::argument(argument, "rows that are all in codes", got));
        }
        let scale_format = layout.scale_format(format);
        let scales = Scales::new(self.scale_format, self.scales.as_slice());
        let (codes_at, pair_at) = layout.parts(format, dim);
        let elements: &[u8] = self.elements.as_slice();
        let not_held = AtomicUsize::new(usize::MAX);
        let into = Disjoint::new(into);
        for_each_part(rows, row_bytes, ctx, |part| {
            #[expect(unsafe_code, reason = "rows are disjoint")]
            // SAFETY: parts are of different rows, and each comes once.
            let into = unsafe { into.piece(part.start * row_bytes..part.end * row_bytes) };
            for (row, into) in part.zip(into.chunks_exact_mut(row_bytes)) {
                let pair = scales.get(row);
                if pair.map(|x| scale_format.round(x).to_bits()) != pair.map(f32::to_bits) {
                    not_held.fetch_min(row, Ordering::Relaxed);
                }
                into.fill(0);
                into[codes_at.clone()].copy_from_slice(&elements[row * codes_at.len()..][..codes_at.len()]);
                into[pair_at.clone()].copy_from_slice(&pair_as_bytes(scale_format, pair)[..pair_at.len()]);
            }
        })?;
        match not_held.into_inner() {
            usize::MAX => Ok(()),
            row => {
                let [scale, bias] = scales.get(row);
                let expected = format!("scale and bias that {scale_format}, the layout's, holds as they are");
                let argument = format!("row {row} of table '{}'", spec.name);
                Err(Error::argument(argument, expected, format_args!("{scale:e} and {bias:e}")))
            }
        }
    }

    /// Rows of a quantized format of their parts: the codes, scale and bias of every row, and the codebook.
    ///
    /// Scales that are not finite, and a codebook that does not ascend from 0 to 15, are errors.
    pub fn from_parts(
        spec: &TableSpec,
        codes: &[u8],
        (scale_format, pairs): (ScaleFormat, &[u8]),
        codebook: Option<&Lanes>,
    ) -> Result<Self> {
        let TableSpec { rows, dim, format, .. } = *spec;
        check_quantized(spec, format)?;
        for (argument, bytes, got) in [
            ("codes", format.row_bytes(dim), codes.len()),
            ("scales", pair_bytes(format, scale_format), pairs.len()),
        ] {
            let expected = rows as u128 * bytes as u128;
            if got as u128 != expected {
                let argument = format!("{argument} of table '{}'", spec.name);
                return Err(Error::argument(argument, format_args!("{expected} bytes"), got));
            }
        }
        let codebook = check_codebook(spec, codebook)?;
        let mut made = Self::mapped((rows, dim), format, scale_format, &spec.to_string())?;
        made.codebook = codebook;
        made.elements.as_mut_slice().copy_from_slice(codes);
        made.scales.as_mut_slice().copy_from_slice(pairs);
        made.check_scales(spec)?;
        Ok(made)
    }

    /// Refuses scales and biases that are not finite, or that decode a code to what is not.
    fn check_scales(&self, spec: &TableSpec) -> Result<()> {
        let bytes: &[u8] = self.scales.as_slice();
        let largest = self.format.largest_code();
        let is_bad = |[scale, bias]: [f32; 2]| !(scale * largest + bias).is_finite() || !bias.is_finite();
        let pairs = bytes.chunks_exact(self.pair_bytes());
        let Some(row) = pairs.map(|pair| pair_of(self.scale_format, pair)).position(is_bad) else {
            return Ok(());
        };
        let [scale, bias] = pair_of(self.scale_format, &bytes[row * self.pair_bytes()..]);
        let argument = format!("row {row} of table '{}'", spec.name);
        let expected = "scale and bias that decode to finite numbers";
        Err(Error::argument(argument, expected, format_args!("{scale:e} and {bias:e}")))
    }
}

/// Scale and bias that `bytes` begin with, infinities and NaN included.
fn pair_of(format: ScaleFormat, bytes: &[u8]) -> [f32; 2] {
    std::array::from_fn(|i| match format {
        ScaleFormat::Fp32 => bytemuck::pod_read_unaligned(&bytes[4 * i..4 * i + 4]),
        ScaleFormat::Fp16 => bytemuck::pod_read_unaligned::<f16>(&bytes[2 * i..2 * i + 2]).to_f32(),
        ScaleFormat::Bf16 => bytemuck::pod_read_unaligned::<half::bf16>(&bytes[2 * i..2 * i + 2]).to_f32(),
    })
}

/// The bytes of scale and bias, the first [`ScaleFormat::pair_bytes`] of 8.
fn pair_as_bytes(format: ScaleFormat, pair: [f32; 2]) -> [u8; 8] {
    let mut words = [0_u32; 2];
    scales::store(format, bytemuck::cast_slice_mut(&mut words), 0, pair);
    bytemuck::cast(words)
}

fn check_quantized(spec: &TableSpec, format: RowFormat) -> Result<()> {
    if format.is_quantized() {
        return Ok(());
    }
    Err(Error::argument(format!("rows of table '{}'", spec.name), "int8, int4 or int2 rows", format))
}

fn check_len(
    spec: &TableSpec,
    len: usize,
    layout: Layout,
    format: RowFormat,
    row_bytes: usize,
) -> Result<()> {
    let needed = layout.row_bytes(format, spec.dim);
    if row_bytes < needed {
        let argument = format!("packed rows of table '{}'", spec.name);
        let expected = format!("at least {needed} bytes a row ({layout}, {format}, dim {})", spec.dim);
        return Err(Error::argument(argument, expected, row_bytes));
    }
    let expected = spec.rows as u128 * row_bytes as u128;
    if len as u128 != expected {
        let argument = format!("packed rows of table '{}'", spec.name);
        return Err(Error::argument(argument, format_args!("{expected} bytes"), len));
    }
    Ok(())
}

/// The codebook of a table; without one, that in which a code means its own number.
pub(crate) fn check_codebook(spec: &TableSpec, codebook: Option<&Lanes>) -> Result<Lanes> {
    let Some(&codebook) = codebook else {
        return Ok(UNIFORM);
    };
    let ascends = codebook.is_sorted() && codebook[0] == 0.0 && codebook.ends_with(&[15.0]);
    if spec.format != RowFormat::Int4 || !ascends {
        let argument = format!("codebook of table '{}'", spec.name);
        let got = format!("{codebook:?} for {} rows", spec.format);
        return Err(Error::argument(argument, "16 numbers ascending from 0 to 15, for int4 rows", got));
    }
    Ok(codebook)
}

/// Calls `run` with parts of the rows until all were in one, on the threads of `ctx`.
fn for_each_part(
    rows: usize,
    row_bytes: usize,
    ctx: &Context,
    run: impl Fn(Range<usize>) + Sync,
) -> Result<()> {
    let part = PART.div_ceil(row_bytes);
    let lines = (rows as u128 * row_bytes as u128 / 64).min(usize::MAX as u128) as usize;
    threads::for_each(ctx, rows.div_ceil(part), lines, |i| run(i * part..rows.min((i + 1) * part)))
}
