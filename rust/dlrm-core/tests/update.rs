//! Gradients and updates against float64, at every level and number of threads.

mod common;

use std::collections::BTreeMap;

use common::formulas::{self, optimizers};
use common::{Arrays, Case, any_case, assert_close, bits, contexts, large_case, noise, plain_cases};
use dlrm_core::optimizers::{Kind, Optimizer, Step};
use dlrm_core::{
    Bags, Context, Encoding, Error, Feature, Gradient, Ids, Level, Method, Offsets, Output, Pooling,
    RowFormat, ScaleFormat, SparseRows, TableSet, TableSpec,
};
use proptest::prelude::*;

/// What comes from the model: a gradient of the output, and the argmax of a lookup.
struct FromModel {
    output: Vec<f32>,
    argmax: Vec<i32>,
    trainable: Vec<bool>,
    /// By no table's occurrences, and by those of every other table.
    by_frequency: [Vec<bool>; 2],
}

fn from_model(case: &Case, set: &TableSet, arrays: &Arrays) -> FromModel {
    let bags = case.call(arrays);
    let len = set.output_len(&bags);
    let mut argmax = vec![-7; len];
    set.lookup(&bags, Output::Fp32(&mut vec![0.0; len]), Some(&mut argmax), &Context::default()).unwrap();
    let output = (0..len).map(|i| noise(case.seed ^ 3, i)).collect();
    let tables = case.tables.len();
    let by_frequency = [false, true].map(|some| (0..tables).map(|t| some && t % 2 == 0).collect());
    FromModel { output, argmax, trainable: vec![true; tables], by_frequency }
}

impl FromModel {
    fn gradient(&self, by_frequency: bool) -> Gradient<'_> {
        Gradient {
            output: &self.output,
            argmax: Some(&self.argmax),
            trainable: &self.trainable,
            scale_by_frequency: &self.by_frequency[usize::from(by_frequency)],
            factor: 1.0,
        }
    }
}

/// Row gradients of a table, by row.
type Rows = BTreeMap<usize, Vec<f64>>;

fn expected_gradient(case: &Case, arrays: &Arrays, from: &FromModel, by_frequency: bool) -> Vec<Rows> {
    let mut tables = vec![Rows::new(); case.tables.len()];
    let mut counts = vec![BTreeMap::<usize, f64>::new(); case.tables.len()];
    let mut at = 0;
    for (f, ids) in case.output_rows() {
        let feature = case.features[f];
        let dim = case.tables[feature.table].1;
        for (place, id, factor) in case.terms(arrays, f, &ids) {
            if Some(id) == feature.padding {
                continue;
            }
            *counts[feature.table].entry(id).or_default() += 1.0;
            let row = tables[feature.table].entry(id).or_insert_with(|| vec![0.0; dim]);
            for (c, sum) in row.iter_mut().enumerate() {
                let own = ids.iter().position(|&(p, _)| p == place).unwrap() as i32;
                if feature.pooling != Pooling::Max || from.argmax[at + c] == own {
                    *sum += factor * f64::from(from.output[at + c]);
                }
            }
        }
        at += dim;
    }
    for (t, (rows, counts)) in tables.iter_mut().zip(counts).enumerate() {
        if from.by_frequency[usize::from(by_frequency)][t] {
            for (row, sum) in rows {
                for x in sum {
                    *x /= counts[row];
                }
            }
        }
    }
    tables
}

fn sparse(case: &Case, ctx: &Context, by_frequency: bool) -> Vec<SparseRows> {
    let (set, arrays) = (case.set(ctx), case.arrays());
    let from = from_model(case, &set, &arrays);
    let gradient = set.sparse_gradient(&case.call(&arrays), &from.gradient(by_frequency), ctx).unwrap();
    gradient.into_iter().map(Option::unwrap).collect()
}

fn check_gradient(case: &Case, by_frequency: bool, tolerance: f64) {
    let ctx = &contexts()[0];
    let (set, arrays) = (case.set(ctx), case.arrays());
    let from = from_model(case, &set, &arrays);
    let expected = expected_gradient(case, &arrays, &from, by_frequency);
    let got = sparse(case, ctx, by_frequency);
    for (got, expected) in got.iter().zip(&expected) {
        let rows: Vec<_> = expected.keys().map(|&row| row as i64).collect();
        assert_eq!(got.rows, rows);
        assert_close(&got.values, &expected.values().flatten().copied().collect::<Vec<_>>(), tolerance);
    }
    for ctx in &contexts()[1..] {
        for (a, b) in got.iter().zip(sparse(case, ctx, by_frequency)) {
            assert_eq!((&a.rows, bits(&a.values)), (&b.rows, bits(&b.values)));
        }
    }
    check_dense(case, &set, &arrays, &from, by_frequency, &got);
}

/// The dense gradient is the sparse one, spread over zeros.
fn check_dense(
    case: &Case,
    set: &TableSet,
    arrays: &Arrays,
    from: &FromModel,
    by_frequency: bool,
    sparse: &[SparseRows],
) {
    let mut dense: Vec<_> = case.tables.iter().map(|&(rows, dim)| vec![0.0; rows * dim]).collect();
    let mut into: Vec<_> = dense.iter_mut().map(|d| Some(&mut d[..])).collect();
    let gradient = from.gradient(by_frequency);
    set.dense_gradient(&case.call(arrays), &gradient, &mut into, &Context::default()).unwrap();
    for ((dense, sparse), &(rows, dim)) in dense.iter().zip(sparse).zip(&case.tables) {
        let mut spread = vec![0.0; rows * dim];
        for (&row, values) in sparse.rows.iter().zip(sparse.values.chunks(dim)) {
            spread[row as usize * dim..][..dim].copy_from_slice(values);
        }
        assert_eq!(bits(dense), bits(&spread));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_gradient_is_right_and_has_the_same_bits_everywhere(case in any_case(), by_frequency: bool) {
        check_gradient(&case, by_frequency, 1e-5);
    }

    #[test]
    fn the_gradient_of_weights_is_right_and_has_the_same_bits_everywhere(mut case in any_case()) {
        for feature in &mut case.features {
            feature.pooling = if feature.table == 0 { Pooling::Sum } else { Pooling::Mean };
        }
        case.weighted = false;
        let arrays = case.arrays();
        let mut expected = vec![0.0; arrays.wide.len()];
        let from = from_model(&case, &case.set(&Context::default()), &arrays);
        let mut at = 0;
        for (f, ids) in case.output_rows() {
            let table = case.features[f].table;
            let dim = case.tables[table].1;
            for (place, id, factor) in case.terms(&arrays, f, &ids) {
                let element = |c| f64::from(case.weight(table, id, c)) * f64::from(from.output[at + c]);
                expected[place] = factor * (0..dim).map(element).sum::<f64>();
            }
            at += dim;
        }
        let mut first = None;
        for ctx in contexts() {
            let set = case.set(&ctx);
            let mut got = vec![f32::NAN; arrays.wide.len()];
            set.per_sample_weights_gradient(&case.call(&arrays), &from.output, &mut got, &ctx).unwrap();
            assert_close(&got, &expected, 1e-5);
            let bits = bits(&got);
            prop_assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits);
        }
    }
}

#[test]
fn a_large_gradient_is_right_and_has_the_same_bits_everywhere() {
    for case in Pooling::ALL.into_iter().map(large_case).chain(plain_cases()) {
        // Some rows have thousands of gradients of both signs: their sum is small beside what is added up.
        check_gradient(&case, false, 5e-5);
    }
}

/// Weights and state after `steps` updates with changing gradients.
fn trained(case: &Case, kind: Kind, steps: u64, ctx: &Context) -> Vec<Vec<f32>> {
    let (set, arrays) = (case.set(ctx), case.arrays());
    set.set_optimizer(kind, false, RowFormat::Fp32, ctx).unwrap();
    let mut from = from_model(case, &set, &arrays);
    for step in 1..=steps {
        for (i, g) in from.output.iter_mut().enumerate() {
            *g = noise(step, i);
        }
        let optimizers = optimizers(kind, step, case.tables.len());
        set.update(&case.call(&arrays), &from.gradient(false), &optimizers, ctx).unwrap();
    }
    (0..case.tables.len()).flat_map(|t| contents(&set, t)).collect()
}

/// Weights and both parts of the state of a table.
fn contents(set: &TableSet, table: usize) -> [Vec<f32>; 3] {
    let state = |part| set.write_state(table, part, |state| state.to_vec()).unwrap();
    [set.write(table, |w| w.to_vec()).unwrap(), state(0), state(1)]
}

/// The same in float64, by the formulas.
fn expected_trained(case: &Case, kind: Kind, steps: u64) -> Vec<Vec<f64>> {
    let arrays = case.arrays();
    let set = case.set(&Context::default());
    let mut from = from_model(case, &set, &arrays);
    let row = |t: usize, row: usize, dim: usize| {
        let part = |i: usize| kind.state().get(i).map_or(0, |part| part.len(dim));
        formulas::Row {
            weights: (0..dim).map(|c| f64::from(case.weight(t, row, c))).collect(),
            state: [vec![0.0; part(0)], vec![0.0; part(1)]],
        }
    };
    let table = |(t, &(rows, dim)): (usize, &(usize, usize))| -> Vec<_> {
        (0..rows).map(|r| row(t, r, dim)).collect()
    };
    let mut tables: Vec<_> = case.tables.iter().enumerate().map(table).collect();
    for step in 1..=steps {
        for (i, g) in from.output.iter_mut().enumerate() {
            *g = noise(step, i);
        }
        let gradients = expected_gradient(case, &arrays, &from, false);
        let ratio = formulas::clip_ratio(kind, gradients.iter().flat_map(BTreeMap::values).flatten());
        for (t, rows) in gradients.into_iter().enumerate() {
            for (row, gradient) in rows {
                let clipped: Vec<_> = gradient.iter().map(|g| g * ratio).collect();
                tables[t][row].update(kind, &clipped, step);
            }
        }
    }
    let parts = |rows: Vec<formulas::Row>| {
        let weights = rows.iter().flat_map(|row| row.weights.clone()).collect();
        let state = |part: usize| rows.iter().flat_map(|row| row.state[part].clone()).collect();
        [weights, state(0), state(1)]
    };
    tables.into_iter().flat_map(parts).collect()
}

#[test]
fn fifty_fused_steps_follow_the_formulas() {
    for &kind in Kind::ALL {
        for pooling in [Pooling::Sum, Pooling::Mean, Pooling::None] {
            let mut case = large_case(pooling);
            case.batch = 20;
            case.bags = (0..80).map(|i| (0..i % 9).map(|k| i64::from(i * k % 3)).collect()).collect();
            let got = trained(&case, kind, 50, &Context::default());
            for (got, expected) in got.iter().zip(expected_trained(&case, kind, 50)) {
                assert_close(got, &expected, 1e-5);
            }
        }
    }
}

/// Tables of one dim, each looked up by a feature of its own.
struct Fifty<'a> {
    tables: &'a [(RowFormat, usize)],
    dim: usize,
    batch: usize,
    /// The row of a sample at a step, of a table with so many.
    id: fn(usize, usize, usize) -> usize,
}

impl Fifty<'_> {
    /// The bytes of rows, their scales and their state after 50 steps.
    fn trained(&self, kind: Kind, split: bool, state: RowFormat, ctx: &Context) -> Vec<Vec<u8>> {
        let Self { tables, dim, batch, id } = *self;
        let count = tables.len();
        let spec =
            |t: usize| TableSpec { name: format!("t{t}"), rows: tables[t].1, dim, format: tables[t].0 };
        let feature = |table| Feature { table, pooling: Pooling::Sum, padding: None };
        let set =
            TableSet::new((0..count).map(spec).collect(), (0..count).map(feature).collect(), ctx).unwrap();
        for (t, &(_, rows)) in tables.iter().enumerate() {
            let source: Vec<_> = (0..rows * dim).map(|i| noise(t as u64, i)).collect();
            set.write_rows(t, 0, &source, ctx).unwrap();
        }
        set.set_optimizer(kind, split, state, ctx).unwrap();
        let flags = [vec![true; count], vec![false; count]];
        for step in 1..=50 {
            let ids: Vec<_> = (0..count * batch).map(|i| id(tables[i / batch].1, i, step) as i64).collect();
            let output: Vec<_> = (0..count * batch * dim).map(|i| noise(step as u64, i)).collect();
            let gradient = Gradient {
                output: &output,
                argmax: None,
                trainable: &flags[0],
                scale_by_frequency: &flags[1],
                factor: 1.0,
            };
            let bags = Bags::new(Ids::I64(&ids), Offsets::Even, count, batch, None).unwrap();
            set.update(&bags, &gradient, &optimizers(kind, step as u64, count), ctx).unwrap();
        }
        let state = |t, part| set.read_state(t, part, |_, state, _| state.to_vec()).unwrap();
        let low = |t| set.read_low(t, |low, _| low.iter().flat_map(|x| x.to_le_bytes()).collect()).unwrap();
        let rows = |t| {
            set.read_rows(t, |rows| [rows.elements().0.to_vec(), rows.scales().0.to_vec()].concat()).unwrap()
        };
        (0..count).flat_map(|t| [rows(t), state(t, 0), state(t, 1), low(t)]).collect()
    }
}

#[test]
fn fifty_fused_steps_have_the_same_bytes_everywhere_and_again() {
    use RowFormat::{Bf16, Fp16, Fp32};
    // Two thirds of the ids of the first table are one row, which is hot.
    let fifty = Fifty {
        tables: &[(Fp32, 3), (Fp32, 300), (Fp16, 300), (Bf16, 300)],
        dim: 33,
        batch: 2500,
        id: |rows, i, step| (i * i + step * (i % 3)) % rows,
    };
    let best = Context::default();
    let levels = Level::available().map(|level| Context { level, threads: 2, ..best });
    let threads = [2, 3, 7, 8].map(|threads| Context { threads, ..best });
    let contexts: Vec<_> = levels.chain(threads).chain([best]).collect();
    for (i, &kind) in Kind::ALL.iter().enumerate() {
        let split = i % 2 == 1;
        for state in [Fp32, Bf16] {
            if (kind, state) == (Kind::Ftrl, Bf16) {
                continue; // refused
            }
            let first = fifty.trained(kind, split, state, &best);
            for ctx in &contexts {
                let same = first == fifty.trained(kind, split, state, ctx);
                assert!(same, "{kind} with {state} state at {:?} on {} threads", ctx.level, ctx.threads);
            }
        }
    }
}

#[test]
fn fifty_fused_steps_on_rows_of_codes_have_the_same_bytes_everywhere() {
    // Each table is a piece of the work, and all of them are just enough for several threads. Every row has three gradients.
    let fifty = Fifty {
        tables: &[RowFormat::Int8, RowFormat::Int4, RowFormat::Int2].map(|format| (format, 27)).repeat(3),
        dim: 129,
        batch: 81,
        id: |rows, i, step| (i * 5 + step) % rows,
    };
    for &kind in Kind::ALL {
        let mut first = None;
        for level in Level::available() {
            for threads in [1, 2, 3, 7, 8] {
                let ctx = Context { level, threads, ..Context::default() };
                let bytes = fifty.trained(kind, false, RowFormat::Fp32, &ctx);
                let same = *first.get_or_insert_with(|| bytes.clone()) == bytes;
                assert!(same, "{kind} at {level:?} on {threads} threads");
            }
        }
    }
}

#[test]
fn a_factor_multiplies_the_gradient_of_every_row() {
    let case = large_case(Pooling::Sum);
    let ctx = Context::default();
    let trained = |scale: f32| {
        let (set, arrays) = (case.set(&ctx), case.arrays());
        set.set_optimizer(Kind::Adagrad, false, RowFormat::Fp32, &ctx).unwrap();
        let mut from = from_model(&case, &set, &arrays);
        from.output.iter_mut().for_each(|g| *g *= scale);
        let gradient = Gradient { factor: 1.0 / scale, ..from.gradient(false) };
        set.update(&case.call(&arrays), &gradient, &optimizers(Kind::Adagrad, 1, 3), &ctx).unwrap();
        (0..3).flat_map(|t| contents(&set, t)).map(|x| bits(&x)).collect::<Vec<_>>()
    };
    assert!(trained(1.0) == trained(1024.0));
}

#[test]
fn the_norm_is_that_of_all_trainable_tables_and_has_the_same_bits_everywhere() {
    let kind = Kind::RowWiseAdagrad; // which is clipped
    for pooling in Pooling::ALL {
        let case = large_case(pooling);
        let (set, arrays) = (case.set(&Context::default()), case.arrays());
        set.set_optimizer(kind, false, RowFormat::Fp32, &Context::default()).unwrap();
        let mut from = from_model(&case, &set, &arrays);
        from.trainable[1] = false;
        from.output.iter_mut().for_each(|g| *g *= 50.0);
        let gradient = Gradient { factor: 0.125, ..from.gradient(true) };
        let bags = case.call(&arrays);
        let mut rows = expected_gradient(&case, &arrays, &from, true);
        rows.remove(1);
        let scaled: Vec<_> = rows.iter().flat_map(BTreeMap::values).flatten().map(|g| g * 0.125).collect();
        let expected = 0.125 * formulas::clip_ratio(kind, scaled.iter());
        assert!(expected < 0.12, "nothing to clip: {expected}");
        for ctx in contexts() {
            let prepared = set.prepare(&bags, &from.trainable, &ctx).unwrap();
            let factor = set.clipped_factor(&prepared, &gradient, &optimizers(kind, 1, 3), &ctx).unwrap();
            assert!((f64::from(factor) - expected).abs() < 1e-6 * expected, "{factor}, expected {expected}");
            let first =
                set.clipped_factor(&prepared, &gradient, &optimizers(kind, 1, 3), &contexts()[0]).unwrap();
            assert_eq!(factor.to_bits(), first.to_bits());
            let none = set.clipped_factor(&prepared, &gradient, &optimizers(Kind::Sgd, 1, 3), &ctx).unwrap();
            assert_eq!(none.to_bits(), 0.125_f32.to_bits());
        }
    }
}

#[test]
fn gradients_without_a_norm_are_not_clipped_but_refused() {
    let kind = Kind::RowWiseAdagrad;
    let case = large_case(Pooling::Sum);
    let ctx = Context::default();
    let (set, arrays) = (case.set(&ctx), case.arrays());
    set.set_optimizer(kind, false, RowFormat::Fp32, &ctx).unwrap();
    let mut from = from_model(&case, &set, &arrays);
    let before: Vec<_> = (0..3).flat_map(|t| contents(&set, t)).map(|x| bits(&x)).collect();
    for value in [f32::NAN, f32::INFINITY] {
        let last = from.output.len() - 1;
        let good = std::mem::replace(&mut from.output[last], value);
        let refused = set.update(&case.call(&arrays), &from.gradient(false), &optimizers(kind, 1, 3), &ctx);
        assert!(matches!(refused, Err(Error::NotFinite { .. })), "{refused:?}");
        from.output[last] = good;
    }
    let mut values = formulas::values(kind);
    values[kind.hyperparameters().iter().position(|&name| name == "clip_norm").unwrap()] = 1.5;
    let other = Optimizer::new(kind, &values, Step { number: 1, seed: 5 }).unwrap();
    let mixed = [&optimizers(kind, 1, 2)[..], &[other]].concat();
    let refused =
        set.update(&case.call(&arrays), &from.gradient(false), &mixed, &ctx).unwrap_err().to_string();
    assert!(refused.starts_with("clip_norm: expected one bound for all tables"), "{refused}");
    assert!(refused.ends_with("got 12 and 1.5"), "{refused}");
    assert!(before == (0..3).flat_map(|t| contents(&set, t)).map(|x| bits(&x)).collect::<Vec<_>>());
    // Squares of numbers that float32 has are no infinity.
    from.output.fill(1e30);
    set.update(&case.call(&arrays), &from.gradient(false), &optimizers(kind, 1, 3), &ctx).unwrap();
    assert!((0..3).all(|t| contents(&set, t).iter().flatten().all(|x| x.is_finite())));
}

/// Brings all tables into another format.
fn encode_all(case: &Case, set: &TableSet, format: RowFormat, scales: Option<ScaleFormat>, ctx: &Context) {
    let encoding = Encoding { format, method: Method::MinMax, scales, zero_not_finite: false };
    for t in 0..case.tables.len() {
        let rows = set.encode(t, encoding, ctx).unwrap().rows;
        set.swap_rows(t, rows).unwrap();
    }
}

/// All bytes of rows that are not fp32 after some steps: elements, lower halves, scales and state.
fn trained_rows(
    case: &Case,
    format: RowFormat,
    split: bool,
    scales: Option<ScaleFormat>,
    kind: Kind,
    steps: u64,
    ctx: &Context,
) -> Vec<Vec<u8>> {
    let (set, arrays) = (case.set(ctx), case.arrays());
    encode_all(case, &set, format, scales, ctx);
    set.set_optimizer(kind, split, RowFormat::Fp32, ctx).unwrap();
    let mut from = from_model(case, &set, &arrays);
    for step in 1..=steps {
        for (i, g) in from.output.iter_mut().enumerate() {
            *g = noise(step, i);
        }
        let optimizers = optimizers(kind, step, case.tables.len());
        set.update(&case.call(&arrays), &from.gradient(false), &optimizers, ctx).unwrap();
    }
    let low = |t| set.read_low(t, |low, _| low.iter().flat_map(|x| x.to_le_bytes()).collect()).unwrap();
    let rows =
        |t| set.read_rows(t, |rows| [rows.elements().0.to_vec(), rows.scales().0.to_vec()].concat()).unwrap();
    let state = |t, part| set.read_state(t, part, |_, state, _| state.to_vec()).unwrap();
    (0..case.tables.len()).flat_map(|t| [rows(t), low(t), state(t, 0), state(t, 1)]).collect()
}

#[test]
fn rows_of_every_format_have_the_same_bits_everywhere() {
    use RowFormat::{Bf16, Fp16, Int2, Int4, Int8};
    use ScaleFormat as Scales;
    let case = large_case(Pooling::Sum);
    for (format, split, scales) in [
        (Fp16, false, None),
        (Bf16, false, None),
        (Bf16, true, None),
        (Int8, false, Some(Scales::Fp16)),
        (Int8, false, Some(Scales::Bf16)),
        (Int8, false, Some(Scales::Fp32)),
        (Int4, false, Some(Scales::Fp16)),
        (Int2, false, Some(Scales::Fp16)),
    ] {
        let trained = |ctx: &_| trained_rows(&case, format, split, scales, Kind::RowWiseAdagrad, 3, ctx);
        let first = trained(&contexts()[0]);
        assert!(first == trained(&contexts()[0]), "a second run");
        for ctx in &contexts()[1..] {
            assert!(first == trained(ctx), "{format} at {:?} on {} threads", ctx.level, ctx.threads);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn an_updated_row_of_codes_is_near_that_of_fp32_and_has_the_same_bits_everywhere(
        case in any_case(), format in prop::sample::select(vec![RowFormat::Int8, RowFormat::Int4, RowFormat::Int2])
    ) {
        let mut first = None;
        for ctx in contexts() {
            let (set, arrays) = (case.set(&ctx), case.arrays());
            encode_all(&case, &set, format, None, &ctx);
            let decoded = |t| {
                let encoding =
                    Encoding { format: RowFormat::Fp32, method: Method::MinMax, scales: None, zero_not_finite: false };
                let rows = set.encode(t, encoding, &ctx).unwrap().rows;
                bytemuck::cast_slice::<u8, f32>(rows.elements().0).to_vec()
            };
            let before: Vec<_> = (0..case.tables.len()).map(decoded).collect();
            set.set_optimizer(Kind::Sgd, false, RowFormat::Fp32, &ctx).unwrap();
            let from = from_model(&case, &set, &arrays);
            let optimizers = optimizers(Kind::Sgd, 1, case.tables.len());
            set.update(&case.call(&arrays), &from.gradient(false), &optimizers, &ctx).unwrap();
            let after: Vec<_> = (0..case.tables.len()).map(decoded).collect();
            let expected = expected_gradient(&case, &arrays, &from, false);
            for (t, touched) in expected.iter().enumerate() {
                let dim = case.tables[t].1;
                for (row, (old, new)) in before[t].chunks(dim).zip(after[t].chunks(dim)).enumerate() {
                    let Some(gradient) = touched.get(&row) else {
                        prop_assert_eq!(bits(old), bits(new), "an untouched row");
                        continue;
                    };
                    let mut expected = formulas::Row {
                        weights: old.iter().map(|&x| f64::from(x)).collect(), state: [vec![], vec![]],
                    };
                    expected.update(Kind::Sgd, gradient, 1);
                    let weights = &expected.weights;
                    let [least, most] =
                        weights.iter().fold([f64::MAX, f64::MIN], |[a, b], &x| [a.min(x), b.max(x)]);
                    let codes = f64::from((1_u32 << format.bits()) - 1);
                    let step = (most - least + least.abs() / 128.0) / codes * 1.01 + 1e-6;
                    for (x, y) in weights.iter().zip(new) {
                        prop_assert!((x - f64::from(*y)).abs() <= step, "{} became {}", x, y);
                    }
                }
            }
            let bits: Vec<_> = after.iter().map(|x| bits(x)).collect();
            prop_assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits);
        }
    }
}

#[test]
fn rows_with_a_codebook_are_not_trained() {
    let case = large_case(Pooling::Sum);
    let ctx = Context::default();
    let set = case.set(&ctx);
    let encoding =
        Encoding { format: RowFormat::Int4, method: Method::Codebook, scales: None, zero_not_finite: false };
    set.swap_rows(0, set.encode(0, encoding, &ctx).unwrap().rows).unwrap();
    let refused = set.set_optimizer(Kind::Sgd, false, RowFormat::Fp32, &ctx).unwrap_err().to_string();
    let expected = "optimizer: expected tables whose codes, if any, are evenly spaced, got int4 rows with a codebook \
                    in table 't0'";
    assert_eq!(refused, expected);
}

#[test]
fn a_million_numbers_of_state_are_rounded_without_a_bias() {
    // After 8 updates by a gradient of 1, sums of squares are 8; then each grows by a fraction of what separates neighbours.
    const DIM: usize = 1000;
    const ROWS: usize = 1000;
    for fraction in [0.1_f64, 0.25, 0.5, 0.9] {
        let ctx = Context::default();
        let spec = TableSpec { name: "t".into(), rows: ROWS, dim: DIM, format: RowFormat::Fp32 };
        let feature = Feature { table: 0, pooling: Pooling::Sum, padding: None };
        let set = TableSet::new(vec![spec], vec![feature], &ctx).unwrap();
        set.set_optimizer(Kind::Adagrad, false, RowFormat::Bf16, &ctx).unwrap();
        let ids: Vec<_> = (0..ROWS as i64).collect();
        let bags = Bags::new(Ids::I64(&ids), Offsets::Even, 1, ROWS, None).unwrap();
        let value = |&name: &&str| match name {
            "lr" | "eps" => 0.1,
            "clip_norm" | "clip_value" | "max_norm" => f64::INFINITY,
            _ => 0.0,
        };
        let values: Vec<_> = Kind::Adagrad.hyperparameters().iter().map(value).collect();
        for number in 1..=9 {
            let square = if number < 9 { 1.0 } else { fraction / 16.0 };
            let output = vec![square.sqrt() as f32; ROWS * DIM];
            let gradient = Gradient {
                output: &output,
                argmax: None,
                trainable: &[true],
                scale_by_frequency: &[false],
                factor: 1.0,
            };
            let optimizer = Optimizer::new(Kind::Adagrad, &values, Step { number, seed: 3 }).unwrap();
            set.update(&bags, &gradient, &[optimizer], &ctx).unwrap();
        }
        let up = |state: &[u8]| {
            let bits = bytemuck::cast_slice::<u8, u16>(state).iter();
            let sums: Vec<_> = bits.map(|&x| f32::from_bits(u32::from(x) << 16)).collect();
            assert!(sums.iter().all(|sum| [8.0, 8.0625].contains(sum)));
            sums.iter().filter(|&&sum| sum > 8.0).count()
        };
        let count = set.read_state(0, 0, |_, state, _| up(state)).unwrap();
        let draws = (ROWS * DIM) as f64;
        let error = 4.0 * (fraction * (1.0 - fraction) / draws).sqrt();
        let got = count as f64 / draws;
        assert!((got - fraction).abs() <= error, "{got}, expected {fraction}");
    }
}

#[test]
fn state_that_bf16_would_make_wrong_is_refused() {
    let case = large_case(Pooling::Sum);
    let ctx = Context::default();
    let set = case.set(&ctx);
    let refused = |kind, format| set.set_optimizer(kind, false, format, &ctx).unwrap_err().to_string();
    let expected =
        "state_dtype: expected fp32 for ftrl, which computes its weights anew from the state, got bf16";
    assert_eq!(refused(Kind::Ftrl, RowFormat::Bf16), expected);
    assert_eq!(refused(Kind::Adam, RowFormat::Fp16), "state_dtype: expected fp32 or bf16, got fp16");
    assert_eq!(set.optimizer(), None);
}

#[test]
fn lower_halves_go_and_come_with_their_rows() {
    let case = large_case(Pooling::Sum);
    let ctx = Context::default();
    let (set, arrays) = (case.set(&ctx), case.arrays());
    encode_all(&case, &set, RowFormat::Bf16, None, &ctx);
    set.set_optimizer(Kind::Sgd, true, RowFormat::Fp32, &ctx).unwrap();
    let from = from_model(&case, &set, &arrays);
    set.update(&case.call(&arrays), &from.gradient(false), &optimizers(Kind::Sgd, 1, 3), &ctx).unwrap();
    let low = || set.read_low(0, |low, _| low.to_vec()).unwrap();
    let before = low();
    assert!(before.iter().any(|&x| x != 0));
    let encoding =
        Encoding { format: RowFormat::Int8, method: Method::MinMax, scales: None, zero_not_finite: false };
    let put_aside = set.swap_rows(0, set.encode(0, encoding, &ctx).unwrap().rows).unwrap();
    assert!(low().is_empty());
    set.update(&case.call(&arrays), &from.gradient(false), &optimizers(Kind::Sgd, 2, 3), &ctx).unwrap();
    set.swap_rows(0, put_aside).unwrap();
    assert_eq!(low(), before);
}

#[test]
fn a_refused_update_changes_nothing() {
    let case = large_case(Pooling::Sum);
    let ctx = Context { threads: 3, ..Context::default() };
    let set = case.set(&ctx);
    set.set_optimizer(Kind::Adagrad, false, RowFormat::Fp32, &ctx).unwrap();
    let mut arrays = case.arrays();
    let from = from_model(&case, &set, &arrays);
    let optimizer = optimizers(Kind::Adagrad, 1, 3);
    let all = || (0..3).flat_map(|t| contents(&set, t)).map(|x| bits(&x));
    let before: Vec<_> = all().collect();
    let last = arrays.wide.len() - 1;
    let good = std::mem::replace(&mut arrays.wide[last], 5000);
    let refused = set.update(&case.call(&arrays), &from.gradient(false), &optimizer, &ctx);
    assert!(matches!(refused, Err(Error::Id { position, .. }) if position == last), "{refused:?}");
    arrays.wide[last] = good;

    let short = Gradient { output: &from.output[1..], ..from.gradient(false) };
    assert!(set.update(&case.call(&arrays), &short, &optimizer, &ctx).is_err());
    let flags = Gradient { scale_by_frequency: &[false; 2], ..from.gradient(false) };
    let refused = set.update(&case.call(&arrays), &flags, &optimizer, &ctx).unwrap_err().to_string();
    assert_eq!(refused, "scale_grad_by_freq: expected one flag for each of 3 tables, got 2");
    let other = optimizers(Kind::Sgd, 1, 3);
    assert!(set.update(&case.call(&arrays), &from.gradient(false), &other, &ctx).is_err());
    let ended = Context { poll: &|| true, ..ctx };
    let few = set.update(&case.call(&arrays), &from.gradient(false), &optimizer[1..], &ctx);
    assert!(few.unwrap_err().to_string().starts_with("optimizers: expected one for each of 3 tables"));
    let interrupted = set.update(&case.call(&arrays), &from.gradient(false), &optimizer, &ended);
    assert_eq!(interrupted, Err(Error::Interrupted));
    assert!(before == all().collect::<Vec<_>>());

    set.update(&case.call(&arrays), &from.gradient(false), &optimizer, &ctx).unwrap();
    assert!(before != all().collect::<Vec<_>>());
}

#[test]
fn a_table_that_is_not_trainable_stays() {
    let case = large_case(Pooling::Sum);
    let ctx = Context::default();
    let (set, arrays) = (case.set(&ctx), case.arrays());
    set.set_optimizer(Kind::Sgd, false, RowFormat::Fp32, &ctx).unwrap();
    let mut from = from_model(&case, &set, &arrays);
    from.trainable = vec![true, false, true];
    let before: Vec<_> = (0..3).map(|t| set.write(t, |w| w.to_vec()).unwrap()).collect();
    let optimizer = optimizers(Kind::Sgd, 1, 3);
    set.update(&case.call(&arrays), &from.gradient(false), &optimizer, &ctx).unwrap();
    let same: Vec<_> = (0..3).map(|t| set.write(t, |w| bits(w)).unwrap() == bits(&before[t])).collect();
    assert_eq!(same, [false, true, false]);
}

#[test]
fn hyperparameters_are_checked() {
    let check = |kind: Kind, name: &str, value: f64, words: &str| {
        let place = kind.hyperparameters().iter().position(|&own| own == name).unwrap();
        let mut values = formulas::values(kind);
        values[place] = value;
        let message = Optimizer::new(kind, &values, Step { number: 1, seed: 0 }).unwrap_err().to_string();
        assert!(message.starts_with(words), "{message}");
    };
    for (name, value, words) in [
        ("lr", -0.1, "lr"),
        ("lr", f64::NAN, "lr"),
        ("eps", 0.0, "eps"),
        ("beta1", 1.0, "beta1: expected a number from 0 to below 1"),
        ("weight_decay", f64::INFINITY, "weight_decay"),
        ("clip_norm", f64::NAN, "clip_norm: expected a number above 0"),
        ("clip_value", 0.0, "clip_value: expected a number above 0"),
        ("max_norm", -1.0, "max_norm"),
        ("decoupled_weight_decay", 0.5, "decoupled_weight_decay: expected 0 or 1"),
    ] {
        check(Kind::Adam, name, value, words);
    }
    check(Kind::Adam, "lr", 3e38, "eps: expected a number so large");
    check(Kind::Ftrl, "lr", 0.0, "lr: expected a finite number above 0");
    let step = Step { number: 0, seed: 0 };
    assert!(Optimizer::new(Kind::Sgd, &formulas::values(Kind::Sgd), step).is_err());
    assert!(Optimizer::new(Kind::Sgd, &[0.1], Step { number: 1, seed: 0 }).is_err());
}

#[test]
fn renorm_scales_long_rows_down_and_leaves_the_others() {
    for norm_type in [1.0, 2.0, 3.5, f64::INFINITY] {
        let case = large_case(Pooling::None);
        let mut first = None;
        for ctx in contexts() {
            let (set, arrays) = (case.set(&ctx), case.arrays());
            set.renorm(&case.call(&arrays), 1.5, norm_type, &ctx).unwrap();
            let after: Vec<_> = (0..3).map(|t| bits(&set.write(t, |w| w.to_vec()).unwrap())).collect();
            assert!(first.get_or_insert_with(|| after.clone()) == &after);
        }
        let named: Vec<_> =
            case.output_rows().into_iter().map(|(f, ids)| (case.features[f].table, ids[0].1)).collect();
        for (t, table) in first.unwrap().iter().enumerate() {
            let dim = case.tables[t].1;
            for (row, got) in table.chunks(dim).enumerate() {
                let before: Vec<_> = (0..dim).map(|c| f64::from(case.weight(t, row, c))).collect();
                let sizes = before.iter().map(|x| x.abs());
                let norm = if norm_type.is_infinite() {
                    sizes.fold(0.0, f64::max)
                } else {
                    sizes.map(|x| x.powf(norm_type)).sum::<f64>().powf(1.0 / norm_type)
                };
                let long = norm > 1.5 && named.contains(&(t, row));
                let factor = if long { 1.5 / (norm + 1e-7) } else { 1.0 };
                let expected: Vec<_> = before.iter().map(|x| x * factor).collect();
                let got: Vec<_> = got.iter().map(|&b| f32::from_bits(b)).collect();
                assert_close(&got, &expected, 1e-5);
            }
        }
    }
}
