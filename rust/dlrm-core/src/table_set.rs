//! A set of tables and the features that look them up: what is known before the first call.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::encode::{self, Encoded, Encoding};
use crate::guarded::Guarded;
use crate::memory::{Borrowed, Keeper, check_available};
use crate::optimizers::Kind;
use crate::per_feature::PerFeature;
use crate::spare::Spare;
use crate::table::{Table, TableMemory, TableSpec};
use crate::table_rows::TableRows;
use crate::{Bags, Context, Error, Pooling, Result, RowFormat};

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
    /// The features of each table.
    pub(crate) features_of: Vec<Vec<usize>>,
    /// The chosen optimizer, as its place in [`Kind::ALL`] plus one; 0 for none. Apart from the tables, so that it can be
    /// asked for without their lock, and written under it alone.
    optimizer: AtomicUsize,
    /// Whether it keeps the lower halves of bf16 rows; likewise.
    split: AtomicBool,
    pub(crate) tables: Guarded<Vec<Table>>,
}

/// Where a feature's output rows are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot<'a> {
    start: usize,
    stride: usize,
    /// The output row of each unit, where these are not all rows in their order.
    rows: Option<&'a [usize]>,
}

impl Slot<'_> {
    /// Where the output row of a unit (a bag; an id where nothing is pooled) begins.
    #[inline(always)]
    pub(crate) fn at(self, unit: usize) -> usize {
        self.start + self.rows.map_or(unit, |rows| rows[unit]) * self.stride
    }

    /// The same of the units from number `unit` on.
    pub(crate) fn from(self, unit: usize) -> Self {
        match self.rows {
            Some(rows) => Self { rows: Some(&rows[unit..]), ..self },
            None => Self { start: self.at(unit), ..self },
        }
    }

    /// The same of some units, which go into these rows.
    pub(crate) fn of_rows(self, rows: &[usize]) -> Slot<'_> {
        Slot { rows: Some(rows), ..self }
    }
}

impl TableSet {
    /// Zeroed tables.
    pub fn new(specs: Vec<TableSpec>, features: Vec<Feature>, ctx: &Context) -> Result<Self> {
        Self::with_tables(specs, features, |specs| {
            check_available(specs.iter().map(TableSpec::bytes).sum(), &describe(specs))?;
            specs.iter().map(|spec| Table::new(spec.clone(), ctx)).collect()
        })
    }

    /// Tables of rows that are there already, by their names.
    pub fn of_rows(tables: Vec<(String, TableRows)>, features: Vec<Feature>, ctx: &Context) -> Result<Self> {
        let spec = |(name, rows): &(String, TableRows)| rows.spec(name.clone());
        Self::with_tables(tables.iter().map(spec).collect(), features, |specs| {
            let rows = tables.into_iter().map(|(_, rows)| rows);
            specs.iter().zip(rows).map(|(spec, rows)| Table::of_rows(spec.clone(), rows, ctx)).collect()
        })
    }

    fn with_tables(
        specs: Vec<TableSpec>,
        features: Vec<Feature>,
        tables: impl FnOnce(&[TableSpec]) -> Result<Vec<Table>>,
    ) -> Result<Self> {
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
        let mut features_of = vec![Vec::new(); specs.len()];
        for (f, feature) in features.iter().enumerate() {
            features_of[feature.table].push(f);
        }
        let tables = Guarded::new(tables(&specs)?);
        let (optimizer, split) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Self { specs, features, columns, pooled, features_of, optimizer, split, tables })
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
        let place = self.optimizer.load(Ordering::Relaxed).checked_sub(1)?;
        Some(Kind::ALL[place])
    }

    /// Chooses the optimizer of [`TableSet::update`], once, and gives every table zeroed state for it.
    ///
    /// With `split`, the lower halves of bf16 rows are kept beside them, so that updates are of fp32 numbers; else they
    /// are rounded stochastically, as those of fp16 and of the quantized formats are. State is kept as `state`, fp32 or
    /// bf16, which is rounded stochastically, too.
    pub fn set_optimizer(&self, kind: Kind, split: bool, state: RowFormat, ctx: &Context) -> Result<()> {
        kind.check_state(state)?;
        check_available(
            self.specs.iter().map(|spec| spec.state_bytes(kind, state)).sum(),
            &format!("{kind} state of {}", describe(&self.specs)),
        )?;
        self.tables.write(|tables| {
            if let Some(chosen) = self.optimizer() {
                let got = format!("{chosen}, then {kind}");
                return Err(Error::argument("optimizer", "to be chosen once", got));
            }
            tables.iter().try_for_each(|table| table.check_trainable("optimizer"))?;
            let states = tables.iter().map(|table| table.new_state(kind, state, ctx));
            let states = states.collect::<Result<Vec<_>>>()?;
            let new_low = |Table { rows, spec, .. }: &Table| -> Result<_> {
                let mut low = rows.new_low(split, &spec.name)?;
                low.touch(ctx)?;
                Ok(low)
            };
            let lows = tables.iter().map(new_low).collect::<Result<Vec<_>>>()?;
            for (table, (memory, low)) in tables.iter_mut().zip(states.into_iter().zip(lows)) {
                (table.state, table.state_format, table.rows.low) = (memory, state, low);
            }
            self.split.store(split, Ordering::Relaxed);
            let before = Kind::ALL.iter().take_while(|&&one| one != kind);
            self.optimizer.store(before.count() + 1, Ordering::Relaxed);
            Ok(())
        })?
    }

    /// Gives the optimizer up, and its state.
    pub fn clear_optimizer(&self, ctx: &Context) -> Result<()> {
        self.tables.write(|tables| {
            for table in tables {
                (table.state, table.state_format) = (Table::no_state(ctx)?, RowFormat::Fp32);
                table.rows.low = table.rows.new_low(false, &table.spec.name)?;
            }
            self.split.store(false, Ordering::Relaxed);
            self.optimizer.store(0, Ordering::Relaxed);
            Ok(())
        })?
    }

    /// Calls `f` with the rows of a table, while no other call changes them.
    pub fn read_rows<R>(&self, table: usize, f: impl FnOnce(&TableRows) -> R) -> Result<R> {
        self.tables.read(|tables| f(&tables[table].rows))
    }

    /// Makes rows of another format of those of a table, which stay as they are.
    pub fn encode(&self, table: usize, encoding: Encoding, ctx: &Context) -> Result<Encoded> {
        self.encode_in(&mut Spare::default(), table, encoding, ctx)
    }

    /// The same, in spare memory where that is enough.
    pub fn encode_in(
        &self,
        spare: &mut Spare,
        table: usize,
        encoding: Encoding,
        ctx: &Context,
    ) -> Result<Encoded> {
        self.tables.read(|tables| {
            let Table { spec, rows, .. } = &tables[table];
            encode::encode(rows.as_ref(), spec, encoding, spare, ctx)
        })?
    }

    /// Refuses rows that [`TableSet::encode`] refuses, and makes none.
    pub fn check_encoding(&self, table: usize, encoding: Encoding, ctx: &Context) -> Result<()> {
        self.tables.read(|tables| {
            let Table { spec, rows, .. } = &tables[table];
            encode::check(rows.as_ref(), spec, encoding, ctx)
        })?
    }

    /// Puts rows of the same number and dim in the place of those of a table, and gives these back.
    ///
    /// An optimizer's state stays. Rows with a codebook are not updated, so [`TableSet::update`] refuses them.
    pub fn swap_rows(&self, table: usize, mut rows: TableRows) -> Result<TableRows> {
        self.tables.write(|tables| {
            let Table { spec, rows: present, .. } = &mut tables[table];
            let expected = (spec.rows, spec.dim);
            if (rows.rows, rows.dim) != expected {
                let argument = format!("rows of table '{}'", spec.name);
                let [expected, got] = [expected, (rows.rows, rows.dim)].map(|(n, d)| format!("{n} x {d}"));
                return Err(Error::argument(argument, expected, got));
            }
            if rows.low.bytes() == 0 {
                rows.low = rows.new_low(self.split.load(Ordering::Relaxed), &spec.name)?;
            }
            Ok(std::mem::replace(present, rows))
        })?
    }

    /// Keeps as many rows of a table of codes in fp32 from now on, those that are touched most by [`TableSet::update`]: at
    /// first none. The number is rounded up to a multiple of [`WAYS`](crate::WAYS).
    pub fn add_cache(&self, table: usize, rows: usize, ctx: &Context) -> Result<()> {
        self.tables.write(|tables| {
            let Table { spec, rows: of, .. } = &mut tables[table];
            of.add_cache(rows, &spec.name, ctx)
        })?
    }

    /// Encodes fp32 rows, `(n, D)`, by minmax in the table's own format, over those from `first` on.
    ///
    /// An error counts rows from `first`.
    pub fn write_rows(&self, table: usize, first: usize, source: &[f32], ctx: &Context) -> Result<()> {
        self.tables.write(|tables| {
            let Table { spec, rows, .. } = &mut tables[table];
            let count = source.len() / spec.dim;
            if !source.len().is_multiple_of(spec.dim)
                || first.checked_add(count).is_none_or(|end| end > spec.rows)
            {
                let expected = format!("whole rows of {} elements, up to row {}", spec.dim, spec.rows);
                let got = format!("{} elements from row {first} on", source.len());
                return Err(Error::argument(format!("rows of table '{}'", spec.name), expected, got));
            }
            let part = TableSpec { rows: count, ..spec.clone() };
            let made = TableRows::encode(source, &part, rows.encoding(), ctx)?;
            rows.overwrite(first, &made.rows);
            Ok(())
        })?
    }

    /// Calls `f` with the fp32 rows of a table, `(N, D)`, while no other call reads or writes the set.
    ///
    /// # Panics
    /// When the rows have another format.
    pub fn write<R>(&self, table: usize, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        self.tables.write(|tables| {
            assert_eq!(tables[table].rows.format, RowFormat::Fp32, "rows to write as fp32");
            f(tables[table].rows.elements.as_mut_slice())
        })
    }

    /// Calls `f` with how the optimizer state of a table is kept, the bytes of a part of it, `(N, StatePart::len(D))`, and
    /// what keeps these in memory, while no other call changes it.
    pub fn read_state<R>(
        &self,
        table: usize,
        part: usize,
        f: impl FnOnce(RowFormat, &[u8], Keeper) -> R,
    ) -> Result<R> {
        self.tables.read(|tables| {
            let Table { state, state_format, .. } = &tables[table];
            f(*state_format, state[part].as_slice(), state[part].keeper())
        })
    }

    /// The same of state in fp32 to be changed, while no other call has the set.
    ///
    /// # Panics
    /// When it is kept in another format.
    pub fn write_state<R>(&self, table: usize, part: usize, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        self.tables.write(|tables| {
            assert_eq!(tables[table].state_format, RowFormat::Fp32, "state to write as fp32");
            f(tables[table].state[part].as_mut_slice())
        })
    }

    /// The same of the lower halves of the rows, `(N, D)`, where they are kept; else nothing.
    pub fn read_low<R>(&self, table: usize, f: impl FnOnce(&[i16], Keeper) -> R) -> Result<R> {
        self.tables.read(|tables| {
            let low = &tables[table].rows.low;
            f(low.as_slice(), low.keeper())
        })
    }

    /// Puts other memory in the place of a table's optimizer state, of a part of it or of the lower halves of the rows; what
    /// it holds is the state from then on.
    pub fn put_state(&self, table: usize, part: Option<usize>, memory: Borrowed) -> Result<()> {
        self.tables.write(|tables| {
            let table = &mut tables[table];
            let present = part.map_or(&mut table.rows.low, |part| &mut table.state[part]);
            let what = format!("state of table '{}'", table.spec.name);
            *present = memory.checked(present.bytes() as u128, align_of::<f32>(), &what)?;
            Ok(())
        })?
    }

    /// Bytes of every table.
    pub fn memory_report(&self) -> Result<Vec<TableMemory>> {
        self.tables.read(|tables| tables.iter().map(Table::memory).collect())
    }

    /// Elements of the output of a call.
    #[must_use]
    pub fn output_len(&self, bags: &Bags) -> usize {
        if self.pooled {
            bags.batch.saturating_mul(self.columns[self.features.len()])
        } else {
            let lens = (0..self.features.len()).map(|f| bags.feature_bounds(f).len() * self.dim(f));
            lens.sum()
        }
    }

    /// Where each feature's output rows are.
    pub(crate) fn slots(&self, bags: &Bags) -> PerFeature<Slot<'static>> {
        let mut start = 0;
        let slot = |f: usize| {
            if self.pooled {
                return self.column(f);
            }
            let slot = Slot { start, stride: self.dim(f), rows: None };
            start += bags.feature_bounds(f).len() * slot.stride;
            slot
        };
        (0..self.features.len()).map(slot).collect()
    }

    /// The columns of a feature in the pooled output.
    pub(crate) fn column(&self, feature: usize) -> Slot<'static> {
        Slot { start: self.columns[feature], stride: self.columns[self.features.len()], rows: None }
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

    /// Refuses the bad id at `position`, if it is one: `usize::MAX` is none.
    pub(crate) fn refuse_bad_id(&self, bags: &Bags, position: usize) -> Result<()> {
        if position == usize::MAX {
            return Ok(());
        }
        let bag = bags.bag_of(position);
        let feature = bag / bags.batch;
        let spec = &self.specs[self.features[feature].table];
        let within =
            if self.pooled { bag % bags.batch } else { position - bags.feature_bounds(feature).start };
        Err(Error::Id {
            position,
            id: bags.ids.get(position),
            table: spec.name.clone(),
            rows: spec.rows,
            feature,
            bag: within,
        })
    }
}

/// Tables in messages.
fn describe(specs: &[TableSpec]) -> String {
    match specs {
        [spec] => spec.to_string(),
        _ => format!("{} tables", specs.len()),
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
