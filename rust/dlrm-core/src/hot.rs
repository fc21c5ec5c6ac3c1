//! Hot rows: those with so many occurrences in a call that several threads sum their gradients, block by block.
//!
//! A row belongs to one thread, and a table of few rows, or a row that half of the samples have, would keep that thread
//! alone at work. So the sums of a hot row's blocks are made first, each by whoever is free; who applies the rule to the
//! row adds them onto each other. That is the order in which one thread would have added them: the bits are the same.

use std::ops::Range;

use crate::disjoint::Disjoint;
use crate::kernels::LANES;
use crate::kernels::reduce::{BLOCK, SumBlock};
use crate::kernels::touched::{Target, Touched};
use crate::memory::zeros;
use crate::occurrences::{Occurrences, Run};
use crate::sources::Sources;
use crate::{Context, Result, threads};

/// The hot rows of a call.
pub(crate) struct Hot {
    /// By table, then by row.
    rows: Vec<HotRow>,
    /// Of all blocks, one after another.
    sums: Vec<f32>,
}

struct HotRow {
    table: usize,
    row: usize,
    occurrences: Range<usize>,
    /// Where in `sums` those of its blocks are.
    sums: Range<usize>,
}

/// The hot rows of a table.
#[derive(Clone, Copy)]
pub(crate) struct HotRows<'a> {
    rows: &'a [HotRow],
    sums: &'a [f32],
}

impl HotRows<'static> {
    pub(crate) const NONE: Self = Self { rows: &[], sums: &[] };
}

impl<'a> HotRows<'a> {
    /// Whether there are any.
    #[inline(always)]
    pub(crate) fn any(self) -> bool {
        !self.rows.is_empty()
    }

    /// Whether the row is one.
    #[inline(always)]
    pub(crate) fn has(self, row: usize) -> bool {
        self.any() && self.blocks(row).is_some()
    }

    /// The sums of the row's blocks in their order, one after another, if it is hot.
    #[inline(always)]
    pub(crate) fn blocks(self, row: usize) -> Option<&'a [f32]> {
        let found = self.rows.binary_search_by_key(&row, |hot| hot.row).ok()?;
        Some(&self.sums[self.rows[found].sums.clone()])
    }
}

impl Hot {
    /// Finds the hot rows of the tables that have a target, and sums their blocks; none where one thread does it all, or
    /// where there is no gradient.
    pub(crate) fn summed(
        occurrences: &Occurrences,
        sources: &Sources,
        targets: &[Option<Target>],
        ctx: &Context,
    ) -> Result<Self> {
        let mut rows = Vec::new();
        let mut end = 0;
        if ctx.threads > 1 && !sources.grad.is_empty() {
            for (table, target) in targets.iter().enumerate().filter_map(|(t, one)| Some((t, one.as_ref()?)))
            {
                let run = occurrences.of(table);
                for occurrences in hot_rows(run) {
                    let len = occurrences.len().div_ceil(BLOCK) * target.dim;
                    let row = run.row(occurrences.start);
                    rows.push(HotRow { table, row, occurrences, sums: end..end + len });
                    end += len;
                }
            }
        }
        let mut sums = zeros(end, "the gradients of hot rows")?;
        let blocks = rows.iter().flat_map(|row| {
            let starts = row.occurrences.clone().step_by(BLOCK);
            starts.enumerate().map(move |(nth, start)| (row, nth, start))
        });
        let blocks: Vec<_> = blocks.collect();
        let into = Disjoint::new(&mut sums);
        let level = ctx.level;
        let lines: usize = rows.iter().map(|row| row.sums.len() * BLOCK / LANES).sum();
        threads::for_each(&ctx.uninterrupted(), blocks.len(), lines, |i| {
            let (hot, nth, start) = blocks[i];
            let target = targets[hot.table].as_ref().expect("others have no hot rows");
            let at = hot.sums.start + nth * target.dim;
            #[expect(unsafe_code, reason = "blocks are disjoint")]
            // SAFETY: every block has a place of its own, and each comes once.
            let into = unsafe { into.piece(at..at + target.dim) };
            let run = occurrences.of(hot.table);
            let touched =
                Touched { run, sources, target, by_frequency: false, factor: 1.0, hot: HotRows::NONE };
            let block = start..hot.occurrences.end.min(start + BLOCK);
            level.run(SumBlock { touched, block, into });
        })?;
        Ok(Self { rows, sums })
    }

    pub(crate) fn of(&self, table: usize) -> HotRows<'_> {
        let start = self.rows.partition_point(|row| row.table < table);
        let end = self.rows.partition_point(|row| row.table <= table);
        HotRows { rows: &self.rows[start..end], sums: &self.sums }
    }
}

/// The occurrences of every row that has those of two multiples of [`BLOCK`] in a row, so of all that have twice as many.
fn hot_rows(run: Run) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for k in (BLOCK..run.len()).step_by(BLOCK) {
        let seen = found.last().is_some_and(|last| last.contains(&k));
        if !seen && run.row(k - BLOCK) == run.row(k) {
            found.push(run.row_begin(k)..run.row_end(k));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_two_blocks_are_hot_and_found_whole() {
        for len in [1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3] {
            for before in [0, 1, 700] {
                let rows = std::iter::repeat_n(0, before).chain(std::iter::repeat_n(1, len)).chain([2, 3]);
                let sorted: Vec<u64> = rows.map(|row| row << 3).collect();
                let found = hot_rows(Run::new(&sorted, 3));
                let expected = before..before + len;
                assert!(len < 2 * BLOCK || found.contains(&expected), "{len} after {before}: {found:?}");
                assert!(len > BLOCK || !found.contains(&expected), "{len} after {before}: {found:?}");
            }
        }
    }
}
