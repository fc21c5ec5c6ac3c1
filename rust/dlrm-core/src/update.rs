//! Update: an optimizer run on the rows that a call touched.

use crate::bags::Bags;
use crate::gradient::{Backward, Gradient};
use crate::kernels::stochastic::Random;
use crate::optimizers::{Kind, Optimizer, Step};
use crate::overlap::{Overlap, Part};
use crate::prepared::Prepared;
use crate::table_set::TableSet;
use crate::{Context, Error, Result, cache};

impl TableSet {
    /// Sums the gradients of every touched row of every trainable table, then runs the table's optimizer once on the row.
    ///
    /// There is an optimizer for each table, of the kind chosen by [`TableSet::set_optimizer`]. Everything is checked
    /// before the first write; once writing has begun the call is not ended by [`Context::poll`].
    pub fn update(
        &self,
        bags: &Bags,
        gradient: &Gradient,
        optimizers: &[Optimizer],
        ctx: &Context,
    ) -> Result<()> {
        self.check_optimizers(optimizers)?;
        let prepared = self.prepare(bags, gradient.trainable, ctx)?;
        let factor = self.clipped_factor(&prepared, gradient, optimizers, ctx)?;
        let gradient = &Gradient { factor, ..*gradient };
        self.run_optimizers(&prepared.backward(self, gradient)?, gradient, optimizers, ctx)
    }

    /// [`TableSet::update`] of a prepared call: of all its rows, or of those on one side of its overlap with another.
    ///
    /// Nothing is clipped by norm here, as some rows do not tell that of all: [`TableSet::clipped_factor`] gives the factor
    /// that does.
    pub fn update_prepared(
        &self,
        prepared: &Prepared,
        part: Option<(&Overlap, Part)>,
        gradient: &Gradient,
        optimizers: &[Optimizer],
        ctx: &Context,
    ) -> Result<()> {
        self.check_optimizers(optimizers)?;
        let backward = prepared.backward(self, gradient)?;
        let occurrences = part.map_or(backward.occurrences, |(overlap, part)| overlap.occurrences(part));
        self.run_optimizers(&Backward { occurrences, ..backward }, gradient, optimizers, ctx)
    }

    fn check_optimizers(&self, optimizers: &[Optimizer]) -> Result<()> {
        if optimizers.len() != self.specs.len() {
            let expected = format!("one for each of {} tables", self.specs.len());
            return Err(Error::argument("optimizers", expected, optimizers.len()));
        }
        let Some(other) = optimizers.iter().find(|one| self.optimizer() != Some(one.kind())) else {
            return Ok(());
        };
        let expected = self.optimizer().map_or("a set with one chosen", Kind::name);
        Err(Error::argument("optimizer", expected, other.kind()))
    }

    fn run_optimizers(
        &self,
        backward: &Backward,
        gradient: &Gradient,
        optimizers: &[Optimizer],
        ctx: &Context,
    ) -> Result<()> {
        self.tables.write(|tables| {
            let mut trained = tables.iter().zip(gradient.trainable).filter(|(_, trainable)| **trainable);
            trained.try_for_each(|(table, _)| table.check_trainable("trainable"))?;
            let random = |t: usize| {
                let Step { number, seed } = optimizers[t].step();
                Random::new(seed, number, t)
            };
            let targets = tables.iter_mut().enumerate();
            let targets: Vec<_> =
                targets.map(|(t, table)| gradient.trainable[t].then(|| table.target(random(t)))).collect();
            backward.apply(&targets, ctx, |t, touched, level| optimizers[t].apply(touched, level))?;
            cache::follow(backward.occurrences, &targets, ctx)
        })?
    }
}
