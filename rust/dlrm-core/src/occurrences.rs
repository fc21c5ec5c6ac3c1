//! Which ids of a call touch which row: for each table, its ids sorted by row.
//!
//! An occurrence is a number: the row in its high bits, and in its low ones the source of its gradient (see [`Source`]).
//! Sorted, the occurrences of a row are together and in the order of the call, so what is summed over them does not depend
//! on who sorts.

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bags::{Bags, Id, excess, with_ids};
use crate::lookup::first_bad;
use crate::memory::{room, zeros};
use crate::per_feature::PerFeature;
use crate::row_filter::RowFilter;
use crate::sides::sides;
use crate::table_set::{Feature, Slot, TableSet};
use crate::{Context, Error, Result, threads};

/// What memory is for that holds occurrences.
const WHAT: &str = "the occurrences of rows";

/// What the low bits of an occurrence tell of its gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The first element of the output row that the id went into: all there is to know of a plain sum.
    Start,
    /// The place of the id in `indices`, where more is to be known.
    Place,
}

/// The occurrences of every table, sorted.
pub(crate) struct Occurrences {
    /// Of each table.
    sorted: Vec<Vec<u64>>,
    /// Low bits that hold the source.
    source_bits: u32,
}

impl Occurrences {
    /// Checks all ids, then sorts those of the tables that are `wanted`; padding ids are left out unless `padding`.
    pub(crate) fn sorted(
        set: &TableSet,
        bags: &Bags,
        wanted: &[bool],
        padding: bool,
        source: Source,
        ctx: &Context,
    ) -> Result<Self> {
        let (number, what) = match source {
            Source::Start => (set.output_len(bags), "elements of the output"),
            Source::Place => (bags.len(), "ids"),
        };
        let source_bits = bits(number);
        if let Some(spec) = set.specs.iter().find(|spec| bits(spec.rows) + source_bits > u64::BITS) {
            let bits = u64::BITS - bits(spec.rows);
            let expected = format!("fewer than 2^{bits} {what} for {} rows", spec.rows);
            return Err(Error::argument("indices", expected, format_args!("{number} {what}")));
        }
        let bad = AtomicUsize::new(usize::MAX);
        let call = Call { set, bags, slots: set.slots(bags), padding, source, source_bits, bad };
        let sorted = threads::map(ctx, set.specs.len(), bags.len() / 2, |t| {
            let collected = with_ids!(bags.ids, |ids| call.collect(t, ids, wanted[t]))?;
            sort(collected, source_bits, bits(set.specs[t].rows))
        })?;
        set.refuse_bad_id(bags, call.bad.into_inner())?;
        Ok(Self { sorted: sorted.into_iter().collect::<Result<_>>()?, source_bits })
    }

    /// Those of rows that the table's filter may have, all where there is none, and the others.
    pub(crate) fn part(&self, by: &[Option<&RowFilter>], ctx: &Context) -> Result<[Self; 2]> {
        let len: usize = self.sorted.iter().map(Vec::len).sum();
        let parted = threads::map(ctx, self.sorted.len(), len, |t| {
            let sorted = &self.sorted[t];
            let Some(filter) = by[t] else {
                return Ok([sorted.clone(), Vec::new()]);
            };
            let of = |&occurrence: &u64| (occurrence, filter.may_have(occurrence >> self.source_bits));
            sides(sorted.iter().map(of), WHAT)
        })?;
        let mut parts = [0, 1].map(|_| Self { sorted: Vec::new(), source_bits: self.source_bits });
        for table in parted {
            parts.iter_mut().zip(table?).for_each(|(part, sorted)| part.sorted.push(sorted));
        }
        Ok(parts)
    }

    /// The rows of each table, as filters.
    pub(crate) fn row_filters(&self, ctx: &Context) -> Result<Vec<RowFilter>> {
        let len: usize = self.sorted.iter().map(Vec::len).sum();
        let filters = threads::map(ctx, self.sorted.len(), len / 2, |t| RowFilter::of(self.of(t)))?;
        filters.into_iter().collect()
    }

    /// Those of a table.
    pub(crate) fn of(&self, table: usize) -> Run<'_> {
        Run { sorted: &self.sorted[table], source_bits: self.source_bits }
    }
}

/// Some occurrences of one table.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    sorted: &'a [u64],
    source_bits: u32,
}

impl<'a> Run<'a> {
    #[cfg(test)]
    pub(crate) const fn new(sorted: &'a [u64], source_bits: u32) -> Self {
        Self { sorted, source_bits }
    }

    #[inline(always)]
    pub(crate) fn len(self) -> usize {
        self.sorted.len()
    }

    #[inline(always)]
    pub(crate) fn row(self, k: usize) -> usize {
        (self.sorted[k] >> self.source_bits) as usize
    }

    /// Where the gradient of an occurrence comes from.
    #[inline(always)]
    pub(crate) fn source(self, k: usize) -> usize {
        (self.sorted[k] & ((1 << self.source_bits) - 1)) as usize
    }

    /// The beginning of the occurrences of the row that occurrence `k` is of.
    pub(crate) fn row_begin(self, k: usize) -> usize {
        let row = self.sorted[k] >> self.source_bits;
        self.sorted[..k].partition_point(|&o| o >> self.source_bits < row)
    }

    /// The end of the occurrences of the row that occurrence `k` is of.
    #[inline(always)]
    pub(crate) fn row_end(self, k: usize) -> usize {
        /// A row that has more may have most of the occurrences: then a search and not a walk.
        const WALK: usize = 32;
        let last_source = (1 << self.source_bits) - 1;
        let last = self.sorted[k] | last_source;
        let mut end = k + 1;
        while end < self.len() && self.sorted[end] <= last {
            if end - k == WALK {
                return end + up_to(last, &self.sorted[end..]);
            }
            end += 1;
        }
        end
    }

    /// The rows that begin in `range`, whole.
    pub(crate) fn rows_in(self, range: Range<usize>) -> Run<'a> {
        let whole = |k: usize| match k {
            0 => 0,
            k if k >= self.len() => self.len(),
            k => self.row_end(k - 1),
        };
        Run { sorted: &self.sorted[whole(range.start)..whole(range.end)], ..self }
    }

    /// Every row once, ascending.
    pub(crate) fn rows(self) -> Vec<i64> {
        let mut rows: Vec<_> = (0..self.len()).map(|k| self.row(k) as i64).collect();
        rows.dedup();
        rows
    }
}

/// How many of `sorted`, which ascend, are not above `last`.
#[inline(never)]
fn up_to(last: u64, sorted: &[u64]) -> usize {
    sorted.partition_point(|&occurrence| occurrence <= last)
}

/// Bits of the numbers below `n`, at least 1.
fn bits(n: usize) -> u32 {
    usize::BITS - n.saturating_sub(1).max(1).leading_zeros()
}

/// What is the same for all tables while occurrences are collected.
struct Call<'a> {
    set: &'a TableSet,
    bags: &'a Bags<'a>,
    slots: PerFeature<Slot<'static>>,
    padding: bool,
    source: Source,
    source_bits: u32,
    /// Lowest place of an id that its table does not have.
    bad: AtomicUsize,
}

impl Call<'_> {
    /// The occurrences of a table in the order of the call, none if they are not `wanted`.
    fn collect<I: Id>(&self, table: usize, ids: &[I], wanted: bool) -> Result<Vec<u64>> {
        let Self { set, bags, .. } = *self;
        let rows = set.specs[table].rows;
        let bounds = |&f: &usize| bags.feature_bounds(f);
        let features = &set.features_of[table];
        let len = if wanted { features.iter().map(|f| bounds(f).len()).sum() } else { 0 };
        let mut occurrences = room(len, WHAT)?;
        for f in features {
            let (first, ids) = (bounds(f).start, &ids[bounds(f)]);
            let mut bad = None;
            if !wanted {
                bad = first_bad(ids, rows);
            } else if self.append(*f, ids, &mut occurrences) {
                // What was bad stays so, though somebody may have changed the id since.
                bad = Some(first_bad(ids, rows).unwrap_or(0));
            }
            if let Some(bad) = bad {
                self.bad.fetch_min(first + bad, Ordering::Relaxed);
            }
        }
        Ok(occurrences)
    }

    /// The occurrences of a feature's ids; whether any is bad.
    fn append<I: Id>(&self, f: usize, ids: &[I], occurrences: &mut Vec<u64>) -> bool {
        let Self { set, bags, source, .. } = *self;
        let slot = self.slots[f];
        let positions = bags.feature_bounds(f);
        match source {
            Source::Place => self.extend(f, ids.iter().zip(positions), occurrences),
            Source::Start if !set.pooled || bags.feature_has_one_id_each(f) => {
                let starts = (0..ids.len()).map(|unit| slot.at(unit));
                self.extend(f, ids.iter().zip(starts), occurrences)
            }
            Source::Start => {
                let mut any = false;
                let first = positions.start;
                bags.for_each_bag(positions, |bag, positions| {
                    let start = slot.at(bags.unit(f, bag));
                    let ids = &ids[positions.start - first..positions.end - first];
                    any |= self.extend(f, ids.iter().map(|id| (id, start)), occurrences);
                });
                any
            }
        }
    }

    /// The occurrences of some ids of a feature, with their sources; whether any is bad.
    #[inline(always)]
    fn extend<'i, I: Id + 'i>(
        &self,
        f: usize,
        ids: impl Iterator<Item = (&'i I, usize)>,
        occurrences: &mut Vec<u64>,
    ) -> bool {
        let Feature { table, padding, .. } = self.set.features[f];
        let rows = self.set.specs[table].rows;
        let mut any = 0;
        // Read once, so that what was checked is what is used.
        let occurrence = |(row, source): (u64, usize)| {
            any |= excess(row, rows);
            row << self.source_bits | source as u64
        };
        let ids = ids.map(|(id, source)| (id.row(), source));
        match padding.filter(|_| !self.padding) {
            None => occurrences.extend(ids.map(occurrence)),
            Some(padding) => {
                occurrences.extend(ids.filter(|(row, _)| *row != padding as u64).map(occurrence));
            }
        }
        any < 0
    }
}

/// Sorts by the `key_bits` bits above `shift`; stable. Radix sort, least significant digit first.
fn sort(mut data: Vec<u64>, shift: u32, key_bits: u32) -> Result<Vec<u64>> {
    const DIGIT: u32 = 11;
    const SMALL: usize = 512;
    if data.len() <= SMALL {
        data.sort_by_key(|x| x >> shift);
        return Ok(data);
    }
    let mut to = zeros(data.len(), WHAT)?;
    let passes = key_bits.div_ceil(DIGIT);
    let digit_bits = key_bits.div_ceil(passes);
    let mut places = [0; 1 << DIGIT];
    for pass in 0..passes {
        sort_by_digit(&data, &mut to, shift + pass * digit_bits, &mut places[..1 << digit_bits]);
        mem::swap(&mut data, &mut to);
    }
    Ok(data)
}

/// Sorts by the bits above `shift` that are a number below that of `places`; stable.
fn sort_by_digit(from: &[u64], to: &mut [u64], shift: u32, places: &mut [usize]) {
    let last = places.len() - 1;
    let digit = |x: u64| (x >> shift) as usize & last;
    places.fill(0);
    for &x in from {
        places[digit(x)] += 1;
    }
    let mut end = 0;
    for place in &mut *places {
        end += mem::replace(place, end);
    }
    for &x in from {
        let place = &mut places[digit(x)];
        to[*place] = x;
        *place += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sort_agrees_with_the_standard_one(
            rows in prop::collection::vec(0_u64..1 << 40, 0..3000),
            rows_bits in 1_u32..41,
        ) {
            // Low bits in no order, which the sort is not to change.
            let data: Vec<u64> = (0_u64..).zip(&rows)
                .map(|(i, row)| (row & ((1 << rows_bits) - 1)) << 13 | ((i * 2741) & 0x1FFF))
                .collect();
            let mut expected = data.clone();
            expected.sort_by_key(|x| x >> 13);
            prop_assert_eq!(sort(data, 13, rows_bits).unwrap(), expected);
        }
    }

    #[test]
    fn bits_hold_every_number_below() {
        assert_eq!([0, 1, 2, 3, 4, 5, 1 << 31].map(bits), [1, 1, 1, 2, 2, 3, 31]);
    }

    #[test]
    fn pieces_of_a_run_hold_whole_rows() {
        let sorted: Vec<u64> = [0, 0, 0, 1, 2, 2, 5].iter().map(|row| row << 3).collect();
        let run = Run::new(&sorted, 3);
        let rows: Vec<_> = [0..2, 2..4, 4..6, 6..7].map(|r| run.rows_in(r).rows()).into();
        assert_eq!(rows, [vec![0], vec![1], vec![2], vec![5]]);
    }
}
