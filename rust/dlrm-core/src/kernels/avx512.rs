//! AVX-512: a vector is one register.

#![expect(
    unsafe_code,
    reason = "intrinsics; every one needs avx512f and nothing else, loads and stores apart"
)]

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Runs `kernel`.
    ///
    /// # Safety
    /// The CPU has avx512f.
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Self(()))
    }
}

/// Wraps an intrinsic.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: an `Avx512` is made only where the CPU has avx512f; a memory operand comes as a reference to as many
        // floats as the intrinsic, or its mask, touches.
        unsafe { $call }
    };
}

/// The mask of the first `n < LANES` lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    debug_assert!(n < LANES);
    (1 << n) - 1
}

impl Simd for Avx512 {
    type V = __m512;
    type M = __mmask16;
    const BLOCK: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        have!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, from: &Lanes) -> __m512 {
        have!(_mm512_loadu_ps(from.as_ptr()))
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes, v: __m512) {
        have!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        have!(_mm512_sqrt_ps(a))
    }

    #[inline(always)]
    fn greater(self, a: __m512, b: __m512) -> __mmask16 {
        have!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b))
    }

    #[inline(always)]
    fn same_bits(self, a: __m512, b: __m512) -> __mmask16 {
        have!(_mm512_cmpeq_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(b)))
    }

    #[inline(always)]
    fn select(self, m: __mmask16, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_mask_blend_ps(m, b, a))
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        // Into L2: measured a tenth faster than into L1 for rows of 512 bytes on a server of Intel's.
        have!(_mm_prefetch::<_MM_HINT_T1>(at.cast()));
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> __m512 {
        have!(_mm512_maskz_loadu_ps(first(from.len()), from.as_ptr()))
    }

    #[inline(always)]
    fn store_partial(self, to: &mut [f32], v: __m512) {
        have!(_mm512_mask_storeu_ps(to.as_mut_ptr(), first(to.len()), v));
    }
}
