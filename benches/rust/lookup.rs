//! Lookup on one thread: every level, row format and dim, with a table that stays in the cache and with one that does not.

use std::fmt;

use divan::Bencher;
use divan::counter::BytesCount;
use dlrm_benches::{Sizes, Workload};
use dlrm_core::{Context, Level, RowFormat};

/// Bytes of a table that stays in L2, and of one that is beyond every cache.
const PLACES: [(&str, usize); 2] = [("cache", 256 << 10), ("memory", 512 << 20)];

const DIMS: [usize; 5] = [16, 32, 64, 100, 128];

fn main() {
    divan::main();
}

#[derive(Clone)]
struct Case {
    level: Level,
    format: RowFormat,
    dim: usize,
    place: (&'static str, usize),
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, format, dim, place: (place, _) } = self;
        write!(f, "{place:6} {format} D {dim:3} {level:?}")
    }
}

impl Case {
    fn workload(&self) -> (Sizes, Workload) {
        let rows = self.place.1 / self.format.row_bytes(self.dim);
        let sizes =
            Sizes { tables: 1, rows, dim: self.dim, format: self.format, ids_per_bag: 20, batch: 1024 };
        (sizes, Workload::new(sizes))
    }

    fn context(&self) -> Context<'static> {
        Context { level: self.level, ..Context::default() }
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for place in PLACES {
        for format in RowFormat::ALL {
            for dim in DIMS {
                cases.extend(Level::available().map(|level| Case { level, format, dim, place }));
            }
        }
    }
    cases
}

#[divan::bench(args = cases(), max_time = 0.3)]
fn lookup(bencher: Bencher, case: &Case) {
    let (sizes, mut workload) = case.workload();
    let context = case.context();
    bencher.counter(BytesCount::new(sizes.bytes())).bench_local(|| workload.lookup(&context));
}

/// What the memory allows.
#[divan::bench(args = cases().into_iter().filter(|case| case.level == Level::best()), max_time = 0.3)]
fn touch(bencher: Bencher, case: &Case) {
    let (sizes, mut workload) = case.workload();
    let context = case.context();
    bencher.counter(BytesCount::new(sizes.bytes())).bench_local(|| workload.touch(&context));
}
