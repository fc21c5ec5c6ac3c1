//! AVX2: a vector is two registers.

#![expect(
    unsafe_code,
    reason = "intrinsics; every one needs avx2, fma or f16c and nothing else, loads and stores apart"
)]

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::{Kernel, LANES, Lanes, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// The registers of a vector, low lanes first.
type Pair = [__m256; 2];

/// Those of integers.
type Ints = [__m256i; 2];

const HALF: usize = LANES / 2;

impl Avx2 {
    /// Runs `kernel`.
    ///
    /// # Safety
    /// The CPU has avx2, fma and f16c.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Self(()))
    }
}

/// Wraps an intrinsic.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: an `Avx2` is made only where the CPU has avx2, fma and f16c; a memory operand comes as a reference to as many
        // bytes as the intrinsic, or its mask, touches.
        unsafe { $call }
    };
}

impl Avx2 {
    /// The mask of the first `n` lanes of a register.
    #[inline(always)]
    fn first(self, n: usize) -> __m256i {
        const ONES_THEN_ZEROS: [i32; 2 * HALF] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        let window = &ONES_THEN_ZEROS[HALF - n.min(HALF)..][..HALF];
        have!(_mm256_loadu_si256(window.as_ptr().cast()))
    }

    /// 8 codes of 8 bits, as numbers.
    #[inline(always)]
    fn int8_half(self, codes: &[u8]) -> __m256 {
        let codes = &codes[..HALF];
        have!(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()))))
    }

    /// For a level that has all of this one's instructions.
    #[inline(always)]
    pub(super) fn of(_: Avx512) -> Self {
        Self(())
    }

    /// Two halves of two halves added up: lane `i` of the four is the sum of `i`, `i + 8`, `i + 4` and `i + 12`.
    #[inline(always)]
    fn quarter(self, v: Pair) -> __m128 {
        have!({
            let half = _mm256_add_ps(v[0], v[1]);
            _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
        })
    }

    /// Two halves of two halves, the higher of each two: likewise.
    #[inline(always)]
    fn highest_quarter(self, v: Pair) -> __m128 {
        have!({
            let half = _mm256_max_ps(v[0], v[1]);
            _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
        })
    }

    /// The first lanes of all four, the second ones, and so on.
    #[inline(always)]
    fn transposed(self, [a, b, c, d]: [__m128; 4]) -> [__m128; 4] {
        have!({
            let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
            let (first, second) = (_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
            let (ab, cd) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
            let (third, fourth) = (_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
            [first, second, third, fourth]
        })
    }

    /// Of 8 numbers the place among `middles`, as how many are below it: by search, halving what is left.
    #[inline(always)]
    fn search(self, v: __m256, middles: &[f32; LANES - 1]) -> __m256i {
        // What is compared with in a step, by the place so far: of 1, 2, 4 and 8.
        const fn of_step(middles: &[f32; LANES - 1], step: usize) -> [f32; HALF] {
            let mut of = [0.0; HALF];
            let mut place = 0;
            while place << (4 - step) < LANES && place < HALF {
                of[place] = middles[(place << (4 - step)) + (HALF >> step) - 1];
                place += 1;
            }
            of
        }
        have!({
            let mut place = _mm256_setzero_si256();
            for step in 0..4 {
                let middles = _mm256_loadu_ps(of_step(middles, step).as_ptr());
                let middle = _mm256_permutevar8x32_ps(middles, place);
                let beyond = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v, middle)); // -1 where it is
                place = _mm256_sub_epi32(_mm256_add_epi32(place, place), beyond);
            }
            place
        })
    }

    /// 16 codes of 4 bits in the low bits of a lane each, under what other bits there may be.
    #[inline(always)]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "so that each half is loaded into all lanes")]
    fn at_low_bits(self, codes: &[u8; LANES / 2]) -> [__m256i; 2] {
        let (eights, _) = codes.as_chunks();
        // Each lane gets 8 codes, and shifts its own down.
        have!({
            let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
            let [low, high] = [eights[0], eights[1]].map(i32::from_le_bytes);
            [
                _mm256_srlv_epi32(_mm256_set1_epi32(low), shifts),
                _mm256_srlv_epi32(_mm256_set1_epi32(high), shifts),
            ]
        })
    }

    /// `of[place]` of 8 places.
    #[inline(always)]
    fn at_places(self, places: __m256i, of: Pair) -> __m256 {
        have!({
            // Only the low 3 bits of an index count; the fourth, as a sign, chooses between the halves.
            let low = _mm256_permutevar8x32_ps(of[0], places);
            let high = _mm256_permutevar8x32_ps(of[1], places);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(places)))
        })
    }

    /// The 8 numbers of half a vector as bfloat16, each in the low half of 32 bits.
    #[inline(always)]
    fn to_bf16(self, v: __m256) -> __m256i {
        have!({
            let bits = _mm256_castps_si256(v);
            let upper = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
            _mm256_blendv_epi8(rounded, quiet, nan)
        })
    }

    /// 16 integers of 32 bits, all below 2^16, in 16 bits each.
    #[inline(always)]
    fn narrow(self, low: __m256i, high: __m256i) -> __m256i {
        // Packing works on quarters of the two registers; the permutation brings them into order.
        have!(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high)))
    }

    /// Integers from 0 to 255 as bytes.
    #[inline(always)]
    fn to_bytes(self, v: Pair) -> __m128i {
        have!({
            let words = self.narrow(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
            _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
        })
    }

    /// [`Simd::same_bits`] of half a vector.
    #[inline(always)]
    fn same_half(self, a: __m256, b: __m256) -> __m256 {
        have!({
            let same = _mm256_cmpeq_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
            _mm256_castsi256_ps(same)
        })
    }
}

impl Simd for Avx2 {
    type V = Pair;
    type M = Pair;
    type I = Ints;
    type Planes = [__m256i; 4];
    const BLOCK: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        have!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    fn splat_bf16(self, pair: &[u16; 2]) -> [Pair; 2] {
        have!({
            let both = _mm256_set1_epi32(bytemuck::cast(*pair));
            let first = _mm256_slli_epi32::<16>(both);
            let second = _mm256_and_si256(both, _mm256_set1_epi32(!0xFFFF));
            [[_mm256_castsi256_ps(first); 2], [_mm256_castsi256_ps(second); 2]]
        })
    }

    #[inline(always)]
    fn splat_fp16(self, pair: &[u16; 2]) -> [Pair; 2] {
        have!({
            let both = _mm256_cvtph_ps(_mm_set1_epi32(bytemuck::cast(*pair)));
            [[_mm256_moveldup_ps(both); 2], [_mm256_movehdup_ps(both); 2]]
        })
    }

    #[inline(always)]
    fn load(self, from: &Lanes) -> Pair {
        have!([_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[HALF..].as_ptr())])
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes, v: Pair) {
        have!({
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to[HALF..].as_mut_ptr(), v[1]);
        });
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        have!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sqrt(self, a: Pair) -> Pair {
        have!([_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])])
    }

    #[inline(always)]
    fn greater(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])])
    }

    #[inline(always)]
    fn same_bits(self, a: Pair, b: Pair) -> Pair {
        [self.same_half(a[0], b[0]), self.same_half(a[1], b[1])]
    }

    #[inline(always)]
    fn select(self, m: Pair, a: Pair, b: Pair) -> Pair {
        have!([_mm256_blendv_ps(b[0], a[0], m[0]), _mm256_blendv_ps(b[1], a[1], m[1])])
    }

    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        have!([_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])])
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        have!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn load_fp16(self, from: &[u16; LANES]) -> Pair {
        have!([
            _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from[HALF..].as_ptr().cast()))
        ])
    }

    #[inline(always)]
    fn load_int8(self, from: &[u8; LANES]) -> Pair {
        [self.int8_half(&from[..HALF]), self.int8_half(&from[HALF..])]
    }

    #[inline(always)]
    fn load_int4(self, from: &[u8; LANES / 2]) -> Pair {
        let [low, high] = self.at_low_bits(from);
        have!({
            let code = _mm256_set1_epi32(15);
            [
                _mm256_cvtepi32_ps(_mm256_and_si256(low, code)),
                _mm256_cvtepi32_ps(_mm256_and_si256(high, code)),
            ]
        })
    }

    #[inline(always)]
    fn look_up(self, codes: &[u8; LANES / 2], of: Pair) -> Pair {
        let [low, high] = self.at_low_bits(codes);
        [self.at_places(low, of), self.at_places(high, of)]
    }

    /// The first bytes of all lanes, their second ones, third and fourth; in both halves of a register.
    #[inline(always)]
    fn planes(self, of: Pair) -> [__m256i; 4] {
        have!({
            // Of each 4 lanes the first bytes, the second, the third, the fourth.
            let by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
            ));
            let low = _mm256_shuffle_epi8(_mm256_castps_si256(of[0]), by_byte);
            let high = _mm256_shuffle_epi8(_mm256_castps_si256(of[1]), by_byte);
            let [first, second] = [_mm256_unpacklo_epi32(low, high), _mm256_unpackhi_epi32(low, high)];
            let even = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
            let odd = _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7);
            [
                _mm256_permutevar8x32_epi32(first, even),
                _mm256_permutevar8x32_epi32(first, odd),
                _mm256_permutevar8x32_epi32(second, even),
                _mm256_permutevar8x32_epi32(second, odd),
            ]
        })
    }

    /// Byte by byte, which are then put together.
    #[inline(always)]
    fn look_up_pair(self, codes: &[[u8; LANES / 2]; 2], planes: [__m256i; 4]) -> [Pair; 2] {
        have!({
            // The bytes of the codes 0 to 3, 8 to 11, 16 to 19 and 24 to 27 in one half, of the others in the other half: in
            // such an order they come out of the unpacking below as they are wanted.
            let order = _mm256_setr_epi8(
                0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11,
                14, 14, 15, 15,
            );
            let all = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.as_ptr().cast()));
            let twice = _mm256_shuffle_epi8(all, order);
            let even = _mm256_and_si256(twice, _mm256_set1_epi16(0x000F));
            let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(twice), _mm256_set1_epi16(0x0F00));
            let codes = _mm256_or_si256(even, odd);
            let a = _mm256_shuffle_epi8(planes[0], codes);
            let b = _mm256_shuffle_epi8(planes[1], codes);
            let c = _mm256_shuffle_epi8(planes[2], codes);
            let d = _mm256_shuffle_epi8(planes[3], codes);
            let [low, high] = [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)];
            let [low_end, high_end] = [_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)];
            [
                [
                    _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low_end)),
                    _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low_end)),
                ],
                [
                    _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high_end)),
                    _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high_end)),
                ],
            ]
        })
    }
    #[inline(always)]
    fn load_int2(self, from: &[u8; LANES / 4]) -> Pair {
        have!({
            let all = _mm256_set1_epi32(i32::from_le_bytes(*from));
            let three = _mm256_set1_epi32(3);
            let low = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            let high = _mm256_srlv_epi32(all, _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30));
            [
                _mm256_cvtepi32_ps(_mm256_and_si256(low, three)),
                _mm256_cvtepi32_ps(_mm256_and_si256(high, three)),
            ]
        })
    }

    #[inline(always)]
    fn store_fp16(self, to: &mut [u16; LANES], v: Pair) {
        have!({
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm256_set_m128i(high, low));
        });
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut [u16; LANES], v: Pair) {
        let halves = self.narrow(self.to_bf16(v[0]), self.to_bf16(v[1]));
        have!(_mm256_storeu_si256(to.as_mut_ptr().cast(), halves));
    }

    #[inline(always)]
    fn store_int8(self, to: &mut [u8; LANES], v: Pair) {
        have!(_mm_storeu_si128(to.as_mut_ptr().cast(), self.to_bytes(v)));
    }

    #[inline(always)]
    fn store_int4(self, to: &mut [u8; LANES / 2], v: Pair) {
        have!({
            // Of two neighbours, the second is 16 times as much: 8 words of 8 bits, the others zero.
            let pairs = _mm_maddubs_epi16(self.to_bytes(v), _mm_set1_epi16(0x1001));
            _mm_storel_epi64(to.as_mut_ptr().cast(), _mm_packus_epi16(pairs, pairs));
        });
    }

    #[inline(always)]
    fn store_int2(self, to: &mut [u8; LANES / 4], v: Pair) {
        let fours = have!({
            // Of two neighbours, the second is 4 times as much; of two such pairs, 16 times.
            let pairs = _mm_maddubs_epi16(self.to_bytes(v), _mm_set1_epi16(0x0401));
            let fours = _mm_madd_epi16(pairs, _mm_set1_epi32(0x0010_0001));
            let words = _mm_packus_epi32(fours, fours);
            _mm_cvtsi128_si32(_mm_packus_epi16(words, words))
        });
        *to = fours.to_le_bytes();
    }

    #[inline(always)]
    fn bits(self, v: Pair) -> Ints {
        have!([_mm256_castps_si256(v[0]), _mm256_castps_si256(v[1])])
    }

    #[inline(always)]
    fn of_bits(self, bits: Ints) -> Pair {
        have!([_mm256_castsi256_ps(bits[0]), _mm256_castsi256_ps(bits[1])])
    }

    #[inline(always)]
    fn to_floats(self, a: Ints) -> Pair {
        have!([_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])])
    }

    #[inline(always)]
    fn add_int(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn sub_int(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn mul_int(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn min_int(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_min_epu32(a[0], b[0]), _mm256_min_epu32(a[1], b[1])])
    }

    #[inline(always)]
    fn max_int(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_max_epu32(a[0], b[0]), _mm256_max_epu32(a[1], b[1])])
    }

    #[inline(always)]
    fn and(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])])
    }

    #[inline(always)]
    fn or(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])])
    }

    #[inline(always)]
    fn xor(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])])
    }

    #[inline(always)]
    fn shl(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_sllv_epi32(a[0], b[0]), _mm256_sllv_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn shr(self, a: Ints, b: Ints) -> Ints {
        have!([_mm256_srlv_epi32(a[0], b[0]), _mm256_srlv_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn lower_twice(self, a: Ints) -> Ints {
        [a[0]; 2]
    }

    #[inline(always)]
    fn load_u16(self, from: &[u16; LANES]) -> Ints {
        have!([
            _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast())),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(from[HALF..].as_ptr().cast()))
        ])
    }

    #[inline(always)]
    fn store_u16(self, to: &mut [u16; LANES], a: Ints) {
        have!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.narrow(a[0], a[1])));
    }

    #[inline(always)]
    fn choose(self, v: Pair, middles: &[f32; LANES - 1], of: &Lanes) -> Pair {
        let of = self.load(of);
        [self.at_places(self.search(v[0], middles), of), self.at_places(self.search(v[1], middles), of)]
    }

    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        have!({
            let quarter = self.quarter(v);
            let pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        })
    }

    #[inline(always)]
    fn sums(self, [a, b, c, d]: [Pair; 4]) -> [f32; 4] {
        let [first, second, third, fourth] =
            self.transposed([self.quarter(a), self.quarter(b), self.quarter(c), self.quarter(d)]);
        let mut sums = [0.0; 4];
        have!({
            let all = _mm_add_ps(_mm_add_ps(first, third), _mm_add_ps(second, fourth));
            _mm_storeu_ps(sums.as_mut_ptr(), all);
        });
        sums
    }

    #[inline(always)]
    fn highests(self, [a, b, c, d]: [Pair; 4]) -> [f32; 4] {
        let [first, second, third, fourth] = self.transposed([
            self.highest_quarter(a),
            self.highest_quarter(b),
            self.highest_quarter(c),
            self.highest_quarter(d),
        ]);
        let mut highests = [0.0; 4];
        have!({
            let all = _mm_max_ps(_mm_max_ps(first, third), _mm_max_ps(second, fourth));
            _mm_storeu_ps(highests.as_mut_ptr(), all);
        });
        highests
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // Into L2: measured a tenth faster than into L1 for rows of 512 bytes on a server of Intel's.
        have!(_mm_prefetch::<_MM_HINT_T1>(at.cast()));
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Pair {
        let (low, high) = from.split_at(from.len().min(HALF));
        have!([
            _mm256_maskload_ps(low.as_ptr(), self.first(low.len())),
            _mm256_maskload_ps(high.as_ptr(), self.first(high.len()))
        ])
    }

    #[inline(always)]
    fn store_partial(self, to: &mut [f32], v: Pair) {
        let (low, high) = to.split_at_mut(to.len().min(HALF));
        have!({
            _mm256_maskstore_ps(low.as_mut_ptr(), self.first(low.len()), v[0]);
            _mm256_maskstore_ps(high.as_mut_ptr(), self.first(high.len()), v[1]);
        });
    }
}
