//! Memory that rows have left, for those that are made next.
//!
//! A page that is got from the system is cleared first, which can take longer than what is written to it then. Tables that
//! are replaced one after the other need no new ones: the next table's rows go where those of the last were.

use crate::mapping::Mapping;
use crate::memory::Memory;
use crate::table_rows::TableRows;
use crate::{Result, RowFormat, ScaleFormat};

/// The memory of one table that has been replaced, as far as it is not in use again.
#[derive(Default)]
pub struct Spare(Option<Mapping>);

impl Spare {
    /// Takes the memory of rows, if nobody looks at it any more and it is more than is here; the lesser goes back to the
    /// system.
    pub fn retire(&mut self, rows: TableRows) {
        if let Some(mapping) = rows.elements.into_mapping()
            && mapping.len() > self.bytes()
        {
            self.0 = Some(mapping);
        }
    }

    /// Bytes that are here.
    pub(crate) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, Mapping::len)
    }

    /// Rows as of [`TableRows::mapped`], of any content, in this memory if it is enough, else in new.
    pub(crate) fn rows(
        &mut self,
        shape: (usize, usize),
        format: RowFormat,
        scales: ScaleFormat,
        what: &str,
    ) -> Result<TableRows> {
        TableRows::made_of(shape, format, scales, |rows, row_bytes| self.memory(rows, row_bytes, what))
    }

    /// `rows * row_bytes` bytes, likewise.
    pub(crate) fn memory(&mut self, rows: usize, row_bytes: usize, what: &str) -> Result<Memory> {
        let spare = self.0.as_mut().and_then(|mapping| Memory::in_mapping(mapping, rows * row_bytes));
        spare.map_or_else(|| Memory::mapped(rows, row_bytes, what), Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Context;

    const SHAPE: (usize, usize) = (100_000, 64);

    fn fp32() -> TableRows {
        TableRows::zeroed(SHAPE, RowFormat::Fp32, ScaleFormat::Fp32, "a test", &Context::default()).unwrap()
    }

    fn int8(spare: &mut Spare) -> TableRows {
        spare.rows(SHAPE, RowFormat::Int8, ScaleFormat::Fp16, "a test").unwrap()
    }

    #[test]
    fn rows_are_where_others_were_and_share_nothing() {
        let mut spare = Spare::default();
        let old = fp32();
        let first = old.elements().0.as_ptr();
        spare.retire(old);
        let mut made = [int8(&mut spare), int8(&mut spare), int8(&mut spare)];
        assert_eq!(made[0].elements().0.as_ptr(), first);
        for (byte, rows) in (1_u8..).zip(&mut made) {
            rows.elements.as_mut_slice().fill(byte);
            rows.scales.as_mut_slice().fill(10 + byte);
        }
        drop(spare);
        let [one, two, three] = made;
        drop(two);
        for (byte, rows) in [(1, &one), (3, &three)] {
            assert!(rows.elements.as_slice::<u8>().iter().all(|&x| x == byte));
            assert!(rows.scales.as_slice::<u8>().iter().all(|&x| x == 10 + byte));
            assert_eq!(rows.elements.as_slice::<u8>().as_ptr() as usize % 64, 0);
        }
    }

    #[test]
    fn memory_that_somebody_looks_at_is_left_alone() {
        let mut spare = Spare::default();
        let old = fp32();
        let keeper = old.elements().1;
        spare.retire(old);
        assert_eq!(spare.bytes(), 0);
        drop(keeper);
        spare.retire(fp32());
        let before = spare.bytes();
        spare.retire(TableRows::mapped((1, 1), RowFormat::Fp32, ScaleFormat::Fp32, "a test").unwrap());
        assert_eq!(spare.bytes(), before);
    }
}
