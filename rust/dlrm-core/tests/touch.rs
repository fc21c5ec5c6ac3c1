//! `TableSet::touch` reads the cache lines that a lookup reads: each once for every id, whatever the level and threads.

mod common;

use common::{Case, any_case, contexts, large_case};
use dlrm_core::{
    Bags, Context, Encoding, Ids, Method, Offsets, Pooling, RowFormat, ScaleFormat, TableRows, TableSet,
};
use proptest::prelude::*;

const LINE: usize = 64;

/// The sum of the first byte of every line of a row, and of its scale and bias.
fn row(rows: &TableRows, dim: usize, id: usize) -> u64 {
    let ((elements, _), (scales, _)) = (rows.elements(), rows.scales());
    let row_bytes = rows.format().row_bytes(dim);
    let lines = id * row_bytes / LINE..((id + 1) * row_bytes).div_ceil(LINE);
    let scale = rows.format().is_quantized().then(|| id * rows.scale_format().pair_bytes() / LINE);
    let bytes = lines.map(|line| elements[line * LINE]).chain(scale.map(|line| scales[line * LINE]));
    bytes.map(u64::from).sum()
}

fn expected(case: &Case, set: &TableSet) -> u64 {
    let bag = |(i, bag): (usize, &Vec<i64>)| -> u64 {
        let table = case.features[i / case.batch].table;
        let of_bag =
            |rows: &TableRows| bag.iter().map(|&id| row(rows, case.tables[table].1, id as usize)).sum();
        set.read_rows(table, of_bag).unwrap()
    };
    case.bags.iter().enumerate().map(bag).sum()
}

fn check(case: &Case) {
    let (set, arrays) = (case.set(&Context::default()), case.arrays());
    for format in RowFormat::ALL {
        for scales in ScaleFormat::ALL {
            let encoding =
                Encoding { format, method: Method::MinMax, scales: Some(scales), zero_not_finite: false };
            for table in 0..case.tables.len() {
                let encoded = set.encode(table, encoding, &Context::default()).unwrap();
                set.swap_rows(table, encoded.rows).unwrap();
            }
            for ctx in contexts() {
                assert_eq!(set.touch(&case.call(&arrays), &ctx), Ok(expected(case, &set)));
            }
        }
    }
}

proptest! {
    #[test]
    fn every_line_of_every_row_is_read(case in any_case().prop_filter("bags", |case| case.batch > 0)) {
        check(&case);
    }
}

#[test]
fn also_on_several_threads() {
    for pooling in [Pooling::Sum, Pooling::None] {
        check(&large_case(pooling));
    }
}

#[test]
fn a_bad_id_is_named() {
    let case = large_case(Pooling::Sum);
    let (set, mut arrays) = (case.set(&Context::default()), case.arrays());
    let last = arrays.wide.len() - 1;
    arrays.wide[last] = -7;
    for ctx in contexts() {
        let bags = Bags::new(Ids::I64(&arrays.wide), Offsets::I64(&arrays.offsets), 4, case.batch, None);
        let message = set.touch(&bags.unwrap(), &ctx).unwrap_err().to_string();
        assert!(message.starts_with(&format!("indices[{last}]: expected 0 <= id < 5000")), "{message}");
    }
}
