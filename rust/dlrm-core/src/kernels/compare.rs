//! How far rows are from what they were made of.
//!
//! ```text
//! error[row] = sqrt(sum of (x - y)^2 / sum of x^2),  0 where nothing differs
//! ```
//! Where the squares are too large or too small for single precision, they are taken of the row times a power of two that
//! brings its largest element near 1.

use super::fit::Span;
use super::{LANES, Simd};
use crate::rows::{Map, Packing, pack_mapped};

/// What is packed of elements, and what they are when they are read again.
pub(super) trait Stored: Copy {
    fn stored<S: Simd>(self, simd: S, x: S::V) -> Numbers<S::V>;
}

/// Of a vector of elements.
pub(super) struct Numbers<V> {
    pub(super) packed: V,
    pub(super) read: V,
}

/// Up to [`LANES`] rows, which are looked at together, and where they go.
pub(super) struct Group<'a, U> {
    pub(super) rows: &'a [f32],
    pub(super) dim: usize,
    pub(super) into: &'a mut [U],
    /// Units of a packed row.
    pub(super) units: usize,
    /// The relative L2 error of each row.
    pub(super) errors: &'a mut [f32],
}

/// The worst element of all rows so far.
pub(super) struct Worst<V> {
    /// What is off most, as its square, and of rows that are scaled as it is.
    square: V,
    scaled: f32,
}

impl<V: Copy> Worst<V> {
    #[inline(always)]
    pub(super) fn new(simd: impl Simd<V = V>) -> Self {
        Self { square: simd.splat(0.0), scaled: 0.0 }
    }

    /// Packs those rows of a group of which it is said how they are stored, and writes their errors. Gives back the rows,
    /// as bits, that have a NaN or an infinity.
    #[inline(always)]
    pub(super) fn pack<S: Simd<V = V>, P: Packing>(
        &mut self,
        simd: S,
        packing: P,
        stored: &[Option<impl Stored>; LANES],
        group: Group<P::Unit>,
    ) -> u16 {
        let Group { rows, dim, into, units, errors } = group;
        let zero = simd.splat(0.0);
        // Nothing waits for a sum before all rows are packed.
        let (mut squares, mut worst) = ([zero; 2 * LANES], [zero; LANES]);
        for (i, (row, into)) in rows.chunks_exact(dim).zip(into.chunks_exact_mut(units)).enumerate() {
            // Of the next group: the hardware's own prefetch ends where a page does.
            simd.prefetch_bytes(row.as_ptr().wrapping_add(LANES * dim).cast(), size_of_val(row));
            if let Some(stored) = stored[i] {
                let compared = pack(simd, packing, stored, row, into, 1.0);
                [squares[2 * i], squares[2 * i + 1]] = [compared.whole, compared.off];
                worst[i] = compared.worst;
            }
        }
        let (mut whole, mut off) = ([0.0; LANES], [0.0; LANES]);
        for (i, two) in squares.as_chunks().0.iter().enumerate() {
            [whole[2 * i], off[2 * i], whole[2 * i + 1], off[2 * i + 1]] = simd.sums(*two);
        }
        let mut not_finite = 0;
        for (i, (row, into)) in rows.chunks_exact(dim).zip(into.chunks_exact_mut(units)).enumerate() {
            if let Some(stored) = stored[i] {
                if are_precise(whole[i], off[i]) {
                    self.square = simd.max(self.square, worst[i]);
                } else if let Some(sums) = self.pack_scaled(simd, packing, stored, row, into) {
                    [whole[i], off[i]] = sums;
                } else {
                    not_finite |= 1 << i;
                }
            }
        }
        // Divisions and roots wait long, but for 16 rows no longer than for one.
        let ratios = simd.div(simd.load(&off), simd.load(&whole));
        errors.copy_from_slice(&simd.lanes(simd.sqrt(ratios))[..errors.len()]);
        not_finite
    }

    /// The sums of the squares of a row's elements, and of what they are off by, of the row near 1. `None` if it has a NaN
    /// or an infinity.
    #[inline(always)]
    fn pack_scaled<S: Simd<V = V>, P: Packing>(
        &mut self,
        simd: S,
        packing: P,
        stored: impl Stored,
        row: &[f32],
        into: &mut [P::Unit],
    ) -> Option<[f32; 2]> {
        let unit = near_one(Span::of(simd, row)?.largest());
        let Compared { whole, off, worst, .. } = pack(simd, packing, stored, row, into, unit);
        self.scaled = self.scaled.max(simd.highest(worst).sqrt() / unit);
        let [whole, off, ..] = simd.sums([whole, off, whole, off]);
        Some(if off > 0.0 { [whole, off] } else { [1.0, 0.0] })
    }

    /// The largest absolute error of an element.
    #[inline(always)]
    pub(super) fn largest(&self, simd: impl Simd<V = V>) -> f32 {
        simd.highest(self.square).sqrt().max(self.scaled)
    }
}

/// Whether sums of squares are as precise as single precision is.
#[inline(always)]
fn are_precise(whole: f32, off: f32) -> bool {
    const PRECISE: std::ops::Range<f32> = 1e-24..1e30;
    PRECISE.contains(&whole) && (off == 0.0 || PRECISE.contains(&off))
}

/// Packs a row, and compares it times `unit`.
#[inline(always)]
fn pack<S: Simd, P: Packing, T: Stored>(
    simd: S,
    packing: P,
    stored: T,
    row: &[f32],
    into: &mut [P::Unit],
    unit: f32,
) -> Compared<S::V, T> {
    let zero = simd.splat(0.0);
    let mut compared = Compared { stored, unit: simd.splat(unit), whole: zero, off: zero, worst: zero };
    pack_mapped(simd, packing, row, into, &mut compared);
    compared
}

/// What [`pack`] finds on the way.
struct Compared<V, T> {
    stored: T,
    unit: V,
    /// The sums, in any lane, of the squares of the elements, and of what they are off by.
    whole: V,
    off: V,
    /// The largest of the latter.
    worst: V,
}

impl<S: Simd, T: Stored> Map<S> for Compared<S::V, T> {
    #[inline(always)]
    fn map(&mut self, simd: S, x: S::V, len: usize) -> S::V {
        let Numbers { packed, read } = self.stored.stored(simd, x);
        let mut off = simd.mul(simd.sub(x, read), self.unit);
        if len < LANES {
            off = simd.first(off, len);
        }
        let (x, square) = (simd.mul(x, self.unit), simd.mul(off, off));
        self.whole = simd.add(self.whole, simd.mul(x, x));
        self.off = simd.add(self.off, square);
        self.worst = simd.max(self.worst, square);
        packed
    }
}

/// A power of two that brings `x` near 1, as far as single precision has one.
#[inline(always)]
fn near_one(x: f32) -> f32 {
    let exponent = (x.to_bits() >> 23) as i32 - 127;
    f32::from_bits(((127 - exponent.clamp(-126, 126)) as u32) << 23)
}
