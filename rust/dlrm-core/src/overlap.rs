//! The overlap of two calls: the rows that an update of the first changes and a lookup of the second reads.
//!
//! It parts the first call's rows and, if that is wanted, the second call's bags, each into those with the overlap and
//! those without (the bags of a feature where few are without count as with it, and so do all rows and bags of a table
//! with a cache, whose update may move rows that neither call touches). The second call's bags without can be looked up
//! before the first call is updated, and the first call's rows without can be updated after the second is looked up; the
//! result has the same bits as when all is done in turn:
//!
//! ```text
//! lookup the second's bags APART   | in any order
//! update the first's rows SHARED   |
//! lookup the second's bags SHARED  (after the update of SHARED)
//! update the first's rows APART    (at any time before a third call is looked up)
//! ```

use crate::bags::{Bags, Id, with_ids};
use crate::lookup::{Lookup, Output, Place};
use crate::occurrences::Occurrences;
use crate::own_bags::OwnBags;
use crate::pieces::{self, Size};
use crate::prepared::Prepared;
use crate::row_filter::RowFilter;
use crate::rows::with_rows;
use crate::sides::sides;
use crate::table_set::TableSet;
use crate::{Context, Error, Result, named, threads};

/// A side of an [`Overlap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// With the overlap: rows that both calls touch; bags that have such a row.
    Shared,
    /// Without it.
    Apart,
}

impl Part {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Shared, Self::Apart];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Apart => "apart",
        }
    }
}

impl std::str::FromStr for Part {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("part", Self::ALL, Self::name, name)
    }
}

/// Two calls, parted by the rows that both touch. See [`TableSet::overlap`].
pub struct Overlap {
    /// Of the first call, by [`Part`].
    occurrences: [Occurrences; 2],
    /// The bags of each feature of the second call.
    features: Vec<FeatureBags>,
    /// Ids and elements of the output of the second call.
    ids: usize,
    output_len: usize,
}

impl Overlap {
    pub(crate) const fn occurrences(&self, part: Part) -> &Occurrences {
        &self.occurrences[part as usize]
    }
}

/// The bags of a feature of the second call.
enum FeatureBags {
    /// All of them on one side.
    Whole(Part),
    /// By [`Part`].
    Parted([SomeBags; 2]),
}

/// A feature is parted if bags apart have at least this share of its ids. Below it, what an early lookup saves is less
/// than what it costs to put the ids side by side.
const PARTED_FROM: f64 = 0.25;

/// What memory is for that parts bags.
const WHAT: &str = "the overlap of two calls";

/// Some bags of a feature.
struct SomeBags {
    own: OwnBags,
    /// The output row of each.
    rows: Vec<usize>,
}

impl TableSet {
    /// Parts `first` and `second` by the rows of trainable tables that both touch; `bags` are the second's, and count
    /// as with the overlap, all of them, unless `parts_bags`.
    ///
    /// The features must be pooled.
    pub fn overlap(
        &self,
        first: &Prepared,
        second: &Prepared,
        bags: &Bags,
        parts_bags: bool,
        ctx: &Context,
    ) -> Result<Overlap> {
        self.check_bags(bags)?;
        if !self.pooled {
            return Err(Error::argument("features", "pooled ones", "pooling none"));
        }
        if (second.ids, second.output_len) != (bags.len(), self.output_len(bags)) {
            let expected = format!("the second call's, of {} ids", second.ids);
            return Err(Error::argument("bags", expected, format_args!("{} ids", bags.len())));
        }
        let wanted = second.filters(ctx)?;
        let cached: Vec<_> =
            self.tables.read(|tables| tables.iter().map(|one| one.rows.cache.is_some()).collect())?;
        let by: Vec<_> =
            wanted.iter().zip(&cached).map(|(filter, cached)| (!cached).then_some(filter)).collect();
        let occurrences = first.occurrences.part(&by, ctx)?;
        let features = if parts_bags {
            let updated = first.filters(ctx)?;
            let parted =
                threads::map(ctx, self.features.len(), bags.len(), |f| match self.features[f].table {
                    table if cached[table] => Ok(FeatureBags::Whole(Part::Shared)),
                    table => with_ids!(bags.ids, |ids| FeatureBags::new(bags, f, ids, &updated[table])),
                })?;
            parted.into_iter().collect::<Result<_>>()?
        } else {
            self.features.iter().map(|_| FeatureBags::Whole(Part::Shared)).collect()
        };
        Ok(Overlap { occurrences, features, ids: second.ids, output_len: second.output_len })
    }

    /// [`TableSet::lookup`] of the second call's bags on one side of an overlap: the other output rows are left as they
    /// are. `bags` are the second call's.
    pub fn lookup_part(
        &self,
        overlap: &Overlap,
        part: Part,
        bags: &Bags,
        out: Output,
        argmax: Option<&mut [i32]>,
        ctx: &Context,
    ) -> Result<()> {
        let lens = [
            ("bags", bags.len(), overlap.ids, "ids"),
            ("out", out.len(), overlap.output_len, "elements"),
            (
                "argmax",
                argmax.as_ref().map_or(overlap.output_len, |a| a.len()),
                overlap.output_len,
                "elements",
            ),
        ];
        self.check_bags(bags)?;
        self.check_weights(bags)?;
        for (argument, len, expected, what) in lens {
            if len != expected {
                return Err(Error::argument(argument, format_args!("{expected} {what}"), len));
            }
        }
        let parted: Vec<_> = overlap.features.iter().map(|feature| feature.parted(part)).collect();
        let parted = parted.into_iter().map(|some| some.map(|some| some.own.bags()).transpose());
        let parted = parted.collect::<Result<Vec<_>>>()?;
        let call = Lookup::new(self, out, argmax);
        let level = ctx.level;
        self.tables.read(|tables| {
            let size = |(f, feature): (usize, &FeatureBags)| match feature {
                FeatureBags::Whole(whole) if *whole == part => {
                    self.size(f, bags.batch, bags.feature_bounds(f).len(), tables)
                }
                FeatureBags::Whole(_) => Size { units: 0, lines: 0 },
                FeatureBags::Parted(bags) => {
                    let some = &bags[part as usize];
                    self.size(f, some.rows.len(), some.own.ids.len(), tables)
                }
            };
            let sizes: Vec<_> = overlap.features.iter().enumerate().map(size).collect();
            pieces::for_each(ctx, &sizes, |feature, units| {
                let table = &tables[self.features[feature].table];
                let (row_lines, slot) = (table.row_lines(), self.column(feature));
                let whole = Place { bags, feature, row_lines, first: bags.first_of(feature, true), slot };
                with_rows!(table.rows.as_ref(), |rows| match overlap.features[feature]
                    .parted(part)
                    .zip(parted[feature].as_ref())
                {
                    Some((some, bags)) => {
                        let place = Place { bags, first: 0, slot: slot.of_rows(&some.rows), ..whole };
                        call.piece(level, rows, place, units);
                    }
                    None => call.piece(level, rows, whole, units),
                });
            })
        })??;
        self.refuse_bad_id(bags, call.bad.into_inner())
    }
}

impl FeatureBags {
    /// Bags of a feature that is parted.
    fn parted(&self, part: Part) -> Option<&SomeBags> {
        match self {
            Self::Whole(_) => None,
            Self::Parted(bags) => Some(&bags[part as usize]),
        }
    }

    /// `updated` has the rows that the first call touches.
    fn new<I: Id>(bags: &Bags, feature: usize, ids: &[I], updated: &RowFilter) -> Result<Self> {
        let positions = bags.feature_bounds(feature);
        if bags.feature_has_one_id_each(feature) {
            let (ids, weights) = (&ids[positions.clone()], bags.weights.map(|weights| &weights[positions]));
            let sides = sides(ids.iter().map(|id| updated.may_have(id.row())).enumerate(), WHAT)?;
            let apart_ids = sides[Part::Apart as usize].len();
            let own = |rows: &[usize]| OwnBags::of_one_id(rows, ids, weights);
            return Ok(Self::of(sides, apart_ids, ids.len(), own));
        }
        let mut starts = vec![0; bags.batch + 1];
        bags.starts(feature * bags.batch, &mut starts);
        // All ids of a bag are asked, without an early end: answers come faster than branches can be foreseen.
        let any = |bag: &[usize]| {
            ids[bag[0]..bag[1]].iter().fold(false, |any, id| any | updated.may_have(id.row()))
        };
        let sides = sides(starts.windows(2).map(any).enumerate(), WHAT)?;
        let apart_ids = sides[Part::Apart as usize].iter().map(|&row| starts[row + 1] - starts[row]).sum();
        let own = |rows: &[usize]| OwnBags::of_rows(rows, &starts, ids, bags.weights);
        Ok(Self::of(sides, apart_ids, positions.len(), own))
    }

    /// Of bags on both sides, by [`Part`]; those apart have so many of all ids.
    fn of(sides: [Vec<usize>; 2], apart_ids: usize, ids: usize, own: impl Fn(&[usize]) -> OwnBags) -> Self {
        if sides[Part::Shared as usize].is_empty() {
            return Self::Whole(Part::Apart);
        }
        if (apart_ids as f64) < PARTED_FROM * ids as f64 {
            return Self::Whole(Part::Shared);
        }
        Self::Parted(sides.map(|rows| SomeBags { own: own(&rows), rows }))
    }
}
