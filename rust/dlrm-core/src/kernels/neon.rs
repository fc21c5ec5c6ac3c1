//! NEON: a vector is four registers.

#![expect(unsafe_code, reason = "intrinsics; every one needs neon and nothing else, loads and stores apart")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::scalar::Scalar;
use super::{Kernel, LANES, Lanes, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Neon(());

/// Registers of a vector.
const REGISTERS: usize = 4;

/// Lanes of a register.
const QUARTER: usize = LANES / REGISTERS;

impl Neon {
    /// Runs `kernel`.
    ///
    /// # Safety
    /// The CPU has neon.
    #[target_feature(enable = "neon")]
    pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Self(()))
    }
}

/// One intrinsic for each register `$i` of a vector.
macro_rules! each {
    (|$i:ident| $call:expr) => {{
        // SAFETY: a `Neon` is made only where the CPU has neon; a memory operand comes as a reference to as many bytes
        // as the intrinsic touches.
        unsafe {
            [
                { const $i: usize = 0; $call },
                { const $i: usize = 1; $call },
                { const $i: usize = 2; $call },
                { const $i: usize = 3; $call },
            ]
        }
    }};
}

impl Simd for Neon {
    type V = [float32x4_t; REGISTERS];
    type M = [uint32x4_t; REGISTERS];
    type I = [uint32x4_t; REGISTERS];
    type Planes = Lanes;
    const BLOCK: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        each!(|_I| vdupq_n_f32(x))
    }

    #[inline(always)]
    fn load(self, from: &Lanes) -> Self::V {
        each!(|I| vld1q_f32(from[I * QUARTER..].as_ptr()))
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes, v: Self::V) {
        each!(|I| vst1q_f32(to[I * QUARTER..].as_mut_ptr(), v[I]));
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each!(|I| vaddq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each!(|I| vsubq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each!(|I| vmulq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each!(|I| vfmaq_f32(c[I], a[I], b[I]))
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each!(|I| vdivq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        each!(|I| vsqrtq_f32(a[I]))
    }

    #[inline(always)]
    fn greater(self, a: Self::V, b: Self::V) -> Self::M {
        each!(|I| vcgtq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn same_bits(self, a: Self::V, b: Self::V) -> Self::M {
        each!(|I| vceqq_u32(vreinterpretq_u32_f32(a[I]), vreinterpretq_u32_f32(b[I])))
    }

    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        each!(|I| vbslq_f32(m[I], a[I], b[I]))
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        each!(|I| vrndnq_f32(a[I]))
    }

    #[inline(always)]
    fn load_fp16(self, from: &[u16; LANES]) -> Self::V {
        each!(|I| {
            let widened: float32x4_t;
            let halves = vld1_u16(from[I * QUARTER..].as_ptr());
            // The intrinsic is of a newer Rust than this crate asks for.
            asm!("fcvtl {to:v}.4s, {from:v}.4h", to = out(vreg) widened, from = in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
            widened
        })
    }

    #[inline(always)]
    fn load_int8(self, from: &[u8; LANES]) -> Self::V {
        let words = from.map(u32::from);
        each!(|I| vcvtq_f32_u32(vld1q_u32(words[I * QUARTER..].as_ptr())))
    }

    #[inline(always)]
    fn load_int4(self, from: &[u8; LANES / 2]) -> Self::V {
        self.load_int8(&std::array::from_fn(|i| from[i / 2] >> (i % 2 * 4) & 15))
    }

    #[inline(always)]
    fn look_up(self, codes: &[u8; LANES / 2], of: Self::V) -> Self::V {
        self.load(&Scalar.look_up(codes, self.lanes(of)))
    }

    #[inline(always)]
    fn planes(self, of: Self::V) -> Lanes {
        self.lanes(of)
    }

    #[inline(always)]
    fn look_up_pair(self, codes: &[[u8; LANES / 2]; 2], of: Lanes) -> [Self::V; 2] {
        let [first, second] = Scalar.look_up_pair(codes, of);
        [self.load(&first), self.load(&second)]
    }

    #[inline(always)]
    fn load_int2(self, from: &[u8; LANES / 4]) -> Self::V {
        self.load_int8(&std::array::from_fn(|i| from[i / 4] >> (i % 4 * 2) & 3))
    }

    #[inline(always)]
    fn store_fp16(self, to: &mut [u16; LANES], v: Self::V) {
        each!(|I| {
            let halves: uint16x4_t;
            asm!("fcvtn {to:v}.4h, {from:v}.4s", to = out(vreg) halves, from = in(vreg) v[I],
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(to[I * QUARTER..].as_mut_ptr(), halves);
        });
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [u16; LANES], v: Self::V) {
        each!(|I| {
            let bits = vreinterpretq_u32_f32(v[I]);
            let upper = vshrq_n_u32::<16>(bits);
            let odd = vandq_u32(upper, vdupq_n_u32(1));
            let rounded = vshrq_n_u32::<16>(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))));
            let quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
            let halves = vmovn_u32(vbslq_u32(vceqq_f32(v[I], v[I]), rounded, quiet));
            vst1_u16(to[I * QUARTER..].as_mut_ptr(), halves);
        });
    }

    #[inline(always)]
    fn store_int8(self, to: &mut [u8; LANES], v: Self::V) {
        let words: [uint16x4_t; REGISTERS] = each!(|I| vmovn_u32(vcvtq_u32_f32(v[I])));
        // SAFETY: as in `each`.
        unsafe {
            let low = vmovn_u16(vcombine_u16(words[0], words[1]));
            let high = vmovn_u16(vcombine_u16(words[2], words[3]));
            vst1q_u8(to.as_mut_ptr(), vcombine_u8(low, high));
        }
    }

    #[inline(always)]
    fn bits(self, v: Self::V) -> Self::I {
        each!(|I| vreinterpretq_u32_f32(v[I]))
    }

    #[inline(always)]
    fn of_bits(self, bits: Self::I) -> Self::V {
        each!(|I| vreinterpretq_f32_u32(bits[I]))
    }

    #[inline(always)]
    fn to_floats(self, a: Self::I) -> Self::V {
        each!(|I| vcvtq_f32_u32(a[I]))
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vaddq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vsubq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vmulq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn min_int(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vminq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vmaxq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vandq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| vorrq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn xor(self, a: Self::I, b: Self::I) -> Self::I {
        each!(|I| veorq_u32(a[I], b[I]))
    }

    #[inline(always)]
    fn shl(self, a: Self::I, by: Self::I) -> Self::I {
        each!(|I| vshlq_u32(a[I], vreinterpretq_s32_u32(by[I])))
    }

    #[inline(always)]
    fn shr(self, a: Self::I, by: Self::I) -> Self::I {
        each!(|I| vshlq_u32(a[I], vnegq_s32(vreinterpretq_s32_u32(by[I]))))
    }

    #[inline(always)]
    fn lower_twice(self, a: Self::I) -> Self::I {
        [a[0], a[1], a[0], a[1]]
    }

    #[inline(always)]
    fn load_u16(self, from: &[u16; LANES]) -> Self::I {
        each!(|I| vmovl_u16(vld1_u16(from[I * QUARTER..].as_ptr())))
    }

    #[inline(always)]
    fn store_u16(self, to: &mut [u16; LANES], a: Self::I) {
        each!(|I| vst1_u16(to[I * QUARTER..].as_mut_ptr(), vmovn_u32(a[I])));
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch reads and writes nothing that the program sees, at any address.
        unsafe {
            asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly))
        }
    }
}
