//! Pages that the system has mapped, which can be parted: each part goes back by itself.

#![expect(unsafe_code, reason = "pages are given back")]

use std::io;
use std::sync::Arc;

use memmap2::{Advice, MmapMut, MmapRaw, UncheckedAdvice};

pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// No system has longer ones where huge pages are not asked for.
const LARGEST_PAGE: usize = 64 << 10;

/// Pages that are the system's again when this is dropped. It gives their address, and no access.
pub(crate) struct Mapping {
    /// Shared with the other parts.
    map: Arc<MmapRaw>,
    /// Where this part begins, on a page.
    start: usize,
    len: usize,
}

impl Mapping {
    /// At least `len` zeros, on huge pages from the first boundary of such a page on if they are as long.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let slack = if len >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map = MmapRaw::from(MmapMut::map_anon((len + slack).max(1))?);
        let mapping = Self { start: 0, len: map.len(), map: Arc::new(map) };
        ask_for_huge_pages(&mapping.map, mapping.offset_of(len), len);
        Ok(mapping)
    }

    /// Where `len` bytes begin: on a huge page if they are as long as one.
    fn offset_of(&self, len: usize) -> usize {
        if len >= HUGE_PAGE { self.map.as_ptr().wrapping_add(self.start).align_offset(HUGE_PAGE) } else { 0 }
    }

    /// The address of `len` bytes in it, if it is as long.
    pub(crate) fn place(&self, len: usize) -> Option<*mut u8> {
        let offset = self.offset_of(len);
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        fits.then(|| self.map.as_mut_ptr().wrapping_add(self.start + offset))
    }

    /// Takes the pages from the front that `len` bytes at their [`Mapping::place`] are on; what is left stays here.
    pub(crate) fn take(&mut self, len: usize) -> Self {
        let end = (self.offset_of(len) + len).next_multiple_of(LARGEST_PAGE).min(self.len);
        let taken = Self { map: Arc::clone(&self.map), start: self.start, len: end };
        self.start += end;
        self.len -= end;
        taken
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The last part unmaps all.
        #[cfg(unix)]
        if self.len > 0 && Arc::strong_count(&self.map) > 1 {
            // SAFETY: the pages are of this part alone, and nobody has their address any more. Those who refuse keep them
            // until the last part is gone.
            let _ =
                unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.start, self.len) };
        }
    }
}

/// For `len` bytes from `start` on.
fn ask_for_huge_pages(map: &MmapRaw, start: usize, len: usize) {
    #[cfg(target_os = "linux")]
    {
        let whole = len / HUGE_PAGE * HUGE_PAGE;
        let end = start + whole;
        // A kernel without huge pages refuses; the memory is as good without, only slower.
        let _ = map.advise_range(Advice::HugePage, start, whole);
        let _ = map.advise_range(Advice::NoHugePage, end, map.len() - end);
    }
}
