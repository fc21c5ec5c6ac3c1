//! A slice that many threads write at once, each at places of its own.

#![expect(unsafe_code, reason = "the borrow checker cannot see that the places differ")]

use std::marker::PhantomData;
use std::ops::Range;

/// A `&mut [T]` that can be lent to several threads piece by piece.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a piece reaches a thread only through `piece`, whose caller promises that no two pieces overlap; so a `T` is
// never shared, only handed over.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Panics
    /// When `range` lies outside the slice.
    ///
    /// # Safety
    /// While the returned piece lives, no other piece that overlaps it may be made or used.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "that is the point; see Safety")]
    pub(crate) unsafe fn piece(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range lies inside the slice that `'a` borrows; the caller keeps others out of it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where element `index` is, for prefetching only.
    #[inline(always)]
    pub(crate) fn address(&self, index: usize) -> *const T {
        self.start.wrapping_add(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_slices_own_elements() {
        let mut data = [1, 2, 3, 4];
        let all = Disjoint::new(&mut data);
        // SAFETY: the two pieces do not overlap.
        let (left, right) = unsafe { (all.piece(0..2), all.piece(2..4)) };
        left[1] = 20;
        right[0] = 30;
        assert_eq!(data, [1, 20, 30, 4]);
    }

    #[test]
    #[should_panic(expected = "range.end <= self.len")]
    fn a_piece_outside_the_slice_is_refused() {
        let mut data = [1, 2];
        let all = Disjoint::new(&mut data);
        // SAFETY: it is the only piece.
        let _ = unsafe { all.piece(1..3) };
    }
}
