//! `max_norm`: looked-up rows scaled down to a norm, as `torch.embedding_renorm_` does before a lookup.

use crate::bags::Bags;
use crate::gradient;
use crate::kernels::Simd;
use crate::kernels::stochastic::Random;
use crate::kernels::touched::{Row, Rule};
use crate::occurrences::{Occurrences, Source};
use crate::sources::Sources;
use crate::table_set::TableSet;
use crate::{Context, Error, Result};

/// Scales a row whose norm exceeds `max_norm` by `max_norm / (norm + 1e-7)`.
struct Renorm {
    max_norm: f64,
    norm_type: f64,
}

impl Rule for Renorm {
    const NEEDS_GRADIENT: bool = false;

    #[inline(always)]
    fn apply<S: Simd>(&self, _simd: S, row: Row) {
        let norm = norm(row.weights, self.norm_type);
        if norm > self.max_norm {
            let factor = (self.max_norm / (norm + 1e-7)) as f32;
            for w in row.weights {
                *w *= factor;
            }
        }
    }
}

fn norm(row: &[f32], p: f64) -> f64 {
    let sizes = row.iter().map(|&x| f64::from(x).abs());
    if p.is_infinite() {
        sizes.fold(0.0, f64::max)
    } else {
        sizes.map(|x| x.powf(p)).sum::<f64>().powf(1.0 / p)
    }
}

impl TableSet {
    /// Scales every row that `bags` name, padding ids included, down to a `norm_type`-norm of `max_norm`.
    pub fn renorm(&self, bags: &Bags, max_norm: f64, norm_type: f64, ctx: &Context) -> Result<()> {
        if max_norm.is_nan() || max_norm < 0.0 {
            return Err(Error::argument("max_norm", "a number, at least 0", max_norm));
        }
        if norm_type.is_nan() || norm_type <= 0.0 {
            return Err(Error::argument("norm_type", "a number above 0", norm_type));
        }
        self.check_bags(bags)?;
        self.check_weights(bags)?; // a lookup with them follows: what it would refuse is refused before any row changes
        let every = vec![true; self.specs.len()];
        let occurrences = Occurrences::sorted(self, bags, &every, true, Source::Place, ctx)?;
        let sources = Sources::none();
        let rule = Renorm { max_norm, norm_type };
        self.tables.write(|tables| {
            tables.iter().try_for_each(|table| table.check_fp32("max_norm"))?;
            let targets: Vec<_> =
                tables.iter_mut().map(|table| Some(table.target(Random::new(0, 0, 0)))).collect();
            let by_frequency = vec![false; targets.len()];
            gradient::apply(&occurrences, &sources, &by_frequency, 1.0, &targets, ctx, |_, touched, level| {
                touched.apply(&rule, level);
            })
        })?
    }
}
