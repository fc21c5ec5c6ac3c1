//! The ids of a call and how they fall into bags.
//!
//! Ids are feature-major: bag `b` of feature `f` is number `f * batch + b`, and holds the ids between two offsets.
//! [`Bags::new`] checks the offsets; ids are checked against their tables where they are used.

use std::ops::Range;

use crate::per_feature::PerFeature;
use crate::{Error, Result};

/// An integer type of ids.
pub(crate) trait Id: Copy + Send + Sync {
    /// The row it names; a negative id becomes a number above any number of rows.
    fn row(self) -> u64;
}

impl Id for i32 {
    #[inline(always)]
    fn row(self) -> u64 {
        i64::from(self).row()
    }
}

impl Id for i64 {
    #[inline(always)]
    fn row(self) -> u64 {
        self as u64
    }
}

/// Runs `$body` with `$typed` the slice that `$ids` holds, whatever its type.
macro_rules! with_ids {
    ($ids:expr, |$typed:ident| $body:expr) => {
        match $ids {
            $crate::bags::Ids::I32($typed) => $body,
            $crate::bags::Ids::I64($typed) => $body,
        }
    };
}
pub(crate) use with_ids;

/// The ids of a call.
#[derive(Clone, Copy, Debug)]
pub enum Ids<'a> {
    /// 32-bit ids.
    I32(&'a [i32]),
    /// 64-bit ids.
    I64(&'a [i64]),
}

impl Ids<'_> {
    /// How many.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::I32(ids) => ids.len(),
            Self::I64(ids) => ids.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn get(&self, position: usize) -> i64 {
        match self {
            Self::I32(ids) => i64::from(ids[position]),
            Self::I64(ids) => ids[position],
        }
    }
}

/// A negative number unless `row` is below `rows`, to be gathered by `|` over many rows: the vectors that every processor has
/// compare no numbers of 64 bits.
#[inline(always)]
pub(crate) fn excess(row: u64, rows: usize) -> i64 {
    let row = row as i64;
    row | (rows as i64 - 1).wrapping_sub(row) // where `row` is not negative, no difference overflows
}

/// How many of `ids` are not `padding`.
#[inline(always)]
pub(crate) fn count<I: Id>(ids: &[I], padding: u64) -> usize {
    let mut count = 0;
    for id in ids {
        count += usize::from(id.row() != padding);
    }
    count
}

/// Where bags begin.
#[derive(Clone, Copy, Debug)]
pub enum Offsets<'a> {
    /// The first id of every bag, with or without the end of the last; 32-bit.
    I32(&'a [i32]),
    /// The same, 64-bit.
    I64(&'a [i64]),
    /// Every bag holds as many ids.
    Even,
}

/// The ids of a call, fallen into bags.
#[derive(Clone, Debug)]
pub struct Bags<'a> {
    pub(crate) ids: Ids<'a>,
    offsets: Offsets<'a>,
    pub(crate) features: usize,
    pub(crate) batch: usize,
    /// Where each feature's ids begin, and where the last one's end.
    feature_starts: PerFeature<usize>,
    /// A factor for every id.
    pub(crate) weights: Option<&'a [f32]>,
}

impl<'a> Bags<'a> {
    /// Checks offsets and lengths.
    ///
    /// `offsets` has `features * batch` elements or one more; `per_sample_weights` has one for every id.
    pub fn new(
        ids: Ids<'a>,
        offsets: Offsets<'a>,
        features: usize,
        batch: usize,
        per_sample_weights: Option<&'a [f32]>,
    ) -> Result<Self> {
        let bags = features
            .checked_mul(batch)
            .filter(|&bags| bags < usize::MAX)
            .ok_or_else(|| Error::argument("batch_size", "features * batch_size below 2^64 - 1", batch))?;
        match offsets {
            Offsets::I32(offsets) => check_offsets(offsets, features, batch, ids.len())?,
            Offsets::I64(offsets) => check_offsets(offsets, features, batch, ids.len())?,
            Offsets::Even if bags == 0 && ids.is_empty() => {}
            Offsets::Even if bags > 0 && ids.len().is_multiple_of(bags) => {}
            Offsets::Even => {
                let expected = format!("as many ids in each of {bags} bags, since there are no offsets");
                return Err(Error::argument("indices", expected, format_args!("{} ids", ids.len())));
            }
        }
        if let Some(weights) = per_sample_weights
            && weights.len() != ids.len()
        {
            let expected = format!("one for each of {} ids", ids.len());
            return Err(Error::argument("per_sample_weights", expected, weights.len()));
        }
        let mut made = Self {
            ids,
            offsets,
            features,
            batch,
            feature_starts: PerFeature::new(),
            weights: per_sample_weights,
        };
        let start = |f: usize| if batch == 0 { 0 } else { made.bounds(f * batch).start };
        made.feature_starts = (0..features).map(start).chain([ids.len()]).collect();
        Ok(made)
    }

    /// How many ids.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The bag of the first unit of `feature`; its id where nothing is pooled.
    pub(crate) fn first_of(&self, feature: usize, pooled: bool) -> usize {
        if pooled { feature * self.batch } else { self.feature_starts[feature] }
    }

    /// Where the ids of bag number `bag` are.
    #[inline(always)]
    pub(crate) fn bounds(&self, bag: usize) -> Range<usize> {
        match self.offsets {
            Offsets::I32(offsets) => self.bounds_in(offsets, bag),
            Offsets::I64(offsets) => self.bounds_in(offsets, bag),
            Offsets::Even => {
                let len = self.ids.len() / (self.features * self.batch);
                bag * len..(bag + 1) * len
            }
        }
    }

    #[inline(always)]
    fn bounds_in<I: Id>(&self, offsets: &[I], bag: usize) -> Range<usize> {
        let end = offsets.get(bag + 1).map_or(self.ids.len(), |o| o.row() as usize);
        offsets[bag].row() as usize..end
    }

    /// Where the ids of bags begin, and where the last one's end: of as many bags from number `first` on as `into` has
    /// room for.
    #[inline(always)]
    pub(crate) fn starts(&self, first: usize, into: &mut [usize]) {
        match self.offsets {
            Offsets::I32(offsets) => starts_in(offsets, first, self.ids.len(), into),
            Offsets::I64(offsets) => starts_in(offsets, first, self.ids.len(), into),
            Offsets::Even => {
                let len = self.ids.len() / (self.features * self.batch);
                into.iter_mut().enumerate().for_each(|(i, start)| *start = (first + i) * len);
            }
        }
    }

    /// Whether each of some bags has one id.
    pub(crate) fn have_one_id(&self, bags: Range<usize>) -> bool {
        match self.offsets {
            Offsets::I32(offsets) => have_one_id(offsets, self.ids.len(), bags),
            Offsets::I64(offsets) => have_one_id(offsets, self.ids.len(), bags),
            Offsets::Even => self.ids.len() == self.features * self.batch,
        }
    }

    /// Whether each bag of `feature` has one id, and so has as many as bags, also where offsets have changed during the call.
    pub(crate) fn feature_has_one_id_each(&self, feature: usize) -> bool {
        let first = feature * self.batch;
        self.feature_bounds(feature).len() == self.batch && self.have_one_id(first..first + self.batch)
    }

    /// Where the ids of `feature` are.
    pub(crate) fn feature_bounds(&self, feature: usize) -> Range<usize> {
        self.feature_starts[feature]..self.feature_starts[feature + 1]
    }

    /// The place of a bag, numbered among all features' bags, within its feature.
    ///
    /// # Panics
    /// When it is not of that feature, as offsets that change during the call can make it seem.
    pub(crate) fn unit(&self, feature: usize, bag: usize) -> usize {
        let unit = bag.wrapping_sub(feature * self.batch);
        assert!(unit < self.batch, "offsets changed during the call");
        unit
    }

    /// Calls `f` with every bag that has ids among `positions`, and where these are.
    pub(crate) fn for_each_bag(&self, positions: Range<usize>, mut f: impl FnMut(usize, Range<usize>)) {
        let mut bag = self.bag_of(positions.start);
        let mut start = positions.start;
        while start < positions.end {
            // The bounds keep `f` inside of `positions` whatever the offsets say by now.
            let end = self.bounds(bag).end.clamp(start, positions.end);
            if start < end {
                f(bag, start..end);
            }
            (bag, start) = (bag + 1, end);
        }
    }

    /// The bag, of all features' bags, that holds the id at `position`.
    pub(crate) fn bag_of(&self, position: usize) -> usize {
        let (mut low, mut high) = (0, self.features * self.batch);
        while low < high {
            let middle = low.midpoint(high);
            if self.bounds(middle).end <= position {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

#[inline(always)]
fn starts_in<I: Id>(offsets: &[I], first: usize, ids: usize, into: &mut [usize]) {
    let offsets = offsets[first..].iter().map(|offset| offset.row() as usize).chain([ids]);
    for (start, offset) in into.iter_mut().zip(offsets) {
        *start = offset;
    }
}

fn have_one_id<I: Id>(offsets: &[I], ids: usize, bags: Range<usize>) -> bool {
    let start = |bag: usize| offsets.get(bag).map_or(ids as u64, |offset| offset.row());
    let (first, end) = (start(bags.start), start(bags.end));
    // Most bags of several ids are told from the ends. No early exit from the rest, as in `check_offsets`.
    end.wrapping_sub(first) == bags.len() as u64
        && (first..).zip(&offsets[bags]).fold(0, |differ, (one, offset)| differ | (offset.row() ^ one)) == 0
}

fn check_offsets<I: Id + std::fmt::Display>(
    offsets: &[I],
    features: usize,
    batch: usize,
    ids: usize,
) -> Result<()> {
    let bags = features * batch;
    if offsets.len() != bags && offsets.len() != bags + 1 {
        let expected = format!(
            "{bags} or {} elements (features {features} x batch size {batch}, with or without the end of the last bag)",
            bags + 1
        );
        return Err(Error::argument("offsets", expected, offsets.len()));
    }
    if bags == 0 && ids > 0 {
        return Err(Error::argument("indices", "no ids, as there are no bags", ids));
    }
    let bound = |i: usize| offsets.get(i).map_or(ids as u64, |o| o.row());
    if bound(0) != 0 {
        return Err(Error::argument("offsets[0]", 0, offsets.first().map_or(0, |o| o.row() as i64)));
    }
    // No early exit: this way the compiler looks at many at a time. As in `excess`, a sign tells.
    let falls = offsets.windows(2).fold(0, |falls, pair| {
        let [one, next] = [0, 1].map(|i| pair[i].row() as i64);
        falls | one | next.wrapping_sub(one)
    });
    if falls < 0 || offsets.last().is_some_and(|last| last.row() > ids as u64) {
        return Err(describe_bad_offsets(offsets, ids));
    }
    if bound(bags) != ids as u64 {
        let expected = format!("{ids}, the number of ids");
        return Err(Error::argument(format!("offsets[{bags}]"), expected, bound(bags)));
    }
    Ok(())
}

fn describe_bad_offsets<I: Id + std::fmt::Display>(offsets: &[I], ids: usize) -> Error {
    let mut before = 0;
    for (i, offset) in offsets.iter().enumerate() {
        if offset.row() > ids as u64 || offset.row() < before {
            let expected = format!("from {before} (the offset before it) to {ids} (the number of ids)");
            return Error::argument(format!("offsets[{i}]"), expected, offset);
        }
        before = offset.row();
    }
    unreachable!("called for offsets that fall or end beyond the ids")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(ids: &[i64], offsets: &[i64], features: usize, batch: usize) -> String {
        let made = Bags::new(Ids::I64(ids), Offsets::I64(offsets), features, batch, None);
        made.unwrap_err().to_string()
    }

    #[test]
    fn bounds_with_and_without_the_last_offset() {
        for offsets in [&[0, 2, 2, 3][..], &[0, 2, 2, 3, 5]] {
            let bags = Bags::new(Ids::I32(&[0; 5]), Offsets::I32(offsets), 2, 2, None).unwrap();
            let all: Vec<_> = (0..4).map(|b| bags.bounds(b)).collect();
            assert_eq!(all, [0..2, 2..2, 2..3, 3..5]);
            assert_eq!((bags.feature_bounds(0), bags.feature_bounds(1)), (0..2, 2..5));
            let owners: Vec<_> = (0..5).map(|p| bags.bag_of(p)).collect();
            assert_eq!(owners, [0, 0, 2, 3, 3]);
            let mut parts = Vec::new();
            bags.for_each_bag(1..4, |bag, ids| parts.push((bag, ids)));
            assert_eq!(parts, [(0, 1..2), (2, 2..3), (3, 3..4)]);
        }
    }

    #[test]
    fn even_bags() {
        let bags = Bags::new(Ids::I64(&[0; 6]), Offsets::Even, 1, 3, None).unwrap();
        assert_eq!(bags.bounds(1), 2..4);
        let uneven = Bags::new(Ids::I64(&[0; 7]), Offsets::Even, 1, 3, None);
        assert!(uneven.unwrap_err().to_string().contains("7 ids"));
        assert!(Bags::new(Ids::I64(&[]), Offsets::Even, 1, 0, None).is_ok());
    }

    #[test]
    fn bad_offsets_are_named() {
        let ids = [0; 4];
        for (offsets, words) in [
            (
                &[0, 3, 2, 4][..],
                "offsets[2]: expected from 3 (the offset before it) to 4 (the number of ids), got 2",
            ),
            (&[1, 2, 3, 4], "offsets[0]: expected 0, got 1"),
            (&[-1, 2, 3, 4], "offsets[0]: expected 0, got -1"),
            (
                &[0, 2, -3, 4],
                "offsets[2]: expected from 2 (the offset before it) to 4 (the number of ids), got -3",
            ),
            (
                &[0, 2, 3, 5],
                "offsets[3]: expected from 3 (the offset before it) to 4 (the number of ids), got 5",
            ),
            (
                &[0, 2, 9],
                "offsets[2]: expected from 2 (the offset before it) to 4 (the number of ids), got 9",
            ),
            (&[0, 2, 2, 3], "offsets[3]: expected 4, the number of ids, got 3"),
            (&[0, 2], "offsets: expected 3 or 4 elements"),
        ] {
            let message = refused(&ids, offsets, 1, 3);
            assert!(message.starts_with(words), "{message}");
        }
    }

    #[test]
    fn weights_are_one_for_each_id() {
        let made = Bags::new(Ids::I64(&[1, 2]), Offsets::Even, 1, 1, Some(&[1.0]));
        let message = made.unwrap_err().to_string();
        assert_eq!(message, "per_sample_weights: expected one for each of 2 ids, got 1");
    }
}
