//! Packed rows: what is read is written again, and any bytes are either rows or an error.

mod common;

use common::noise;
use dlrm_core::{Context, Encoding, Layout, Method, RowFormat, ScaleFormat, TableRows, TableSpec};
use half::f16;
use proptest::prelude::*;

const QUANTIZED: [RowFormat; 3] = [RowFormat::Int8, RowFormat::Int4, RowFormat::Int2];

fn spec(rows: usize, dim: usize, format: RowFormat) -> TableSpec {
    TableSpec { name: "t".into(), rows, dim, format }
}

fn encoded(rows: usize, dim: usize, format: RowFormat, scales: Option<ScaleFormat>) -> TableRows {
    let source: Vec<f32> = (0..rows * dim).map(|i| noise(3, i)).collect();
    let encoding = Encoding { format, method: Method::MinMax, scales, zero_not_finite: false };
    TableRows::encode(&source, &spec(rows, dim, format), encoding, &Context::default()).unwrap().rows
}

proptest! {
    #[test]
    fn what_is_unpacked_is_packed_again(
        rows in 0_usize..50,
        dim in 1_usize..40,
        format in prop::sample::select(&QUANTIZED[..]),
        layout in prop::sample::select(&Layout::ALL[..]),
        fill in 0_usize..20,
    ) {
        let ctx = Context { threads: 2, ..Context::default() };
        let spec = spec(rows, dim, format);
        let made = encoded(rows, dim, format, Some(layout.scale_format(format)));
        let row_bytes = layout.row_bytes(format, dim) + fill;
        let mut packed = vec![7; rows * row_bytes];
        made.pack(&mut packed, &spec, layout, row_bytes, &ctx).unwrap();
        let again = TableRows::unpack(&packed, &spec, layout, row_bytes, &ctx).unwrap();
        prop_assert!(again.elements().0 == made.elements().0 && again.scales().0 == made.scales().0);
        let mut repacked = vec![9; packed.len()];
        again.pack(&mut repacked, &spec, layout, row_bytes, &ctx).unwrap();
        prop_assert_eq!(packed, repacked);
    }

    /// Any bytes load, and then give back the same ones and decode to finite numbers, or are refused in words.
    #[test]
    fn any_bytes_load_or_are_refused(
        dim in 1_usize..20,
        format in prop::sample::select(&QUANTIZED[..]),
        layout in prop::sample::select(&Layout::ALL[..]),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        rows in 0_usize..12,
        row_bytes in 0_usize..40,
        exact in any::<bool>(),
    ) {
        let ctx = Context::default();
        let row_bytes = if exact { layout.row_bytes(format, dim) } else { row_bytes };
        let rows = if exact { bytes.len() / row_bytes } else { rows };
        let bytes = if exact { &bytes[..rows * row_bytes] } else { &bytes[..] };
        let spec = spec(rows, dim, format);
        match TableRows::unpack(bytes, &spec, layout, row_bytes, &ctx) {
            Ok(loaded) => {
                let mut packed = vec![0; bytes.len()];
                loaded.pack(&mut packed, &spec, layout, row_bytes, &ctx).unwrap();
                if exact {
                    prop_assert_eq!(&packed[..], bytes);
                }
                let set = dlrm_core::TableSet::new(vec![spec.clone()], vec![], &ctx).unwrap();
                set.swap_rows(0, loaded).unwrap();
                let fp32 = Encoding {
                    format: RowFormat::Fp32, method: Method::MinMax, scales: None, zero_not_finite: false,
                };
                prop_assert!(set.encode(0, fp32, &ctx).is_ok(), "decodes to what is not finite");
            }
            Err(error) => {
                let message = error.to_string();
                prop_assert!(message.contains("of table 't': expected ") && message.contains(", got "), "{}", message);
            }
        }
    }

    #[test]
    fn any_parts_load_or_are_refused(
        dim in 1_usize..20,
        rows in 0_usize..4,
        format in prop::sample::select(&RowFormat::ALL[..]),
        scales in prop::sample::select(&ScaleFormat::ALL[..]),
        codes in prop::collection::vec(any::<u8>(), 400),
        pairs in prop::collection::vec(any::<u8>(), 40),
        off in 0_usize..3,
        codebook in prop::option::of(prop::array::uniform16(any::<f32>())),
    ) {
        let spec = spec(rows, dim, format);
        let codes = &codes[..rows * format.row_bytes(dim) + off / 2];
        let pair_bytes = if format.is_quantized() { scales.pair_bytes() } else { 0 };
        let pairs = &pairs[..rows * pair_bytes];
        match TableRows::from_parts(&spec, codes, (scales, pairs), codebook.as_ref()) {
            Ok(rows) => {
                prop_assert!(off < 2 && codebook.is_none());
                prop_assert!(rows.elements().0 == codes && rows.scales().0 == pairs);
            }
            Err(error) => {
                let message = error.to_string();
                prop_assert!(message.contains("of table 't': expected ") && message.contains(", got "), "{}", message);
            }
        }
    }
}

#[test]
fn bytes_are_where_the_layouts_say() {
    let ctx = Context::default();
    let made = encoded(2, 5, RowFormat::Int4, Some(ScaleFormat::Fp16));
    let (codes, scales) = (made.elements().0, made.scales().0);
    let spec = spec(2, 5, RowFormat::Int4);
    let mut fused = vec![0; 2 * 7];
    made.pack(&mut fused, &spec, Layout::Fused, 7, &ctx).unwrap();
    assert_eq!(fused, [&codes[..3], &scales[..4], &codes[3..], &scales[4..]].concat());
    let mut tbe = vec![1; 2 * 16];
    made.pack(&mut tbe, &spec, Layout::Tbe, 16, &ctx).unwrap();
    assert_eq!(tbe, [&scales[..4], &codes[..3], &[0; 9], &scales[4..], &codes[3..], &[0; 9]].concat());
}

#[test]
fn scales_are_widened_but_never_rounded() {
    let ctx = Context::default();
    let pack = |made: &TableRows, layout: Layout| {
        let spec = spec(3, 8, made.format());
        let row_bytes = layout.row_bytes(made.format(), 8);
        let mut packed = vec![0; 3 * row_bytes];
        made.pack(&mut packed, &spec, layout, row_bytes, &ctx).map(|()| packed).map_err(|e| e.to_string())
    };
    let narrow = encoded(3, 8, RowFormat::Int8, Some(ScaleFormat::Fp16));
    let fused = pack(&narrow, Layout::Fused).unwrap();
    let scale = f32::from_le_bytes(fused[8..12].try_into().unwrap());
    let stored = f16::from_le_bytes(narrow.scales().0[..2].try_into().unwrap());
    assert_eq!(scale.to_bits(), stored.to_f32().to_bits());

    let wide = encoded(3, 8, RowFormat::Int8, Some(ScaleFormat::Fp32));
    let message = pack(&wide, Layout::Tbe).unwrap_err();
    let words =
        "row 0 of table 't': expected scale and bias that fp16, the layout's, holds as they are, got ";
    assert!(message.starts_with(words), "{message}");
}

#[test]
fn a_codebook_has_no_place_in_packed_rows() {
    let ctx = Context::default();
    let source: Vec<f32> = (0..64 * 64).map(|i| noise(3, i).powi(3)).collect();
    let spec = spec(64, 64, RowFormat::Int4);
    let encoding =
        Encoding { format: RowFormat::Int4, method: Method::Codebook, scales: None, zero_not_finite: false };
    let made = TableRows::encode(&source, &spec, encoding, &ctx).unwrap().rows;
    assert!(made.has_codebook());
    let refused = made.pack(&mut vec![0; 64 * 36], &spec, Layout::Fused, 36, &ctx).unwrap_err().to_string();
    assert_eq!(
        refused,
        "rows of table 't': expected evenly spaced codes, which the layout has, got a codebook"
    );
    let codebook = *made.codebook();
    let scales = (made.scale_format(), made.scales().0);
    let again = TableRows::from_parts(&spec, made.elements().0, scales, Some(&codebook)).unwrap();
    assert_eq!(common::bits(again.codebook()), common::bits(&codebook));
}
