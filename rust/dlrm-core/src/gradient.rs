//! The gradient of a lookup: from output rows back to the rows of the tables.
//!
//! [`Backward`] is what every use of it shares: the checked arguments, the occurrences of every row, and where each
//! occurrence's gradient is. It is applied with a rule: an optimizer (`update`), or [`Store`], which keeps the sum.

use crate::bags::{Bags, with_ids};
use crate::disjoint::Disjoint;
use crate::kernels::dot::Dot;
use crate::kernels::pool::count;
use crate::kernels::touched::{Rule, Target, Touched};
use crate::kernels::{LANES, Simd};
use crate::lookup::Pooling;
use crate::occurrences::Occurrences;
use crate::pieces::{self, Size};
use crate::rows::with_rows;
use crate::table_set::TableSet;
use crate::{Context, Error, Result};

/// The gradient that comes from the model, and how it is to be used.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// Of the output of [`TableSet::lookup`], in its shape.
    pub output: &'a [f32],
    /// What [`TableSet::lookup`] wrote; needed when a feature pools by max.
    pub argmax: Option<&'a [i32]>,
    /// One flag for each table: whether it gets a gradient.
    pub trainable: &'a [bool],
    /// Whether the gradient of a row is divided by its occurrences in the call.
    pub scale_by_frequency: bool,
}

/// The gradient of a table: its touched rows.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseRows {
    /// The touched rows, ascending, `(U,)`.
    pub rows: Vec<i64>,
    /// Their gradients, `(U, D)`.
    pub values: Vec<f32>,
}

/// Where the gradient of every id comes from; indexed by the place in `indices`.
pub(crate) struct Sources<'a> {
    pub(crate) grad: &'a [f32],
    /// First element of the output row that the id went into.
    pub(crate) starts: Vec<usize>,
    /// By what that row's gradient is multiplied.
    pub(crate) scales: Option<Vec<f32>>,
    pub(crate) argmax: Option<&'a [f32]>,
    /// The id's place in its bag where that is pooled by max, else -1.
    pub(crate) places: Option<Vec<i32>>,
}

/// A checked backward call.
pub(crate) struct Backward<'a> {
    occurrences: Occurrences,
    sources: Sources<'a>,
    by_frequency: bool,
}

impl<'a> Backward<'a> {
    /// Checks everything; after this nothing can fail.
    pub(crate) fn new(set: &TableSet, bags: &Bags, gradient: &Gradient<'a>, ctx: &Context) -> Result<Self> {
        set.check_bags(bags)?;
        set.check_weights(bags)?;
        set.check_len("grad", gradient.output.len(), bags)?;
        let (flags, tables) = (gradient.trainable.len(), set.specs.len());
        if flags != tables {
            let expected = format!("one flag for each of {tables} tables");
            return Err(Error::argument("trainable", expected, flags));
        }
        let max = set.features.iter().any(|f| f.pooling == Pooling::Max);
        match gradient.argmax {
            Some(argmax) if max => set.check_len("argmax", argmax.len(), bags)?,
            None if max => {
                return Err(Error::argument("argmax", "what lookup wrote, for max pooling", "nothing"));
            }
            _ => {}
        }
        let argmax = gradient.argmax.filter(|_| max).map(bytemuck::cast_slice);
        Ok(Self {
            occurrences: Occurrences::sorted(set, bags, gradient.trainable, false, ctx)?,
            sources: Sources::new(set, bags, gradient.output, argmax, ctx)?,
            by_frequency: gradient.scale_by_frequency,
        })
    }

    /// Applies `rule` once to every touched row of every table that has a target.
    pub(crate) fn apply<R: Rule>(&self, targets: &[Option<Target>], rule: &R, ctx: &Context) -> Result<()> {
        apply(&self.occurrences, &self.sources, self.by_frequency, targets, rule, ctx)
    }
}

/// Applies `rule` once to every row of `occurrences` in every table that has a target.
///
/// It does not stop half-way: [`Context::poll`] is not asked.
pub(crate) fn apply<R: Rule>(
    occurrences: &Occurrences,
    sources: &Sources,
    by_frequency: bool,
    targets: &[Option<Target>],
    rule: &R,
    ctx: &Context,
) -> Result<()> {
    let size = |(t, target): (usize, &Option<Target>)| {
        let row = |target: &Target| 2 * target.dim.div_ceil(LANES) + target.state_len.div_ceil(LANES);
        let units = target.as_ref().map_or(0, |_| occurrences.of(t).len());
        Size { units, lines: units * target.as_ref().map_or(0, row) }
    };
    let sizes: Vec<_> = targets.iter().enumerate().map(size).collect();
    let level = ctx.level;
    pieces::for_each(&ctx.uninterrupted(), &sizes, |t, units| {
        let target = targets[t].as_ref().expect("others have no units");
        level.run(Touched { run: occurrences.of(t).rows_in(units), sources, target, by_frequency, rule });
    })
}

impl<'a> Sources<'a> {
    /// No gradient at all, for a rule that needs none.
    pub(crate) fn none(ids: usize) -> Self {
        Self { grad: &[], starts: vec![0; ids], scales: None, argmax: None, places: None }
    }

    fn new(
        set: &TableSet,
        bags: &Bags,
        grad: &'a [f32],
        argmax: Option<&'a [f32]>,
        ctx: &Context,
    ) -> Result<Self> {
        let ids = bags.ids.len();
        let scaled = bags.weights.is_some() || set.features.iter().any(|f| f.pooling == Pooling::Mean);
        let mut starts = vec![0; ids];
        let mut scales = scaled.then(|| vec![1.0; ids]);
        let mut places = argmax.map(|_| vec![-1; ids]);
        {
            let starts = Disjoint::new(&mut starts);
            let scales = scales.as_mut().map(|s| Disjoint::new(s));
            let places = places.as_mut().map(|p| Disjoint::new(p));
            let slots = set.slots(bags);
            let sizes = set.sizes(bags, |_| 0.25); // 8 to 16 bytes an id
            pieces::for_each(ctx, &sizes, |f, units| {
                for unit in units {
                    let ids = set.unit(bags, f, unit);
                    let start = slots[f].at(unit);
                    #[expect(unsafe_code, reason = "units are disjoint")]
                    // SAFETY: the ids of different units do not overlap, and each unit comes once.
                    unsafe {
                        starts.piece(ids.clone()).fill(start);
                        if let Some(scales) = &scales {
                            set.scales(bags, f, ids.clone(), scales.piece(ids.clone()));
                        }
                        if let Some(places) =
                            places.as_ref().filter(|_| set.features[f].pooling == Pooling::Max)
                        {
                            let own = places.piece(ids);
                            for (i, place) in (0..).zip(own) {
                                *place = i;
                            }
                        }
                    }
                }
            })?;
        }
        Ok(Self { grad, starts, scales, argmax, places })
    }
}

impl TableSet {
    /// Where the ids of a unit of a feature are.
    fn unit(&self, bags: &Bags, feature: usize, unit: usize) -> std::ops::Range<usize> {
        if self.pooled {
            return bags.bounds(feature * bags.batch + unit);
        }
        let position = bags.feature_bounds(feature).start + unit;
        position..position + 1
    }

    /// By what the gradient of a bag is multiplied for each of its ids.
    fn scales(&self, bags: &Bags, feature: usize, ids: std::ops::Range<usize>, into: &mut [f32]) {
        if let Some(weights) = bags.weights {
            into.copy_from_slice(&weights[ids.clone()]);
        }
        if self.features[feature].pooling == Pooling::Mean {
            let n = self.count(bags, feature, ids);
            for scale in into {
                *scale /= n;
            }
        }
    }

    /// How many ids of a bag are not padding, at least 1.
    fn count(&self, bags: &Bags, feature: usize, ids: std::ops::Range<usize>) -> f32 {
        let padding = self.features[feature].padding.map_or(u64::MAX, |p| p as u64);
        let count = with_ids!(bags.ids, |all| count(&all[ids], padding));
        count.max(1) as f32
    }

    /// The gradient of every trainable table, written over the zeros of `into`, `(N, D)` each.
    pub fn dense_gradient(
        &self,
        bags: &Bags,
        gradient: &Gradient,
        into: &mut [Option<&mut [f32]>],
        ctx: &Context,
    ) -> Result<()> {
        let backward = Backward::new(self, bags, gradient, ctx)?;
        for (spec, into) in self.specs.iter().zip(&*into) {
            if let Some(into) = into
                && into.len() != spec.rows * spec.dim
            {
                let expected = format!("{} x {} elements for table '{}'", spec.rows, spec.dim, spec.name);
                return Err(Error::argument("into", expected, into.len()));
            }
        }
        let targets: Vec<_> = self
            .specs
            .iter()
            .zip(into)
            .map(|(spec, into)| into.as_deref_mut().map(|into| Target::stored(into, spec.dim, None)))
            .collect();
        backward.apply(&targets, &Store, ctx)
    }

    /// The gradient of every table as its touched rows; `None` for a table that is not trainable.
    pub fn sparse_gradient(
        &self,
        bags: &Bags,
        gradient: &Gradient,
        ctx: &Context,
    ) -> Result<Vec<Option<SparseRows>>> {
        let backward = Backward::new(self, bags, gradient, ctx)?;
        let touched = |(t, &trainable): (usize, &bool)| {
            trainable.then(|| {
                let rows = backward.occurrences.of(t).rows();
                let values = vec![0.0; rows.len() * self.specs[t].dim];
                SparseRows { rows, values }
            })
        };
        let mut sparse: Vec<_> = gradient.trainable.iter().enumerate().map(touched).collect();
        let targets: Vec<_> = self
            .specs
            .iter()
            .zip(&mut sparse)
            .map(|(spec, sparse)| {
                let SparseRows { rows, values } = sparse.as_mut()?;
                Some(Target::stored(values, spec.dim, Some(rows)))
            })
            .collect();
        backward.apply(&targets, &Store, ctx)?;
        drop(targets);
        Ok(sparse)
    }

    /// The gradient of `per_sample_weights`, one element for each id: the dot product of the id's row with the gradient
    /// of its bag, divided by the ids of the bag for mean pooling; zero for a padding id.
    pub fn per_sample_weights_gradient(
        &self,
        bags: &Bags,
        output: &[f32],
        into: &mut [f32],
        ctx: &Context,
    ) -> Result<()> {
        self.check_bags(bags)?;
        self.check_weighable()?;
        self.check_len("grad", output.len(), bags)?;
        if into.len() != bags.ids.len() {
            return Err(Error::argument("into", format_args!("{} elements", bags.ids.len()), into.len()));
        }
        crate::occurrences::check_ids(self, bags, ctx)?;
        let slots = self.slots(bags);
        let into = Disjoint::new(into);
        let level = ctx.level;
        self.inner.read(|inner| {
            pieces::for_each(ctx, &self.sizes(bags, |f| self.row_lines(f)), |f, units| {
                let feature = self.features[f];
                with_rows!(&inner.tables[feature.table], |rows| with_ids!(bags.ids, |ids| {
                    level.run(Dot {
                        rows,
                        ids,
                        bags,
                        mean: feature.pooling == Pooling::Mean,
                        padding: feature.padding.map_or(u64::MAX, |p| p as u64),
                        first: f * bags.batch,
                        units,
                        slot: slots[f],
                        output,
                        into: &into,
                    });
                }));
            })
        })
    }
}

impl<'a> Target<'a> {
    /// A target for [`Store`]: all rows of a table, or the `rows` of it.
    fn stored(weights: &'a mut [f32], dim: usize, rows: Option<&'a [i64]>) -> Self {
        Self { weights: Disjoint::new(weights), state: Disjoint::new(&mut []), dim, state_len: 0, rows }
    }
}

/// Keeps the gradient itself.
struct Store;

impl Rule for Store {
    #[inline(always)]
    fn apply<S: Simd>(&self, _simd: S, weights: &mut [f32], _state: &mut [f32], gradient: &[f32]) {
        weights.copy_from_slice(gradient);
    }
}
