//! Tables of memory that is someone else's: looked up where it is, in every row format.

#![expect(unsafe_code, reason = "memory lent to the engine")]

mod common;

use common::noise;
use dlrm_core::optimizers::Kind;
use dlrm_core::{
    Bags, Borrowed, Context, Encoding, Feature, Ids, Method, Offsets, Output, Pooling, RowFormat, TableRows,
    TableSet, TableSpec,
};

const ROWS: usize = 6;

/// A copy of bytes as memory of its own, aligned to 4 bytes.
fn borrowed(bytes: &[u8]) -> Borrowed {
    let mut copy = vec![0_u32; bytes.len().div_ceil(4)];
    let start: *mut u8 = copy.as_mut_ptr().cast();
    bytemuck::cast_slice_mut(&mut copy)[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the vector is moved and not touched, and its elements stay where they are.
    unsafe { Borrowed::new(start, bytes.len(), copy) }
}

fn spec(dim: usize, format: RowFormat) -> TableSpec {
    TableSpec { name: "t".into(), rows: ROWS, dim, format }
}

fn encoded(dim: usize, format: RowFormat, method: Method) -> TableRows {
    let source: Vec<f32> = (0..ROWS * dim).map(|i| noise(3, i)).collect();
    let encoding = Encoding { format, method, scales: None, zero_not_finite: false };
    TableRows::encode(&source, &spec(dim, format), encoding, &Context::default()).unwrap().rows
}

fn looked_up(rows: TableRows, dim: usize) -> Vec<u32> {
    let ctx = Context::default();
    let feature = Feature { table: 0, pooling: Pooling::Mean, padding: None };
    let set = TableSet::of_rows(vec![("t".into(), rows)], vec![feature], &ctx).unwrap();
    let bags = Bags::new(Ids::I64(&[1, 5, 5, 0]), Offsets::I64(&[0, 3]), 1, 2, None).unwrap();
    let mut out = vec![0.0; 2 * dim];
    set.lookup(&bags, Output::Fp32(&mut out), None, &ctx).unwrap();
    out.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn borrowed_rows_are_looked_up_as_own_ones() {
    for format in RowFormat::ALL {
        for dim in [1, 5, 16, 33] {
            let method = if format == RowFormat::Int4 { Method::Codebook } else { Method::MinMax };
            let own = encoded(dim, format, method);
            let scales = format.is_quantized().then(|| (own.scale_format(), borrowed(own.scales().0)));
            let codebook = own.has_codebook().then(|| own.codebook());
            let rows = TableRows::borrow(&spec(dim, format), borrowed(own.elements().0), scales, codebook);
            assert_eq!(looked_up(rows.unwrap(), dim), looked_up(own, dim), "{format} of {dim}");
        }
    }
}

#[test]
fn memory_that_does_not_fit_is_refused() {
    let own = encoded(3, RowFormat::Int8, Method::MinMax);
    let scales = || Some((own.scale_format(), borrowed(own.scales().0)));
    let borrow =
        |format, bytes: &[u8], scales| TableRows::borrow(&spec(3, format), borrowed(bytes), scales, None);
    let message = |result: dlrm_core::Result<TableRows>| result.map(|_| ()).unwrap_err().to_string();

    let codes = own.elements().0;
    assert_eq!(
        message(borrow(RowFormat::Int8, &codes[1..], scales())),
        "rows of table 't': expected 18 bytes, got 17"
    );
    assert_eq!(
        message(borrow(RowFormat::Int8, codes, None)),
        "scales of table 't': expected those of quantized rows, got none"
    );
    assert_eq!(
        message(borrow(RowFormat::Fp32, codes, scales())),
        "scales of table 't': expected those of quantized rows, got some"
    );
    assert_eq!(message(borrow(RowFormat::Fp32, codes, None)), "rows of table 't': expected 72 bytes, got 18");
    let no_columns = TableRows::borrow(&spec(0, RowFormat::Fp32), borrowed(&[]), None, None);
    assert_eq!(message(no_columns), "embedding_dim of table 't': expected at least 1, got 0");
}

#[test]
fn state_in_memory_of_someone_else_is_the_state() {
    let ctx = Context::default();
    let features = vec![Feature { table: 0, pooling: Pooling::Sum, padding: None }];
    let table = TableSet::new(vec![spec(2, RowFormat::Fp32)], features, &ctx).unwrap();
    table.set_optimizer(Kind::Adagrad, false, RowFormat::Fp32, &ctx).unwrap();
    let rows = table.specs()[0].rows;
    let sums = vec![3.0_f32; rows * 2];
    table.put_state(0, Some(0), borrowed(bytemuck::cast_slice(&sums))).unwrap();
    let check = |format, state: &[u8]| {
        assert_eq!((format, bytemuck::cast_slice(state)), (RowFormat::Fp32, &sums[..]));
    };
    table.read_state(0, 0, |format, state, _| check(format, state)).unwrap();
    let message = |part, bytes: &[u8]| table.put_state(0, part, borrowed(bytes)).unwrap_err().to_string();
    let expected = format!("state of table 't': expected {} bytes, got 4", rows * 8);
    assert_eq!(message(Some(0), &[0; 4]), expected);
    assert_eq!(message(None, &[0; 4]), "state of table 't': expected 0 bytes, got 4");
    table.read_state(0, 0, |format, state, _| check(format, state)).unwrap();
}
