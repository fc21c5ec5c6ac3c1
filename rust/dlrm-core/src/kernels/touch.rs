//! Touch: one byte read of every cache line of every row, and nothing else.
//!
//! ```text
//! for id in ids:
//!     for line in the cache lines of row id:
//!         sum += the first byte of line
//! ```
//! The time of this is the time of the memory: no lookup of the same rows in the same order can take less.

use super::pool::AHEAD;
use super::{Kernel, Simd};
use crate::bags::Id;

const LINE: usize = 64;

/// Rows to touch, in the order of `ids`.
pub(crate) struct Touch<'a, I> {
    /// All rows of the table; begins on a cache line.
    pub(crate) bytes: &'a [u8],
    pub(crate) row_bytes: usize,
    /// Each below the number of rows.
    pub(crate) ids: &'a [I],
}

impl<I: Id> Kernel for Touch<'_, I> {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u64 {
        if LINE.is_multiple_of(self.row_bytes) {
            return self.rows(simd, |row| (row * self.row_bytes / LINE, 1));
        }
        // Where all rows have the same few lines, loops over them are unrolled: as in a lookup, the processor then sees
        // farther ahead.
        match (self.row_bytes % LINE, self.row_bytes / LINE) {
            (0, 2) => self.rows(simd, |row| (row * 2, 2)),
            (0, 4) => self.rows(simd, |row| (row * 4, 4)),
            (0, 8) => self.rows(simd, |row| (row * 8, 8)),
            _ => self.rows(simd, |row| {
                let start = row * self.row_bytes;
                (start / LINE, (start + self.row_bytes).div_ceil(LINE) - start / LINE)
            }),
        }
    }
}

impl<I: Id> Touch<'_, I> {
    /// Touches all rows; `lines` tells the first line of a row, and how many it has.
    #[inline(always)]
    fn rows<S: Simd>(&self, simd: S, lines: impl Fn(usize) -> (usize, usize)) -> u64 {
        let prefetch = |id: &I| {
            let (first, count) = lines(id.row() as usize);
            for line in first..first + count {
                simd.prefetch(self.bytes.as_ptr().wrapping_add(line * LINE).cast());
            }
        };
        self.ids.iter().take(AHEAD).for_each(prefetch);
        let mut sum = 0;
        for (position, id) in self.ids.iter().enumerate() {
            if let Some(next) = self.ids.get(position + AHEAD) {
                prefetch(next);
            }
            let (mut at, mut count) = lines(id.row() as usize);
            while count >= 8 {
                sum += self.block::<8>(at);
                (at, count) = (at + 8, count - 8);
            }
            if count & 4 > 0 {
                sum += self.block::<4>(at);
                at += 4;
            }
            if count & 2 > 0 {
                sum += self.block::<2>(at);
                at += 2;
            }
            if count & 1 > 0 {
                sum += self.block::<1>(at);
            }
        }
        sum
    }

    /// `COUNT` lines from `first` on, each read by an instruction of its own: when one strides through the row, processors
    /// guess that it goes on, and bring lines that nobody asked for. That was measured to take twice as long.
    #[inline(always)]
    fn block<const COUNT: usize>(&self, first: usize) -> u64 {
        let bytes = &self.bytes[first * LINE..][..=(COUNT - 1) * LINE];
        let mut sum = 0;
        for i in 0..COUNT {
            sum += u64::from(bytes[i * LINE]);
        }
        sum
    }
}
