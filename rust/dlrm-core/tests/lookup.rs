//! Lookup against float64, at every level and number of threads.

mod common;

use common::{Case, any_case, assert_close, bits, contexts, large_case};
use dlrm_core::{
    Bags, Context, Encoding, Error, Feature, Ids, Level, Method, Offsets, Output, Pooling, RowFormat,
};
use half::{bf16, f16};
use proptest::prelude::*;

/// Output and argmax.
fn lookup(case: &Case, ctx: &Context) -> (Vec<f32>, Vec<i32>) {
    let (set, arrays) = (case.set(ctx), case.arrays());
    let bags = case.call(&arrays);
    let mut out = vec![f32::NAN; set.output_len(&bags)]; // every element must be written
    let mut argmax = vec![-7; out.len()];
    set.lookup(&bags, Output::Fp32(&mut out), Some(&mut argmax), ctx).unwrap();
    (out, argmax)
}

fn check_all_contexts(case: &Case) {
    let (out, argmax) = lookup(case, &contexts()[0]);
    assert_close(&out, &case.expected_output(&case.arrays()), 1e-5);
    for ctx in &contexts()[1..] {
        let (other, places) = lookup(case, ctx);
        assert_eq!(bits(&out), bits(&other), "{:?} on {} threads", ctx.level, ctx.threads);
        assert_eq!(argmax, places);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_lookup_is_right_and_has_the_same_bits_everywhere(case in any_case()) {
        check_all_contexts(&case);
    }

    #[test]
    fn argmax_names_the_first_largest(case in any_case()) {
        let (out, argmax) = lookup(&case, &Context::default());
        let mut at = 0;
        for (f, ids) in case.output_rows() {
            let table = case.features[f].table;
            for c in 0..case.tables[table].1 {
                let place = argmax[at];
                if case.features[f].pooling != Pooling::Max {
                    prop_assert_eq!(place, -7);
                } else if place == -1 {
                    prop_assert!(ids.iter().all(|&(_, id)| Some(id) == case.features[f].padding));
                } else {
                    let value = |&(_, id): &(usize, usize)| case.weight(table, id, c);
                    prop_assert_eq!(value(&ids[place as usize]).to_bits(), out[at].to_bits());
                    let kept = |i: &&(usize, usize)| Some(i.1) != case.features[f].padding;
                    prop_assert!(ids[..place as usize].iter().filter(kept).all(|i| value(i) < out[at]));
                }
                at += 1;
            }
        }
    }
}

#[test]
fn a_large_lookup_has_the_same_bits_everywhere() {
    for pooling in Pooling::ALL {
        for wide_ids in [false, true] {
            check_all_contexts(&Case { wide_ids, ..large_case(pooling) });
        }
    }
}

/// A case whose bags have one id each.
fn one_id_case(pooling: Pooling) -> Case {
    let case = large_case(pooling);
    let one_id = |(b, bag): (usize, &Vec<i64>)| vec![bag.first().copied().unwrap_or(b as i64 % 3)];
    let bags = case.bags.iter().enumerate().map(one_id).collect();
    let features = case.features.iter().map(|&feature| Feature { padding: None, ..feature }).collect();
    Case { features, bags, ..case }
}

#[test]
fn bags_of_one_id_are_right_and_have_the_same_bits_everywhere() {
    for pooling in [Pooling::Sum, Pooling::Mean] {
        for (last_offset, weighted) in [(false, false), (true, false), (true, true)] {
            let wide_ids = last_offset;
            check_all_contexts(&Case { weighted, wide_ids, last_offset, ..one_id_case(pooling) });
        }
    }
}

#[test]
fn bags_of_one_id_are_its_row_in_every_format_and_precision() {
    let case = Case { weighted: false, ..one_id_case(Pooling::Sum) };
    let arrays = case.arrays();
    let bags = case.call(&arrays);
    let encoding = |format| Encoding { format, method: Method::MinMax, scales: None, zero_not_finite: false };
    for (format, level) in RowFormat::ALL.into_iter().flat_map(|f| Level::available().map(move |l| (f, l))) {
        let ctx = Context { level, ..Context::default() };
        let set = case.set(&ctx);
        let of_format = |format| {
            for t in 0..case.tables.len() {
                set.swap_rows(t, set.encode(t, encoding(format), &ctx).unwrap().rows).unwrap();
            }
            let mut out = vec![f32::NAN; set.output_len(&bags)];
            set.lookup(&bags, Output::Fp32(&mut out), None, &ctx).unwrap();
            out
        };
        let (coded, decoded) = (of_format(format), of_format(RowFormat::Fp32));
        assert!(coded == decoded, "{format} {level:?}");
        let (mut fp16, mut half) = (vec![f16::NAN; coded.len()], vec![bf16::NAN; coded.len()]);
        set.lookup(&bags, Output::Fp16(&mut fp16), None, &ctx).unwrap();
        set.lookup(&bags, Output::Bf16(&mut half), None, &ctx).unwrap();
        for (i, &x) in coded.iter().enumerate() {
            assert_eq!((fp16[i], half[i]), (f16::from_f32(x), bf16::from_f32(x)), "{format} {level:?}");
        }
    }
}

#[test]
fn a_bad_id_is_named_at_every_level_and_the_next_call_is_right() {
    let case = large_case(Pooling::Sum);
    let mut arrays = case.arrays();
    let last = arrays.wide.len() - 1;
    for (ids, named) in
        [(vec![(last, -1), (100, 5000)], 100), (vec![(40, 1 << 40)], 40), (vec![(last, 1 << 31)], last)]
    {
        let good = arrays.wide.clone();
        for &(place, id) in &ids {
            arrays.wide[place] = id;
        }
        for ctx in contexts() {
            let set = case.set(&ctx);
            let bags = case.call(&arrays);
            let mut out = vec![0.0; set.output_len(&bags)];
            match set.lookup(&bags, Output::Fp32(&mut out), None, &ctx) {
                Err(Error::Id { position, id, .. }) => {
                    assert_eq!((position, id), (named, arrays.wide[named]));
                }
                other => panic!("expected a bad id, got {other:?}"),
            }
        }
        arrays.wide = good;
    }
    assert_close(&lookup(&case, &Context::default()).0, &case.expected_output(&arrays), 1e-5);
}

#[test]
fn the_message_names_table_feature_and_bag() {
    let case = large_case(Pooling::Sum);
    let set = case.set(&Context::default());
    let offsets: Vec<i64> = (0..8).collect();
    let ids = [0, 0, 0, 3, 0, 0, 0, 0];
    let bags = Bags::new(Ids::I32(&ids), Offsets::I64(&offsets), 4, 2, None).unwrap();
    let error =
        set.lookup(&bags, Output::Fp32(&mut vec![0.0; set.output_len(&bags)]), None, &Context::default());
    assert_eq!(
        error.unwrap_err().to_string(),
        "indices[3]: expected 0 <= id < 3, the rows of table 't1', got 3 (feature 1, bag 1)"
    );
}

#[test]
fn shapes_and_weights_are_checked() {
    let case = large_case(Pooling::Max);
    let ctx = Context::default();
    let (set, arrays) = (case.set(&ctx), case.arrays());
    let bags = case.call(&arrays);
    let len = set.output_len(&bags);
    let message = |result: dlrm_core::Result<()>| result.unwrap_err().to_string();
    let out = message(set.lookup(&bags, Output::Fp32(&mut vec![0.0; len - 1]), None, &ctx));
    assert_eq!(out, format!("out: expected {len} elements, got {}", len - 1));
    let argmax = message(set.lookup(&bags, Output::Fp32(&mut vec![0.0; len]), Some(&mut [0]), &ctx));
    assert_eq!(argmax, format!("argmax: expected {len} elements, got 1"));

    let weights = vec![1.0; arrays.wide.len()];
    let weighted =
        Bags::new(Ids::I64(&arrays.wide), Offsets::I64(&arrays.offsets), 4, case.batch, Some(&weights))
            .unwrap();
    let refused = message(set.lookup(&weighted, Output::Fp32(&mut vec![0.0; len]), None, &ctx));
    assert_eq!(refused, "per_sample_weights: expected sum or mean pooling, got pooling max in feature 0");

    let mut nan = weights;
    nan[9] = f32::NAN;
    let case = large_case(Pooling::Sum);
    let bags =
        Bags::new(Ids::I64(&arrays.wide), Offsets::I64(&arrays.offsets), 4, case.batch, Some(&nan)).unwrap();
    let refused = message(case.set(&ctx).lookup(&bags, Output::Fp32(&mut vec![0.0; len]), None, &ctx));
    assert_eq!(refused, "per_sample_weights[9]: expected a number, got NaN");
}

#[test]
fn poll_ends_a_lookup() {
    let case = large_case(Pooling::Sum);
    let ctx = Context { poll: &|| true, ..Context::default() };
    let arrays = case.arrays();
    let set = case.set(&Context::default());
    let bags = case.call(&arrays);
    let ended = set.lookup(&bags, Output::Fp32(&mut vec![0.0; set.output_len(&bags)]), None, &ctx);
    assert_eq!(ended, Err(Error::Interrupted));
}

#[test]
fn a_call_from_poll_on_the_same_tables_is_refused() {
    let case = large_case(Pooling::Sum);
    let (set, arrays) = (case.set(&Context::default()), case.arrays());
    let bags = case.call(&arrays);
    let poll = || {
        assert_eq!(set.write(0, |_| ()), Err(Error::Reentered));
        false
    };
    let ctx = Context { poll: &poll, ..Context::default() };
    set.lookup(&bags, Output::Fp32(&mut vec![0.0; set.output_len(&bags)]), None, &ctx).unwrap();
    assert_eq!(set.write(0, |_| ()), Ok(()));
}
