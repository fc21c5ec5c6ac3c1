//! Rows of half precision read before a rule and written after it.
//!
//! ```text
//! stochastic:  the two neighbours of x in the format, each with a probability so that the mean is x
//! split:       the nearest bfloat16, and beside it the 16 bits that give x back: x = (high << 16) + low
//! ```
//! Random bits are a function of seed, step, table, row and column alone. All of it is integer arithmetic on the bits, so
//! it is the same at every level; a number beyond the largest of the format becomes that, and only an infinity infinite.

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
        let bits = random_bits(self.of_row(row), u32::MAX);
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

/// 32 random bits for a column: the finalizer of `MurmurHash3` on its number, keyed before and after.
#[inline(always)]
pub(super) fn random_bits(key: [u32; 2], column: u32) -> u32 {
    final_mix(final_mix(column.wrapping_add(key[0])) ^ key[1])
}

#[inline(always)]
fn final_mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
    x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
    x ^ (x >> 16)
}

const INFINITE: u32 = 0x7F80_0000;

/// One of the two bfloat16 around a float32.
#[inline(always)]
fn to_bf16(x: u32, random: u32) -> u16 {
    let size = x & 0x7FFF_FFFF;
    let rounded = (size + (random & 0xFFFF)).min(INFINITE - 1) >> 16;
    let special = (size >> 16) | u32::from(size > INFINITE); // a NaN that stays one
    let size = if size < INFINITE { rounded } else { special };
    (size | (x >> 16 & 0x8000)) as u16
}

/// One of the two float16 around a float32. Below 2^-32, where rounding up would take more than 32 random bits, it is 0.
#[inline(always)]
fn to_fp16(x: u32, random: u32) -> u16 {
    const SMALLEST_NORMAL: u32 = 113; // exponent of 2^-14 in float32
    let size = x & 0x7FFF_FFFF;
    let exponent = size >> 23;
    let normal = (size + (random & 0x1FFF)).saturating_sub((SMALLEST_NORMAL - 1) << 23) >> 13;
    let drop = (13 + SMALLEST_NORMAL.saturating_sub(exponent)).min(31);
    let fraction = (size & 0x007F_FFFF) | 0x0080_0000;
    let subnormal = (fraction + (random & ((1 << drop) - 1))) >> drop;
    let finite = if exponent >= SMALLEST_NORMAL { normal.min(0x7BFF) } else { subnormal };
    let finite = if exponent + 18 < SMALLEST_NORMAL { 0 } else { finite };
    let special = 0x7C00 | if size > INFINITE { 0x200 } else { 0 };
    let size = if size < INFINITE { finite } else { special };
    (size | (x >> 16 & 0x8000)) as u16
}

/// The upper half nearest to a float32, and what gives that back.
#[inline(always)]
fn split(x: u32) -> [u16; 2] {
    let high = x.wrapping_add(0x8000) >> 16;
    [high as u16, x as u16]
}

/// The float32 of its halves.
#[inline(always)]
fn joined([high, low]: [u16; 2]) -> u32 {
    // The lower bits are as they were; the upper half was rounded up where the highest of them is set.
    ((u32::from(high) << 16).wrapping_sub(u32::from(low >> 15) << 16)) | u32::from(low)
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
                Half::Split => {
                    let low = &*halves.row(&halves.all.low, row);
                    for (i, x) in into.iter_mut().enumerate() {
                        *x = f32::from_bits(joined([bits[i], low[i]]));
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn unpack<S: Simd, P: Packing<Unit = u16, Group = [u16; LANES]>>(
    simd: S,
    packing: P,
    bits: &[u16],
    into: &mut [f32],
) {
    let (groups, rest) = bits.as_chunks();
    let mut at = 0;
    for group in groups {
        simd.store_at(into, at, packing.load(simd, group));
        at += LANES;
    }
    if !rest.is_empty() {
        let mut group = [0; LANES];
        group[..rest.len()].copy_from_slice(rest);
        simd.store_at(into, at, packing.load(simd, &group));
    }
}

/// Writes rows of fp32 back.
pub(crate) struct Encode<'a> {
    pub(crate) halves: Halves<'a>,
    pub(crate) from: &'a [f32],
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { halves, from } = self;
        for (&row, from) in halves.rows.iter().zip(from.chunks_exact(halves.all.dim)) {
            let bits = halves.row(&halves.all.bits, row);
            let key = halves.all.random.of_row(row);
            match halves.all.half {
                Half::Fp16 => round(from, bits, key, to_fp16),
                Half::Bf16 => round(from, bits, key, to_bf16),
                Half::Split => {
                    let low = halves.row(&halves.all.low, row);
                    for (i, x) in from.iter().enumerate() {
                        [bits[i], low[i]] = split(x.to_bits());
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn round(from: &[f32], into: &mut [u16], key: [u32; 2], to: impl Fn(u32, u32) -> u16) {
    for (column, (x, into)) in (0..).zip(from.iter().zip(into)) {
        *into = to(x.to_bits(), random_bits(key, column));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    const DRAWS: usize = 1_000_000;

    /// The mean of the roundings of `x`, as where it is between its neighbours `low` and `low + step`.
    fn mean(x: f32, low: f32, step: f32, round: impl Fn(u32, u32) -> f32) -> f64 {
        let up = (0..DRAWS).filter(|&draw| {
            let key = Random::new(1, draw as u64 % 1000, 2).of_row(draw / 1000);
            let rounded = round(x.to_bits(), random_bits(key, (draw % 64) as u32));
            assert!([low, low + step].contains(&rounded), "{x} became {rounded}");
            rounded > low
        });
        up.count() as f64 / DRAWS as f64
    }

    #[test]
    fn a_mean_of_a_million_roundings_is_the_number() {
        let bf16_of = |x, random| bf16::from_bits(to_bf16(x, random)).to_f32();
        let fp16_of = |x, random| f16::from_bits(to_fp16(x, random)).to_f32();
        for fraction in [0.1_f64, 0.25, 0.5, 0.9] {
            let error = 4.0 * (fraction * (1.0 - fraction) / DRAWS as f64).sqrt();
            for (name, low, step, round) in [
                ("bf16", 1.0_f32, 1.0 / 128.0, &bf16_of as &dyn Fn(u32, u32) -> f32),
                ("bf16", 1.5e-3, 2.0_f32.powi(-17), &bf16_of),
                ("fp16", 1.0, 1.0 / 1024.0, &fp16_of),
                ("fp16 subnormal", 2.0_f32.powi(-18), 2.0_f32.powi(-24), &fp16_of),
            ] {
                let low = if name == "bf16" { bf16::from_f32(low).to_f32() } else { low };
                let x = low + fraction as f32 * step;
                let exact = (f64::from(x) - f64::from(low)) / f64::from(step);
                let got = mean(x, low, step, round);
                assert!((got - exact).abs() <= error, "{name} at {fraction}: {got}, expected {exact}");
            }
        }
    }

    #[test]
    fn numbers_of_the_format_stay_and_the_others_become_a_neighbour() {
        for random in [0, 1, 0x1FFF, 0xFFFF, 0x8000_0000, u32::MAX] {
            for bits in 0..=u16::MAX {
                let (x, y) = (f16::from_bits(bits), bf16::from_bits(bits));
                if !x.is_nan() {
                    assert_eq!(to_fp16(x.to_f32().to_bits(), random), bits);
                }
                if !y.is_nan() {
                    assert_eq!(to_bf16(y.to_f32().to_bits(), random), bits);
                }
            }
            assert!(f16::from_bits(to_fp16(f32::NAN.to_bits(), random)).is_nan());
            assert!(bf16::from_bits(to_bf16(0x7F80_0001, random)).is_nan());
            assert_eq!(to_fp16(1e9_f32.to_bits(), random), f16::MAX.to_bits());
            assert_eq!(to_bf16((-f32::MAX).to_bits(), random), bf16::MIN.to_bits());
        }
    }

    #[test]
    fn halves_give_the_number_back_and_the_upper_is_the_nearest() {
        for i in 0..1_000_000_u32 {
            let x = i.wrapping_mul(0x9E37_79B1);
            assert_eq!(joined(split(x)), x);
        }
        assert_eq!(split(1.003_f32.to_bits())[0], bf16::from_f32(1.003).to_bits());
        assert_eq!(split(1.005_f32.to_bits())[0], bf16::from_f32(1.005).to_bits());
    }
}
