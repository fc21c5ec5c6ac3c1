//! Any CPU: one lane after another. This is the specification of every other level.

use half::{bf16, f16};

use super::{LANES, Lanes, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn lanes<T>(f: impl Fn(usize) -> T) -> [T; LANES] {
    std::array::from_fn(f)
}

impl Simd for Scalar {
    type V = Lanes;
    type M = [bool; LANES];
    type I = [u32; LANES];
    type Planes = Lanes;
    const BLOCK: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn splat_fp16(self, pair: &[u16; 2]) -> [Lanes; 2] {
        pair.map(|x| [f16::from_bits(x).to_f32(); LANES])
    }

    #[inline(always)]
    fn load(self, from: &Lanes) -> Lanes {
        *from
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes, v: Lanes) {
        *to = v;
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        lanes(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn sqrt(self, a: Lanes) -> Lanes {
        lanes(|i| a[i].sqrt())
    }

    #[inline(always)]
    fn greater(self, a: Lanes, b: Lanes) -> [bool; LANES] {
        lanes(|i| a[i] > b[i])
    }

    #[inline(always)]
    fn same_bits(self, a: Lanes, b: Lanes) -> [bool; LANES] {
        lanes(|i| a[i].to_bits() == b[i].to_bits())
    }

    #[inline(always)]
    fn select(self, m: [bool; LANES], a: Lanes, b: Lanes) -> Lanes {
        lanes(|i| if m[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, a: Lanes) -> Lanes {
        lanes(|i| a[i].round_ties_even())
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}

    #[inline(always)]
    fn load_fp16(self, from: &[u16; LANES]) -> Lanes {
        from.map(|x| f16::from_bits(x).to_f32())
    }

    #[inline(always)]
    fn load_int8(self, from: &[u8; LANES]) -> Lanes {
        from.map(f32::from)
    }

    #[inline(always)]
    fn load_int4(self, from: &[u8; LANES / 2]) -> Lanes {
        lanes(|i| f32::from(from[i / 2] >> (i % 2 * 4) & 15))
    }

    #[inline(always)]
    fn look_up(self, codes: &[u8; LANES / 2], of: Lanes) -> Lanes {
        lanes(|i| of[usize::from(codes[i / 2] >> (i % 2 * 4) & 15)])
    }

    #[inline(always)]
    fn planes(self, of: Lanes) -> Lanes {
        of
    }

    #[inline(always)]
    fn look_up_pair(self, codes: &[[u8; LANES / 2]; 2], of: Lanes) -> [Lanes; 2] {
        [self.look_up(&codes[0], of), self.look_up(&codes[1], of)]
    }

    #[inline(always)]
    fn load_int2(self, from: &[u8; LANES / 4]) -> Lanes {
        lanes(|i| f32::from(from[i / 4] >> (i % 4 * 2) & 3))
    }

    #[inline(always)]
    fn store_fp16(self, to: &mut [u16; LANES], v: Lanes) {
        *to = v.map(|x| f16::from_f32(x).to_bits());
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [u16; LANES], v: Lanes) {
        *to = v.map(|x| bf16::from_f32(x).to_bits());
    }

    #[inline(always)]
    fn store_int8(self, to: &mut [u8; LANES], v: Lanes) {
        *to = v.map(|x| x as u8);
    }

    #[inline(always)]
    fn bits(self, v: Lanes) -> [u32; LANES] {
        v.map(f32::to_bits)
    }

    #[inline(always)]
    fn of_bits(self, bits: [u32; LANES]) -> Lanes {
        bits.map(f32::from_bits)
    }

    #[inline(always)]
    fn to_floats(self, a: [u32; LANES]) -> Lanes {
        a.map(|x| x as f32)
    }

    #[inline(always)]
    fn add_int(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    fn sub_int(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    fn mul_int(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].wrapping_mul(b[i]))
    }

    #[inline(always)]
    fn min_int(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].min(b[i]))
    }

    #[inline(always)]
    fn max_int(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].max(b[i]))
    }

    #[inline(always)]
    fn and(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i] & b[i])
    }

    #[inline(always)]
    fn or(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn xor(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i] ^ b[i])
    }

    #[inline(always)]
    fn shl(self, a: [u32; LANES], by: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].unbounded_shl(by[i]))
    }

    #[inline(always)]
    fn shr(self, a: [u32; LANES], by: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i].unbounded_shr(by[i]))
    }

    #[inline(always)]
    fn lower_twice(self, a: [u32; LANES]) -> [u32; LANES] {
        lanes(|i| a[i % (LANES / 2)])
    }

    #[inline(always)]
    fn load_u16(self, from: &[u16; LANES]) -> [u32; LANES] {
        from.map(u32::from)
    }

    #[inline(always)]
    fn store_u16(self, to: &mut [u16; LANES], a: [u32; LANES]) {
        *to = a.map(|x| x as u16);
    }
}
