//! What memory allows: the same rows as a lookup's, read and left unused.
//!
//! Benches hold a lookup against it. It knows bags and pieces as `lookup` does, and pools nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::bags::{Bags, Id, with_ids};
use crate::kernels::touch::Touch;
use crate::lookup::first_bad;
use crate::pieces;
use crate::table::Table;
use crate::table_set::TableSet;
use crate::{Context, Level, Pooling, Result};

impl TableSet {
    /// Reads a byte of every cache line of the rows that [`TableSet::lookup`] would read: in the same order, with the
    /// same pieces, threads, prefetches and checks. The sum of these bytes tells nothing but that they were read.
    ///
    /// ```
    /// # use dlrm_core::{Bags, Context, Feature, Ids, Offsets, Pooling, RowFormat, TableSet, TableSpec};
    /// # let ctx = Context::default();
    /// let spec = TableSpec { name: "ads".into(), rows: 4, dim: 2, format: RowFormat::Fp32 };
    /// let feature = Feature { table: 0, pooling: Pooling::Sum, padding: None };
    /// let set = TableSet::new(vec![spec], vec![feature], &ctx)?;
    /// let bags = Bags::new(Ids::I64(&[1, 3, 2]), Offsets::I64(&[0, 2]), 1, 2, None)?;
    /// assert_eq!(set.touch(&bags, &ctx)?, 0);
    /// # Ok::<(), dlrm_core::Error>(())
    /// ```
    pub fn touch(&self, bags: &Bags, ctx: &Context) -> Result<u64> {
        self.check_bags(bags)?;
        let level = ctx.level;
        let (sum, bad) = (AtomicU64::new(0), AtomicUsize::new(usize::MAX));
        self.tables.read(|tables| {
            pieces::for_each(ctx, &self.sizes(bags, tables), |feature, units| {
                let table = &tables[self.features[feature].table];
                let positions = self.positions(bags, feature, units);
                let touched = with_ids!(bags.ids, |ids| touch(level, table, &ids[positions.clone()]));
                match touched {
                    Ok(bytes) => drop(sum.fetch_add(bytes, Ordering::Relaxed)),
                    Err(place) => drop(bad.fetch_min(positions.start + place, Ordering::Relaxed)),
                }
            })
        })??;
        self.refuse_bad_id(bags, bad.into_inner())?;
        Ok(sum.into_inner())
    }

    /// Where the ids of a run of a feature's units are.
    fn positions(&self, bags: &Bags, feature: usize, units: Range<usize>) -> Range<usize> {
        if self.features[feature].pooling == Pooling::None {
            let first = bags.feature_bounds(feature).start;
            return first + units.start..first + units.end;
        }
        let first = feature * bags.batch;
        bags.bounds(first + units.start).start..bags.bounds(first + units.end - 1).end
    }
}

/// The sum of what was touched, or the place of the first bad id.
fn touch<I: Id>(level: Level, table: &Table, ids: &[I]) -> std::result::Result<u64, usize> {
    match first_bad(ids, table.spec.rows) {
        Some(place) => Err(place),
        None => Ok(level.run(Touch {
            elements: table.rows.elements.as_slice(),
            row_bytes: table.rows.format.row_bytes(table.spec.dim),
            scales: table.rows.scales.as_slice(),
            pair_bytes: table.rows.pair_bytes(),
            ids,
        })),
    }
}
