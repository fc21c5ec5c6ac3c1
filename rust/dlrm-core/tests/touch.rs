//! `TableSet::touch` reads the cache lines that a lookup reads: each once for every id, whatever the level and threads.

mod common;

use common::{Case, any_case, contexts, large_case};
use dlrm_core::{Bags, Context, Ids, Offsets, Pooling};
use proptest::prelude::*;

/// Floats of a cache line.
const LINE: usize = 16;

/// The sum of the first byte of every line of every id's row.
fn expected(case: &Case) -> u64 {
    let line = |table: usize, line: usize| {
        let (element, dim) = (line * LINE, case.tables[table].1);
        u64::from(case.weight(table, element / dim, element % dim).to_ne_bytes()[0])
    };
    let row = |table: usize, id: usize| -> u64 {
        let dim = case.tables[table].1;
        (id * dim / LINE..((id + 1) * dim).div_ceil(LINE)).map(|i| line(table, i)).sum()
    };
    let bags = case.bags.iter().enumerate();
    bags.flat_map(|(i, bag)| bag.iter().map(move |&id| (i, id as usize)))
        .map(|(i, id)| row(case.features[i / case.batch].table, id))
        .sum()
}

fn check(case: &Case) {
    let (set, arrays) = (case.set(&Context::default()), case.arrays());
    for ctx in contexts() {
        assert_eq!(set.touch(&case.call(&arrays), &ctx), Ok(expected(case)));
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
