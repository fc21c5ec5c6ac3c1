//! Update: an optimizer run on the rows that a call touched.

use crate::bags::Bags;
use crate::gradient::{Backward, Gradient};
use crate::optimizers::{Kind, Optimizer};
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
        if self.optimizer() != Some(optimizer.kind()) {
            let expected = self.optimizer().map_or("a set with one chosen", Kind::name);
            return Err(Error::argument("optimizer", expected, optimizer.kind()));
        }
        let backward = Backward::new(self, bags, gradient, ctx)?;
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
