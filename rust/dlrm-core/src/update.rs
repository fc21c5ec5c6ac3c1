//! Update: an optimizer run on the rows that a call touched.

use crate::bags::Bags;
use crate::gradient::{Backward, Gradient};
use crate::optimizers::{Kind, Optimizer};
use crate::overlap::{Overlap, Part};
use crate::prepared::Prepared;
use crate::table_set::TableSet;
use crate::{Context, Error, Result};

impl TableSet {
    /// Sums the gradients of every touched row of every trainable table, then runs `optimizer` once on the row.
    ///
    /// The optimizer is of the kind chosen by [`TableSet::set_optimizer`]. Everything is checked before the first write;
    /// once writing has begun the call is not ended by [`Context::poll`].
    pub fn update(
        &self,
        bags: &Bags,
        gradient: &Gradient,
        optimizer: &Optimizer,
        ctx: &Context,
    ) -> Result<()> {
        self.check_kind(optimizer)?;
        let prepared = self.prepare(bags, gradient.trainable, ctx)?;
        self.run_optimizer(&prepared.backward(self, gradient)?, gradient, optimizer, ctx)
    }

    /// [`TableSet::update`] of a prepared call: of all its rows, or of those on one side of its overlap with another.
    pub fn update_prepared(
        &self,
        prepared: &Prepared,
        part: Option<(&Overlap, Part)>,
        gradient: &Gradient,
        optimizer: &Optimizer,
        ctx: &Context,
    ) -> Result<()> {
        self.check_kind(optimizer)?;
        let backward = prepared.backward(self, gradient)?;
        let occurrences = part.map_or(backward.occurrences, |(overlap, part)| overlap.occurrences(part));
        self.run_optimizer(&Backward { occurrences, ..backward }, gradient, optimizer, ctx)
    }

    fn check_kind(&self, optimizer: &Optimizer) -> Result<()> {
        if self.optimizer() == Some(optimizer.kind()) {
            return Ok(());
        }
        let expected = self.optimizer().map_or("a set with one chosen", Kind::name);
        Err(Error::argument("optimizer", expected, optimizer.kind()))
    }

    fn run_optimizer(
        &self,
        backward: &Backward,
        gradient: &Gradient,
        optimizer: &Optimizer,
        ctx: &Context,
    ) -> Result<()> {
        self.tables.write(|tables| {
            let mut trained = tables.iter().zip(gradient.trainable).filter(|(_, trainable)| **trainable);
            trained.try_for_each(|(table, _)| table.check_fp32("trainable"))?;
            let tables = tables.iter_mut().zip(gradient.trainable);
            let targets: Vec<_> =
                tables.map(|(table, &trainable)| trainable.then(|| table.target())).collect();
            match optimizer {
                Optimizer::Sgd(rule) => backward.apply(&targets, rule, ctx),
                Optimizer::Adagrad(rule) => backward.apply(&targets, rule, ctx),
                Optimizer::RowWiseAdagrad(rule) => backward.apply(&targets, rule, ctx),
            }
        })?
    }
}
