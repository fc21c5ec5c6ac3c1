//! Calls parted by their overlap: the same bits as calls in turn, at every level and number of threads.

mod common;

use std::collections::BTreeSet;

use common::formulas::optimizers;
use common::{Case, any_case, bits, contexts, large_case, noise, plain_cases};
use dlrm_core::optimizers::Kind;
use dlrm_core::{Context, Feature, Gradient, Output, Part, Pooling, RowFormat, TableSet};
use proptest::prelude::*;

/// The same tables and another batch, whose bags are cut out of those of `case` at other places.
fn following(case: &Case) -> Case {
    let bags = case.bags.iter().enumerate().map(|(i, bag)| {
        let rows = case.tables[case.features[i / case.batch.max(1)].table].0 as i64;
        bag.iter().enumerate().map(|(k, id)| (id * 3 + (i + k) as i64 % 2) % rows).collect()
    });
    Case { bags: bags.collect(), ..case.clone() }
}

struct Trained {
    /// Of the lookup of the second batch.
    out: Vec<f32>,
    argmax: Vec<i32>,
    /// Weights and state of every table after both updates.
    tables: Vec<Vec<f32>>,
}

/// Two batches looked up and trained on, in turn or parted by their overlap, of the second its bags too or not.
fn train(case: &Case, kind: Kind, parts_bags: Option<bool>, ctx: &Context) -> Trained {
    let second = following(case);
    let (set, arrays) = (case.set(ctx), [case.arrays(), second.arrays()]);
    let calls = [case.call(&arrays[0]), second.call(&arrays[1])];
    set.set_optimizer(kind, false, RowFormat::Fp32, ctx).unwrap();
    let optimizer = optimizers(kind, 1, case.tables.len());
    let len = set.output_len(&calls[0]);
    let trainable: Vec<_> = (0..case.tables.len()).map(|t| t != 1).collect();
    let by_frequency: Vec<_> = (0..case.tables.len()).map(|t| t % 2 == 1).collect();
    let mut argmax = [vec![-7; len], vec![-7; len]];
    let mut out = vec![f32::NAN; len];
    let grads = [2, 3].map(|seed| (0..len).map(|i| noise(seed, i)).collect::<Vec<_>>());
    set.lookup(&calls[0], Output::Fp32(&mut out), Some(&mut argmax[0]), ctx).unwrap();
    out.fill(f32::NAN);
    let [first, mut second_argmax] = argmax;
    let gradient = |output, argmax| Gradient {
        output,
        argmax: Some(argmax),
        trainable: &trainable,
        scale_by_frequency: &by_frequency,
        factor: 1.0,
    };
    if let Some(parts_bags) = parts_bags {
        let prepared = [0, 1].map(|k| set.prepare(&calls[k], &trainable, ctx).unwrap());
        let overlap = set.overlap(&prepared[0], &prepared[1], &calls[1], parts_bags, ctx).unwrap();
        let mut look = |part| {
            let out = Output::Fp32(&mut out);
            set.lookup_part(&overlap, part, &calls[1], out, Some(&mut second_argmax), ctx).unwrap();
        };
        let update = |k: usize, part, gradient: &Gradient| {
            let factor = set.clipped_factor(&prepared[k], gradient, &optimizer, ctx).unwrap();
            let gradient = Gradient { factor, ..*gradient };
            set.update_prepared(&prepared[k], part, &gradient, &optimizer, ctx).unwrap();
        };
        look(Part::Apart);
        update(0, Some((&overlap, Part::Shared)), &gradient(&grads[0], &first));
        look(Part::Shared);
        update(0, Some((&overlap, Part::Apart)), &gradient(&grads[0], &first));
        update(1, None, &gradient(&grads[1], &second_argmax));
    } else {
        set.update(&calls[0], &gradient(&grads[0], &first), &optimizer, ctx).unwrap();
        set.lookup(&calls[1], Output::Fp32(&mut out), Some(&mut second_argmax), ctx).unwrap();
        set.update(&calls[1], &gradient(&grads[1], &second_argmax), &optimizer, ctx).unwrap();
    }
    Trained { out, argmax: second_argmax, tables: contents(&set, case.tables.len()) }
}

fn contents(set: &TableSet, tables: usize) -> Vec<Vec<f32>> {
    let table = |t| [set.write(t, |w| w.to_vec()).unwrap(), set.write_state(t, 0, |s| s.to_vec()).unwrap()];
    (0..tables).flat_map(table).collect()
}

fn check(case: &Case, kind: Kind) {
    let expected = train(case, kind, None, &Context::default());
    let ways = contexts().into_iter().flat_map(|ctx| [false, true].map(|parts_bags| (ctx, parts_bags)));
    for (ctx, parts_bags) in ways {
        let got = train(case, kind, Some(parts_bags), &ctx);
        assert_eq!(bits(&got.out), bits(&expected.out));
        assert_eq!(got.argmax, expected.argmax);
        for (got, expected) in got.tables.iter().zip(&expected.tables) {
            assert_eq!(bits(got), bits(expected));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_two_calls_have_the_bits_of_calls_in_turn(
        case in any_case().prop_filter("pooled", Case::pooled),
        kind in prop::sample::select(Kind::ALL),
    ) {
        check(&case, kind);
    }
}

#[test]
fn large_calls_have_the_bits_of_calls_in_turn() {
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        check(&large_case(pooling), Kind::RowWiseAdagrad);
    }
    for case in plain_cases() {
        check(&case, Kind::RowWiseAdagrad);
    }
}

#[test]
fn bags_without_a_row_of_the_first_call_are_apart_and_a_feature_with_few_of_them_is_not_parted() {
    for case in [large_case(Pooling::Sum)].into_iter().chain(plain_cases()) {
        check_sides(case);
    }
}

fn check_sides(mut case: Case) {
    let ctx = &Context::default();
    case.tables[0].0 = 20_000;
    let mut second = following(&case);
    for (i, bag) in second.bags.iter_mut().enumerate() {
        if i % 2 == 1 && case.features[i / case.batch].table == 0 {
            for id in bag {
                *id = *id % 5000 + 10_000;
            }
        }
    }
    let (set, arrays) = (case.set(ctx), [case.arrays(), second.arrays()]);
    let calls = [case.call(&arrays[0]), second.call(&arrays[1])];
    let [first, after] = [0, 1].map(|k| set.prepare(&calls[k], &[true; 3], ctx).unwrap());
    let overlap = set.overlap(&first, &after, &calls[1], true, ctx).unwrap();
    let mut out = vec![f32::NAN; set.output_len(&calls[1])];
    set.lookup_part(&overlap, Part::Apart, &calls[1], Output::Fp32(&mut out), None, ctx).unwrap();

    let mut touched = BTreeSet::new();
    for (i, bag) in case.bags.iter().enumerate() {
        let Feature { table, padding, .. } = case.features[i / case.batch];
        // Padding ids are never trained, so the first call's do not count.
        touched.extend(bag.iter().filter(|&&id| Some(id as usize) != padding).map(|&id| (table, id)));
    }
    let width = out.len() / case.batch;
    let mut column = 0;
    let mut parted = 0;
    for (f, feature) in case.features.iter().enumerate() {
        let bags = &second.bags[f * case.batch..][..case.batch];
        let is_apart = |bag: &Vec<i64>| bag.iter().all(|&id| !touched.contains(&(feature.table, id)));
        let ids = |bags: &mut dyn Iterator<Item = &Vec<i64>>| bags.map(Vec::len).sum::<usize>();
        let share = ids(&mut bags.iter().filter(|bag| is_apart(bag))) as f64 / ids(&mut bags.iter()) as f64;
        parted += usize::from(share >= 0.25);
        for (b, bag) in bags.iter().enumerate() {
            let is_written = !out[b * width + column].is_nan();
            assert_eq!(is_written, is_apart(bag) && share >= 0.25, "feature {f}, bag {b}: {bag:?}, {share}");
        }
        column += case.tables[feature.table].1;
    }
    assert!(0 < parted && parted < case.features.len());
}

#[test]
fn what_does_not_fit_is_refused() {
    let ctx = &Context::default();
    let case = large_case(Pooling::Sum);
    let (set, arrays) = (case.set(ctx), case.arrays());
    let call = case.call(&arrays);
    let message = |error: dlrm_core::Error| error.to_string();
    let prepared = set.prepare(&call, &[true; 3], ctx).unwrap();
    let refused = set.prepare(&call, &[true; 2], ctx).err().map(message);
    assert_eq!(refused.as_deref(), Some("trainable: expected one flag for each of 3 tables, got 2"));

    let other = Case { bags: vec![vec![0]; case.bags.len()], ..case.clone() };
    let (arrays, overlap) = (other.arrays(), set.overlap(&prepared, &prepared, &call, true, ctx).unwrap());
    let refused = set.overlap(&prepared, &prepared, &other.call(&arrays), true, ctx).err().map(message);
    assert!(refused.unwrap().starts_with("bags: expected the second call's, of "));
    let refused = set.lookup_part(&overlap, Part::Shared, &call, Output::Fp32(&mut [0.0; 3]), None, ctx);
    assert!(message(refused.unwrap_err()).ends_with("elements, got 3"));

    set.set_optimizer(Kind::Sgd, false, RowFormat::Fp32, ctx).unwrap();
    let optimizer = optimizers(Kind::Sgd, 1, case.tables.len());
    let output = vec![0.0; set.output_len(&call)];
    let gradient = Gradient {
        output: &output,
        argmax: None,
        trainable: &[true, true, false],
        scale_by_frequency: &[false; 3],
        factor: 1.0,
    };
    let refused = set.update_prepared(&prepared, None, &gradient, &optimizer, ctx).unwrap_err();
    assert_eq!(message(refused), "trainable: expected the flags that the call was prepared with, got others");
    let unpooled = large_case(Pooling::None);
    let (set, arrays) = (unpooled.set(ctx), unpooled.arrays());
    let call = unpooled.call(&arrays);
    let prepared = set.prepare(&call, &[true; 3], ctx).unwrap();
    let refused = set.overlap(&prepared, &prepared, &call, true, ctx).err().map(message);
    assert_eq!(refused.as_deref(), Some("features: expected pooled ones, got pooling none"));
}
