//! How often a lookup allocates: counted, not timed. Nothing may depend on the number of ids or bags.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use dlrm_benches::{Sizes, Workload};
use dlrm_core::{Context, RowFormat};

/// Calls that are counted, after as many that are not.
const CALLS: usize = 100;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every method is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

fn main() {
    println!("allocations of a call, on all its threads (mean of {CALLS} calls)\n");
    println!("{:>8}{:>8}{:>8}{:>14}{:>12}", "threads", "tables", "batch", "allocations", "bytes");
    for threads in [1, 2] {
        for tables in [1, 26] {
            for batch in [1, 16, 2048] {
                let [allocations, bytes] = count(tables, batch, threads);
                println!("{threads:>8}{tables:>8}{batch:>8}{allocations:>14.2}{bytes:>12.0}");
            }
        }
    }
}

/// Allocations and bytes of a call.
fn count(tables: usize, batch: usize, threads: usize) -> [f64; 2] {
    let sizes = Sizes { tables, rows: 10_000, dim: 64, format: RowFormat::Fp32, ids_per_bag: 4, batch };
    let mut workload = Workload::new(sizes);
    let context = Context { threads, ..Context::default() };
    let mut run = || {
        for _ in 0..CALLS {
            workload.lookup(&context).expect("ids are in range");
        }
    };
    run(); // the pool is made by the first large call
    let counters = [&ALLOCATIONS, &BYTES];
    let before = counters.map(|counter| counter.load(Ordering::Relaxed));
    run();
    let after = counters.map(|counter| counter.load(Ordering::Relaxed));
    [0, 1].map(|i| (after[i] - before[i]) as f64 / CALLS as f64)
}
