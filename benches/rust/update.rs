//! Backward and update on all threads: the shapes and optimizers of the comparison, and its first shape in every row format.

use std::fmt;

use divan::Bencher;
use divan::counter::BytesCount;
use dlrm_benches::{Sizes, Workload, optimizer};
use dlrm_core::optimizers::Kind;
use dlrm_core::{Context, RowFormat, threads};

const SINGLE: Sizes =
    Sizes { tables: 26, rows: 1 << 20, dim: 64, format: RowFormat::Fp32, ids_per_bag: 1, batch: 2048 };
const MULTI: Sizes =
    Sizes { tables: 8, rows: 1 << 20, dim: 128, format: RowFormat::Fp32, ids_per_bag: 40, batch: 512 };

fn main() {
    divan::main();
}

struct Case {
    name: &'static str,
    sizes: Sizes,
    kind: Kind,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, sizes, kind } = self;
        write!(f, "{name} {} {kind}", sizes.format)
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = [("SINGLE", SINGLE), ("MULTI", MULTI)];
    let fp32 = shapes
        .into_iter()
        .flat_map(|(name, sizes)| Kind::ALL.iter().map(move |&kind| Case { name, sizes, kind }));
    let others = RowFormat::ALL.into_iter().filter(|&format| format != RowFormat::Fp32);
    fp32.chain(others.flat_map(|format| {
        let sizes = Sizes { format, ..SINGLE };
        [Kind::Sgd, Kind::RowWiseAdagrad].map(|kind| Case { name: "SINGLE", sizes, kind })
    }))
}

#[divan::bench(args = cases(), max_time = 2)]
fn update(bencher: Bencher, case: &Case) {
    let context = Context { threads: threads::get().expect("a number of threads"), ..Context::default() };
    let mut workload = Workload::new(case.sizes);
    workload.set_optimizer(case.kind, &context).expect("memory for the state");
    let optimizer = optimizer(case.kind);
    bencher
        .counter(BytesCount::new(case.sizes.bytes()))
        .bench_local(|| workload.update(&optimizer, &context));
}
