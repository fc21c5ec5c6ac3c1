//! Row formats: encoded as the formulas say, decoded and pooled with the same bits everywhere.

mod common;

use common::{DIMS, any_case, bits, contexts, noise};
use dlrm_core::{
    Bags, Context, Encoding, Error, Feature, Ids, Level, Method, Offsets, Output, Pooling, RowFormat,
    ScaleFormat, TableRows, TableSet, TableSpec,
};
use half::{bf16, f16};
use proptest::prelude::*;

fn spec(rows: usize, dim: usize) -> TableSpec {
    TableSpec { name: "t".into(), rows, dim, format: RowFormat::Fp32 }
}

fn encoding(format: RowFormat, method: Method, scales: Option<ScaleFormat>) -> Encoding {
    Encoding { format, method, scales, zero_not_finite: false }
}

/// Every encoding there is, scales in every format.
fn encodings() -> Vec<Encoding> {
    let mut all = Vec::new();
    for format in RowFormat::ALL {
        for method in Method::ALL {
            let fits = match method {
                Method::MinMax => true,
                Method::LeastSquares => format.is_quantized(),
                Method::Codebook => format == RowFormat::Int4,
            };
            if fits {
                let scales =
                    [None, Some(ScaleFormat::Fp32), Some(ScaleFormat::Fp16), Some(ScaleFormat::Bf16)];
                all.extend(scales.map(|scales| encoding(format, method, scales)));
            }
        }
    }
    all
}

/// Numbers around `middle`, as large as `size`.
fn rows_of(seed: u64, rows: usize, dim: usize, size: f32, middle: f32) -> Vec<f32> {
    (0..rows * dim).map(|i| middle + size * noise(seed, i)).collect()
}

/// Bytes of the elements and of the scales.
fn bytes(rows: &TableRows) -> (Vec<u8>, Vec<u8>) {
    (rows.elements().0.to_vec(), rows.scales().0.to_vec())
}

/// Scale and bias of a row, and its codes, one a byte.
fn parts(rows: &TableRows, dim: usize, row: usize) -> (f32, f32, Vec<u8>) {
    let (elements, scales) = bytes(rows);
    let pair: Vec<f32> = match rows.scale_format() {
        ScaleFormat::Fp32 => scales.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        ScaleFormat::Fp16 => {
            scales.chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        ScaleFormat::Bf16 => {
            scales.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
    };
    let width = rows.format().bits();
    let row_bytes = rows.format().row_bytes(dim);
    let code =
        |c: usize| elements[row * row_bytes + c * width / 8] >> (c * width % 8) & ((1 << width) - 1) as u8;
    (
        pair[2 * row],
        pair[2 * row + 1],
        (0..dim).map(|c| if width == 8 { elements[row * row_bytes + c] } else { code(c) }).collect(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_level_and_number_of_threads_encodes_the_same_bytes(
        seed in any::<u64>(),
        dim in prop::sample::select(&DIMS[..]),
        rows in 1_usize..70,
        exponent in -12_i32..12,
        middle in -2.0_f32..2.0,
    ) {
        let source = rows_of(seed, rows, dim, 10.0_f32.powi(exponent).min(1e4), middle);
        for encoding in encodings() {
            let mut first = None;
            for ctx in contexts().into_iter().filter(|ctx| [1, 3].contains(&ctx.threads)) {
                let made = TableRows::encode(&source, &spec(rows, dim), encoding, &ctx).unwrap();
                let now = (bytes(&made.rows), bits(&made.errors), made.largest_error.to_bits(), bits(made.rows.codebook()));
                let first = first.get_or_insert_with(|| now.clone());
                prop_assert_eq!(&*first, &now, "{:?} {:?} on {} threads", encoding, ctx.level, ctx.threads);
            }
        }
    }

    /// Lookups of rows in mixed formats have the same bits everywhere. Those of the same rows as fp32 have these bits too where
    /// elements are added one by one, and are as near as rounding allows elsewhere.
    #[test]
    fn pooling_is_the_same_everywhere_and_that_of_the_decoded_rows(
        case in any_case(),
        chosen in prop::collection::vec(0..encodings().len(), 4),
    ) {
        let arrays = case.arrays();
        let bags = case.call(&arrays);
        let mut expected = [None, None];
        let mut have_codebook = [false; 4]; // one that is asked for may turn out to be the codes' own numbers
        for ctx in contexts() {
            let set = case.set(&ctx);
            for (t, &chosen) in chosen.iter().enumerate().take(case.tables.len()) {
                let made = set.encode(t, encodings()[chosen], &ctx).unwrap();
                have_codebook[t] = made.rows.has_codebook();
                set.swap_rows(t, made.rows).unwrap();
            }
            for decoded in [false, true] {
                if decoded {
                    for t in 0..case.tables.len() {
                        let fp32 = set.encode(t, encoding(RowFormat::Fp32, Method::MinMax, None), &ctx).unwrap();
                        prop_assert!(fp32.errors.iter().all(|&e| e == 0.0));
                        set.swap_rows(t, fp32.rows).unwrap();
                    }
                }
                let len = set.output_len(&bags);
                let (mut out, mut argmax) = (vec![f32::NAN; len], vec![-7; len]);
                let (mut fp16, mut half) = (vec![f16::NAN; len], vec![bf16::NAN; len]);
                set.lookup(&bags, Output::Fp32(&mut out), Some(&mut argmax), &ctx).unwrap();
                set.lookup(&bags, Output::Fp16(&mut fp16), None, &ctx).unwrap();
                set.lookup(&bags, Output::Bf16(&mut half), None, &ctx).unwrap();
                for i in 0..len {
                    prop_assert_eq!(fp16[i].to_bits(), f16::from_f32(out[i]).to_bits());
                    prop_assert_eq!(half[i].to_bits(), bf16::from_f32(out[i]).to_bits());
                }
                let now = (bits(&out), argmax);
                let expected = expected[usize::from(decoded)].get_or_insert_with(|| now.clone());
                prop_assert_eq!(&*expected, &now, "{:?} on {} threads", ctx.level, ctx.threads);
            }
        }
        let [Some((coded, places)), Some((decoded, decoded_places))] = expected else {
            unreachable!("there is a context");
        };
        prop_assert_eq!(places, decoded_places);
        let mut at = 0;
        for (f, ids) in case.output_rows() {
            let Feature { table, pooling, .. } = case.features[f];
            let one_by_one = !encodings()[chosen[table]].format.is_quantized()
                || have_codebook[table]
                || matches!(pooling, Pooling::None | Pooling::Max);
            // Elements, and what codes stand for without the bias, are below 4 in size.
            let allowed = if one_by_one { 0.0 } else { 4.0 * f32::EPSILON * (ids.len() as f32).powi(2) };
            for i in at..at + case.tables[table].1 {
                let (a, b) = (f32::from_bits(coded[i]), f32::from_bits(decoded[i]));
                prop_assert!(
                    (a - b).abs() <= allowed && (allowed > 0.0 || coded[i] == decoded[i]),
                    "{a:e} of codes, {b:e} of what they decode to, {} ids", ids.len()
                );
            }
            at += case.tables[table].1;
        }
    }

    #[test]
    fn minmax_is_the_formula(
        seed in any::<u64>(),
        dim in 1_usize..70,
        size in prop::sample::select(&[1e-3_f32, 1.0, 300.0, 2e4][..]),
    ) {
        let source = rows_of(seed, 3, dim, size, size / 3.0);
        for format in [RowFormat::Int8, RowFormat::Int4, RowFormat::Int2] {
            for scales in ScaleFormat::ALL {
                let made = TableRows::encode(
                    &source, &spec(3, dim), encoding(format, Method::MinMax, Some(scales)), &Context::default(),
                ).unwrap();
                for (row, x) in source.chunks(dim).enumerate() {
                    let (scale, bias, codes) = parts(&made.rows, dim, row);
                    prop_assert_eq!((scale, bias, codes), formula(x, format, scales));
                }
            }
        }
    }

    #[test]
    fn least_squares_is_never_worse_than_minmax(seed in any::<u64>(), dim in 1_usize..200) {
        let source = rows_of(seed, 20, dim, 1.0, 0.3);
        for format in [RowFormat::Int8, RowFormat::Int4, RowFormat::Int2] {
            let errors = [Method::MinMax, Method::LeastSquares].map(|method| {
                let scales = Some(ScaleFormat::Fp16);
                TableRows::encode(&source, &spec(20, dim), encoding(format, method, scales), &Context::default())
                    .unwrap()
                    .errors
            });
            for (minmax, best) in errors[0].iter().zip(errors[1].iter()) {
                prop_assert!(*best <= minmax * 1.0001, "{minmax} {best}");
            }
        }
    }
}

/// design.md's formulas, one element after another.
fn formula(x: &[f32], format: RowFormat, scales: ScaleFormat) -> (f32, f32, Vec<u8>) {
    let round = |x: f32| match scales {
        ScaleFormat::Fp32 => x,
        ScaleFormat::Fp16 => f16::from_f32(x).to_f32(),
        ScaleFormat::Bf16 => bf16::from_f32(x).to_f32(),
    };
    let n = ((1 << format.bits()) - 1) as f32;
    let bias = round(x.iter().copied().fold(f32::INFINITY, f32::min));
    let range = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) - bias;
    let (scale, inverse) = if format == RowFormat::Int8 && scales == ScaleFormat::Fp32 {
        (range / 255.0, 255.0 / (range + 1e-8))
    } else {
        let scale = round(if range == 0.0 { 1.0 } else { range / n });
        let scale = if scale == 0.0 { 1.0 } else { scale };
        (scale, 1.0 / scale)
    };
    let code = |&x: &f32| ((x - bias) * inverse).round_ties_even().clamp(0.0, n) as u8;
    (scale, bias, x.iter().map(code).collect())
}

/// The sum of rows of codes as `kernels/pool.rs` has it, one element after another.
fn sum_of_codes(rows: &[(f32, f32, Vec<u8>)], weights: &[f32], c: usize) -> f32 {
    let mut sum = None;
    let mut add = |rows: &[(f32, f32, Vec<u8>)], weights: &[f32]| {
        let bias = rows.iter().zip(weights).map(|((_, bias, _), w)| bias * w).reduce(|a, b| a + b).unwrap();
        let onto = sum.map_or(bias, |sum: f32| sum + bias);
        let fused = |onto, ((scale, _, codes), w): (&(f32, f32, Vec<u8>), &f32)| {
            f32::from(codes[c]).mul_add(scale * w, onto)
        };
        sum = Some(rows.iter().zip(weights).fold(onto, fused));
    };
    let (fours, rest) = rows.split_at(rows.len() / 4 * 4);
    fours.chunks(4).zip(weights.chunks(4)).for_each(|(rows, weights)| add(rows, weights));
    rest.chunks(1).zip(weights[fours.len()..].chunks(1)).for_each(|(rows, weights)| add(rows, weights));
    sum.unwrap_or(0.0)
}

#[test]
fn sums_of_codes_are_the_formula() {
    let (rows, bags) = (40, 12);
    // Bags of 0 to 11 ids.
    let offsets: Vec<i64> = (0..=bags).map(|bag| bag * (bag - 1) / 2).collect();
    let ids: Vec<i64> = (0..offsets[bags as usize]).map(|i| i * 7 % rows as i64).collect();
    let some: Vec<f32> = (0..ids.len()).map(|i| noise(6, i)).collect();
    let ones = vec![1.0; ids.len()];
    for (dim, format) in
        [16, 35, 64, 128, 150].into_iter().flat_map(|d| [(d, RowFormat::Int8), (d, RowFormat::Int2)])
    {
        let source = rows_of(5, rows, dim, 0.7, 0.2);
        let encode = |ctx: &Context| {
            TableRows::encode(&source, &spec(rows, dim), encoding(format, Method::MinMax, None), ctx)
                .unwrap()
                .rows
        };
        let made = encode(&Context::default());
        let parts: Vec<_> = (0..rows).map(|row| parts(&made, dim, row)).collect();
        for (pooling, padding) in
            [Pooling::Sum, Pooling::Mean].into_iter().flat_map(|p| [(p, None), (p, Some(39))])
        {
            let kept =
                |position: &usize| padding.is_none_or(|padding: usize| ids[*position] != padding as i64);
            for (weights, level) in
                Level::available().flat_map(|level| [(None, level), (Some(&some[..]), level)])
            {
                let ctx = Context { level, ..Context::default() };
                let feature = Feature { table: 0, pooling, padding };
                let set = TableSet::of_rows(vec![("t".into(), encode(&ctx))], vec![feature], &ctx).unwrap();
                let call =
                    Bags::new(Ids::I64(&ids), Offsets::I64(&offsets), 1, bags as usize, weights).unwrap();
                let mut out = vec![f32::NAN; set.output_len(&call)];
                set.lookup(&call, Output::Fp32(&mut out), None, &ctx).unwrap();
                for (bag, out) in out.chunks(dim).enumerate() {
                    let positions = offsets[bag] as usize..offsets[bag + 1] as usize;
                    let positions: Vec<_> = positions.filter(kept).collect();
                    let rows: Vec<_> = positions.iter().map(|&p| parts[ids[p] as usize].clone()).collect();
                    let weights: Vec<_> = positions.iter().map(|&p| weights.unwrap_or(&ones)[p]).collect();
                    let divisor = if pooling == Pooling::Mean { rows.len().max(1) as f32 } else { 1.0 };
                    for (c, x) in out.iter().enumerate() {
                        let expected = sum_of_codes(&rows, &weights, c) / divisor;
                        assert_eq!(
                            x.to_bits(),
                            expected.to_bits(),
                            "{format} D {dim} {pooling} {padding:?} {level:?}, bag {bag}: {x:e} {expected:e}"
                        );
                    }
                }
            }
        }
    }
}

/// Numbers of a normal distribution, from the sum of 12 uniform ones less exactly as much.
fn gaussian(rows: usize, dim: usize) -> Vec<f32> {
    (0..rows * dim).map(|i| (0..12).map(|k| noise(11, i * 12 + k) / 2.0).sum()).collect()
}

/// Of a Laplace distribution, by its inverse.
fn laplace(rows: usize, dim: usize) -> Vec<f32> {
    let one = |i| {
        let u = noise(13, i);
        -u.signum() * (1.0 - u.abs()).max(1e-7).ln()
    };
    (0..rows * dim).map(one).collect()
}

fn mean_error(source: &[f32], dim: usize, format: RowFormat, method: Method) -> f64 {
    let rows = source.len() / dim;
    let made =
        TableRows::encode(source, &spec(rows, dim), encoding(format, method, None), &Context::default());
    let errors = made.unwrap().errors;
    errors.iter().map(|&e| f64::from(e)).sum::<f64>() / rows as f64
}

#[test]
fn errors_of_random_rows_are_small() {
    let [g64, g128, l128] = [gaussian(2000, 64), gaussian(2000, 128), laplace(2000, 128)];
    for (source, dim, format, method, limit) in [
        (&g64, 64, RowFormat::Int8, Method::MinMax, 0.0055),
        (&g64, 64, RowFormat::Int4, Method::MinMax, 0.0905),
        (&g64, 64, RowFormat::Int4, Method::LeastSquares, 0.083),
        (&g64, 64, RowFormat::Int2, Method::LeastSquares, 0.33),
        (&g128, 128, RowFormat::Int8, Method::MinMax, 0.0062),
        (&g128, 128, RowFormat::Int4, Method::MinMax, 0.100),
        (&g128, 128, RowFormat::Int4, Method::LeastSquares, 0.092),
        (&g128, 128, RowFormat::Int2, Method::LeastSquares, 0.34),
        (&l128, 128, RowFormat::Int4, Method::LeastSquares, 0.121),
        (&l128, 128, RowFormat::Int4, Method::Codebook, 0.113),
    ] {
        let error = mean_error(source, dim, format, method);
        println!("{format} {method} D {dim}: {error:.5} (limit {limit})");
        assert!(error <= limit, "{format} {method} D {dim}: {error} above {limit}");
    }
}

#[test]
fn constant_denormal_and_huge_rows_decode_right() {
    let dim = 33;
    for (x, tolerance) in [(0.0, 0.0), (0.1, 1e-3), (-7.5, 1e-2), (1e-40, 2e-40), (1e30, 4e27), (-3e37, 2e35)]
    {
        for spread in [0.0, 0.5] {
            let source: Vec<f32> = (0..4 * dim).map(|i| x * (1.0 + spread * noise(5, i))).collect();
            for encoding in encodings() {
                if encoding.scales == Some(ScaleFormat::Fp16) || encoding.format == RowFormat::Fp16 {
                    continue; // not for rows of any magnitude
                }
                let made = TableRows::encode(&source, &spec(4, dim), encoding, &Context::default()).unwrap();
                let step = x.abs() * spread / ((1_u64 << encoding.format.bits().min(32)) - 1) as f32;
                let rounding = if encoding.format == RowFormat::Bf16 { 1.5 * x.abs() / 512.0 } else { 0.0 };
                let bound = tolerance + 1.1 * f64::from(step) + f64::from(rounding);
                assert!(
                    f64::from(made.largest_error) <= bound,
                    "{x} {spread} {encoding:?}: {}",
                    made.largest_error
                );
            }
        }
    }
}

#[test]
fn scales_are_fp16_where_that_holds_them_and_bf16_elsewhere() {
    let scales = |size: f32| {
        let source = rows_of(1, 100, 64, size, 0.0);
        let made = TableRows::encode(
            &source,
            &spec(100, 64),
            encoding(RowFormat::Int4, Method::LeastSquares, None),
            &Context::default(),
        );
        made.unwrap().rows.scale_format()
    };
    assert_eq!([1e-2, 1.0, 3e4].map(scales), [ScaleFormat::Fp16; 3]);
    assert_eq!([1e-9, 1e6, 1e30].map(scales), [ScaleFormat::Bf16; 3]);
}

#[test]
fn what_cannot_be_encoded_is_named() {
    let ctx = Context::default();
    let mut source = rows_of(2, 300, 20, 1.0, 0.0);
    let refused = |source: &[f32], encoding: Encoding| {
        TableRows::encode(source, &spec(300, 20), encoding, &ctx).map(|_| ()).unwrap_err().to_string()
    };
    source[123 * 20 + 7] = f32::NAN;
    source[200 * 20] = f32::INFINITY;
    for mut encoding in encodings() {
        assert_eq!(refused(&source, encoding), "row 123 of table 't': expected finite numbers, got NaN");
        encoding.zero_not_finite = true;
        let made = TableRows::encode(&source, &spec(300, 20), encoding, &ctx).unwrap();
        let mut zeroed = source.clone();
        zeroed.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = 0.0);
        encoding.zero_not_finite = false;
        let expected = TableRows::encode(&zeroed, &spec(300, 20), encoding, &ctx).unwrap();
        assert!(bytes(&made.rows) == bytes(&expected.rows), "{encoding:?}");
    }
    source[123 * 20 + 7] = -1e9;
    source[200 * 20] = 3e38;
    source[201 * 20] = -3e38;
    let fp16 = encoding(RowFormat::Fp16, Method::MinMax, None);
    assert_eq!(
        refused(&source, fp16),
        "row 123 of table 't': expected numbers of at most 6.5504e4 in size, which fp16 holds, got -1e9"
    );
    let int4 = encoding(RowFormat::Int4, Method::MinMax, Some(ScaleFormat::Fp16));
    assert_eq!(
        refused(&source, int4),
        "row 123 of table 't': expected elements whose scale and bias fp16 holds, got -1e9"
    );
    source[202 * 20] = 3e38;
    source[202 * 20 + 1] = -3e38;
    let int4 = encoding(RowFormat::Int4, Method::MinMax, None);
    assert!(
        refused(&source, int4)
            .starts_with("row 202 of table 't': expected elements whose scale and bias bf16 holds")
    );
    let short = TableRows::encode(&source[1..], &spec(300, 20), int4, &ctx).map(|_| ()).unwrap_err();
    assert_eq!(short.to_string(), "rows of table 't': expected 6000 elements, got 5999");
    for (format, method) in [(RowFormat::Fp16, Method::LeastSquares), (RowFormat::Int8, Method::Codebook)] {
        let message = refused(&source, encoding(format, method, None));
        assert!(message.starts_with("method: expected "), "{message}");
    }
}

#[test]
fn rows_are_swapped_only_for_rows_of_their_shape() {
    let ctx = Context::default();
    let case = common::large_case(dlrm_core::Pooling::Sum);
    let set = case.set(&ctx);
    let made = set.encode(0, encoding(RowFormat::Int8, Method::MinMax, None), &ctx).unwrap();
    let message = set.swap_rows(1, made.rows).map(|_| ()).unwrap_err().to_string();
    assert_eq!(message, "rows of table 't1': expected 3 x 33, got 5000 x 64");
}

#[test]
fn max_norm_is_for_fp32_rows_alone() {
    let ctx = Context::default();
    let case = common::large_case(dlrm_core::Pooling::Sum);
    let (set, arrays) = (case.set(&ctx), case.arrays());
    let int8 = encoding(RowFormat::Int8, Method::MinMax, None);
    let fp32 = set.swap_rows(0, set.encode(0, int8, &ctx).unwrap().rows).unwrap();
    let before = set.read_rows(1, bytes).unwrap();
    let refused = set.renorm(&case.call(&arrays), 1e-3, 2.0, &ctx).unwrap_err().to_string();
    assert_eq!(refused, "max_norm: expected tables of fp32 rows, got int8 rows in table 't0'");
    assert!(set.read_rows(1, bytes).unwrap() == before);
    set.swap_rows(0, fp32).unwrap();
    set.renorm(&case.call(&arrays), 1e-3, 2.0, &ctx).unwrap();
    assert!(set.read_rows(1, bytes).unwrap() != before);
}

#[test]
fn rows_written_in_parts_are_those_written_at_once() {
    let ctx = Context::default();
    let source = rows_of(4, 100, 37, 1.0, 0.0);
    for format in [RowFormat::Bf16, RowFormat::Int8, RowFormat::Int4, RowFormat::Int2] {
        let feature = dlrm_core::Feature { table: 0, pooling: dlrm_core::Pooling::Sum, padding: None };
        let table = TableSpec { format, ..spec(100, 37) };
        let set = dlrm_core::TableSet::new(vec![table], vec![feature], &ctx).unwrap();
        for (first, part) in [(0, &source[..64 * 37]), (64, &source[64 * 37..])] {
            set.write_rows(0, first, part, &ctx).unwrap();
        }
        let whole = encoding(format, Method::MinMax, Some(ScaleFormat::Bf16));
        let whole = TableRows::encode(&source, &spec(100, 37), whole, &ctx).unwrap();
        assert!(set.read_rows(0, bytes).unwrap() == bytes(&whole.rows), "{format}");
        let message = set.write_rows(0, 64, &source, &ctx).unwrap_err().to_string();
        assert_eq!(
            message,
            "rows of table 't': expected whole rows of 37 elements, up to row 100, got 3700 elements from row 64 on"
        );
    }
}

#[test]
fn poll_ends_an_encoding() {
    let ctx = Context { poll: &|| true, ..Context::default() };
    let source = rows_of(4, 10_000, 64, 1.0, 0.0);
    let int8 = encoding(RowFormat::Int8, Method::MinMax, None);
    let ended = TableRows::encode(&source, &spec(10_000, 64), int8, &ctx).map(|_| ());
    assert_eq!(ended.unwrap_err(), Error::Interrupted);
}

#[test]
fn every_level_of_this_machine_is_tested() {
    assert!(contexts().iter().any(|ctx| ctx.level == Level::best()));
}
