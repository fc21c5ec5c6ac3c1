//! Lookup of every feature of a call.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use crate::bags::{Bags, Id, count, excess, with_ids};
use crate::disjoint::Disjoint;
use crate::kernels::LANES;
use crate::kernels::pool::{Pool, ahead, is_near};
use crate::own_bags::OwnBags;
use crate::per_feature::PerFeature;
use crate::pieces::{self, Size};
use crate::rows::{Rows, with_rows};
use crate::table::Table;
use crate::table_set::{Feature, Slot, TableSet};
use crate::{Context, Error, Level, Result, named};

/// How a bag becomes one output row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The sum of its rows, each times its weight when there are weights.
    Sum,
    /// That sum divided by the number of ids.
    Mean,
    /// The elementwise maximum.
    Max,
    /// It does not: every id gives one output row.
    None,
}

impl Pooling {
    /// Every pooling.
    pub const ALL: [Self; 4] = [Self::Sum, Self::Mean, Self::Max, Self::None];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Mean => "mean",
            Self::Max => "max",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Pooling {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("pooling", Self::ALL, Self::name, name)
    }
}

impl TableSet {
    /// Looks up and pools every feature into `out`, in whose format the sums of single precision are stored.
    ///
    /// Pooled, `out` is `(B, W)`, features side by side; else it is `(ids, D)` of one feature after another. Every
    /// element is written. `argmax`, of the same shape, gets for max pooling the place within the bag of the id whose
    /// element was largest, -1 in an empty bag; columns of other features are left as they are.
    pub fn lookup(&self, bags: &Bags, out: Output, argmax: Option<&mut [i32]>, ctx: &Context) -> Result<()> {
        self.check_bags(bags)?;
        self.check_len("out", out.len(), bags)?;
        if let Some(argmax) = &argmax {
            self.check_len("argmax", argmax.len(), bags)?;
        }
        self.check_weights(bags)?;
        let call = Lookup::new(self, out, argmax);
        let slots = self.slots(bags);
        let level = ctx.level;
        self.tables.read(|tables| {
            pieces::for_each(ctx, &self.sizes(bags, tables), |feature, units| {
                let table = &tables[self.features[feature].table];
                let first = bags.first_of(feature, self.pooled);
                let place =
                    Place { bags, feature, row_lines: table.row_lines(), first, slot: slots[feature] };
                with_rows!(table.rows.as_ref(), |rows| call.piece(level, rows, place, units));
            })
        })??;
        self.refuse_bad_id(bags, call.bad.into_inner())
    }

    /// Refuses weights that are NaN, or that a feature's pooling has no use for.
    pub(crate) fn check_weights(&self, bags: &Bags) -> Result<()> {
        let Some(weights) = bags.weights else {
            return Ok(());
        };
        self.check_weighable()?;
        match weights.iter().position(|w| w.is_nan()) {
            None => Ok(()),
            Some(i) => Err(Error::argument(format!("per_sample_weights[{i}]"), "a number", "NaN")),
        }
    }

    /// Refuses features whose pooling has no use for weights.
    pub(crate) fn check_weighable(&self) -> Result<()> {
        let weighable = |f: &Feature| matches!(f.pooling, Pooling::Sum | Pooling::Mean);
        match self.features.iter().position(|f| !weighable(f)) {
            None => Ok(()),
            Some(f) => {
                let got = format!("pooling {} in feature {f}", self.features[f].pooling);
                Err(Error::argument("per_sample_weights", "sum or mean pooling", got))
            }
        }
    }

    /// The work of each feature: rows read and output rows written.
    pub(crate) fn sizes(&self, bags: &Bags, tables: &[Table]) -> PerFeature<Size> {
        let size = |f| {
            let ids = bags.feature_bounds(f).len();
            self.size(f, if self.pooled { bags.batch } else { ids }, ids, tables)
        };
        (0..self.features.len()).map(size).collect()
    }

    /// The work of some units of a feature, which have so many ids.
    pub(crate) fn size(&self, feature: usize, units: usize, ids: usize, tables: &[Table]) -> Size {
        let table = &tables[self.features[feature].table];
        Size { units, lines: ids * table.row_lines() + units * self.dim(feature).div_ceil(LANES) }
    }
}

/// Where a lookup's output goes, as numbers of which precision.
#[derive(Debug)]
pub enum Output<'a> {
    /// Single precision.
    Fp32(&'a mut [f32]),
    /// Half precision, to the nearest, ties to even; too large a number becomes infinite.
    Fp16(&'a mut [f16]),
    /// bfloat16, likewise.
    Bf16(&'a mut [bf16]),
}

impl Output<'_> {
    /// Elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Fp32(out) => out.len(),
            Self::Fp16(out) => out.len(),
            Self::Bf16(out) => out.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// [`Output`], shared by threads.
pub(crate) enum Outputs<'a> {
    Fp32(Disjoint<'a, f32>),
    Fp16(Disjoint<'a, u16>),
    Bf16(Disjoint<'a, u16>),
}

impl<'a> Outputs<'a> {
    fn new(out: Output<'a>) -> Self {
        match out {
            Output::Fp32(out) => Self::Fp32(Disjoint::new(out)),
            Output::Fp16(out) => Self::Fp16(Disjoint::new(bytemuck::cast_slice_mut(out))),
            Output::Bf16(out) => Self::Bf16(Disjoint::new(bytemuck::cast_slice_mut(out))),
        }
    }
}

/// One call.
pub(crate) struct Lookup<'a> {
    set: &'a TableSet,
    out: Outputs<'a>,
    argmax: Option<Disjoint<'a, f32>>,
    /// Lowest position of an id that its table does not have.
    pub(crate) bad: AtomicUsize,
}

/// The units of a feature: where their ids are, and where they go.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) bags: &'a Bags<'a>,
    pub(crate) feature: usize,
    /// Cache lines of a row.
    pub(crate) row_lines: usize,
    /// The bag of unit 0 (its id where nothing is pooled).
    pub(crate) first: usize,
    pub(crate) slot: Slot<'a>,
}

impl<'a> Lookup<'a> {
    pub(crate) fn new(set: &'a TableSet, out: Output<'a>, argmax: Option<&'a mut [i32]>) -> Self {
        let argmax = argmax.map(|a| Disjoint::new(bytemuck::cast_slice_mut(a)));
        Self { set, out: Outputs::new(out), argmax, bad: AtomicUsize::new(usize::MAX) }
    }

    /// Pools some units of a feature.
    pub(crate) fn piece<R: Rows>(&self, level: Level, rows: R, place: Place, units: Range<usize>) {
        with_ids!(place.bags.ids, |ids| self.piece_of(level, rows, place, ids, units));
    }

    /// The same, with `ids` those of `place`.
    fn piece_of<R: Rows, I: Id>(&self, level: Level, rows: R, place: Place, ids: &[I], units: Range<usize>) {
        let Feature { table, pooling, padding } = self.set.features[place.feature];
        let Place { bags, first, slot, .. } = place;
        let positions = match pooling {
            Pooling::None => first + units.start..first + units.end,
            _ => bags.bounds(first + units.start).start..bags.bounds(first + units.end - 1).end,
        };
        let padding = padding.map_or(u64::MAX, |p| p as u64);
        let is_sum = matches!(pooling, Pooling::Sum | Pooling::Mean);
        if let Some(bad) = first_bad(&ids[positions.clone()], self.set.specs[table].rows) {
            self.bad.fetch_min(positions.start + bad, Ordering::Relaxed);
        } else if is_sum && padding != u64::MAX && count(&ids[positions.clone()], padding) < positions.len() {
            // No sum looks for padding: it is left out before.
            let mut starts = vec![0; units.len() + 1];
            bags.starts(first + units.start, &mut starts);
            let own = OwnBags::without(padding, &starts, ids, bags.weights);
            let bags = &own.bags().expect("offsets that ascend");
            let place = Place { bags, first: 0, slot: slot.from(units.start), ..place };
            level.run(self.pool(rows, place, padding, &own.ids, 0..own.ids.len(), 0..units.len()));
        } else {
            level.run(self.pool(rows, place, padding, ids, positions, units));
        }
    }

    /// The kernel for some units, whose ids are at `positions`.
    fn pool<'b, R: Rows, I: Id>(
        &'b self,
        rows: R,
        place: Place<'b>,
        padding: u64,
        ids: &'b [I],
        positions: Range<usize>,
        units: Range<usize>,
    ) -> Pool<'b, R, I> {
        let Feature { table, pooling, .. } = self.set.features[place.feature];
        Pool {
            ahead: ahead(place.row_lines),
            near: is_near(rows.bytes(0).1 * self.set.specs[table].rows),
            rows,
            ids,
            positions,
            bags: place.bags,
            pooling,
            padding,
            first: place.first,
            units,
            slot: place.slot,
            out: &self.out,
            argmax: self.argmax.as_ref().filter(|_| pooling == Pooling::Max),
        }
    }
}

/// The place of the first id that is not below `rows`.
pub(crate) fn first_bad<I: Id>(ids: &[I], rows: usize) -> Option<usize> {
    // No early exit: this way the compiler looks at many at a time.
    let any = ids.iter().fold(0, |any, id| any | excess(id.row(), rows));
    (any < 0).then(|| ids.iter().position(|id| id.row() >= rows as u64)).flatten()
}
