//! A call made ready for its backward before the gradient is there: checked, its ids sorted by row, and the ways of
//! their gradients found.

use std::sync::OnceLock;

use crate::bags::Bags;
use crate::gradient::{Backward, Gradient};
use crate::occurrences::Occurrences;
use crate::row_filter::RowFilter;
use crate::sources::Routes;
use crate::table_set::TableSet;
use crate::{Context, Error, Result};

/// What [`TableSet::prepare`] made of a call; it does not look at the call's arrays again.
pub struct Prepared {
    pub(crate) occurrences: Occurrences,
    routes: Routes,
    trainable: Vec<bool>,
    pub(crate) ids: usize,
    pub(crate) output_len: usize,
    /// The rows of each table, for the overlaps with the calls before and after.
    filters: OnceLock<Vec<RowFilter>>,
}

impl TableSet {
    /// Checks a call, every id of it, and sorts the ids of the `trainable` tables (one flag for each table).
    pub fn prepare(&self, bags: &Bags, trainable: &[bool], ctx: &Context) -> Result<Prepared> {
        self.check_bags(bags)?;
        self.check_weights(bags)?;
        let (flags, tables) = (trainable.len(), self.specs.len());
        if flags != tables {
            let expected = format!("one flag for each of {tables} tables");
            return Err(Error::argument("trainable", expected, flags));
        }
        let source = Routes::source(self, bags);
        Ok(Prepared {
            occurrences: Occurrences::sorted(self, bags, trainable, false, source, ctx)?,
            routes: Routes::new(self, bags, source, ctx)?,
            trainable: trainable.to_vec(),
            ids: bags.len(),
            output_len: self.output_len(bags),
            filters: OnceLock::new(),
        })
    }
}

impl Prepared {
    /// The rows of each table that the call touches.
    pub(crate) fn filters(&self, ctx: &Context) -> Result<&[RowFilter]> {
        if self.filters.get().is_none() {
            let made = self.occurrences.row_filters(ctx)?;
            drop(self.filters.set(made)); // or another thread's, which are the same
        }
        Ok(self.filters.get().expect("they have been set"))
    }

    /// Checks the gradient; after this nothing can fail.
    pub(crate) fn backward<'a>(&'a self, set: &TableSet, gradient: &Gradient<'a>) -> Result<Backward<'a>> {
        if gradient.trainable != self.trainable {
            return Err(Error::argument("trainable", "the flags that the call was prepared with", "others"));
        }
        let (flags, tables) = (gradient.scale_by_frequency.len(), self.trainable.len());
        if flags != tables {
            let expected = format!("one flag for each of {tables} tables");
            return Err(Error::argument("scale_grad_by_freq", expected, flags));
        }
        let check = |name, len| {
            if len == self.output_len {
                return Ok(());
            }
            Err(Error::argument(name, format_args!("{} elements", self.output_len), len))
        };
        check("grad", gradient.output.len())?;
        let argmax = match gradient.argmax.filter(|_| set.pools_by_max()) {
            None if set.pools_by_max() => {
                return Err(Error::argument("argmax", "what lookup wrote, for max pooling", "nothing"));
            }
            argmax => argmax,
        };
        argmax.map_or(Ok(()), |argmax| check("argmax", argmax.len()))?;
        Ok(Backward {
            occurrences: &self.occurrences,
            sources: self.routes.sources(gradient.output, argmax.map(bytemuck::cast_slice)),
            by_frequency: gradient.scale_by_frequency,
            factor: gradient.factor,
        })
    }
}
