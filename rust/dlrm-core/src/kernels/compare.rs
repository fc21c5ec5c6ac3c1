//! How far rows are from what they were made of.
//!
//! ```text
//! error[row] = sqrt(sum of (x - y)^2 / sum of x^2),  0 where nothing differs
//! ```
//! Where the squares are too large or too small for single precision, they are taken of the row times a power of two that
//! brings its largest element near 1.

use super::fit::Span;
use super::{Kernel, LANES, Simd};
use crate::rows::Rows;

/// Rows and what they were made of.
pub(crate) struct Compare<'a, R> {
    /// As many rows as `errors` has.
    pub(crate) source: &'a [f32],
    pub(crate) rows: R,
    /// The relative L2 error of each row.
    pub(crate) errors: &'a mut [f32],
}

impl<R: Rows> Kernel for Compare<'_, R> {
    /// The largest absolute error of an element.
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let dim = self.rows.dim();
        let mut worst = Worst { square: simd.splat(0.0), scaled: 0.0 };
        let groups = self.source.chunks(dim * LANES).zip(self.errors.chunks_mut(LANES));
        for (group, (rows, errors)) in groups.enumerate() {
            // Divisions and roots wait long, but for 16 rows no longer than for one.
            let (mut whole, mut off) = ([1.0; LANES], [0.0; LANES]);
            for (i, row) in rows.chunks_exact(dim).enumerate() {
                [whole[i], off[i]] = worst.compare(simd, self.rows, group * LANES + i, row);
            }
            let ratio = simd.div(simd.load(&off), simd.load(&whole));
            errors.copy_from_slice(&simd.lanes(simd.sqrt(ratio))[..errors.len()]);
        }
        simd.highest(worst.square).sqrt().max(worst.scaled)
    }
}

/// What is off most, as its square, and of rows that are scaled as it is.
struct Worst<V> {
    square: V,
    scaled: f32,
}

impl<V: Copy> Worst<V> {
    /// The sums of the squares of a row's elements, and of what row `i` of `rows` is off by: not both 0.
    #[inline(always)]
    fn compare<S: Simd<V = V>, R: Rows>(&mut self, simd: S, rows: R, i: usize, row: &[f32]) -> [f32; 2] {
        /// Sums of squares between these are as precise as single precision is.
        const PRECISE: std::ops::Range<f32> = 1e-24..1e30;
        let (squares, worst) = sum_squares(simd, rows, i, row, 1.0);
        if squares.iter().all(|sum| PRECISE.contains(sum)) {
            self.square = simd.max(self.square, worst);
            return squares;
        }
        let unit = near_one(Span::of(simd, row).largest());
        let (squares, worst) = sum_squares(simd, rows, i, row, unit);
        self.scaled = self.scaled.max(simd.highest(worst).sqrt() / unit);
        let [whole, off] = squares;
        if off > 0.0 { [whole, off] } else { [1.0, 0.0] }
    }
}

/// The sums of the squares of a row's elements, and of what row `i` of `rows` is off by, all times `unit`; and the largest
/// of the latter squares, in any lane.
#[inline(always)]
fn sum_squares<S: Simd, R: Rows>(simd: S, rows: R, i: usize, row: &[f32], unit: f32) -> ([f32; 2], S::V) {
    /// Vectors that are decoded at once.
    const COUNT: usize = 4;
    let mut squares = Squares { unit: simd.splat(unit), sums: [simd.splat(0.0); 4], worst: simd.splat(0.0) };
    let (vectors, rest) = row.as_chunks();
    let mut at = 0;
    for vectors in vectors.chunks_exact(COUNT) {
        let decoded = rows.load::<S, COUNT, true>(simd, i, at);
        for k in 0..COUNT {
            squares.add(simd, simd.load(&vectors[k]), decoded[k]);
        }
        at += COUNT * LANES;
    }
    for vector in vectors.chunks_exact(COUNT).remainder() {
        squares.add(simd, simd.load(vector), rows.load_at(simd, i, at));
        at += LANES;
    }
    if !rest.is_empty() {
        squares.add(simd, simd.load_partial(rest), rows.load_at(simd, i, at));
    }
    let [whole, off, ..] = simd.sums(squares.sums);
    ([whole, off], squares.worst)
}

/// What [`sum_squares`] adds up.
struct Squares<V> {
    unit: V,
    /// Of elements, and of what they are off by; the others are not used.
    sums: [V; 4],
    worst: V,
}

impl<V: Copy> Squares<V> {
    #[inline(always)]
    fn add<S: Simd<V = V>>(&mut self, simd: S, x: V, decoded: V) {
        let off = simd.mul(simd.sub(x, decoded), self.unit);
        let x = simd.mul(x, self.unit);
        let square = simd.mul(off, off);
        self.worst = simd.max(self.worst, square);
        self.sums[0] = simd.add(self.sums[0], simd.mul(x, x));
        self.sums[1] = simd.add(self.sums[1], square);
    }
}

/// A power of two that brings `x` near 1, as far as single precision has one.
#[inline(always)]
fn near_one(x: f32) -> f32 {
    let exponent = (x.to_bits() >> 23) as i32 - 127;
    f32::from_bits(((127 - exponent.clamp(-126, 126)) as u32) << 23)
}
