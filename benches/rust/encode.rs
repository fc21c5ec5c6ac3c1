//! Rows of fp32 brought into every row format, by every method: bytes of fp32 in a second.

use std::fmt;

use divan::Bencher;
use divan::counter::BytesCount;
use dlrm_core::{Context, Encoding, Level, Method, RowFormat, TableRows, TableSpec};

const DIM: usize = 64;

/// Bytes of fp32: beyond every cache; fewer for the methods that search.
const BYTES: [(Method, usize); 3] =
    [(Method::MinMax, 256 << 20), (Method::LeastSquares, 32 << 20), (Method::Codebook, 32 << 20)];

fn main() {
    divan::main();
}

#[derive(Clone)]
struct Case {
    level: Level,
    threads: usize,
    format: RowFormat,
    method: Method,
    bytes: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, threads, format, method, .. } = self;
        write!(f, "{format} {method} {level:?} {threads} threads")
    }
}

fn cases() -> Vec<Case> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cases = Vec::new();
    for format in RowFormat::ALL {
        for (method, bytes) in BYTES {
            let fits = match method {
                Method::MinMax => true,
                Method::LeastSquares => format.is_quantized(),
                Method::Codebook => format == RowFormat::Int4,
            };
            let levels = Level::available().flat_map(|level| [(level, 1), (level, all)]);
            let case = |(level, threads)| Case { level, threads, format, method, bytes };
            cases.extend(levels.filter(|_| fits).map(case));
        }
    }
    cases
}

/// Numbers without order, the closer to 0 the more of them.
fn source(bytes: usize) -> Vec<f32> {
    let number = |i: usize| {
        let scrambled = (i as u32).wrapping_mul(0x9E37_79B1) ^ (i as u32 >> 7).wrapping_mul(0x85EB_CA77);
        let uniform = f64::from(scrambled) / f64::from(u32::MAX) * 2.0 - 1.0;
        (uniform * uniform.abs()) as f32
    };
    (0..bytes / size_of::<f32>()).map(number).collect()
}

#[divan::bench(args = cases(), max_time = 1.0)]
fn encode(bencher: Bencher, case: &Case) {
    let source = source(case.bytes);
    let spec =
        TableSpec { name: "t".to_owned(), rows: source.len() / DIM, dim: DIM, format: RowFormat::Fp32 };
    let Case { format, method, .. } = *case;
    let encoding = Encoding { format, method, scales: None, zero_not_finite: false };
    let context = Context { level: case.level, threads: case.threads, ..Context::default() };
    bencher
        .counter(BytesCount::new(case.bytes))
        .bench_local(|| TableRows::encode(&source, &spec, encoding, &context).map(|made| made.largest_error));
}
