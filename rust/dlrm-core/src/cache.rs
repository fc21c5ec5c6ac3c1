//! The rows of a table of codes that are used most, kept in fp32.
//!
//! A row is either in codes or in a *way* of the cache: what the codes of a cached row say is out of date. Ways come in
//! sets of [`WAYS`], and a hash of a row's number tells the one set in whose ways it can be: so nothing as long as the
//! table is kept, and nothing is searched. In the place of a cached row's scale and bias are a mark and the number of its
//! way (see `scales`): who reads the row's scale anyway learns where the row is.
//!
//! After an update the rows that it touched are counted, and some of them move:
//!
//! ```text
//! for row in touched rows, ascending:
//!     if row is cached:                  count[way] += 1; where that is 256, all counts of the set are halved before
//!     else if its set has an empty way:  row moves there, count[way] = 1
//!     else, with a probability of 1 / (least + 1), where least is the least count of the set:
//!                                        the row of that way is encoded, row moves there, count[way] = least + 1
//! ```
//! This is the randomized admission policy (Ben Basat, Einziger, Friedman and Kassner 2017): a row that comes again and
//! again gets in without having been counted before, and one that comes once seldom drives out a row that comes often.
//! A row that is driven out is rounded stochastically, as after an update. Random bits are those of `stochastic`, and sets
//! know nothing of each other, so who runs which part of the sets does not show in the result.

use std::ops::Range;

use smallvec::SmallVec;

use crate::disjoint::Disjoint;
use crate::kernels::codes::{CodeRows, Decode, Encode};
use crate::kernels::touched::{Next, ROWS, Target};
use crate::memory::{Keeper, Memory};
use crate::occurrences::{Occurrences, Run};
use crate::scales::{self, Scales};
use crate::table_rows::TableRows;
use crate::weights::Weights;
use crate::{Context, Error, Level, Result, threads};

/// Ways of a set.
pub const WAYS: usize = 16;

/// In the place of a row's number where a way is empty.
const EMPTY: i64 = -1;

/// Which set a row belongs to, among so many.
#[derive(Clone, Copy)]
struct Sets(usize);

impl Sets {
    /// Fibonacci hashing: the upper bits of the product, scaled to the number of sets.
    #[inline(always)]
    fn of(self, row: usize) -> usize {
        let hash = (row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((u128::from(hash) * self.0 as u128) >> u64::BITS) as usize
    }

    /// A way of a row's set, among all ways.
    #[inline(always)]
    fn way(self, row: usize, way: usize) -> usize {
        self.of(row) * WAYS + way
    }
}

/// The cache of a table: `W` ways, a multiple of [`WAYS`].
pub(crate) struct Cache {
    /// `(W, D)`; of an empty way, anything.
    rows: Memory,
    /// The number of each way's row, or [`EMPTY`].
    ids: Memory,
    /// How often each way's row was touched, lately.
    counts: Memory,
}

/// The parts of a cache, and what keeps each in memory for whoever keeps the address.
pub struct CacheParts<'a> {
    /// The row of each way, `(W, D)`; of an empty way, anything.
    pub rows: (&'a [f32], Keeper),
    /// Its number, `(W,)`; -1 where a way is empty.
    pub ids: (&'a [i64], Keeper),
    /// How often it was touched, lately, `(W,)`.
    pub counts: (&'a [u8], Keeper),
}

impl Cache {
    /// An empty one, with a way for at least as many rows.
    fn new(rows: usize, dim: usize, table: &str, ctx: &Context) -> Result<Self> {
        let ways = rows.div_ceil(WAYS).saturating_mul(WAYS);
        let what = format!("the hot rows of table '{table}'");
        let zeroed = |bytes: usize| Memory::zeroed(ways, bytes, &what, ctx);
        let (rows, mut ids) = (zeroed(dim * size_of::<f32>())?, zeroed(size_of::<i64>())?);
        ids.as_mut_slice().fill(EMPTY);
        Ok(Self { rows, ids, counts: zeroed(size_of::<u8>())? })
    }

    fn sets(&self) -> Sets {
        Sets(self.counts.bytes() / WAYS)
    }

    /// The memory that it is made of.
    pub(crate) fn memory(&self) -> [&Memory; 3] {
        [&self.rows, &self.ids, &self.counts]
    }

    pub(crate) fn parts(&self) -> CacheParts<'_> {
        CacheParts {
            rows: (self.rows.as_slice(), self.rows.keeper()),
            ids: (self.ids.as_slice(), self.ids.keeper()),
            counts: (self.counts.as_slice(), self.counts.keeper()),
        }
    }

    /// Empties the ways of some rows.
    pub(crate) fn forget(&mut self, rows: Range<usize>) {
        let counts: &mut [u8] = self.counts.as_mut_slice();
        for (id, count) in self.ids.as_mut_slice::<i64>().iter_mut().zip(counts) {
            if usize::try_from(*id).is_ok_and(|row| rows.contains(&row)) {
                (*id, *count) = (EMPTY, 0);
            }
        }
    }

    /// All of it, to be read.
    pub(crate) fn as_ref(&self) -> CachedRows<'_> {
        CachedRows { rows: self.rows.as_slice(), sets: self.sets() }
    }

    /// All of it, to be changed by several threads.
    pub(crate) fn ways(&mut self) -> Ways<'_> {
        let sets = self.sets();
        Ways {
            rows: Disjoint::new(self.rows.as_mut_slice()),
            ids: Disjoint::new(self.ids.as_mut_slice()),
            counts: Disjoint::new(self.counts.as_mut_slice()),
            sets,
        }
    }
}

/// The cached rows of a table, to be read.
#[derive(Clone, Copy)]
pub(crate) struct CachedRows<'a> {
    rows: &'a [f32],
    sets: Sets,
}

impl<'a> CachedRows<'a> {
    pub(crate) const NONE: Self = Self { rows: &[], sets: Sets(0) };

    /// Whether there is none.
    pub(crate) fn is_empty(self) -> bool {
        self.rows.is_empty()
    }

    /// A row of `dim` elements, if its scale marks it as cached.
    #[inline(always)]
    pub(crate) fn get(self, row: usize, scales: Scales, dim: usize) -> Option<&'a [f32]> {
        // Without a cache the mark means nothing: scales that are borrowed may be any bits.
        let way = scales.way(row).filter(|_| !self.rows.is_empty())?;
        Some(&self.rows[self.sets.way(row, way) * dim..][..dim])
    }
}

/// The ways of a table, which threads change at once, each those of rows or of sets of its own.
pub(crate) struct Ways<'a> {
    rows: Disjoint<'a, f32>,
    ids: Disjoint<'a, i64>,
    counts: Disjoint<'a, u8>,
    sets: Sets,
}

impl TableRows {
    /// Keeps as many of the most used rows in fp32 from now on, rounded up to a multiple of [`WAYS`]; none of them yet.
    pub(crate) fn add_cache(&mut self, rows: usize, table: &str, ctx: &Context) -> Result<()> {
        self.check_cacheable(table)?;
        self.cache = Some(Cache::new(rows, self.dim, table, ctx)?);
        Ok(())
    }

    /// The same, with what [`CacheParts`] have told: rows, their numbers and how often they were touched.
    ///
    /// A row in a way where it cannot be, or in two, is an error.
    pub fn put_cache(
        &mut self,
        rows: &[f32],
        ids: &[i64],
        counts: &[u8],
        table: &str,
        ctx: &Context,
    ) -> Result<()> {
        self.check_cacheable(table)?;
        let ways = ids.len();
        let argument = |part: &str| format!("hot {part} of table '{table}'");
        if ways == 0 || !ways.is_multiple_of(WAYS) {
            return Err(Error::argument(argument("ids"), format_args!("a multiple of {WAYS} ways"), ways));
        }
        for (part, expected, got) in
            [("rows", ways as u128 * self.dim as u128, rows.len()), ("counts", ways as u128, counts.len())]
        {
            if got as u128 != expected {
                return Err(Error::argument(argument(part), format_args!("{expected} elements"), got));
            }
        }
        let mut cache = Cache::new(ways, self.dim, table, ctx)?;
        let sets = cache.sets();
        let mut seen: Vec<i64> = ids.iter().copied().filter(|&id| id != EMPTY).collect();
        seen.sort_unstable();
        let twice = seen.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        let misplaced = |(way, &id): (usize, &i64)| {
            let fits = |row| row < self.rows && sets.of(row) == way / WAYS;
            (id != EMPTY && !usize::try_from(id).is_ok_and(fits)).then_some(id)
        };
        if let Some(id) = ids.iter().enumerate().find_map(misplaced) {
            let expected = format!("rows below {} in the sets of their hash, or -1", self.rows);
            return Err(Error::argument(argument("ids"), expected, id));
        }
        if let Some(id) = twice {
            return Err(Error::argument(argument("ids"), "each row in one way", format_args!("{id} in two")));
        }
        cache.rows.as_mut_slice().copy_from_slice(rows);
        cache.ids.as_mut_slice().copy_from_slice(ids);
        cache.counts.as_mut_slice().copy_from_slice(counts);
        for (way, &id) in ids.iter().enumerate().filter(|(_, id)| **id != EMPTY) {
            scales::mark(self.scale_format, self.scales.as_mut_slice(), id as usize, way % WAYS);
        }
        self.cache = Some(cache);
        Ok(())
    }

    fn check_cacheable(&self, table: &str) -> Result<()> {
        let got = match &self.cache {
            Some(_) => "rows that have hot ones already".to_owned(),
            None if !self.format.is_quantized() => format!("{} rows", self.format),
            None if self.has_codebook() => format!("{} rows with a codebook", self.format),
            None => return Ok(()),
        };
        let argument = format!("hot_rows of table '{table}'");
        Err(Error::argument(
            argument,
            "int8, int4 or int2 rows of evenly spaced codes, without hot rows",
            got,
        ))
    }

    /// The cache, if there is one.
    #[must_use]
    pub fn cache(&self) -> Option<CacheParts<'_>> {
        self.cache.as_ref().map(Cache::parts)
    }
}

impl CodeRows<'_> {
    /// The way of a row, if it is cached.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "rows are disjoint")]
    fn cached(&self, row: usize) -> Option<&mut [f32]> {
        let ways = self.ways.as_ref()?;
        let at = ways.sets.way(row, self.way_of(row)?) * self.dim;
        // SAFETY: a row has a way of its own, and belongs to one piece of a call.
        Some(unsafe { ways.rows.piece(at..at + self.dim) })
    }

    /// The number that a row's mark tells.
    #[inline(always)]
    fn way_of(&self, row: usize) -> Option<usize> {
        Scales::new(self.scale_format, self.row(row).1).way(0)
    }

    /// Writes those of some rows that are cached to their places in `into`.
    pub(crate) fn read_cached(&self, rows: &[usize], into: &mut [f32]) {
        for (&row, into) in rows.iter().zip(into.chunks_exact_mut(self.dim)) {
            if let Some(way) = self.cached(row) {
                into.copy_from_slice(way);
            }
        }
    }

    /// Writes those of some rows that are cached to their ways, and brings the others, which it returns, to the beginning.
    pub(crate) fn write_cached(&self, rows: &[usize], from: &mut [f32]) -> SmallVec<[usize; ROWS]> {
        let mut others = SmallVec::new();
        for (i, &row) in rows.iter().enumerate() {
            let elements = i * self.dim..(i + 1) * self.dim;
            if let Some(way) = self.cached(row) {
                way.copy_from_slice(&from[elements]);
            } else {
                from.copy_within(elements, others.len() * self.dim);
                others.push(row);
            }
        }
        others
    }

    /// Counts the rows of a run that belong to some sets, and moves those that get in.
    fn follow(&self, ways: &Ways, run: Run, sets: &Range<usize>, level: Level) {
        let mut scratch = vec![0.0; self.dim];
        let mut k = 0;
        while k < run.len() {
            let row = run.row(k);
            k = run.row_end(k);
            let set = ways.sets.of(row);
            if sets.contains(&set) {
                self.count(ways, row, set, &mut scratch, level);
            }
        }
    }

    /// Counts a row of a set, or lets it in.
    fn count(&self, ways: &Ways, row: usize, set: usize, scratch: &mut [f32], level: Level) {
        let all = set * WAYS..(set + 1) * WAYS;
        #[expect(unsafe_code, reason = "sets are disjoint")]
        // SAFETY: a set is in one part of a call.
        let (ids, counts) = unsafe { (ways.ids.piece(all.clone()), ways.counts.piece(all)) };
        if let Some(way) = self.way_of(row) {
            if counts[way] == u8::MAX {
                for count in &mut *counts {
                    *count /= 2;
                }
            }
            counts[way] += 1;
            return;
        }
        let place = |way: &usize| (ids[*way] != EMPTY, counts[*way]);
        let way = (0..WAYS).min_by_key(place).expect("there are some");
        if let Ok(old) = usize::try_from(ids[way]) {
            if self.random.below(row, u32::from(counts[way]) + 1) > 0 {
                return;
            }
            scratch.copy_from_slice(self.cached(old).expect("the row of a way"));
            level.run(Encode { all: self, rows: &[old], from: &mut *scratch, next: Next::NONE });
        }
        level.run(Decode { all: self, rows: &[row], into: &mut *scratch });
        scales::mark(self.scale_format, self.row(row).1, 0, way);
        self.cached(row).expect("it is by now").copy_from_slice(scratch);
        ids[way] = row as i64;
        counts[way] = counts[way].saturating_add(1);
    }
}

/// After an update: counts the rows that it touched in tables that have a cache, and moves rows in and out.
pub(crate) fn follow(occurrences: &Occurrences, targets: &[Option<Target>], ctx: &Context) -> Result<()> {
    let cached = |(t, target): (usize, &'_ Option<Target<'_>>)| match target.as_ref().map(|one| &one.weights)
    {
        Some(Weights::Codes(rows)) if rows.ways.is_some() => Some(t),
        _ => None,
    };
    let tables: SmallVec<[usize; 32]> = targets.iter().enumerate().filter_map(cached).collect();
    let lines = tables.iter().map(|&t| occurrences.of(t).len()).sum();
    let (parts, level) = (ctx.threads, ctx.level);
    threads::for_each(&ctx.uninterrupted(), tables.len() * parts, lines, |i| {
        let (t, part) = (tables[i / parts], i % parts);
        if let Some(Target { weights: Weights::Codes(rows), .. }) = &targets[t]
            && let Some(ways) = &rows.ways
        {
            let cut = |part: usize| ways.sets.0 * part / parts;
            rows.follow(ways, occurrences.of(t), &(cut(part)..cut(part + 1)), level);
        }
    })
}
