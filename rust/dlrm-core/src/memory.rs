//! The memory of tables and of optimizer state: mapped, zeroed, on huge pages where the system has them.
//!
//! Large memory starts on a 2 MB boundary and asks for huge pages, since rows are read at random and a page table of
//! 4 KB pages does not stay in the cache. Small memory starts on a page. All of it is touched once, by all threads, so
//! that the first use does not fault. What does not fill a huge page is on small pages: at most 4 KB are wasted.
//!
//! Rows that are somewhere already, as those of a saved program that torch has loaded, can be used where they are:
//! [`Borrowed`].

#![expect(unsafe_code, reason = "memory that others keep alive, as slices")]

use std::any::Any;
use std::sync::Arc;

use bytemuck::Pod;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::disjoint::Disjoint;
use crate::mapping::{HUGE_PAGE, Mapping};
use crate::{Context, Error, Result, threads};

/// Bytes that are read and written as elements of any type; mapped ones are zero at first.
pub(crate) struct Memory {
    /// First byte used, aligned to at least 64 where the memory is mapped.
    start: *mut u8,
    /// Bytes used.
    len: usize,
    /// Shared with those who were given the address; gives no access.
    keeper: Keeper,
}

// SAFETY: `start` leads to bytes that any thread may use while `keeper` lives; `&self` gives `&[T]` alone, and `&mut self`
// excludes all others.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`.
unsafe impl Sync for Memory {}

/// Keeps memory in place for those who were given its address, also after its table has moved on.
#[derive(Clone)]
pub struct Keeper(Arc<dyn Any + Send + Sync>);

/// Memory of someone else's, to be used where it is.
pub struct Borrowed(Memory);

impl Borrowed {
    /// `len` bytes from `start` on, which `owner` keeps there.
    ///
    /// # Safety
    /// 1. The bytes are initialised, and can be read and written by any thread, until `owner` is dropped.
    /// 2. Nobody else writes to them during a call of the engine, nor reads them during one that writes.
    pub unsafe fn new(start: *mut u8, len: usize, owner: impl Any + Send + Sync) -> Self {
        // An empty array may have any address, and a slice may not.
        let start = if len == 0 { std::ptr::dangling_mut::<u64>().cast() } else { start };
        Self(Memory { start, len, keeper: Keeper(Arc::new(owner)) })
    }

    /// The bytes for rows of `what`, if there are as many as those have and they are aligned to `align`.
    pub(crate) fn checked(self, expected: u128, align: usize, what: &str) -> Result<Memory> {
        if self.0.len as u128 != expected {
            return Err(Error::argument(what, format_args!("{expected} bytes"), self.0.len));
        }
        if !(self.0.start as usize).is_multiple_of(align) {
            let got = format!("memory at {:p}", self.0.start);
            return Err(Error::argument(what, format_args!("memory aligned to {align} bytes"), got));
        }
        Ok(self.0)
    }
}

impl Memory {
    /// `rows * row_bytes` zeros for `what`, touched by the threads of `ctx`.
    pub(crate) fn zeroed(rows: usize, row_bytes: usize, what: &str, ctx: &Context) -> Result<Self> {
        let mut memory = Self::mapped(rows, row_bytes, what)?;
        memory.touch(ctx)?;
        Ok(memory)
    }

    /// The same, untouched: the system gives each page on first use.
    pub(crate) fn mapped(rows: usize, row_bytes: usize, what: &str) -> Result<Self> {
        let wanted = rows as u128 * row_bytes as u128;
        let refuse = |reason: String| Error::Memory { what: what.to_owned(), bytes: wanted, reason };
        let bytes = usize::try_from(wanted)
            .ok()
            .filter(|&bytes| bytes < isize::MAX as usize - HUGE_PAGE)
            .ok_or_else(|| refuse("more than an address space holds".to_owned()))?;
        let mapping = Mapping::new(bytes).map_err(|e| refuse(e.to_string()))?;
        let start = mapping.place(bytes).expect("a mapping for as many bytes");
        Ok(Self { start, len: bytes, keeper: Keeper(Arc::new(mapping)) })
    }

    /// `len` bytes of any content at the front of `mapping`, which is left what is behind them; none if it is too short.
    pub(crate) fn in_mapping(mapping: &mut Mapping, len: usize) -> Option<Self> {
        let start = mapping.place(len)?;
        Some(Self { start, len, keeper: Keeper(Arc::new(mapping.take(len))) })
    }

    /// Its pages, if they are the system's and nobody was given their address that still keeps it.
    pub(crate) fn into_mapping(self) -> Option<Mapping> {
        Arc::into_inner(self.keeper.0.downcast().ok()?)
    }

    /// Has the system give all of it now.
    pub(crate) fn touch(&mut self, ctx: &Context) -> Result<()> {
        let len = self.len;
        let all = Disjoint::new(self.as_mut_slice::<u8>());
        threads::for_each(ctx, len.div_ceil(HUGE_PAGE), len / 64, |i| {
            // SAFETY: parts of different `i` do not overlap, and each `i` comes once.
            let part = unsafe { all.piece(i * HUGE_PAGE..((i + 1) * HUGE_PAGE).min(len)) };
            part.fill(0);
        })
    }

    /// All of it; its length is a multiple of the size of `T`, which is at most 64 bytes.
    pub(crate) fn as_slice<T: Pod>(&self) -> &[T] {
        // SAFETY: the bytes are there while `self.keeper` lives, and initialised; `&mut` to them is given by
        // `as_mut_slice` alone, which borrows all of `self`, the only value that gives access.
        bytemuck::cast_slice(unsafe { std::slice::from_raw_parts(self.start, self.len) })
    }

    /// The same, to be changed.
    pub(crate) fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; `&mut self` excludes every other slice.
        bytemuck::cast_slice_mut(unsafe { std::slice::from_raw_parts_mut(self.start, self.len) })
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> usize {
        self.len
    }

    /// What keeps it in place.
    pub(crate) fn keeper(&self) -> Keeper {
        self.keeper.clone()
    }
}

/// Refuses `bytes` for `what` that are not there: else the system would end the process when it uses them.
pub(crate) fn check_available(bytes: u128, what: &str) -> Result<()> {
    /// Below this the system is not asked.
    const SMALL: u128 = 64 << 20;
    if bytes < SMALL {
        return Ok(());
    }
    let free = available();
    if bytes <= u128::from(free) {
        return Ok(());
    }
    Err(Error::Memory { what: what.to_owned(), bytes, reason: format!("{free} bytes available") })
}

/// Bytes that this process may still take: of the machine, or of its control group where that is less.
fn available() -> u64 {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(memory);
    let machine = system.available_memory();
    // Not the group's `free_memory`, which counts cached files as used.
    let group = system.cgroup_limits().map(|group| group.total_memory.saturating_sub(group.rss));
    group.map_or(machine, |group| machine.min(group))
}

/// `len` zeros on the heap for `what`.
pub(crate) fn zeros<T: bytemuck::Zeroable>(len: usize, what: &str) -> Result<Vec<T>> {
    bytemuck::try_zeroed_vec(len).map_err(|()| none_left::<T>(len, what))
}

/// Nothing yet, but room for `len` on the heap, for `what`.
pub(crate) fn room<T>(len: usize, what: &str) -> Result<Vec<T>> {
    let mut made = Vec::new();
    made.try_reserve_exact(len).map_err(|_| none_left::<T>(len, what))?;
    Ok(made)
}

fn none_left<T>(len: usize, what: &str) -> Error {
    Error::Memory {
        what: what.to_owned(),
        bytes: len as u128 * size_of::<T>() as u128,
        reason: "the allocator has none".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_writable() {
        for floats in [0, 1, 100, HUGE_PAGE / 4, HUGE_PAGE / 4 * 3 + 5] {
            let ctx = Context { threads: 3, ..Context::default() };
            let mut memory = Memory::zeroed(floats, size_of::<f32>(), "a test", &ctx).unwrap();
            let align = if memory.bytes() >= HUGE_PAGE { HUGE_PAGE } else { 64 };
            assert_eq!(memory.as_slice::<u8>().as_ptr() as usize % align, 0);
            assert_eq!(memory.as_slice::<f32>().len(), floats);
            assert!(memory.as_slice::<f32>().iter().all(|&x| x == 0.0));
            memory.as_mut_slice().fill(1.0_f32);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        for rows in [1 << 45, 1 << 62, usize::MAX] {
            let error = Memory::zeroed(rows, 64, "table 'huge'", &Context::default()).map(|_| ());
            let message = error.unwrap_err().to_string();
            assert!(message.starts_with("cannot allocate table 'huge'"), "{message}");
        }
    }

    #[test]
    fn memory_that_the_machine_does_not_have_is_refused_before_it_is_used() {
        let message = check_available(1 << 50, "3 tables").unwrap_err().to_string();
        assert!(message.starts_with("cannot allocate 3 tables: 1125899906842624 bytes asked, "), "{message}");
        assert!(zeros::<u64>(1 << 58, "scratch").is_err());
    }

    #[test]
    fn more_than_2_31_rows_are_addressed() {
        let rows = (1 << 31) + 3;
        let mut memory = Memory::mapped(rows, size_of::<f32>(), "a test").unwrap();
        memory.as_mut_slice::<f32>()[rows - 1] = 5.0;
        assert_eq!(memory.as_slice::<f32>()[rows - 1].to_bits(), 5.0_f32.to_bits());
        assert_eq!(memory.bytes(), rows * 4);
    }

    #[test]
    fn a_keeper_keeps_the_memory_of_a_table_that_is_gone() {
        let mut memory = Memory::mapped(1, 64, "a test").unwrap();
        memory.as_mut_slice().fill(7_u8);
        let at = memory.as_slice::<u8>().as_ptr();
        let keeper = memory.keeper();
        drop(memory);
        // SAFETY: the keeper keeps the bytes mapped, and nobody writes to them any more.
        assert_eq!(unsafe { at.read() }, 7);
        drop(keeper);
    }

    #[test]
    fn borrowed_memory_is_used_where_it_is_and_kept() {
        let borrow = || {
            let mut bytes = vec![1.0_f32, 2.0];
            let start: *mut u8 = bytes.as_mut_ptr().cast();
            // SAFETY: the vector is moved and not touched, and its elements stay where they are.
            (start, unsafe { Borrowed::new(start, 8, bytes) })
        };
        let (start, borrowed) = borrow();
        let mut memory = borrowed.checked(8, 4, "a test").unwrap();
        assert_eq!(memory.as_slice::<u8>().as_ptr(), start.cast_const());
        memory.as_mut_slice::<f32>()[1] += 1.0;
        assert_eq!(memory.as_slice::<f32>().iter().sum::<f32>().to_bits(), 4.0_f32.to_bits());

        let message = borrow().1.checked(12, 4, "codes").map(|_| ()).unwrap_err().to_string();
        assert_eq!(message, "codes: expected 12 bytes, got 8");
        // SAFETY: nothing is read.
        let odd = unsafe { Borrowed::new(start.wrapping_add(1), 4, ()) };
        let message = odd.checked(4, 4, "codes").map(|_| ()).unwrap_err().to_string();
        assert!(
            message.starts_with("codes: expected memory aligned to 4 bytes, got memory at 0x"),
            "{message}"
        );
        // SAFETY: there is nothing to read.
        let empty = unsafe { Borrowed::new(std::ptr::null_mut(), 0, ()) };
        assert!(empty.checked(0, 4, "codes").unwrap().as_slice::<f32>().is_empty());
    }
}
