//! The memory of tables and of optimizer state: mapped, zeroed, on huge pages where the system has them.
//!
//! Large memory starts on a 2 MB boundary and asks for huge pages, since rows are read at random and a page table of
//! 4 KB pages does not stay in the cache. Small memory starts on a page. All of it is touched once, by all threads, so
//! that the first use does not fault. What does not fill a huge page is on small pages: at most 4 KB are wasted.

use memmap2::{Advice, MmapMut};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::disjoint::Disjoint;
use crate::{Context, Error, Result, threads};

const HUGE_PAGE: usize = 2 << 20;

/// Floats in mapped memory, zero at first.
pub(crate) struct Memory {
    map: MmapMut,
    /// First byte used, aligned to at least 64.
    start: usize,
    /// Floats.
    len: usize,
}

impl Memory {
    /// `rows * columns` zeros for `what`, touched by the threads of `ctx`.
    pub(crate) fn zeroed(rows: usize, columns: usize, what: &str, ctx: &Context) -> Result<Self> {
        let mut memory = Self::mapped(rows, columns, what)?;
        memory.touch(ctx)?;
        Ok(memory)
    }

    /// The same, untouched: the system gives each page on first use.
    fn mapped(rows: usize, columns: usize, what: &str) -> Result<Self> {
        let wanted = rows as u128 * columns as u128 * size_of::<f32>() as u128;
        let refuse = |reason: String| Error::Memory { what: what.to_owned(), bytes: wanted, reason };
        let bytes = usize::try_from(wanted)
            .ok()
            .filter(|&bytes| bytes < isize::MAX as usize - HUGE_PAGE)
            .ok_or_else(|| refuse("more than an address space holds".to_owned()))?;
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map = MmapMut::map_anon((bytes + slack).max(1)).map_err(|e| refuse(e.to_string()))?;
        let start = if slack > 0 { map.as_ptr().align_offset(HUGE_PAGE) } else { 0 };
        let memory = Self { map, start, len: bytes / size_of::<f32>() };
        memory.ask_for_huge_pages();
        Ok(memory)
    }

    fn ask_for_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        {
            let whole = self.bytes() / HUGE_PAGE * HUGE_PAGE;
            let end = self.start + whole;
            // A kernel without huge pages refuses; the memory is as good without, only slower.
            let _ = self.map.advise_range(Advice::HugePage, self.start, whole);
            let _ = self.map.advise_range(Advice::NoHugePage, end, self.map.len() - end);
        }
    }

    fn touch(&mut self, ctx: &Context) -> Result<()> {
        const PART: usize = HUGE_PAGE / size_of::<f32>();
        let len = self.len;
        let all = Disjoint::new(self.as_mut_slice());
        threads::for_each(ctx, len.div_ceil(PART), len / 16, |i| {
            #[expect(unsafe_code, reason = "parts are disjoint")]
            // SAFETY: parts of different `i` do not overlap, and each `i` comes once.
            let part = unsafe { all.piece(i * PART..((i + 1) * PART).min(len)) };
            part.fill(0.0);
        })
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        bytemuck::cast_slice(&self.map[self.start..self.start + self.bytes()])
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        let end = self.start + self.bytes();
        bytemuck::cast_slice_mut(&mut self.map[self.start..end])
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<f32>()
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
    bytemuck::try_zeroed_vec(len).map_err(|()| Error::Memory {
        what: what.to_owned(),
        bytes: len as u128 * size_of::<T>() as u128,
        reason: "the allocator has none".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_writable() {
        for floats in [0, 1, 100, HUGE_PAGE / 4, HUGE_PAGE / 4 * 3 + 5] {
            let ctx = Context { threads: 3, ..Context::default() };
            let mut memory = Memory::zeroed(floats, 1, "a test", &ctx).unwrap();
            let align = if memory.bytes() >= HUGE_PAGE { HUGE_PAGE } else { 64 };
            assert_eq!(memory.as_slice().as_ptr() as usize % align, 0);
            assert_eq!(memory.as_slice().len(), floats);
            assert!(memory.as_slice().iter().all(|&x| x == 0.0));
            memory.as_mut_slice().fill(1.0);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        for rows in [1 << 45, 1 << 62, usize::MAX] {
            let error = Memory::zeroed(rows, 16, "table 'huge'", &Context::default()).map(|_| ());
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
        let mut memory = Memory::mapped(rows, 1, "a test").unwrap();
        memory.as_mut_slice()[rows - 1] = 5.0;
        assert_eq!(memory.as_slice()[rows - 1].to_bits(), 5.0_f32.to_bits());
        assert_eq!(memory.bytes(), rows * 4);
    }
}
