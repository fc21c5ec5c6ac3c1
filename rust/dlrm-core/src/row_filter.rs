//! A set of a table's rows that may hold too much, never too little: one bit for each value of a hash.
//!
//! Small enough for the nearest caches, and asked without a branch that depends on the answer: where a merge of two sorted
//! lists of rows waits for a mispredicted branch at every other row, this waits for nothing.

use crate::Result;
use crate::memory::zeros;
use crate::occurrences::Run;

/// Bits for each occurrence: at most one row in so many that is not in the set seems to be.
const BITS: usize = 16;

pub(crate) struct RowFilter {
    words: Vec<u64>,
    /// Of a hash, so that a bit's number is left.
    shift: u32,
}

impl RowFilter {
    /// The rows of some occurrences.
    pub(crate) fn of(run: Run) -> Result<Self> {
        let bits = (BITS * run.len()).next_power_of_two().max(u64::BITS as usize);
        let words = zeros(bits / u64::BITS as usize, "the rows of a call")?;
        let mut made = Self { words, shift: u64::BITS - bits.trailing_zeros() };
        for k in 0..run.len() {
            let bit = made.bit(run.row(k) as u64);
            made.words[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        Ok(made)
    }

    /// Whether a row may be in the set; true if it is.
    #[inline(always)]
    pub(crate) fn may_have(&self, row: u64) -> bool {
        let bit = self.bit(row);
        self.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
    }

    /// Fibonacci hashing: neighbouring rows fall far apart, and those of a small table on bits of their own.
    #[inline(always)]
    fn bit(&self, row: u64) -> u64 {
        row.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_row_that_was_inserted_is_there_and_few_others_are(
            rows in prop::collection::btree_set(0_u64..1 << 40, 0..2000),
        ) {
            let sorted: Vec<_> = rows.iter().map(|row| row << 5).collect();
            let filter = RowFilter::of(Run::new(&sorted, 5)).unwrap();
            prop_assert!(rows.iter().all(|&row| filter.may_have(row)));
            let others = (0..1000).map(|k| (1 << 41) + 977 * k).filter(|&row| filter.may_have(row)).count();
            prop_assert!(others <= 1000 / 5, "{others}");
        }
    }
}
