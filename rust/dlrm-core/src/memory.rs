//! The memory of tables and of optimizer state: mapped, zeroed, on huge pages where the system has them.
//!
//! Large memory starts on a 2 MB boundary and asks for huge pages, since rows are read at random and a page table of
//! 4 KB pages does not stay in the cache. Small memory starts on a page. All of it is touched once, by all threads, so
//! that the first use does not fault. The last, partial huge page stays on small pages: at most 4 KB are wasted.

use memmap2::{Advice, MmapMut};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::disjoint::Disjoint;
use crate::{Context, Error, Result, threads};

const HUGE_PAGE: usize = 2 << 20;

/// Below this the system is not asked whether the memory is there.
const CHECKED: usize = 64 << 20;

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
        if bytes >= CHECKED {
            let free = available();
            if bytes as u64 > free {
                return Err(refuse(format!("{free} bytes available")));
            }
        }
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map = MmapMut::map_anon((bytes + slack).max(1)).map_err(|e| refuse(e.to_string()))?;
        let start = if slack > 0 { map.as_ptr().align_offset(HUGE_PAGE) } else { 0 };
        let memory = Self { map, start, len: bytes / size_of::<f32>() };
        memory.ask_for_huge_pages();
        Ok(memory)
    }

    fn ask_for_huge_pages(&self) {
        let whole = self.bytes() / HUGE_PAGE * HUGE_PAGE;
        #[cfg(target_os = "linux")]
        if whole > 0 {
            // A kernel without huge pages refuses; the memory is as good without, only slower.
            let _ = self.map.advise_range(Advice::HugePage, self.start, whole);
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

/// Bytes that this process may still take: of the machine, or of its control group where that is less.
fn available() -> u64 {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(memory);
    let machine = system.available_memory();
    system.cgroup_limits().map_or(machine, |group| machine.min(group.free_memory))
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
    fn more_than_2_31_rows_are_addressed() {
        let rows = (1 << 31) + 3;
        let mut memory = Memory::mapped(rows, 1, "a test").unwrap();
        memory.as_mut_slice()[rows - 1] = 5.0;
        assert_eq!(memory.as_slice()[rows - 1].to_bits(), 5.0_f32.to_bits());
        assert_eq!(memory.bytes(), rows * 4);
    }
}
