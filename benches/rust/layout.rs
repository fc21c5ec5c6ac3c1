//! Where the scale and the bias of a quantized row lie: beside the rows, as they do, or in them.
//!
//! Rows are touched, not looked up, so that memory alone is timed. For rows with their scale and bias in them there are
//! fp32 rows of as many bytes, which start where such rows would start: 17 elements for int8 rows of 64, and so on.

use std::fmt;

use divan::Bencher;
use dlrm_benches::{Sizes, Workload};
use dlrm_core::{Context, RowFormat};

fn main() {
    divan::main();
}

#[derive(Clone, Copy)]
struct Case {
    format: RowFormat,
    dim: usize,
    rows: usize,
    inside: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, dim, rows, inside } = self;
        write!(f, "{format} D {dim:3} {rows:8} rows, scales {}", if *inside { "in them" } else { "beside" })
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in [RowFormat::Int8, RowFormat::Int4] {
        for dim in [32, 64, 128] {
            for rows in [100_000, 1_000_000, 8_000_000] {
                cases.extend([false, true].map(|inside| Case { format, dim, rows, inside }));
            }
        }
    }
    cases
}

#[divan::bench(args = cases(), max_time = 0.5)]
fn touch(bencher: Bencher, case: &Case) {
    let Case { format, dim, rows, inside } = *case;
    let (format, dim) =
        if inside { (RowFormat::Fp32, format.row_bytes(dim) / size_of::<f32>() + 1) } else { (format, dim) };
    let mut workload = Workload::new(Sizes { tables: 1, rows, dim, format, ids_per_bag: 20, batch: 1024 });
    bencher.bench_local(|| workload.touch(&Context::default()));
}
