//! Tables of codes whose most used rows are kept in fp32.

mod common;

use common::formulas::optimizers;
use common::{bits, noise};
use dlrm_core::optimizers::Kind;
use dlrm_core::{
    Bags, Borrowed, Context, Encoding, Feature, Gradient, Ids, Level, Method, Offsets, Output, Part, Pooling,
    RowFormat, ScaleFormat, TableRows, TableSet, TableSpec, WAYS,
};

const DIM: usize = 33;

fn encoding(format: RowFormat, scales: ScaleFormat) -> Encoding {
    Encoding { format, method: Method::MinMax, scales: Some(scales), zero_not_finite: false }
}

fn spec(rows: usize, dim: usize, format: RowFormat) -> TableSpec {
    TableSpec { name: "t".into(), rows, dim, format }
}

/// A table, looked up by one feature, of which `hot` rows are kept in fp32.
struct Trained {
    set: TableSet,
    rows: usize,
    dim: usize,
    steps: u64,
}

impl Trained {
    fn new(rows: usize, dim: usize, hot: usize, encoding: Encoding, ctx: &Context) -> Self {
        let made = Self::without_rows(rows, dim);
        let source: Vec<_> = (0..rows * dim).map(|i| noise(1, i)).collect();
        let encoded =
            TableRows::encode(&source, &spec(rows, dim, encoding.format), encoding, ctx).unwrap().rows;
        made.set.swap_rows(0, encoded).unwrap();
        made.set.add_cache(0, hot, ctx).unwrap();
        made.set.set_optimizer(Kind::Adagrad, false, RowFormat::Fp32, ctx).unwrap();
        made
    }

    fn without_rows(rows: usize, dim: usize) -> Self {
        let feature = Feature { table: 0, pooling: Pooling::Sum, padding: None };
        let ctx = Context::default();
        let set = TableSet::new(vec![spec(rows, dim, RowFormat::Int8)], vec![feature], &ctx).unwrap();
        Self { set, rows, dim, steps: 0 }
    }

    /// An update by bags of two ids each, and gradients that change from step to step.
    fn step(&mut self, ids: &[i64], ctx: &Context) {
        self.steps += 1;
        let bags = Bags::new(Ids::I64(ids), Offsets::Even, 1, ids.len() / 2, None).unwrap();
        let output: Vec<_> = (0..self.set.output_len(&bags)).map(|i| noise(self.steps, i)).collect();
        self.set.update(&bags, &gradient(&output), &optimizers(Kind::Adagrad, self.steps, 1), ctx).unwrap();
    }

    /// Elements, scales, state, and all of the cache.
    fn bytes(&self) -> Vec<Vec<u8>> {
        let state = self.set.read_state(0, 0, |_, state, _| state.to_vec()).unwrap();
        let rows = |rows: &TableRows| {
            let cache = rows.cache().unwrap();
            let fp32 = bytemuck::cast_slice(cache.rows.0).to_vec();
            let ids = bytemuck::cast_slice(cache.ids.0).to_vec();
            [rows.elements().0.to_vec(), rows.scales().0.to_vec(), fp32, ids, cache.counts.0.to_vec()]
        };
        self.set.read_rows(0, rows).unwrap().into_iter().chain([state]).collect()
    }

    /// The numbers of the rows in fp32.
    fn hot(&self) -> Vec<i64> {
        let ids = self.set.read_rows(0, |rows| rows.cache().unwrap().ids.0.to_vec()).unwrap();
        ids.into_iter().filter(|&id| id >= 0).collect()
    }

    fn decoded(&self) -> Vec<f32> {
        let fp32 = self.set.encode(0, encoding(RowFormat::Fp32, ScaleFormat::Fp32), &Context::default());
        bytemuck::cast_slice(fp32.unwrap().rows.elements().0).to_vec()
    }
}

fn gradient(output: &[f32]) -> Gradient<'_> {
    Gradient { output, argmax: None, trainable: &[true], scale_by_frequency: &[false], factor: 1.0 }
}

/// Ids of a step, small ones more often.
fn skewed(rows: usize, count: usize, step: u64) -> Vec<i64> {
    (0..count).map(|i| (noise(100 + step, i).abs().powi(6) * rows as f32) as i64).collect()
}

const FORMATS: [(RowFormat, ScaleFormat); 5] = [
    (RowFormat::Int8, ScaleFormat::Fp16),
    (RowFormat::Int8, ScaleFormat::Fp32),
    (RowFormat::Int8, ScaleFormat::Bf16),
    (RowFormat::Int4, ScaleFormat::Fp16),
    (RowFormat::Int2, ScaleFormat::Bf16),
];

/// A call with more occurrences than one thread takes alone.
const LARGE: usize = 20_000;

#[test]
fn fifty_steps_have_the_same_bytes_everywhere_and_again() {
    let best = Context::default();
    let levels = Level::available().map(|level| Context { level, threads: 2, ..best });
    let threads = [1, 2, 3, 7, 8].map(|threads| Context { threads, ..best });
    let contexts: Vec<_> = levels.chain(threads).collect();
    for (format, scales) in FORMATS {
        let trained = |ctx: &Context| {
            let mut table = Trained::new(3000, DIM, 150, encoding(format, scales), ctx);
            (1..=50).for_each(|step| table.step(&skewed(3000, LARGE, step), ctx));
            assert_eq!(table.hot().len(), 160, "all ways are taken");
            table.bytes()
        };
        let first = trained(&best);
        for ctx in &contexts {
            assert!(first == trained(ctx), "{format} at {:?} on {} threads", ctx.level, ctx.threads);
        }
    }
}

#[test]
fn a_lookup_is_the_same_everywhere_and_that_of_the_decoded_rows() {
    for dim in [1, 7, 16, 17, 32, 64, 100, 128, 130] {
        for (format, scales) in FORMATS {
            let best = Context::default();
            let mut table = Trained::new(500, dim, 40, encoding(format, scales), &best);
            (1..=8).for_each(|step| table.step(&skewed(500, 400, step), &best));
            let decoded = table.decoded();
            for pooling in Pooling::ALL {
                let feature = Feature { table: 0, pooling, padding: Some(3) };
                let ids: Vec<_> = (0..300).map(|i| i * 7 % 500).collect();
                let offsets: Vec<i64> = (0..=100).map(|bag| bag * 3).collect();
                let looked_up = |rows: TableRows, ctx: &Context| {
                    let set = TableSet::of_rows(vec![("t".into(), rows)], vec![feature], ctx).unwrap();
                    let bags = Bags::new(Ids::I64(&ids), Offsets::I64(&offsets), 1, 100, None).unwrap();
                    let mut out = vec![f32::NAN; set.output_len(&bags)];
                    set.lookup(&bags, Output::Fp32(&mut out), None, ctx).unwrap();
                    bits(&out)
                };
                let fp32 = encoding(RowFormat::Fp32, ScaleFormat::Fp32);
                let rows =
                    TableRows::encode(&decoded, &spec(500, dim, RowFormat::Fp32), fp32, &best).unwrap().rows;
                let decoded = looked_up(rows, &best);
                let expected = looked_up(copy(&table), &best);
                for level in Level::available() {
                    let ctx = Context { level, ..best };
                    assert!(
                        expected == looked_up(copy(&table), &ctx),
                        "{format} D {dim} {pooling} {level:?}"
                    );
                }
                // Codes are added without their bias, which is added apart.
                let one_by_one = matches!(pooling, Pooling::None | Pooling::Max);
                let allowed = if one_by_one { 0.0 } else { 1e-6 };
                for (&a, &b) in expected.iter().zip(&decoded) {
                    let (a, b) = (f32::from_bits(a), f32::from_bits(b));
                    assert!((a - b).abs() <= allowed, "{format} D {dim} {pooling}: {a:e}, decoded {b:e}");
                }
            }
        }
    }
}

/// The rows of a table, made anew of their parts as a checkpoint has them: pairs of cached rows are zeros there.
fn copy(table: &Trained) -> TableRows {
    let ctx = Context::default();
    let made = table.set.read_rows(0, |rows| {
        let cache = rows.cache().unwrap();
        let mut pairs = rows.scales().0.to_vec();
        let pair = pairs.len() / table.rows;
        for &id in cache.ids.0.iter().filter(|&&id| id >= 0) {
            pairs[id as usize * pair..][..pair].fill(0);
        }
        let mut aligned = vec![0_u32; pairs.len() / 4];
        bytemuck::cast_slice_mut(&mut aligned).copy_from_slice(&pairs);
        let scales = (rows.scale_format(), bytemuck::cast_slice(&aligned));
        let spec = spec(table.rows, table.dim, rows.format());
        let mut made = TableRows::from_parts(&spec, rows.elements().0, scales, None).unwrap();
        made.put_cache(cache.rows.0, cache.ids.0, cache.counts.0, "t", &ctx).unwrap();
        made
    });
    made.unwrap()
}

#[test]
fn steps_after_a_copy_have_the_bytes_of_steps_without() {
    let ctx = Context::default();
    for (format, scales) in FORMATS {
        let mut whole = Trained::new(900, DIM, 50, encoding(format, scales), &ctx);
        (1..=20).for_each(|step| whole.step(&skewed(900, 300, step), &ctx));
        let mut resumed = Trained { steps: whole.steps, ..Trained::without_rows(900, DIM) };
        resumed.set.swap_rows(0, copy(&whole)).unwrap();
        resumed.set.set_optimizer(Kind::Adagrad, false, RowFormat::Fp32, &ctx).unwrap();
        let state: Vec<f32> =
            whole.set.read_state(0, 0, |_, state, _| bytemuck::cast_slice(state).to_vec()).unwrap();
        resumed.set.write_state(0, 0, |own| own.copy_from_slice(&state)).unwrap();
        assert!(whole.bytes() == resumed.bytes(), "{format} {scales}: the copy");
        for step in 21..=40 {
            let ids = skewed(900, 300, step);
            whole.step(&ids, &ctx);
            resumed.step(&ids, &ctx);
        }
        assert!(whole.bytes() == resumed.bytes(), "{format} {scales}");
    }
}

#[test]
fn hot_rows_are_trained_as_rows_of_fp32_are() {
    let ctx = Context::default();
    let ids: Vec<i64> = (0..WAYS as i64).collect();
    let mut table = Trained::new(WAYS, DIM, WAYS, encoding(RowFormat::Int4, ScaleFormat::Fp16), &ctx);
    table.step(&ids, &ctx); // they are touched, and become hot
    let mut fp32 = Trained { steps: 1, ..Trained::without_rows(WAYS, DIM) };
    let decoded = table.decoded();
    let as_fp32 = encoding(RowFormat::Fp32, ScaleFormat::Fp32);
    let rows = TableRows::encode(&decoded, &spec(WAYS, DIM, RowFormat::Fp32), as_fp32, &ctx).unwrap().rows;
    fp32.set.swap_rows(0, rows).unwrap();
    fp32.set.set_optimizer(Kind::Adagrad, false, RowFormat::Fp32, &ctx).unwrap();
    let state: Vec<f32> =
        table.set.read_state(0, 0, |_, state, _| bytemuck::cast_slice(state).to_vec()).unwrap();
    fp32.set.write_state(0, 0, |own| own.copy_from_slice(&state)).unwrap();
    for _ in 0..20 {
        table.step(&ids, &ctx);
        fp32.step(&ids, &ctx);
        assert_eq!(bits(&table.decoded()), bits(&fp32.decoded()));
    }
}

/// Ids by Zipf's law, the ranks spread over the rows.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(rows: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        Self(
            (1..=rows)
                .map(|rank| {
                    sum += (rank as f64).powf(-exponent);
                    sum
                })
                .collect(),
        )
    }

    fn ids(&self, count: usize, step: u64, shift: usize) -> Vec<i64> {
        let rows = self.0.len();
        let id = |i| {
            let drawn = f64::from(noise(step, i) + 1.0) / 2.0 * self.0[rows - 1];
            let rank = self.0.partition_point(|&sum| sum <= drawn).min(rows - 1);
            ((rank + shift) * 7919 % rows) as i64
        };
        (0..count).map(id).collect()
    }
}

#[test]
fn five_percent_of_the_rows_serve_three_quarters_of_the_lookups_also_after_others_are_used() {
    const ROWS: usize = 200_000;
    let (ctx, zipf) = (Context::default(), Zipf::new(ROWS, 1.05));
    let mut table = Trained::new(ROWS, 1, ROWS / 20, encoding(RowFormat::Int8, ScaleFormat::Fp16), &ctx);
    for (shift, steps) in [(0, 100), (ROWS / 2, 300)] {
        let (mut served, mut all) = (0, 0);
        for step in 0..steps {
            let ids = zipf.ids(8192, 1000 + table.steps, shift);
            if step >= steps - 20 {
                let mut is_hot = vec![false; ROWS];
                table.hot().iter().for_each(|&id| is_hot[id as usize] = true);
                served += ids.iter().filter(|&&id| is_hot[id as usize]).count();
                all += ids.len();
            }
            table.step(&ids, &ctx);
        }
        let share = served as f64 / all as f64;
        println!("after {} steps: {share:.3}", table.steps);
        assert!(share >= 0.75, "{share}");
    }
    assert!(table.hot().len() <= ROWS / 20);
}

#[test]
fn rows_that_are_driven_out_are_near_what_they_were_and_the_others_untouched() {
    let ctx = Context::default();
    let mut table = Trained::new(1000, DIM, WAYS, encoding(RowFormat::Int8, ScaleFormat::Fp16), &ctx);
    let mut moved = 0;
    for step in 1..=60 {
        let (before, hot) = (table.decoded(), table.hot());
        let ids: Vec<i64> = (0..20).map(|i| (i * i * 31 + step * 17) % 1000).collect();
        table.step(&ids, &ctx);
        let (after, still) = (table.decoded(), table.hot());
        let rows = before.chunks(DIM).zip(after.chunks(DIM)).enumerate();
        for (row, (before, after)) in rows.filter(|(row, _)| !ids.contains(&(*row as i64))) {
            if hot.contains(&(row as i64)) && !still.contains(&(row as i64)) {
                moved += 1;
                let span = before.iter().fold([f32::MAX, f32::MIN], |[a, b], &x| [a.min(x), b.max(x)]);
                let code = (span[1] - span[0]) / 255.0 * 1.02;
                assert!(before.iter().zip(after).all(|(a, b)| (a - b).abs() <= code), "{before:?} {after:?}");
            } else {
                assert_eq!(bits(before), bits(after), "row {row}");
            }
        }
    }
    assert!(moved > 10, "{moved}");
}

#[test]
fn calls_parted_by_their_overlap_have_the_bits_of_calls_in_turn() {
    let ctx = Context::default();
    let run = |parted: bool| {
        let mut table = Trained::new(400, DIM, 40, encoding(RowFormat::Int8, ScaleFormat::Fp16), &ctx);
        (1..=5).for_each(|step| table.step(&skewed(400, 200, step), &ctx));
        let ids = [6, 7].map(|step| skewed(400, 200, step));
        let calls = [0, 1].map(|k| Bags::new(Ids::I64(&ids[k]), Offsets::Even, 1, 100, None).unwrap());
        let set = &table.set;
        let mut out = vec![f32::NAN; set.output_len(&calls[1])];
        let output: Vec<_> = (0..out.len()).map(|i| noise(9, i)).collect();
        let (gradient, optimizer) = (gradient(&output), optimizers(Kind::Adagrad, 6, 1));
        if parted {
            let [first, second] = [0, 1].map(|k| set.prepare(&calls[k], &[true], &ctx).unwrap());
            let overlap = set.overlap(&first, &second, &calls[1], true, &ctx).unwrap();
            let mut look = |part| {
                set.lookup_part(&overlap, part, &calls[1], Output::Fp32(&mut out), None, &ctx).unwrap();
            };
            let update = |part| {
                set.update_prepared(&first, Some((&overlap, part)), &gradient, &optimizer, &ctx).unwrap();
            };
            look(Part::Apart);
            update(Part::Shared);
            look(Part::Shared);
            update(Part::Apart);
        } else {
            set.update(&calls[0], &gradient, &optimizer, &ctx).unwrap();
            set.lookup(&calls[1], Output::Fp32(&mut out), None, &ctx).unwrap();
        }
        (bits(&out), table.bytes())
    };
    assert!(run(true) == run(false));
}

#[test]
fn rows_that_are_written_are_hot_no_more() {
    let ctx = Context::default();
    let mut table = Trained::new(WAYS, DIM, WAYS, encoding(RowFormat::Int8, ScaleFormat::Fp32), &ctx);
    table.step(&(0..WAYS as i64).collect::<Vec<_>>(), &ctx);
    table.set.write_rows(0, 2, &vec![0.5; 3 * DIM], &ctx).unwrap();
    let mut hot = table.hot();
    hot.sort_unstable();
    assert_eq!(hot, [0, 1].into_iter().chain(5..WAYS as i64).collect::<Vec<_>>());
    assert_eq!(table.decoded()[2 * DIM..5 * DIM], [0.5; 3 * DIM]);
}

#[test]
fn memory_is_told() {
    let ctx = Context::default();
    let table = Trained::new(1000, DIM, 50, encoding(RowFormat::Int8, ScaleFormat::Fp16), &ctx);
    let memory = table.set.memory_report().unwrap()[0];
    assert_eq!((memory.payload, memory.scales), (1000 * DIM, 4000));
    assert_eq!(memory.cache, 64 * (4 * DIM + 8 + 1));
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let ctx = Context::default();
    let int8 = encoding(RowFormat::Int8, ScaleFormat::Fp16);
    let mut table = Trained::new(300, DIM, 20, int8, &ctx);
    table.step(&skewed(300, 100, 1), &ctx);
    let before = table.bytes();
    let words = |result: dlrm_core::Result<()>| result.unwrap_err().to_string();
    assert_eq!(
        words(table.set.add_cache(0, 20, &ctx)),
        "hot_rows of table 't': expected int8, int4 or int2 rows of evenly spaced codes, without hot rows, got rows \
         that have hot ones already"
    );
    let mut ids = vec![1, 2, 3, 300];
    let update = |ids: &[i64], output: &[f32]| {
        let bags = Bags::new(Ids::I64(ids), Offsets::Even, 1, 2, None).unwrap();
        table.set.update(&bags, &gradient(output), &optimizers(Kind::Adagrad, 2, 1), &ctx)
    };
    assert!(words(update(&ids, &[1.0; 2 * DIM])).starts_with("indices[3]: expected 0 <= id < 300"));
    ids[3] = 4;
    assert!(words(update(&ids, &[1.0; DIM])).starts_with("grad: expected 66 elements"));
    let pack = |rows: &TableRows| {
        let spec = spec(300, DIM, RowFormat::Int8);
        words(rows.pack(&mut vec![0; 300 * 41], &spec, dlrm_core::Layout::Fused, 41, &ctx))
    };
    assert_eq!(
        table.set.read_rows(0, pack).unwrap(),
        "rows of table 't': expected rows that are all in codes, got hot rows in fp32; quantize the module with \
         hot_rows=0 first"
    );
    assert!(table.bytes() == before);

    let plain = |format| {
        let made = TableRows::encode(
            &vec![0.5; 300 * DIM],
            &spec(300, DIM, format),
            encoding(format, ScaleFormat::Fp16),
            &ctx,
        );
        made.unwrap().rows
    };
    let put = |rows: &[f32], ids: &[i64], counts: &[u8]| {
        words(plain(RowFormat::Int8).put_cache(rows, ids, counts, "t", &ctx))
    };
    let (rows, ids, counts) = table
        .set
        .read_rows(0, |rows| {
            let cache = rows.cache().unwrap();
            (cache.rows.0.to_vec(), cache.ids.0.to_vec(), cache.counts.0.to_vec())
        })
        .unwrap();
    assert_eq!(
        put(&rows, &ids[1..], &counts),
        "hot ids of table 't': expected a multiple of 16 ways, got 31"
    );
    assert_eq!(put(&rows[1..], &ids, &counts), "hot rows of table 't': expected 1056 elements, got 1055");
    assert_eq!(put(&rows, &ids, &counts[1..]), "hot counts of table 't': expected 32 elements, got 31");
    for id in [300, -2] {
        let wrong = [vec![id], ids[1..].to_vec()].concat();
        let expected = "hot ids of table 't': expected rows below 300 in the sets of their hash, or -1, got ";
        assert_eq!(put(&rows, &wrong, &counts), format!("{expected}{id}"));
    }
    let swapped = [&ids[WAYS..], &ids[..WAYS]].concat();
    assert!(put(&rows, &swapped, &counts).contains("in the sets of their hash"));
    let twice: Vec<i64> =
        ids.iter().enumerate().map(|(way, &id)| if way == 1 { ids[0] } else { id }).collect();
    assert!(
        put(&rows, &twice, &counts).starts_with("hot ids of table 't': expected each row in one way, got ")
    );
    let fp32 = plain(RowFormat::Fp32).put_cache(&rows, &ids, &counts, "t", &ctx);
    assert!(words(fp32).ends_with("without hot rows, got fp32 rows"));
    assert!(plain(RowFormat::Int8).put_cache(&rows, &ids, &counts, "t", &ctx).is_ok());
}

#[test]
fn a_mark_in_borrowed_scales_is_a_nan() {
    let ctx = Context::default();
    let feature = Feature { table: 0, pooling: Pooling::Sum, padding: None };
    let mut memory = vec![[0_u64; 2]; 1];
    let start: *mut u8 = memory.as_mut_ptr().cast();
    let pairs: &mut [u16] = bytemuck::cast_slice_mut(&mut memory);
    pairs[..2].copy_from_slice(&[0x7FE5, 3]);
    // SAFETY: the bytes are in the vector, which is moved and not touched.
    #[expect(unsafe_code, reason = "memory that a vector keeps")]
    let borrow = |at: usize, len: usize| unsafe { Borrowed::new(start.add(at), len, ()) };
    let scales = Some((ScaleFormat::Fp16, borrow(0, 4)));
    let rows = TableRows::borrow(&spec(1, 1, RowFormat::Int8), borrow(8, 1), scales, None).unwrap();
    let set = TableSet::of_rows(vec![("t".into(), rows)], vec![feature], &ctx).unwrap();
    let mut out = [0.0];
    let bags = Bags::new(Ids::I64(&[0]), Offsets::Even, 1, 1, None).unwrap();
    set.lookup(&bags, Output::Fp32(&mut out), None, &ctx).unwrap();
    assert!(out[0].is_nan());
    drop(memory);
}
