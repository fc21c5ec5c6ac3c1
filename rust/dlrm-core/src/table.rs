//! One embedding table: its rows and the state that an optimizer keeps beside them.

use std::fmt;

use crate::cache::Cache;
use crate::disjoint::Disjoint;
use crate::kernels::codes::CodeRows;
use crate::kernels::stochastic::{Half, HalfRows, Random};
use crate::kernels::touched::{PARTS, Target};
use crate::memory::Memory;
use crate::optimizers::Kind;
use crate::scales::ScaleFormat;
use crate::table_rows::{TableRows, pair_bytes};
use crate::weights::Weights;
use crate::{Context, Error, Result, RowFormat};

/// What a table is.
#[derive(Clone, Debug)]
pub struct TableSpec {
    /// Its name in messages.
    pub name: String,
    /// Rows.
    pub rows: usize,
    /// Elements of a row, at least 1.
    pub dim: usize,
    /// How a row is stored at first; see [`TableSet::swap_rows`](crate::TableSet::swap_rows).
    pub format: RowFormat,
}

/// How the scales of new tables are stored: as what rows they will get is not known.
const NEW_SCALES: ScaleFormat = ScaleFormat::Bf16;

/// Elements of a row at most, so that sizes of outputs do not overflow.
const MAX_DIM: usize = 1 << 31;

impl TableSpec {
    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> u128 {
        let row_bytes = self.format.row_bytes(self.dim) as u128;
        self.rows as u128 * (row_bytes + pair_bytes(self.format, NEW_SCALES) as u128)
    }

    /// Refuses rows of no elements, or of more than can be counted in the sizes of outputs.
    pub(crate) fn check_dim(&self) -> Result<()> {
        let refuse = |expected: &str| {
            Err(Error::argument(format!("embedding_dim of table '{}'", self.name), expected, self.dim))
        };
        match self.dim {
            0 => refuse("at least 1"),
            1..=MAX_DIM => Ok(()),
            _ => refuse(&format!("at most {MAX_DIM}")),
        }
    }

    /// Bytes of the state of an optimizer of this kind.
    pub(crate) fn state_bytes(&self, kind: Kind, format: RowFormat) -> u128 {
        let lens = kind.state_lens(self.dim);
        self.rows as u128 * lens.map(|len| format.row_bytes(len) as u128).iter().sum::<u128>()
    }
}

impl fmt::Display for TableSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table '{}' of {} rows x {}", self.name, self.rows, self.dim)
    }
}

/// Bytes of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableMemory {
    /// Of the elements of its rows.
    pub payload: usize,
    /// Of the scales and biases of its rows.
    pub scales: usize,
    /// Of the rows that are kept in fp32 because they are used most, and what is known of them.
    pub cache: usize,
    /// Of its optimizer state.
    pub state: usize,
    /// Of the rest: what pages waste, and the engine's own description.
    pub overhead: usize,
}

/// An embedding table.
pub(crate) struct Table {
    pub(crate) spec: TableSpec,
    pub(crate) rows: TableRows,
    /// The parts that the optimizer has, the others empty.
    pub(crate) state: [Memory; PARTS],
    /// How these are kept: fp32 or bf16.
    pub(crate) state_format: RowFormat,
}

impl Table {
    /// Zeroed rows and no state.
    pub(crate) fn new(spec: TableSpec, ctx: &Context) -> Result<Self> {
        spec.check_dim()?;
        let shape = (spec.rows, spec.dim);
        let rows = TableRows::zeroed(shape, spec.format, NEW_SCALES, &spec.to_string(), ctx)?;
        Self::of_rows(spec, rows, ctx)
    }

    /// These rows and no state.
    pub(crate) fn of_rows(spec: TableSpec, rows: TableRows, ctx: &Context) -> Result<Self> {
        Ok(Self { spec, rows, state: Self::no_state(ctx)?, state_format: RowFormat::Fp32 })
    }

    /// What a table has without an optimizer.
    pub(crate) fn no_state(ctx: &Context) -> Result<[Memory; PARTS]> {
        Ok([Memory::zeroed(0, 0, "no state", ctx)?, Memory::zeroed(0, 0, "no state", ctx)?])
    }

    /// Zeroed state for an optimizer of this kind.
    pub(crate) fn new_state(&self, kind: Kind, format: RowFormat, ctx: &Context) -> Result<[Memory; PARTS]> {
        let what = format!("{kind} state of table '{}'", self.spec.name);
        let [first, second] = kind.state_lens(self.spec.dim);
        let zeroed = |len: usize| Memory::zeroed(self.spec.rows, format.row_bytes(len), &what, ctx);
        Ok([zeroed(first)?, zeroed(second)?])
    }

    /// All rows and their state, for a rule to change; `random` decides how what is not fp32 is rounded.
    pub(crate) fn target(&mut self, random: Random) -> Target<'_> {
        let (dim, rows) = (self.spec.dim, &mut self.rows);
        let low: &mut [u16] = rows.low.as_mut_slice();
        let half = match rows.format {
            RowFormat::Fp16 => Half::Fp16,
            _ if low.is_empty() => Half::Bf16,
            _ => Half::Split,
        };
        let elements = &mut rows.elements;
        let weights = match rows.format {
            RowFormat::Fp32 => Weights::Fp32(Disjoint::new(elements.as_mut_slice())),
            RowFormat::Fp16 | RowFormat::Bf16 => {
                let bits = Disjoint::new(elements.as_mut_slice());
                Weights::Half(HalfRows { half, bits, low: Disjoint::new(low), dim, random })
            }
            format @ (RowFormat::Int8 | RowFormat::Int4 | RowFormat::Int2) => Weights::Codes(CodeRows {
                format,
                row_bytes: format.row_bytes(dim),
                codes: Disjoint::new(elements.as_mut_slice()),
                scales: Disjoint::new(rows.scales.as_mut_slice()),
                scale_format: rows.scale_format,
                dim,
                random,
                ways: rows.cache.as_mut().map(Cache::ways),
            }),
        };
        let (rows, format) = (self.spec.rows.max(1), self.state_format);
        let state_len = self.state.each_ref().map(|part| part.bytes() / rows / format.row_bytes(1));
        let [first, second] = &mut self.state;
        let state = [(first, 0), (second, 1)].map(|(memory, part)| match format {
            RowFormat::Bf16 if state_len[part] > 0 => Weights::Half(HalfRows {
                half: Half::Bf16,
                bits: Disjoint::new(memory.as_mut_slice()),
                low: Disjoint::new(&mut []),
                dim: state_len[part],
                random: random.of_state(part),
            }),
            _ => Weights::Fp32(Disjoint::new(memory.as_mut_slice())),
        });
        Target { dim, state_len, weights, state, rows: None }
    }

    /// Refuses rows that an optimizer cannot change, for what `argument` asks.
    pub(crate) fn check_trainable(&self, argument: &str) -> Result<()> {
        if !self.rows.has_codebook() {
            return Ok(());
        }
        let got = format!("{} rows with a codebook in table '{}'", self.rows.format, self.spec.name);
        Err(Error::argument(argument, "tables whose codes, if any, are evenly spaced", got))
    }

    /// Refuses rows that are not fp32, which alone can be changed in place, for what `argument` asks.
    pub(crate) fn check_fp32(&self, argument: &str) -> Result<()> {
        if self.rows.format == RowFormat::Fp32 {
            return Ok(());
        }
        let got = format!("{} rows in table '{}'", self.rows.format, self.spec.name);
        Err(Error::argument(argument, "tables of fp32 rows", got))
    }

    /// Cache lines of a row.
    pub(crate) fn row_lines(&self) -> usize {
        self.rows.format.row_bytes(self.spec.dim).div_ceil(64)
    }

    pub(crate) fn memory(&self) -> TableMemory {
        const PAGE: usize = 4096;
        let wasted = |bytes: usize| bytes.next_multiple_of(PAGE) - bytes;
        let (payload, scales) = (self.rows.elements.bytes(), self.rows.scales.bytes());
        let cache = self.rows.cache.iter().flat_map(Cache::memory);
        let state = self.state.iter().chain([&self.rows.low]);
        let of_rest: usize = cache.clone().chain(state.clone()).map(|part| wasted(part.bytes())).sum();
        let (cache, state) = (cache.map(Memory::bytes).sum(), state.map(Memory::bytes).sum());
        let pages = wasted(payload) + wasted(scales) + of_rest;
        let overhead = pages + size_of::<Self>() + self.spec.name.len();
        TableMemory { payload, scales, cache, state, overhead }
    }
}
