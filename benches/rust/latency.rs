//! Small calls: what one costs when there is little to look up.

use divan::Bencher;
use divan::counter::ItemsCount;
use dlrm_benches::{Sizes, Workload};
use dlrm_core::{Context, RowFormat, threads};

fn main() {
    divan::main();
}

/// One call for 26 tables with one id a bag, on all threads; the batch sizes of requests, and one of training.
#[divan::bench(args = [1, 16, 64, 2048], consts = [1, 26], max_time = 1)]
fn lookup<const TABLES: usize>(bencher: Bencher, batch: usize) {
    let sizes =
        Sizes { tables: TABLES, rows: 100_000, dim: 64, format: RowFormat::Fp32, ids_per_bag: 1, batch };
    let mut workload = Workload::new(sizes);
    let context = Context { threads: threads::get().expect("a number of threads"), ..Context::default() };
    bencher.counter(ItemsCount::new(sizes.ids())).bench_local(|| workload.lookup(&context));
}
