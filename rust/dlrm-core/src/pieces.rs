//! A call cut into pieces of about equal work, for the threads to take.
//!
//! Work is counted in cache lines, not in bags or tables: a piece is a run of one feature's units (bags, or ids where
//! nothing is pooled) that touches about so many lines as [`piece_lines`] says.

use std::ops::Range;

use crate::per_feature::PerFeature;
use crate::{Context, Result, threads};

/// Cache lines of a piece: 512 KB, some tens of microseconds of memory traffic, as every piece begins by waiting for its first
/// rows. Fewer, but not many, where the threads would have less than two each.
const PIECE_LINES: std::ops::RangeInclusive<usize> = 2048..=8192;

/// The size of one feature's work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// What cannot be divided further.
    pub(crate) units: usize,
    /// Cache lines that all of them touch.
    pub(crate) lines: usize,
}

/// Calls `run(feature, units)` until every unit of every feature was in one call, on the threads of `ctx`.
pub(crate) fn for_each(
    ctx: &Context,
    sizes: &[Size],
    run: impl Fn(usize, Range<usize>) + Sync,
) -> Result<()> {
    let lines = sizes.iter().map(|size| size.lines).sum();
    let piece_lines = piece_lines(lines, ctx.threads);
    let mut ends = PerFeature::with_capacity(sizes.len());
    let mut end = 0;
    for size in sizes {
        end += count(*size, piece_lines);
        ends.push(end);
    }
    threads::for_each(ctx, end, lines, |piece| {
        let feature = ends.partition_point(|&end| end <= piece);
        let size = sizes[feature];
        let pieces = count(size, piece_lines);
        let nth = piece - (ends[feature] - pieces);
        run(feature, cut(size.units, pieces, nth)..cut(size.units, pieces, nth + 1));
    })
}

fn piece_lines(lines: usize, threads: usize) -> usize {
    (lines / (2 * threads)).clamp(*PIECE_LINES.start(), *PIECE_LINES.end())
}

fn count(size: Size, piece_lines: usize) -> usize {
    size.lines.div_ceil(piece_lines).clamp(size.units.min(1), size.units)
}

/// Where the `nth` of `pieces` begins.
fn cut(units: usize, pieces: usize, nth: usize) -> usize {
    match units.checked_mul(nth) {
        Some(product) => product / pieces,
        None => (units as u128 * nth as u128 / pieces as u128) as usize, // a slow division
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_unit_is_in_one_piece() {
        let sizes = [(0, 0), (5, 0), (3, 100_000), (10_000, 50_000), (1, 9999)]
            .map(|(units, lines)| Size { units, lines });
        let seen = sizes.map(|size| (0..size.units).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>());
        for_each(&Context::default(), &sizes, |feature, units| {
            assert!(!units.is_empty());
            for unit in units {
                seen[feature][unit].fetch_add(1, Ordering::Relaxed);
            }
        })
        .unwrap();
        assert!(seen.iter().flatten().all(|n| n.load(Ordering::Relaxed) == 1));
    }
}
