//! Any CPU: one lane after another. This is the specification of every other level.

use half::{bf16, f16};

use super::{LANES, Lanes, Simd, Take};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn lanes<T>(f: impl Fn(usize) -> T) -> [T; LANES] {
    std::array::from_fn(f)
}

impl Simd for Scalar {
    type V = Lanes;
    type M = [bool; LANES];
    const BLOCK: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
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
    fn load_bf16(self, from: &[u16; LANES]) -> Lanes {
        from.map(|x| bf16::from_bits(x).to_f32())
    }

    #[inline(always)]
    fn load_int8(self, from: &[u8; LANES]) -> Lanes {
        from.map(f32::from)
    }

    #[inline(always)]
    fn each_int4<const COUNT: usize>(
        self,
        from: &[[u8; LANES / 2]; COUNT],
        of: Lanes,
        into: &mut impl Take<Self>,
    ) {
        for (k, codes) in from.iter().enumerate() {
            into.take(self, k, lanes(|i| of[usize::from(codes[i / 2] >> (i % 2 * 4) & 15)]));
        }
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
}
