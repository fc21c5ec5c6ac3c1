//! Which ids of a call touch which row: for each table, its ids sorted by row.
//!
//! An occurrence is a number: the row in its high bits, the place in `indices` in its low ones. Sorted, the occurrences
//! of a row are together and in the order of the call, so what is summed over them does not depend on who sorts.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bags::{Bags, Id, with_ids};
use crate::disjoint::Disjoint;
use crate::memory::zeros;
use crate::row_filter::RowFilter;
use crate::table_set::TableSet;
use crate::{Context, Error, Result, threads};

/// The occurrences of every table, sorted.
pub(crate) struct Occurrences {
    sorted: Vec<u64>,
    /// Of each table, in `sorted`.
    ranges: Vec<Range<usize>>,
    /// Low bits that hold the place in `indices`.
    place_bits: u32,
}

impl Occurrences {
    /// Checks all ids, then sorts those of the tables that are `wanted`; padding ids are left out unless `padding`.
    pub(crate) fn sorted(
        set: &TableSet,
        bags: &Bags,
        wanted: &[bool],
        padding: bool,
        ctx: &Context,
    ) -> Result<Self> {
        let place_bits = bits(bags.ids.len());
        let mut ranges = Vec::with_capacity(set.specs.len());
        let mut end = 0;
        for (t, spec) in set.specs.iter().enumerate() {
            if bits(spec.rows) + place_bits > u64::BITS {
                let expected =
                    format!("fewer than 2^{} ids for {} rows", u64::BITS - bits(spec.rows), spec.rows);
                return Err(Error::argument("indices", expected, bags.ids.len()));
            }
            let ids: usize = set.features_of[t].iter().map(|&f| bags.feature_bounds(f).len()).sum();
            ranges.push(end..end + ids);
            end += ids;
        }
        let mut sorted = zeros(end, "the occurrences of rows")?;
        let mut spare = zeros(end, "the occurrences of rows")?;
        let lens: Vec<_> = ranges.iter().map(|_| AtomicUsize::new(0)).collect();
        let bad = AtomicUsize::new(usize::MAX);
        {
            let (sorted, spare) = (Disjoint::new(&mut sorted), Disjoint::new(&mut spare));
            threads::for_each(ctx, ranges.len(), end / 2, |t| {
                #[expect(unsafe_code, reason = "tables are disjoint")]
                // SAFETY: the ranges of different tables do not overlap, and each table comes once.
                let (own, spare) =
                    unsafe { (sorted.piece(ranges[t].clone()), spare.piece(ranges[t].clone())) };
                match with_ids!(bags.ids, |ids| collect(set, bags, t, ids, padding, place_bits, own)) {
                    Ok(len) if wanted[t] => {
                        sort(&mut own[..len], &mut spare[..len], place_bits, bits(set.specs[t].rows));
                        lens[t].store(len, Ordering::Relaxed);
                    }
                    Ok(_) => {}
                    Err(place) => {
                        bad.fetch_min(place, Ordering::Relaxed);
                    }
                }
            })?;
        }
        set.refuse_bad_id(bags, bad.into_inner())?;
        for (range, len) in ranges.iter_mut().zip(lens) {
            range.end = range.start + len.into_inner();
        }
        Ok(Self { sorted, ranges, place_bits })
    }

    /// Those of rows that `is_first` says yes to, and the others.
    pub(crate) fn part(
        &self,
        is_first: impl Fn(usize, usize) -> bool + Sync,
        ctx: &Context,
    ) -> Result<[Self; 2]> {
        const WHAT: &str = "the occurrences of rows";
        let mut parts = [zeros(self.sorted.len(), WHAT)?, zeros(self.sorted.len(), WHAT)?];
        let lens: Vec<_> = self.ranges.iter().map(|_| [0, 0].map(AtomicUsize::new)).collect();
        {
            let parts = parts.each_mut().map(|part| Disjoint::new(part));
            threads::for_each(ctx, self.ranges.len(), self.sorted.len(), |t| {
                #[expect(unsafe_code, reason = "tables are disjoint")]
                // SAFETY: the ranges of different tables do not overlap, and each table comes once.
                let [first, second] =
                    parts.each_ref().map(|part| unsafe { part.piece(self.ranges[t].clone()) });
                let run = self.of(t);
                let mut in_first = 0;
                // Each is written to both sides, and kept on one: no branch that cannot be foreseen.
                for (k, &occurrence) in run.sorted.iter().enumerate() {
                    first[in_first] = occurrence;
                    second[k - in_first] = occurrence;
                    in_first += usize::from(is_first(t, run.row(k)));
                }
                for (len, found) in lens[t].iter().zip([in_first, run.len() - in_first]) {
                    len.store(found, Ordering::Relaxed);
                }
            })?;
        }
        let mut part = 0;
        Ok(parts.map(|sorted| {
            let end = |(range, len): (&Range<usize>, &[AtomicUsize; 2])| {
                range.start..range.start + len[part].load(Ordering::Relaxed)
            };
            let ranges = self.ranges.iter().zip(&lens).map(end).collect();
            part += 1;
            Self { sorted, ranges, place_bits: self.place_bits }
        }))
    }

    /// The rows of each table, as filters.
    pub(crate) fn row_filters(&self, ctx: &Context) -> Result<Vec<RowFilter>> {
        let mut filters: Vec<_> =
            self.ranges.iter().map(|range| RowFilter::new(range.len())).collect::<Result<_>>()?;
        {
            let filters = Disjoint::new(&mut filters);
            threads::for_each(ctx, self.ranges.len(), self.sorted.len() / 2, |t| {
                #[expect(unsafe_code, reason = "tables are disjoint")]
                // SAFETY: each table comes once.
                let filter = unsafe { &mut filters.piece(t..t + 1)[0] };
                filter.insert(self.of(t));
            })?;
        }
        Ok(filters)
    }

    /// Those of a table.
    pub(crate) fn of(&self, table: usize) -> Run<'_> {
        Run { sorted: &self.sorted[self.ranges[table].clone()], place_bits: self.place_bits }
    }
}

/// Some occurrences of one table.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    sorted: &'a [u64],
    place_bits: u32,
}

impl<'a> Run<'a> {
    #[cfg(test)]
    pub(crate) const fn new(sorted: &'a [u64], place_bits: u32) -> Self {
        Self { sorted, place_bits }
    }

    #[inline(always)]
    pub(crate) fn len(self) -> usize {
        self.sorted.len()
    }

    #[inline(always)]
    pub(crate) fn row(self, k: usize) -> usize {
        (self.sorted[k] >> self.place_bits) as usize
    }

    /// Where in `indices`.
    #[inline(always)]
    pub(crate) fn place(self, k: usize) -> usize {
        (self.sorted[k] & ((1 << self.place_bits) - 1)) as usize
    }

    /// The beginning of the occurrences of the row that occurrence `k` is of.
    pub(crate) fn row_begin(self, k: usize) -> usize {
        let row = self.sorted[k] >> self.place_bits;
        self.sorted[..k].partition_point(|&o| o >> self.place_bits < row)
    }

    /// The end of the occurrences of the row that occurrence `k` is of.
    #[inline(always)]
    pub(crate) fn row_end(self, k: usize) -> usize {
        /// A row that has more may have most of the occurrences: then a search and not a walk.
        const WALK: usize = 32;
        let last_place = (1 << self.place_bits) - 1;
        let last = self.sorted[k] | last_place;
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

/// Writes the occurrences of a table, in the order of the call; returns how many, or the place of the first bad id.
///
/// Every id is read once, so that what was checked is what is used.
fn collect<I: Id>(
    set: &TableSet,
    bags: &Bags,
    table: usize,
    ids: &[I],
    padding: bool,
    place_bits: u32,
    into: &mut [u64],
) -> std::result::Result<usize, usize> {
    let rows = set.specs[table].rows as u64;
    let mut len = 0;
    for &f in &set.features_of[table] {
        let skip = set.features[f].padding.filter(|_| !padding).map_or(u64::MAX, |p| p as u64);
        for place in bags.feature_bounds(f) {
            let row = ids[place].row();
            if row >= rows {
                return Err(place);
            }
            into[len] = row << place_bits | place as u64;
            len += usize::from(row != skip);
        }
    }
    Ok(len)
}

/// Sorts by the `key_bits` bits above `shift`; stable. Radix sort, least significant digit first.
fn sort(data: &mut [u64], spare: &mut [u64], shift: u32, key_bits: u32) {
    const DIGIT: u32 = 11;
    const SMALL: usize = 512;
    if data.len() <= SMALL {
        data.sort_unstable(); // the low bits are different, and ascending where the keys are equal
        return;
    }
    let passes = key_bits.div_ceil(DIGIT);
    let digit_bits = key_bits.div_ceil(passes);
    let (mut from, mut to) = (data, spare);
    for pass in 0..passes {
        let shift = shift + pass * digit_bits;
        let digit = |x: u64| (x >> shift) as usize & ((1 << digit_bits) - 1);
        let mut next = [0_usize; 1 << DIGIT];
        for &x in &*from {
            next[digit(x)] += 1;
        }
        let mut end = 0;
        for n in &mut next {
            end += std::mem::replace(n, end);
        }
        for &x in &*from {
            let place = &mut next[digit(x)];
            to[*place] = x;
            *place += 1;
        }
        (from, to) = (to, from);
    }
    if passes % 2 == 1 {
        to.copy_from_slice(from);
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
            let mut data: Vec<u64> = (0_u64..).zip(&rows)
                .map(|(i, row)| (row & ((1 << rows_bits) - 1)) << 13 | i)
                .collect();
            let mut expected = data.clone();
            expected.sort_unstable();
            let mut spare = vec![0; data.len()];
            sort(&mut data, &mut spare, 13, rows_bits);
            prop_assert_eq!(data, expected);
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
