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
        let ahead = self.ids.len().min(AHEAD);
        for id in &self.ids[..ahead] {
            self.prefetch(simd, id.row());
        }
        let mut sum = 0;
        for (position, id) in self.ids.iter().enumerate() {
            if let Some(next) = self.ids.get(position + AHEAD) {
                self.prefetch(simd, next.row());
            }
            let start = id.row() as usize * self.row_bytes;
            for line in start / LINE..(start + self.row_bytes).div_ceil(LINE) {
                sum += u64::from(self.bytes[line * LINE]);
            }
        }
        sum
    }
}

impl<I: Id> Touch<'_, I> {
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, row: u64) {
        let start = row as usize * self.row_bytes;
        for line in start / LINE..(start + self.row_bytes).div_ceil(LINE) {
            simd.prefetch(self.bytes.as_ptr().wrapping_add(line * LINE).cast());
        }
    }
}
