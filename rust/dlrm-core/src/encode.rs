//! A table's rows brought into another row format.

use std::fmt;
use std::ops::{Deref, Range};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::codebook;
use crate::disjoint::Disjoint;
use crate::kernels::LANES;
use crate::kernels::decode::Decode;
use crate::kernels::encode::{Encode, Outcome, Refused, Search};
use crate::kernels::within::Within;
use crate::memory::{Keeper, Memory, check_available};
use crate::rows::with_rows;
use crate::scales::ScaleFormat;
use crate::spare::Spare;
use crate::table_rows::{RowsMut, RowsRef, TableRows, pair_bytes};
use crate::{Context, Error, Level, Result, RowFormat, TableSpec, named, threads};

/// How the scale and the bias of a row are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Codes reach from the smallest element to the largest.
    MinMax,
    /// The sum of the squares of the errors is brought down, from several starts.
    LeastSquares,
    /// The same, for 4 bits, with a codebook of the table's own in place of evenly spaced codes.
    Codebook,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 3] = [Self::MinMax, Self::LeastSquares, Self::Codebook];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MinMax => "minmax",
            Self::LeastSquares => "lsq",
            Self::Codebook => "codebook",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("method", Self::ALL, Self::name, name)
    }
}

/// How rows are to be stored.
#[derive(Clone, Copy, Debug)]
pub struct Encoding {
    /// The row format.
    pub format: RowFormat,
    /// How scale and bias are found, when the format is quantized.
    pub method: Method,
    /// How they are stored; `None` for fp16, or bf16 where fp16 does not hold those of every row with its usual
    /// precision.
    pub scales: Option<ScaleFormat>,
    /// Whether a NaN or an infinity is taken for zero, rather than refused.
    pub zero_not_finite: bool,
}

impl Encoding {
    fn check(self) -> Result<()> {
        let Self { format, method, .. } = self;
        let fits = match method {
            Method::MinMax => true,
            Method::LeastSquares => format.is_quantized(),
            Method::Codebook => format == RowFormat::Int4,
        };
        if fits {
            return Ok(());
        }
        let expected = match method {
            Method::Codebook => "int4 rows with 'codebook'".to_owned(),
            _ => format!("int8, int4 or int2 rows with '{method}'"),
        };
        Err(Error::argument("method", expected, format_args!("{format} rows")))
    }
}

/// Rows in their new format, and what they lost.
pub struct Encoded {
    /// The rows.
    pub rows: TableRows,
    /// The relative L2 error of every row, `(N,)`: the norm of the difference by the norm of the row; 0 where nothing
    /// differs.
    pub errors: RowErrors,
    /// The largest absolute error of an element.
    pub largest_error: f32,
}

/// A number for each row.
pub struct RowErrors(Memory);

impl RowErrors {
    /// The numbers, and what keeps them in memory for whoever keeps the address.
    #[must_use]
    pub fn kept(&self) -> (&[f32], Keeper) {
        (self, self.0.keeper())
    }
}

impl Deref for RowErrors {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0.as_slice()
    }
}

impl TableRows {
    /// The rows of `source`, `(N, D)`, of the table that `spec` describes, stored as `encoding` says.
    ///
    /// A NaN or an infinity is an error that names table and row, unless the encoding takes it for zero; so is a number
    /// that the format does not hold.
    pub fn encode(source: &[f32], spec: &TableSpec, encoding: Encoding, ctx: &Context) -> Result<Encoded> {
        let expected = spec.rows as u128 * spec.dim as u128;
        if source.len() as u128 != expected {
            let argument = format!("rows of table '{}'", spec.name);
            return Err(Error::argument(argument, format_args!("{expected} elements"), source.len()));
        }
        encode(RowsRef::fp32(source, spec.dim), spec, encoding, &mut Spare::default(), ctx)
    }
}

/// The same, from rows of any format, in spare memory where that is enough.
pub(crate) fn encode(
    source: RowsRef,
    spec: &TableSpec,
    encoding: Encoding,
    spare: &mut Spare,
    ctx: &Context,
) -> Result<Encoded> {
    encoding.check()?;
    let bytes = spec.rows as u128 * encoding.format.row_bytes(spec.dim) as u128;
    if bytes > spare.bytes() as u128 {
        check_available(bytes, &spec.to_string())?;
    }
    let search = match encoding.method {
        Method::MinMax => Search::MinMax,
        Method::LeastSquares => Search::LeastSquares,
        Method::Codebook => {
            Search::Codebook(codebook::train(source, spec.rows, encoding.zero_not_finite, ctx))
        }
    };
    let mut attempt = |scales, precise| {
        let call = Call { source, spec, search, precise, zero: encoding.zero_not_finite };
        call.run(encoding.format, scales, spare, ctx)
    };
    match encoding.scales {
        None if encoding.format.is_quantized() => match attempt(ScaleFormat::Fp16, true) {
            Err(Failure::NotHeld(_)) => attempt(ScaleFormat::Bf16, false),
            other => other,
        },
        scales => attempt(scales.unwrap_or(ScaleFormat::Fp16), false),
    }
    .map_err(|failure| failure.describe(source, spec, encoding))
}

/// Refuses what [`encode`] refuses, and makes nothing.
pub(crate) fn check(source: RowsRef, spec: &TableSpec, encoding: Encoding, ctx: &Context) -> Result<()> {
    encoding.check()?;
    // What scales are refused for is the same with every search: those of minmax.
    let call = Call { source, spec, search: Search::MinMax, precise: false, zero: encoding.zero_not_finite };
    // Which hold more than fp16 does, that is tried first.
    let scales = encoding.scales.unwrap_or(ScaleFormat::Bf16);
    call.check(encoding.format, scales, ctx).map_err(|failure| failure.describe(source, spec, encoding))
}

/// Why rows could not be encoded.
enum Failure {
    /// The row has a NaN or an infinity.
    NotFinite(usize),
    /// The row needs numbers that the format does not hold.
    NotHeld(usize),
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Failure {
    fn describe(self, source: RowsRef, spec: &TableSpec, encoding: Encoding) -> Error {
        let refused = |row: usize, expected: String, is_bad: &dyn Fn(f32) -> bool| {
            let mut elements = vec![0.0; spec.dim];
            with_rows!(source, |rows| Context::default().level.run(Decode {
                rows,
                first: row,
                into: &mut elements
            }));
            let bad = elements.iter().copied().find(|&x| is_bad(x));
            let got = bad.map_or_else(|| "others".to_owned(), |x| format!("{x:e}"));
            Error::argument(format!("row {row} of table '{}'", spec.name), expected, got)
        };
        let format = encoding.format;
        match self {
            Self::Other(error) => error,
            Self::NotFinite(row) => refused(row, "finite numbers".to_owned(), &|x| !x.is_finite()),
            Self::NotHeld(row) if format.is_quantized() => {
                let scales = encoding.scales.unwrap_or(ScaleFormat::Bf16);
                let expected = format!("elements whose scale and bias {scales} holds");
                refused(row, expected, &|x| x.abs() > f32::from(half::f16::MAX))
            }
            Self::NotHeld(row) => {
                let largest = if format == RowFormat::Fp16 {
                    f32::from(half::f16::MAX)
                } else {
                    f32::from(half::bf16::MAX)
                };
                let expected = format!("numbers of at most {largest:e} in size, which {format} holds");
                refused(row, expected, &|x| x.abs() > largest)
            }
        }
    }
}

/// Rows to be encoded, and how.
struct Call<'a> {
    source: RowsRef<'a>,
    spec: &'a TableSpec,
    search: Search,
    /// See [`Encode::precise`].
    precise: bool,
    /// Whether what is not finite is taken for zero.
    zero: bool,
}

impl Call<'_> {
    /// One pass over all rows.
    fn run(
        &self,
        format: RowFormat,
        scales: ScaleFormat,
        spare: &mut Spare,
        ctx: &Context,
    ) -> std::result::Result<Encoded, Failure> {
        let TableSpec { rows, dim, .. } = *self.spec;
        let mut made = spare.rows((rows, dim), format, scales, &self.spec.to_string())?;
        if let Search::Codebook(codebook) = self.search {
            made.codebook = codebook.numbers;
        }
        let mut errors = spare.memory(rows, size_of::<f32>(), "the errors of rows")?;
        let pass = Pass {
            call: self,
            level: ctx.level,
            pair_bytes: made.pair_bytes(),
            format,
            scale_format: scales,
            elements: Disjoint::new(made.elements.as_mut_slice()),
            scales: Disjoint::new(made.scales.as_mut_slice()),
            errors: Disjoint::new(errors.as_mut_slice()),
            largest_error: AtomicU32::new(0),
            refused: LowestRefused::new(),
        };
        self.for_each_part(ctx, |rows, block| pass.rows(rows, block))?;
        let largest_error = pass.finish()?;
        Ok(Encoded { rows: made, errors: RowErrors(errors), largest_error })
    }

    /// Whether all rows can be encoded.
    fn check(
        &self,
        format: RowFormat,
        scales: ScaleFormat,
        ctx: &Context,
    ) -> std::result::Result<(), Failure> {
        let (level, lowest) = (ctx.level, LowestRefused::new());
        self.for_each_part(ctx, |rows, block| {
            let mut scratch = Vec::new();
            for rows in blocks(rows, block) {
                let source = self.source(level, rows.clone(), &mut scratch);
                if !level.run(Within { numbers: source, largest: surely_held(format, scales) }) {
                    lowest.add(rows.start, self.try_encode(level, source, format, scales));
                }
            }
        })?;
        lowest.finish()
    }

    /// What is refused of some rows, which are encoded for it.
    fn try_encode(&self, level: Level, source: &[f32], format: RowFormat, scales: ScaleFormat) -> Refused {
        let dim = self.spec.dim;
        let rows = source.len() / dim;
        // Words, as elements and scales are to be aligned.
        let words = |row_bytes: usize| vec![0_u32; (rows * row_bytes).div_ceil(size_of::<u32>())];
        let [row_bytes, scale_bytes] = [format.row_bytes(dim), pair_bytes(format, scales)];
        let (mut elements, mut pairs, mut errors) = (words(row_bytes), words(scale_bytes), vec![0.0; rows]);
        let into = RowsMut {
            format,
            dim,
            elements: &mut bytemuck::cast_slice_mut(&mut elements)[..rows * row_bytes],
            scales: &mut bytemuck::cast_slice_mut(&mut pairs)[..rows * scale_bytes],
            scale_format: scales,
        };
        let (search, precise) = (self.search, self.precise);
        level.run(Encode { source, into, errors: &mut errors, search, precise }).refused
    }

    /// Calls `run` with some rows and how many of them are a block, until all have been in one call.
    fn for_each_part(&self, ctx: &Context, run: impl Fn(Range<usize>, usize) + Sync) -> Result<()> {
        let TableSpec { rows, dim, .. } = *self.spec;
        let block = (BLOCK / size_of::<f32>() / dim).max(1);
        let part = block * BLOCKS;
        let lines = (rows * dim).div_ceil(LANES);
        threads::for_each(ctx, rows.div_ceil(part), lines, |i| {
            run(i * part..rows.min((i + 1) * part), block);
        })
    }

    /// Rows as fp32, in `scratch` unless they are so already.
    fn source<'b>(&'b self, level: Level, rows: Range<usize>, scratch: &'b mut Vec<f32>) -> &'b [f32] {
        let Call { source, zero, .. } = *self;
        let elements = rows.start * source.dim..rows.end * source.dim;
        if source.format == RowFormat::Fp32 && !zero {
            return &bytemuck::cast_slice(source.elements)[elements];
        }
        scratch.resize(elements.len(), 0.0);
        with_rows!(source, |of| level.run(Decode { rows: of, first: rows.start, into: scratch }));
        for x in scratch.iter_mut().filter(|x| zero && !x.is_finite()) {
            *x = 0.0;
        }
        scratch
    }
}

/// A size up to which a format holds all numbers, and scale and bias of all rows of such. It may hold some that are larger.
fn surely_held(format: RowFormat, scales: ScaleFormat) -> f32 {
    let of_fp16 = format == RowFormat::Fp16 || (format.is_quantized() && scales == ScaleFormat::Fp16);
    if of_fp16 { 2.0_f32.powi(15) } else { 2.0_f32.powi(125) }
}

/// Rows, `block` at a time.
fn blocks(rows: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(block).map(move |first| first..rows.end.min(first + block))
}

/// The lowest row of each kind of failure, of all that threads find.
struct LowestRefused {
    not_finite: AtomicUsize,
    not_held: AtomicUsize,
}

impl LowestRefused {
    fn new() -> Self {
        Self { not_finite: AtomicUsize::new(usize::MAX), not_held: AtomicUsize::new(usize::MAX) }
    }

    /// Counts what is refused of rows from `first` on.
    fn add(&self, first: usize, refused: Refused) {
        for (row, lowest) in [(refused.not_finite, &self.not_finite), (refused.not_held, &self.not_held)] {
            if let Some(row) = row {
                lowest.fetch_min(first + row, Ordering::Relaxed);
            }
        }
    }

    fn any_not_held(&self) -> bool {
        self.not_held.load(Ordering::Relaxed) < usize::MAX
    }

    fn finish(self) -> std::result::Result<(), Failure> {
        match (self.not_finite.into_inner(), self.not_held.into_inner()) {
            (usize::MAX, usize::MAX) => Ok(()),
            (usize::MAX, row) => Err(Failure::NotHeld(row)),
            (row, _) => Err(Failure::NotFinite(row)),
        }
    }
}

/// Bytes of fp32 that are encoded and compared while they are in the nearest cache.
const BLOCK: usize = 16 << 10;

/// Blocks that a thread takes at once.
const BLOCKS: usize = 16;

/// A pass that threads share, each with rows of its own.
struct Pass<'a> {
    call: &'a Call<'a>,
    level: Level,
    format: RowFormat,
    scale_format: ScaleFormat,
    pair_bytes: usize,
    elements: Disjoint<'a, u8>,
    scales: Disjoint<'a, u8>,
    errors: Disjoint<'a, f32>,
    /// Its bits, which are in the order of the numbers since these are not negative.
    largest_error: AtomicU32,
    refused: LowestRefused,
}

impl Pass<'_> {
    /// Encodes and compares some rows, `block` at a time.
    fn rows(&self, rows: Range<usize>, block: usize) {
        if self.call.precise && self.refused.any_not_held() {
            return; // other scales are tried next, for all rows
        }
        let mut scratch = Vec::new();
        for block in blocks(rows, block) {
            let source = self.call.source(self.level, block.clone(), &mut scratch);
            self.block(block, source);
        }
    }

    fn block(&self, rows: Range<usize>, source: &[f32]) {
        let (format, dim) = (self.format, self.call.source.dim);
        let bytes_of = |row_bytes: usize| rows.start * row_bytes..rows.end * row_bytes;
        #[expect(unsafe_code, reason = "rows are disjoint")]
        // SAFETY: parts are of different rows, each part comes once, and its blocks one after another.
        let (elements, scales, errors) = unsafe {
            (
                self.elements.piece(bytes_of(format.row_bytes(dim))),
                self.scales.piece(bytes_of(self.pair_bytes)),
                self.errors.piece(rows.clone()),
            )
        };
        let into = RowsMut { format, dim, elements, scales, scale_format: self.scale_format };
        let Call { search, precise, .. } = *self.call;
        let Outcome { refused, largest_error } =
            self.level.run(Encode { source, into, errors, search, precise });
        self.refused.add(rows.start, refused);
        self.largest_error.fetch_max(largest_error.to_bits(), Ordering::Relaxed);
    }

    /// The largest error, if there was no failure.
    fn finish(self) -> std::result::Result<f32, Failure> {
        self.refused.finish()?;
        Ok(f32::from_bits(self.largest_error.into_inner()))
    }
}
