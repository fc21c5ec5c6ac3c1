//! Touch: one byte read of every cache line of every row, and nothing else.
//!
//! ```text
//! for id in ids:
//!     for line in the cache lines of row id, and of its scale and bias:
//!         sum += the first byte of line
//! ```
//! The time of this is the time of the memory: no lookup of the same rows in the same order can take less.

use super::pool::{ahead, is_near};
use super::{Kernel, Simd};
use crate::bags::Id;

const LINE: usize = 64;

/// Rows to touch, in the order of `ids`.
pub(crate) struct Touch<'a, I> {
    /// The elements of all rows of the table; begin on a cache line.
    pub(crate) elements: &'a [u8],
    pub(crate) row_bytes: usize,
    /// Their scales and biases, likewise.
    pub(crate) scales: &'a [u8],
    /// Bytes of a row's scale and bias; 0 when it has none.
    pub(crate) pair_bytes: usize,
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
            let row = id.row() as usize;
            let (first, count) = lines(row);
            for line in first..first + count {
                simd.prefetch(self.elements.as_ptr().wrapping_add(line * LINE).cast());
            }
            if self.pair_bytes > 0 {
                simd.prefetch(self.scales.as_ptr().wrapping_add(self.scale_line(row)).cast());
            }
        };
        let ahead = ahead(self.row_bytes.div_ceil(LINE));
        let prefetched = if is_near(self.elements.len()) { &[] } else { self.ids };
        prefetched.iter().take(ahead).for_each(prefetch);
        let mut sum = 0;
        for (position, id) in self.ids.iter().enumerate() {
            if let Some(next) = prefetched.get(position + ahead) {
                prefetch(next);
            }
            let row = id.row() as usize;
            let (first, count) = lines(row);
            sum += self.row(first, count);
            if self.pair_bytes > 0 {
                sum += u64::from(self.scales[self.scale_line(row)]);
            }
        }
        sum
    }

    /// Where the line of a row's scale and bias begins: they are never on two.
    #[inline(always)]
    fn scale_line(&self, row: usize) -> usize {
        row * self.pair_bytes / LINE * LINE
    }

    /// `count` lines from `at` on.
    #[inline(always)]
    fn row(&self, mut at: usize, mut count: usize) -> u64 {
        let mut sum = 0;
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
        sum
    }

    /// `COUNT` lines from `first` on, each read by an instruction of its own: when one strides through the row, processors
    /// guess that it goes on, and bring lines that nobody asked for. That was measured to take twice as long.
    #[inline(always)]
    fn block<const COUNT: usize>(&self, first: usize) -> u64 {
        let bytes = &self.elements[first * LINE..][..=(COUNT - 1) * LINE];
        let mut sum = 0;
        for i in 0..COUNT {
            sum += u64::from(bytes[i * LINE]);
        }
        sum
    }
}
