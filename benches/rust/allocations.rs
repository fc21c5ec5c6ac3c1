//! How often a lookup allocates, and how much an update takes: counted, not timed. A lookup may allocate nothing for an id or
//! a bag, and an update nothing for the rows of a table.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use dlrm_benches::{Sizes, Workload, optimizer};
use dlrm_core::optimizers::Kind;
use dlrm_core::{Context, Result, RowFormat};

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

/// A padding that some bags of every piece have: one id in 25.
const PADDING: usize = 3;
const ROWS: usize = 25;

/// The fewest cache lines of a piece into which the engine cuts a call.
const PIECE_LINES: usize = 2048;

fn main() {
    println!("allocations of a call, on all its threads (mean of {CALLS} calls)\n");
    println!(
        "{:>8}{:>8}{:>9}{:>8}{:>10}{:>14}{:>12}",
        "threads", "tables", "padding", "batch", "pieces <", "allocations", "bytes"
    );
    for threads in [1, 2] {
        for tables in [1, 26, 400] {
            for padding in [None, Some(PADDING)] {
                for batch in [1, 16, 1024] {
                    row(threads, tables, padding, batch);
                }
            }
        }
    }
    println!("\nscratch of an update, one thread\n");
    println!("{:>12}{:>12}{:>14}{:>12}", "rows", "ids", "allocations", "bytes");
    let [few, many] = [1_000, 1_000_000].map(scratch);
    assert!(many <= 2.0 * few, "expected scratch by the batch, whatever the rows of the tables");
}

/// Prints one line.
///
/// # Panics
/// When a call allocates but to have threads help, for more tables than the stack has places for, and for pieces from
/// which ids are left out: never for an id or a bag.
fn row(threads: usize, tables: usize, padding: Option<usize>, batch: usize) {
    let sizes = Sizes { tables, rows: ROWS, dim: 64, format: RowFormat::Fp32, ids_per_bag: 4, batch };
    let mut workload = Workload::with_padding(sizes, padding);
    let context = Context { threads, ..Context::default() };
    let [allocations, bytes] = count(|| workload.lookup(&context));
    let pieces = tables * (batch * (sizes.ids_per_bag + 1) * 4).div_ceil(PIECE_LINES);
    println!(
        "{threads:>8}{tables:>8}{:>9}{batch:>8}{pieces:>10}{allocations:>14.2}{bytes:>12.0}",
        padding.is_some()
    );
    let allowed =
        2 * (threads - 1) + if tables > 32 { 4 } else { 0 } + if padding.is_some() { 3 * pieces } else { 0 };
    assert!(allocations <= allowed as f64, "expected at most {allowed} allocations");
}

/// Prints what an update takes of tables of some rows, and returns the bytes.
fn scratch(rows: usize) -> f64 {
    let sizes = Sizes { tables: 4, rows, dim: 16, format: RowFormat::Fp32, ids_per_bag: 4, batch: 1024 };
    let mut workload = Workload::new(sizes);
    let context = Context::default();
    workload.set_optimizer(Kind::Sgd, &context).expect("memory");
    let optimizer = optimizer(Kind::Sgd);
    let [allocations, bytes] = count(|| workload.update(&optimizer, &context));
    println!("{rows:>12}{:>12}{allocations:>14.2}{bytes:>12.0}", sizes.ids());
    bytes
}

/// Allocations and bytes of a call.
fn count(mut call: impl FnMut() -> Result<()>) -> [f64; 2] {
    let mut run = || {
        for _ in 0..CALLS {
            call().expect("ids are in range");
        }
    };
    run(); // the pool is made by the first large call
    let counters = [&ALLOCATIONS, &BYTES];
    let before = counters.map(|counter| counter.load(Ordering::Relaxed));
    run();
    let after = counters.map(|counter| counter.load(Ordering::Relaxed));
    [0, 1].map(|i| (after[i] - before[i]) as f64 / CALLS as f64)
}
