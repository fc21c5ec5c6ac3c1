//! One embedding table: its rows and the state that an optimizer keeps beside them.

use std::fmt;

use crate::disjoint::Disjoint;
use crate::kernels::touched::Target;
use crate::memory::Memory;
use crate::optimizers::Kind;
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
    /// How a row is stored.
    pub format: RowFormat,
}

/// Elements of a row at most, so that sizes of outputs do not overflow.
const MAX_DIM: usize = 1 << 31;

impl TableSpec {
    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> u128 {
        self.rows as u128 * self.format.row_bytes(self.dim) as u128
    }

    /// Bytes of the state of an optimizer of this kind.
    pub(crate) fn state_bytes(&self, kind: Kind) -> u128 {
        self.rows as u128 * kind.state_len(self.dim) as u128 * size_of::<f32>() as u128
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
    /// Of its rows.
    pub payload: usize,
    /// Of its optimizer state.
    pub state: usize,
    /// Of the rest: what pages waste, and the engine's own description.
    pub overhead: usize,
}

/// An embedding table.
pub(crate) struct Table {
    pub(crate) spec: TableSpec,
    pub(crate) weights: Memory,
    pub(crate) state: Memory,
}

impl Table {
    /// Zeroed rows and no state.
    pub(crate) fn new(spec: TableSpec, ctx: &Context) -> Result<Self> {
        if spec.dim == 0 {
            let argument = format!("embedding_dim of table '{}'", spec.name);
            return Err(Error::argument(argument, "at least 1", 0));
        }
        if spec.dim > MAX_DIM {
            let argument = format!("embedding_dim of table '{}'", spec.name);
            return Err(Error::argument(argument, format_args!("at most {MAX_DIM}"), spec.dim));
        }
        let what = spec.to_string();
        Ok(Self {
            weights: Memory::zeroed(spec.rows, spec.dim, &what, ctx)?,
            state: Memory::zeroed(0, 0, &what, ctx)?,
            spec,
        })
    }

    /// Zeroed state for an optimizer of this kind.
    pub(crate) fn new_state(&self, kind: Kind, ctx: &Context) -> Result<Memory> {
        let what = format!("{kind} state of table '{}'", self.spec.name);
        Memory::zeroed(self.spec.rows, kind.state_len(self.spec.dim), &what, ctx)
    }

    /// All rows and their state, for an optimizer to change.
    pub(crate) fn target(&mut self) -> Target<'_> {
        let dim = self.spec.dim;
        Target {
            dim,
            state_len: self.state.as_slice().len() / self.spec.rows.max(1),
            weights: Disjoint::new(self.weights.as_mut_slice()),
            state: Disjoint::new(self.state.as_mut_slice()),
            rows: None,
        }
    }

    pub(crate) fn memory(&self) -> TableMemory {
        const PAGE: usize = 4096;
        let wasted = |bytes: usize| bytes.next_multiple_of(PAGE) - bytes;
        let (payload, state) = (self.weights.bytes(), self.state.bytes());
        TableMemory {
            payload,
            state,
            overhead: wasted(payload) + wasted(state) + size_of::<Self>() + self.spec.name.len(),
        }
    }
}
