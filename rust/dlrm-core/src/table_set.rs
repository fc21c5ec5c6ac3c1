//! A set of tables and the features that look them up: what is known before the first call.

use crate::guarded::Guarded;
use crate::memory::Memory;
use crate::optimizers::Kind;
use crate::table::{Table, TableMemory, TableSpec};
use crate::{Bags, Context, Error, Pooling, Result};

/// One input of the model: ids that look up one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The table, by its place in the set; several features may share one.
    pub table: usize,
    /// How a bag becomes one output row.
    pub pooling: Pooling,
    /// An id that is left out of every bag and never trained; where nothing is pooled it is looked up like any other.
    pub padding: Option<usize>,
}

/// Embedding tables that are looked up and trained together.
pub struct TableSet {
    pub(crate) specs: Vec<TableSpec>,
    pub(crate) features: Vec<Feature>,
    /// First output column of each feature, then the number of columns.
    columns: Vec<usize>,
    pub(crate) pooled: bool,
    pub(crate) inner: Guarded<Inner>,
}

/// What calls read and write.
pub(crate) struct Inner {
    pub(crate) tables: Vec<Table>,
    pub(crate) optimizer: Option<Kind>,
}

/// Where a feature's output rows are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    start: usize,
    stride: usize,
}

impl Slot {
    /// Where the output row of a unit (a bag; an id where nothing is pooled) begins.
    #[inline(always)]
    pub(crate) fn at(self, unit: usize) -> usize {
        self.start + unit * self.stride
    }
}

impl TableSet {
    /// Zeroed tables.
    pub fn new(specs: Vec<TableSpec>, features: Vec<Feature>, ctx: &Context) -> Result<Self> {
        for (f, feature) in features.iter().enumerate() {
            check_feature(f, *feature, &specs)?;
        }
        let pooled = features.iter().any(|f| f.pooling != Pooling::None);
        if pooled && features.iter().any(|f| f.pooling == Pooling::None) {
            return Err(Error::argument("features", "all pooled or none", "a mixture"));
        }
        let mut columns = vec![0];
        for feature in &features {
            columns.push(columns[columns.len() - 1] + specs[feature.table].dim);
        }
        let tables = specs.iter().map(|spec| Table::new(spec.clone(), ctx));
        let inner = Inner { tables: tables.collect::<Result<_>>()?, optimizer: None };
        Ok(Self { specs, features, columns, pooled, inner: Guarded::new(inner) })
    }

    /// What the tables are.
    #[must_use]
    pub fn specs(&self) -> &[TableSpec] {
        &self.specs
    }

    /// What looks them up.
    #[must_use]
    pub fn features(&self) -> &[Feature] {
        &self.features
    }

    /// The optimizer of [`TableSet::update`].
    #[must_use]
    pub fn optimizer(&self) -> Option<Kind> {
        self.inner.read(|inner| inner.optimizer)
    }

    /// Chooses the optimizer of [`TableSet::update`], once, and gives every table zeroed state for it.
    pub fn set_optimizer(&self, kind: Kind, ctx: &Context) -> Result<()> {
        self.inner.write(|inner| {
            if let Some(chosen) = inner.optimizer {
                return Err(Error::argument(
                    "optimizer",
                    "to be chosen once",
                    format_args!("{chosen}, then {kind}"),
                ));
            }
            let states = inner.tables.iter().map(|table| table.new_state(kind, ctx));
            let states = states.collect::<Result<Vec<_>>>()?;
            for (table, state) in inner.tables.iter_mut().zip(states) {
                table.state = state;
            }
            inner.optimizer = Some(kind);
            Ok(())
        })
    }

    /// Calls `f` with the rows of a table, `(N, D)`, while no other call reads or writes the set.
    pub fn write<R>(&self, table: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        self.memory_mut(table, |t| &mut t.weights, f)
    }

    /// Calls `f` with the optimizer state of a table, `(N, Kind::state_len(D))`, likewise.
    pub fn write_state<R>(&self, table: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        self.memory_mut(table, |t| &mut t.state, f)
    }

    fn memory_mut<R>(
        &self,
        table: usize,
        memory: impl FnOnce(&mut Table) -> &mut Memory,
        f: impl FnOnce(&mut [f32]) -> R,
    ) -> R {
        self.inner.write(|inner| f(memory(&mut inner.tables[table]).as_mut_slice()))
    }

    /// Bytes of every table.
    #[must_use]
    pub fn memory_report(&self) -> Vec<TableMemory> {
        self.inner.read(|inner| inner.tables.iter().map(Table::memory).collect())
    }

    /// Elements of the output of a call.
    #[must_use]
    pub fn output_len(&self, bags: &Bags) -> usize {
        if self.pooled {
            bags.batch * self.columns[self.features.len()]
        } else {
            let lens = (0..self.features.len()).map(|f| bags.feature_bounds(f).len() * self.dim(f));
            lens.sum()
        }
    }

    /// Where each feature's output rows are.
    pub(crate) fn slots(&self, bags: &Bags) -> Vec<Slot> {
        let mut start = 0;
        let slot = |f: usize| {
            if self.pooled {
                return Slot { start: self.columns[f], stride: self.columns[self.features.len()] };
            }
            let slot = Slot { start, stride: self.dim(f) };
            start += bags.feature_bounds(f).len() * slot.stride;
            slot
        };
        (0..self.features.len()).map(slot).collect()
    }

    pub(crate) fn dim(&self, feature: usize) -> usize {
        self.specs[self.features[feature].table].dim
    }

    /// Refuses bags made for another number of features.
    pub(crate) fn check_bags(&self, bags: &Bags) -> Result<()> {
        if bags.features == self.features.len() {
            return Ok(());
        }
        let expected = format!("bags of {} features", self.features.len());
        Err(Error::argument("bags", expected, bags.features))
    }

    /// Refuses a buffer that is not of the output's size.
    pub(crate) fn check_len(&self, argument: &str, len: usize, bags: &Bags) -> Result<()> {
        let expected = self.output_len(bags);
        if len == expected {
            return Ok(());
        }
        Err(Error::argument(argument, format_args!("{expected} elements"), len))
    }

    /// The error for the bad id at `position`.
    pub(crate) fn bad_id(&self, bags: &Bags, position: usize) -> Error {
        let bag = bags.bag_of(position);
        let feature = bag / bags.batch;
        let spec = &self.specs[self.features[feature].table];
        let within =
            if self.pooled { bag % bags.batch } else { position - bags.feature_bounds(feature).start };
        Error::Id {
            position,
            id: bags.ids.get(position),
            table: spec.name.clone(),
            rows: spec.rows,
            feature,
            bag: within,
        }
    }
}

fn check_feature(f: usize, feature: Feature, specs: &[TableSpec]) -> Result<()> {
    let Some(spec) = specs.get(feature.table) else {
        let expected = format!("a table below {}", specs.len());
        return Err(Error::argument(format!("features[{f}]"), expected, feature.table));
    };
    match feature.padding {
        Some(padding) if padding >= spec.rows => {
            let expected = format!("a row of table '{}', below {}", spec.name, spec.rows);
            let argument = format!("padding_idx of features[{f}]");
            Err(Error::argument(argument, expected, padding))
        }
        _ => Ok(()),
    }
}
