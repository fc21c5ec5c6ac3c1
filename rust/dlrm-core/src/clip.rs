//! Gradients clipped by their norm, that over all tables of a call, which is known before the first row changes.
//!
//! ```text
//! norm = the square root of the sum of squares of the gradients of all touched rows of all trainable tables
//! g *= min(1, clip_norm / (norm + 1e-6))     (torch.nn.utils.clip_grad_norm_)
//! ```
//! Gradients are those that rules get: summed over a row's occurrences, divided by these where that is asked for, times
//! the call's factor. They are summed twice, once for the norm and once for the update, and not kept in between. The
//! squares of some occurrences' rows are added up in float64 by one thread, and the sums of these blocks in their order: so
//! the norm has the same bits whoever adds.

use crate::disjoint::Disjoint;
use crate::float_environment::FloatEnvironment;
use crate::gradient::{Backward, Gradient};
use crate::hot::Hot;
use crate::kernels::LANES;
use crate::kernels::touched::{Target, Touched};
use crate::optimizers::Optimizer;
use crate::prepared::Prepared;
use crate::table_set::TableSet;
use crate::{Context, Error, Result, threads};

/// Occurrences whose rows one thread adds up.
const BLOCK: usize = 1024;

impl TableSet {
    /// By what the gradients of a prepared call are to be multiplied: [`Gradient::factor`], or less of the same sign, such
    /// that their norm is at most the `clip_norm` of the optimizers.
    ///
    /// A norm that is infinite or NaN is refused.
    pub fn clipped_factor(
        &self,
        prepared: &Prepared,
        gradient: &Gradient,
        optimizers: &[Optimizer],
        ctx: &Context,
    ) -> Result<f32> {
        let Some(clip_norm) = self.clip_norm(optimizers)? else { return Ok(gradient.factor) };
        let targets: Vec<_> = self
            .specs
            .iter()
            .zip(gradient.trainable)
            .map(|(spec, trainable)| trainable.then(|| Target::nowhere(spec.dim)))
            .collect();
        let norm = prepared.backward(self, gradient)?.squares(&targets, ctx)?.sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite { norm: norm.to_string() });
        }
        let ratio = (clip_norm / (norm + 1e-6)).min(1.0);
        Ok((f64::from(gradient.factor) * ratio) as f32)
    }

    /// The bound that the optimizers of all tables have in common, if there is one.
    fn clip_norm(&self, optimizers: &[Optimizer]) -> Result<Option<f64>> {
        let mut bounds = optimizers.iter().map(Optimizer::clip_norm);
        let Some(first) = bounds.next() else { return Ok(None) };
        match bounds.find(|bound| bound.to_bits() != first.to_bits()) {
            Some(other) => {
                let expected = "one bound for all tables, since the norm is that of all of them";
                Err(Error::argument("clip_norm", expected, format_args!("{first} and {other}")))
            }
            None => Ok((first < f64::INFINITY).then_some(first)),
        }
    }
}

impl Backward<'_> {
    /// The sum of the squares of the gradients of every table that has a target.
    fn squares(&self, targets: &[Option<Target>], ctx: &Context) -> Result<f64> {
        let Self { occurrences, sources, by_frequency, factor } = self;
        let hot = Hot::summed(occurrences, sources, targets, ctx)?;
        let mut blocks = Vec::new();
        let mut lines = 0;
        for (t, target) in targets.iter().enumerate().filter_map(|(t, target)| Some((t, target.as_ref()?))) {
            let len = occurrences.of(t).len();
            blocks.extend((0..len).step_by(BLOCK).map(|begin| (t, target, begin..len.min(begin + BLOCK))));
            lines += len * target.dim.div_ceil(LANES);
        }
        let level = ctx.level;
        let mut sums = vec![0.0; blocks.len()];
        {
            let sums = Disjoint::new(&mut sums);
            threads::for_each(ctx, blocks.len(), lines, |i| {
                let (t, target, ref block) = blocks[i];
                let run = occurrences.of(t).rows_in(block.clone());
                let (by_frequency, hot) = (by_frequency[t], hot.of(t));
                let touched = Touched { run, sources, target, by_frequency, factor: *factor, hot };
                #[expect(unsafe_code, reason = "blocks are disjoint")]
                // SAFETY: each block comes once, and has a place of its own.
                let sum = unsafe { &mut sums.piece(i..i + 1)[0] };
                *sum = touched.squares(level);
            })?;
        }
        let _standard = FloatEnvironment::standard();
        Ok(sums.iter().sum())
    }
}
