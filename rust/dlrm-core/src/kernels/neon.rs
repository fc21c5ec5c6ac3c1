//! NEON: a vector is four registers.

#![expect(unsafe_code, reason = "intrinsics; every one needs neon and nothing else, loads and stores apart")]

use std::arch::aarch64::*;
use std::arch::asm;

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
        // SAFETY: a `Neon` is made only where the CPU has neon; a memory operand comes as a reference to as many floats
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
    fn prefetch(self, at: *const f32) {
        // SAFETY: a prefetch reads and writes nothing that the program sees, at any address.
        unsafe {
            asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly))
        }
    }
}
