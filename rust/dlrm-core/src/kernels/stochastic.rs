//! Rows of half precision read before a rule and written after it.
//!
//! ```text
//! stochastic:  the two neighbours of x in the format, each with a probability so that the mean is x
//! split:       the nearest bfloat16, and beside it the 16 bits that give x back: x = (high << 16) + low
//! ```
//! Random bits are a function of seed, step, table, row and column alone. All of it is integer arithmetic on the bits, so
//! it is the same at every level; a number beyond the largest of the format becomes that, and only an infinity infinite.

use super::scalar::Scalar;
use super::touched::Next;
use super::{Kernel, LANES, Simd};
use crate::disjoint::Disjoint;
use crate::rows::{Bf16, Fp16, Packing};

/// How elements are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Fp16,
    Bf16,
    /// bfloat16, its lower bits apart.
    Split,
}

/// Where random bits come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64, step: u64, table: usize) -> Self {
        Self(mixed(mixed(mixed(seed) ^ step) ^ table as u64))
    }

    /// Other bits, for a part of the state of the same rows.
    pub(crate) fn of_state(self, part: usize) -> Self {
        Self(mixed(self.0.wrapping_add(1 + part as u64)))
    }

    #[inline(always)]
    pub(super) fn of_row(self, row: usize) -> [u32; 2] {
        let key = mixed(self.0 ^ row as u64);
        [key as u32, (key >> 32) as u32]
    }

    /// A number below `n`, each as likely as the others, for a row: of other bits than those that round its elements.
    pub(crate) fn below(self, row: usize, n: u32) -> u32 {
        let [bits, ..] = random_bits(Scalar, self.of_row(row), Scalar.splat_int(u32::MAX));
        ((u64::from(bits) * u64::from(n)) >> u32::BITS) as u32
    }
}

/// The finalizer of `SplitMix64` (Steele, Lea and Flood 2014).
fn mixed(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// 32 random bits for each of these columns: the finalizer of `MurmurHash3` on its number, keyed before and after.
#[inline(always)]
pub(super) fn random_bits<S: Simd>(simd: S, key: [u32; 2], columns: S::I) -> S::I {
    let mixed = final_mix(simd, simd.add_int(columns, simd.splat_int(key[0])));
    final_mix(simd, simd.xor(mixed, simd.splat_int(key[1])))
}

#[inline(always)]
fn final_mix<S: Simd>(simd: S, x: S::I) -> S::I {
    let x = simd.mul_int(folded(simd, x, 16), simd.splat_int(0x85EB_CA6B));
    let x = simd.mul_int(folded(simd, x, 13), simd.splat_int(0xC2B2_AE35));
    folded(simd, x, 16)
}

#[inline(always)]
fn folded<S: Simd>(simd: S, x: S::I, by: u32) -> S::I {
    simd.xor(x, simd.shr(x, simd.splat_int(by)))
}

/// The numbers of a vector's lanes.
#[inline(always)]
pub(super) fn numbers<S: Simd>(simd: S) -> S::I {
    simd.load_int(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
}

const SIGN: u32 = 0x8000_0000;
const INFINITE: u32 = 0x7F80_0000;

/// A format of 16 bits that float32 is rounded to.
trait Rounded: Packing<Unit = u16, Group = [u16; LANES]> {
    /// One of the two numbers around each float32, both given by their bits.
    fn one_of_two<S: Simd>(self, simd: S, x: S::I, random: S::I) -> S::I;
}

impl Rounded for Bf16 {
    #[inline(always)]
    fn one_of_two<S: Simd>(self, simd: S, x: S::I, random: S::I) -> S::I {
        let sign = simd.and(x, simd.splat_int(SIGN));
        let size = simd.xor(x, sign);
        let sum = simd.add_int(size, simd.and(random, simd.splat_int(0xFFFF)));
        // What is not finite has no neighbours.
        let most = simd.max_int(size, simd.splat_int(INFINITE - 1));
        let rounded = simd.or(simd.min_int(sum, most), sign);
        let nan = is_nan(simd, size);
        simd.or(simd.shr(rounded, simd.splat_int(16)), nan)
    }
}

impl Rounded for Fp16 {
    /// Below 2^-32, where rounding up would take more than 32 random bits, it is 0.
    #[inline(always)]
    fn one_of_two<S: Simd>(self, simd: S, x: S::I, random: S::I) -> S::I {
        /// The exponent in float32 of 2^-14, the smallest normal number.
        const NORMAL: u32 = 113;
        let one = simd.splat_int(1);
        let sign = simd.and(x, simd.splat_int(SIGN));
        let size = simd.xor(x, sign);
        let exponent = simd.shr(size, simd.splat_int(23));
        let down = simd.min_int(exponent, simd.splat_int(NORMAL));
        // How many bits of the fraction there is no room for.
        let drop = simd.sub_int(simd.splat_int(NORMAL + 13), down);
        let dropped = simd.sub_int(simd.shl(one, drop), one);
        let fraction = simd.and(size, simd.splat_int(0x007F_FFFF));
        let fraction = simd.or(fraction, simd.splat_int(0x0080_0000));
        let kept = simd.shr(simd.add_int(fraction, simd.and(random, dropped)), drop);
        // The highest bit of a normal number's fraction counts as one of its exponent.
        let sum = simd.add_int(kept, simd.shl(simd.sub_int(exponent, down), simd.splat_int(10)));
        let special = simd.shr(simd.sub_int(simd.splat_int(INFINITE - 1), size), simd.splat_int(31));
        let finite = simd.min_int(sum, simd.add_int(special, simd.splat_int(0x7BFF)));
        let nan = simd.shl(is_nan(simd, size), simd.splat_int(9));
        simd.or(simd.or(finite, nan), simd.shr(sign, simd.splat_int(16)))
    }
}

/// 1 where a number of these bits, without its sign, is a NaN, else 0.
#[inline(always)]
fn is_nan<S: Simd>(simd: S, size: S::I) -> S::I {
    simd.shr(simd.sub_int(simd.splat_int(INFINITE), size), simd.splat_int(31))
}

/// The upper half nearest to each float32, and what gives that back.
#[inline(always)]
fn split<S: Simd>(simd: S, x: S::I) -> [S::I; 2] {
    let high = simd.shr(simd.add_int(x, simd.splat_int(0x8000)), simd.splat_int(16));
    [high, simd.and(x, simd.splat_int(0xFFFF))]
}

/// The float32 of their halves.
#[inline(always)]
fn joined<S: Simd>(simd: S, [high, low]: [S::I; 2]) -> S::I {
    // The lower bits are as they were; the upper half was rounded up where the highest of them is set: as if it were a sign.
    let half = simd.splat_int(0x8000);
    let low = simd.sub_int(simd.xor(low, half), half);
    simd.add_int(simd.shl(high, simd.splat_int(16)), low)
}

/// Rows of half precision, where they are.
pub(crate) struct HalfRows<'a> {
    pub(crate) half: Half,
    pub(crate) bits: Disjoint<'a, u16>,
    /// The lower bits, of split ones.
    pub(crate) low: Disjoint<'a, u16>,
    pub(crate) dim: usize,
    pub(crate) random: Random,
}

/// Some of them.
pub(crate) struct Halves<'a> {
    pub(crate) all: &'a HalfRows<'a>,
    pub(crate) rows: &'a [usize],
}

impl Halves<'_> {
    /// The bits of a row.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "rows are disjoint")]
    fn row<'a>(&self, of: &'a Disjoint<u16>, row: usize) -> &'a mut [u16] {
        let dim = self.all.dim;
        // SAFETY: a row belongs to one piece of a call, which decodes and encodes it once, one after the other.
        unsafe { of.piece(row * dim..(row + 1) * dim) }
    }
}

/// Brings rows into fp32.
pub(crate) struct Decode<'a> {
    pub(crate) halves: Halves<'a>,
    pub(crate) into: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { halves, into } = self;
        for (&row, into) in halves.rows.iter().zip(into.chunks_exact_mut(halves.all.dim)) {
            let bits = &*halves.row(&halves.all.bits, row);
            match halves.all.half {
                Half::Fp16 => unpack(simd, Fp16, bits, into),
                Half::Bf16 => unpack(simd, Bf16, bits, into),
                Half::Split => join(simd, bits, halves.row(&halves.all.low, row), into),
            }
        }
    }
}

#[inline(always)]
fn unpack<S: Simd>(simd: S, packing: impl Rounded, bits: &[u16], into: &mut [f32]) {
    let mut at = 0;
    while at < into.len() {
        simd.store_at(into, at, packing.load(simd, &group(bits, at)));
        at += LANES;
    }
}

#[inline(always)]
fn join<S: Simd>(simd: S, high: &[u16], low: &[u16], into: &mut [f32]) {
    let mut at = 0;
    while at < into.len() {
        let x = joined(simd, [simd.load_u16(&group(high, at)), simd.load_u16(&group(low, at))]);
        simd.store_at(into, at, simd.of_bits(x));
        at += LANES;
    }
}

/// `from[at..]`, as far as a vector reaches, then zeros.
#[inline(always)]
fn group(from: &[u16], at: usize) -> [u16; LANES] {
    let rest = &from[at..];
    if let Some(whole) = rest.first_chunk() {
        return *whole;
    }
    let mut group = [0; LANES];
    group[..rest.len()].copy_from_slice(rest);
    group
}

/// Writes rows of fp32 back.
pub(crate) struct Encode<'a> {
    pub(crate) halves: Halves<'a>,
    pub(crate) from: &'a [f32],
    pub(crate) next: Next<'a>,
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { halves, from, next } = self;
        for (i, (&row, from)) in halves.rows.iter().zip(from.chunks_exact(halves.all.dim)).enumerate() {
            next.prefetch(simd, i);
            let bits = halves.row(&halves.all.bits, row);
            match halves.all.half {
                Half::Fp16 => round(simd, Fp16, from, bits, halves.all.random.of_row(row)),
                Half::Bf16 => round(simd, Bf16, from, bits, halves.all.random.of_row(row)),
                Half::Split => part(simd, from, bits, halves.row(&halves.all.low, row)),
            }
        }
    }
}

#[inline(always)]
fn round<S: Simd>(simd: S, to: impl Rounded, from: &[f32], into: &mut [u16], key: [u32; 2]) {
    let mut columns = numbers(simd);
    let mut at = 0;
    while at < from.len() {
        let x = simd.bits(simd.load_at(from, at));
        store(simd, into, at, to.one_of_two(simd, x, random_bits(simd, key, columns)));
        columns = simd.add_int(columns, simd.splat_int(LANES as u32));
        at += LANES;
    }
}

#[inline(always)]
fn part<S: Simd>(simd: S, from: &[f32], high: &mut [u16], low: &mut [u16]) {
    let mut at = 0;
    while at < from.len() {
        let halves = split(simd, simd.bits(simd.load_at(from, at)));
        store(simd, high, at, halves[0]);
        store(simd, low, at, halves[1]);
        at += LANES;
    }
}

/// Writes `to[at..]`, as far as a vector reaches.
#[inline(always)]
fn store<S: Simd>(simd: S, to: &mut [u16], at: usize, halves: S::I) {
    let rest = &mut to[at..];
    if let Some(whole) = rest.first_chunk_mut() {
        return simd.store_u16(whole, halves);
    }
    let mut group = [0; LANES];
    simd.store_u16(&mut group, halves);
    rest.copy_from_slice(&group[..rest.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;
    use half::{bf16, f16};

    const DRAWS: usize = 1_000_000;

    /// What becomes of numbers, as the scalar level has it.
    fn rounded(to: impl Rounded, x: [f32; LANES], random: [u32; LANES]) -> [u16; LANES] {
        to.one_of_two(Scalar, x.map(f32::to_bits), random).map(|bits| bits as u16)
    }

    /// The mean of the roundings of `x`, as where it is between its neighbours `low` and `low + step`.
    fn mean(to: impl Rounded, x: f32, low: f32, step: f32) -> f64 {
        const COLUMNS: usize = 64;
        let mut ups = 0;
        for row in 0..DRAWS / COLUMNS {
            let key = Random::new(1, 3, 2).of_row(row);
            for first in (0..COLUMNS).step_by(LANES) {
                let columns = numbers(Scalar).map(|i| i + first as u32);
                let rounded = rounded(to, [x; LANES], random_bits(Scalar, key, columns));
                for rounded in rounded.map(|bits| to.load(Scalar, &[bits; LANES])[0]) {
                    assert!([low, low + step].contains(&rounded), "{x} became {rounded}");
                    ups += u32::from(rounded > low);
                }
            }
        }
        f64::from(ups) / DRAWS as f64
    }

    #[test]
    fn a_mean_of_a_million_roundings_is_the_number() {
        for fraction in [0.1_f64, 0.25, 0.5, 0.9] {
            let error = 4.0 * (fraction * (1.0 - fraction) / DRAWS as f64).sqrt();
            let between = |low: f32, step: f32| {
                let x = low + fraction as f32 * step;
                (x, (f64::from(x) - f64::from(low)) / f64::from(step))
            };
            for (low, step) in [(1.0, 1.0 / 128.0), (bf16::from_f32(1.5e-3).to_f32(), 2.0_f32.powi(-17))] {
                let (x, exact) = between(low, step);
                let got = mean(Bf16, x, low, step);
                assert!((got - exact).abs() <= error, "bf16 at {fraction}: {got}, expected {exact}");
            }
            for (low, step) in [(1.0, 1.0 / 1024.0), (2.0_f32.powi(-18), 2.0_f32.powi(-24))] {
                let (x, exact) = between(low, step);
                let got = mean(Fp16, x, low, step);
                assert!((got - exact).abs() <= error, "fp16 at {fraction}: {got}, expected {exact}");
            }
        }
    }

    #[test]
    fn numbers_of_the_format_stay_and_the_others_become_a_neighbour() {
        for random in [0, 1, 0x1FFF, 0xFFFF, 0x8000_0000, u32::MAX] {
            for bits in 0..=u16::MAX {
                let (x, y) = (f16::from_bits(bits), bf16::from_bits(bits));
                if !x.is_nan() {
                    assert_eq!(rounded(Fp16, [x.to_f32(); LANES], [random; LANES])[0], bits);
                }
                if !y.is_nan() {
                    assert_eq!(rounded(Bf16, [y.to_f32(); LANES], [random; LANES])[0], bits);
                }
            }
            let fp16 = |x| f16::from_bits(rounded(Fp16, [x; LANES], [random; LANES])[0]);
            let bf16 = |x| bf16::from_bits(rounded(Bf16, [x; LANES], [random; LANES])[0]);
            assert!(fp16(f32::NAN).is_nan() && fp16(f32::from_bits(0x7F80_0001)).is_nan());
            assert!(bf16(f32::NAN).is_nan() && bf16(f32::from_bits(0xFF80_0001)).is_nan());
            assert_eq!(fp16(1e9), f16::MAX);
            assert_eq!(bf16(-f32::MAX), bf16::MIN);
            assert_eq!(fp16(2.0_f32.powi(-33)), f16::ZERO);
        }
    }

    /// What becomes of vectors.
    struct Rounding<'a>(&'a [f32]);

    impl Kernel for Rounding<'_> {
        type Output = Vec<u16>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<u16> {
            let mut into = vec![0; 4 * self.0.len()];
            let mut parts = into.chunks_exact_mut(self.0.len());
            let mut part_of = || parts.next().expect("four of them");
            round(simd, Bf16, self.0, part_of(), [1, 2]);
            round(simd, Fp16, self.0, part_of(), [1, 2]);
            part(simd, self.0, part_of(), part_of());
            into
        }
    }

    #[test]
    fn every_level_rounds_alike() {
        let any = |i: u32| f32::from_bits(i.wrapping_mul(0x9E37_79B1));
        let edges = [0, 1, 0x7F_FFFF, 0x80_0000, 0x7F7F_8000, 0x7F7F_FFFF, INFINITE];
        let numbers: Vec<_> = (0..100_000).map(any).filter(|x| !x.is_nan()).collect();
        let edges = edges.into_iter().flat_map(|bits| [bits, bits | SIGN]).map(f32::from_bits);
        for numbers in [numbers, edges.collect()] {
            let expected = Rounding(&numbers).run(Scalar);
            for level in Level::available() {
                assert!(level.run(Rounding(&numbers)) == expected, "{level:?}");
            }
        }
    }

    #[test]
    fn halves_give_the_number_back_and_the_upper_is_the_nearest() {
        for i in 0..100_000_u32 {
            let x = numbers(Scalar).map(|lane| (i * 16 + lane).wrapping_mul(0x9E37_79B1));
            assert_eq!(joined(Scalar, split(Scalar, x)), x);
        }
        for x in [1.003_f32, 1.005] {
            let [high, _] = split(Scalar, [x.to_bits(); LANES]);
            assert_eq!(high[0] as u16, bf16::from_f32(x).to_bits());
        }
    }
}
