//! The gradient of a lookup: from output rows back to the rows of the tables.
//!
//! [`Backward`] is what every use of it shares: the checked arguments, the occurrences of every row, and where each
//! occurrence's gradient is (see `prepared`). It is applied with a rule: an optimizer (`update`), or [`Store`], which keeps the sum.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bags::{Bags, Id, with_ids};
use crate::disjoint::Disjoint;
use crate::hot::Hot;
use crate::kernels::dot::Dot;
use crate::kernels::touched::{PARTS, Row, Rule, Target, Touched};
use crate::kernels::{LANES, Simd};
use crate::lookup::{Pooling, first_bad};
use crate::memory::zeros;
use crate::occurrences::Occurrences;
use crate::per_feature::PerFeature;
use crate::pieces::{self, Size};
use crate::rows::{Rows, with_rows};
use crate::sources::Sources;
use crate::table_set::{Slot, TableSet};
use crate::weights::Weights;
use crate::{Context, Error, Level, Result};

/// The gradient that comes from the model, and how it is to be used.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// Of the output of [`TableSet::lookup`], in its shape.
    pub output: &'a [f32],
    /// What [`TableSet::lookup`] wrote; needed when a feature pools by max.
    pub argmax: Option<&'a [i32]>,
    /// One flag for each table: whether it gets a gradient.
    pub trainable: &'a [bool],
    /// One flag for each table: whether the gradient of a row is divided by its occurrences in the call.
    pub scale_by_frequency: &'a [bool],
    /// By what the gradient of a row is multiplied, as when the loss was scaled; 1 for nothing.
    pub factor: f32,
}

/// The gradient of a table: its touched rows.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseRows {
    /// The touched rows, ascending, `(U,)`.
    pub rows: Vec<i64>,
    /// Their gradients, `(U, D)`.
    pub values: Vec<f32>,
}

/// A checked backward call.
pub(crate) struct Backward<'a> {
    pub(crate) occurrences: &'a Occurrences,
    pub(crate) sources: Sources<'a>,
    pub(crate) by_frequency: &'a [bool],
    pub(crate) factor: f32,
}

impl Backward<'_> {
    /// Calls `apply` with all touched rows of every table that has a target, some at a time.
    ///
    /// It does not stop half-way: [`Context::poll`] is not asked.
    pub(crate) fn apply(
        &self,
        targets: &[Option<Target>],
        ctx: &Context,
        apply: impl Fn(usize, Touched, Level) + Sync,
    ) -> Result<()> {
        let Self { occurrences, sources, by_frequency, factor } = self;
        self::apply(occurrences, sources, by_frequency, *factor, targets, ctx, apply)
    }
}

/// Calls `apply` with all rows of `occurrences` in every table that has a target, some at a time.
///
/// It does not stop half-way: [`Context::poll`] is not asked.
pub(crate) fn apply(
    occurrences: &Occurrences,
    sources: &Sources,
    by_frequency: &[bool],
    factor: f32,
    targets: &[Option<Target>],
    ctx: &Context,
    apply: impl Fn(usize, Touched, Level) + Sync,
) -> Result<()> {
    let size = |(t, target): (usize, &Option<Target>)| {
        let row = |target: &Target| {
            let state: usize = target.state_len.iter().map(|len| len.div_ceil(LANES)).sum();
            2 * target.dim.div_ceil(LANES) + state
        };
        let units = target.as_ref().map_or(0, |_| occurrences.of(t).len());
        Size { units, lines: units * target.as_ref().map_or(0, row) }
    };
    let sizes: Vec<_> = targets.iter().enumerate().map(size).collect();
    let level = ctx.level;
    let hot = Hot::summed(occurrences, sources, targets, ctx)?;
    pieces::for_each(&ctx.uninterrupted(), &sizes, |t, units| {
        let target = targets[t].as_ref().expect("others have no units");
        let run = occurrences.of(t).rows_in(units);
        let (by_frequency, hot) = (by_frequency[t], hot.of(t));
        apply(t, Touched { run, sources, target, by_frequency, factor, hot }, level);
    })
}

impl TableSet {
    /// The gradient of every trainable table, written over the zeros of `into`, `(N, D)` each.
    pub fn dense_gradient(
        &self,
        bags: &Bags,
        gradient: &Gradient,
        into: &mut [Option<&mut [f32]>],
        ctx: &Context,
    ) -> Result<()> {
        let prepared = self.prepare(bags, gradient.trainable, ctx)?;
        let backward = prepared.backward(self, gradient)?;
        let expected = |t: usize| gradient.trainable[t].then(|| self.specs[t].rows * self.specs[t].dim);
        let got: Vec<_> = into.iter().map(|into| into.as_ref().map(|into| into.len())).collect();
        if !got.iter().copied().eq((0..self.specs.len()).map(expected)) {
            let expected = "rows x dim elements for each trainable table, nothing for the others";
            return Err(Error::argument("into", expected, format_args!("{got:?}")));
        }
        let targets: Vec<_> = self
            .specs
            .iter()
            .zip(into)
            .map(|(spec, into)| into.as_deref_mut().map(|into| Target::stored(into, spec.dim, None)))
            .collect();
        backward.apply(&targets, ctx, |_, touched, level| touched.apply(&Store, level))
    }

    /// The gradient of every table as its touched rows; `None` for a table that is not trainable.
    pub fn sparse_gradient(
        &self,
        bags: &Bags,
        gradient: &Gradient,
        ctx: &Context,
    ) -> Result<Vec<Option<SparseRows>>> {
        let prepared = self.prepare(bags, gradient.trainable, ctx)?;
        let backward = prepared.backward(self, gradient)?;
        let touched = |(t, &trainable): (usize, &bool)| {
            let rows = trainable.then(|| backward.occurrences.of(t).rows());
            let with_values = |rows: Vec<i64>| {
                let values = zeros(rows.len() * self.specs[t].dim, "a sparse gradient")?;
                Ok(SparseRows { rows, values })
            };
            rows.map(with_values).transpose()
        };
        let sparse = gradient.trainable.iter().enumerate().map(touched);
        let mut sparse = sparse.collect::<Result<Vec<_>>>()?;
        let targets: Vec<_> = self
            .specs
            .iter()
            .zip(&mut sparse)
            .map(|(spec, sparse)| {
                let SparseRows { rows, values } = sparse.as_mut()?;
                Some(Target::stored(values, spec.dim, Some(rows)))
            })
            .collect();
        backward.apply(&targets, ctx, |_, touched, level| touched.apply(&Store, level))?;
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
        let call = WeightsGradient {
            set: self,
            bags,
            slots: self.slots(bags),
            output,
            into: Disjoint::new(into),
            bad: AtomicUsize::new(usize::MAX),
        };
        call.run(ctx)
    }
}

/// One call of [`TableSet::per_sample_weights_gradient`].
struct WeightsGradient<'a> {
    set: &'a TableSet,
    bags: &'a Bags<'a>,
    slots: PerFeature<Slot<'static>>,
    output: &'a [f32],
    into: Disjoint<'a, f32>,
    /// Lowest position of an id that its table does not have.
    bad: AtomicUsize,
}

impl WeightsGradient<'_> {
    fn run(self, ctx: &Context) -> Result<()> {
        let (set, bags, level) = (self.set, self.bags, ctx.level);
        set.tables.read(|tables| {
            let size = |f: usize| {
                let units = bags.feature_bounds(f).len();
                Size { units, lines: units * tables[set.features[f].table].row_lines() }
            };
            let sizes: Vec<_> = (0..set.features.len()).map(size).collect();
            pieces::for_each(ctx, &sizes, |f, units| {
                let first = bags.feature_bounds(f).start;
                let positions = first + units.start..first + units.end;
                with_rows!(tables[set.features[f].table].rows.as_ref(), |rows| with_ids!(bags.ids, |ids| {
                    bags.for_each_bag(positions, |bag, positions| {
                        self.bag(level, rows, ids, f, bag, positions);
                    });
                }));
            })
        })??;
        set.refuse_bad_id(bags, self.bad.into_inner())
    }

    /// Some ids of a bag.
    fn bag<R: Rows, I: Id>(
        &self,
        level: Level,
        rows: R,
        ids: &[I],
        f: usize,
        bag: usize,
        positions: Range<usize>,
    ) {
        let feature = self.set.features[f];
        let ids = &ids[positions.clone()];
        if let Some(bad) = first_bad(ids, self.set.specs[feature.table].rows) {
            self.bad.fetch_min(positions.start + bad, Ordering::Relaxed);
            return;
        }
        let start = self.slots[f].at(self.bags.unit(f, bag));
        let mean = feature.pooling == Pooling::Mean;
        #[expect(unsafe_code, reason = "positions are disjoint")]
        // SAFETY: the positions of pieces do not overlap, and `for_each_bag` gives those of a piece one after another.
        let into = unsafe { self.into.piece(positions) };
        level.run(Dot {
            rows,
            ids,
            padding: feature.padding.map_or(u64::MAX, |p| p as u64),
            grad: &self.output[start..start + rows.dim()],
            divisor: if mean { self.set.ids_of_bag(self.bags, f, bag) } else { 1.0 },
            into,
        });
    }
}

impl<'a> Target<'a> {
    /// None of a table's rows of `dim` elements, where their gradients are only looked at.
    pub(crate) fn nowhere(dim: usize) -> Self {
        Self::stored(&mut [], dim, Some(&[]))
    }

    /// A target for [`Store`]: all rows of a table, or the `rows` of it.
    fn stored(weights: &'a mut [f32], dim: usize, rows: Option<&'a [i64]>) -> Self {
        let state = [0, 1].map(|_| Weights::Fp32(Disjoint::new(&mut [])));
        Self { weights: Weights::Fp32(Disjoint::new(weights)), state, dim, state_len: [0; PARTS], rows }
    }
}

/// Keeps the gradient itself.
struct Store;

impl Rule for Store {
    #[inline(always)]
    fn apply<S: Simd>(&self, _simd: S, row: Row) {
        row.weights.copy_from_slice(row.gradient);
    }
}
