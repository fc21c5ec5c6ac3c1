//! What a level can do.

/// Lanes of a vector, at every level.
pub(crate) const LANES: usize = 16;

/// A vector in memory.
pub(crate) type Lanes = [f32; LANES];

/// An algorithm, to be compiled for every level.
///
/// `run` and all that it calls must be `#[inline(always)]`: only code inlined into a level's entry gets its
/// instructions.
pub(crate) trait Kernel {
    type Output;

    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The operations of one level; a value of the type is the proof that the CPU has it.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "what is loaded is in memory, however small")]
pub(crate) trait Simd: Copy {
    /// [`LANES`] floats in registers.
    type V: Copy;
    /// [`LANES`] truths in registers.
    type M: Copy;
    /// [`LANES`] integers in registers, of 32 bits and without sign; sums and products of theirs wrap around.
    type I: Copy;
    /// 16 numbers, as many choices by codes of 4 bits want them.
    type Planes: Copy;
    /// How many vectors a sum keeps in registers at once; a power of two.
    const BLOCK: usize;

    fn splat(self, x: f32) -> Self::V;
    /// Two numbers of bfloat16, each in all lanes.
    #[inline(always)]
    fn splat_bf16(self, pair: &[u16; 2]) -> [Self::V; 2] {
        [
            self.splat(f32::from_bits(u32::from(pair[0]) << 16)),
            self.splat(f32::from_bits(u32::from(pair[1]) << 16)),
        ]
    }
    /// Two of half precision, likewise.
    #[inline(always)]
    fn splat_fp16(self, &[first, second]: &[u16; 2]) -> [Self::V; 2] {
        [self.load_fp16(&[first; LANES]), self.load_fp16(&[second; LANES])]
    }
    fn load(self, from: &Lanes) -> Self::V;
    fn store(self, to: &mut Lanes, v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even; `a` is below 2^22 in size.
    fn round(self, a: Self::V) -> Self::V;
    /// `a > b`; false where either is NaN.
    fn greater(self, a: Self::V, b: Self::V) -> Self::M;
    /// Where `a` and `b` have the same bits.
    fn same_bits(self, a: Self::V, b: Self::V) -> Self::M;
    /// `a` where `m`, else `b`.
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V;
    /// Starts to bring the cache line at `at` near; `at` may be any address.
    fn prefetch(self, at: *const u8);

    /// Half precision.
    fn load_fp16(self, from: &[u16; LANES]) -> Self::V;
    /// The upper halves of single precision.
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        self.of_bits(self.shl(self.load_u16(from), self.splat_int(16)))
    }
    /// Codes of 8 bits, as numbers.
    fn load_int8(self, from: &[u8; LANES]) -> Self::V;
    /// Codes of 4 bits, the low ones of a byte first, as numbers.
    fn load_int4(self, from: &[u8; LANES / 2]) -> Self::V;
    /// The lanes of `of` that 16 codes of 4 bits, the low ones of a byte first, are the numbers of.
    fn look_up(self, codes: &[u8; LANES / 2], of: Self::V) -> Self::V;
    /// What [`Simd::look_up_pair`] is to choose from: the lanes of `of`.
    fn planes(self, of: Self::V) -> Self::Planes;
    /// [`Simd::look_up`] of two at once.
    fn look_up_pair(self, codes: &[[u8; LANES / 2]; 2], of: Self::Planes) -> [Self::V; 2];
    /// Codes of 2 bits, the low ones of a byte first, as numbers.
    fn load_int2(self, from: &[u8; LANES / 4]) -> Self::V;
    /// As half precision, to the nearest, ties to even; too large a number becomes infinite.
    fn store_fp16(self, to: &mut [u16; LANES], v: Self::V);
    /// As bfloat16, likewise.
    fn store_bf16(self, to: &mut [u16; LANES], v: Self::V);
    /// As 8 bits each; every lane is an integer from 0 to 255.
    fn store_int8(self, to: &mut [u8; LANES], v: Self::V);

    /// The bits of the lanes.
    fn bits(self, v: Self::V) -> Self::I;
    /// Lanes of these bits.
    fn of_bits(self, bits: Self::I) -> Self::V;
    /// The same numbers; every lane is below 2^24.
    fn to_floats(self, a: Self::I) -> Self::V;
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn min_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn max_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a << by`; 0 where `by` is from 32 to 127.
    fn shl(self, a: Self::I, by: Self::I) -> Self::I;
    /// `a >> by`; likewise.
    fn shr(self, a: Self::I, by: Self::I) -> Self::I;
    /// The lower half of the lanes, and once more in place of the upper.
    fn lower_twice(self, a: Self::I) -> Self::I;
    /// Integers of 16 bits.
    fn load_u16(self, from: &[u16; LANES]) -> Self::I;
    /// As 16 bits each; every lane is below 2^16.
    fn store_u16(self, to: &mut [u16; LANES], a: Self::I);

    #[inline(always)]
    fn splat_int(self, x: u32) -> Self::I {
        self.bits(self.splat(f32::from_bits(x)))
    }

    /// These integers.
    #[inline(always)]
    fn load_int(self, from: &[u32; LANES]) -> Self::I {
        self.bits(self.load(bytemuck::cast_ref(from)))
    }

    /// As 4 bits each, the first in the low ones; every lane is an integer from 0 to 15.
    #[inline(always)]
    fn store_int4(self, to: &mut [u8; LANES / 2], v: Self::V) {
        let mut bytes = [0; LANES];
        self.store_int8(&mut bytes, v);
        let (halves, _) = bytes.as_chunks();
        for i in 0..2 {
            // Bits meet their neighbours' in three steps: 8 numbers of 4 bits, 4 of 8, 2 of 16.
            let mut x = u64::from_le_bytes(halves[i]);
            x = (x | x >> 4) & 0x00FF_00FF_00FF_00FF;
            x = (x | x >> 8) & 0x0000_FFFF_0000_FFFF;
            to[4 * i..4 * i + 4].copy_from_slice(&((x | x >> 16) as u32).to_le_bytes());
        }
    }

    /// As 2 bits each, the first in the lowest; every lane is an integer from 0 to 3.
    #[inline(always)]
    fn store_int2(self, to: &mut [u8; LANES / 4], v: Self::V) {
        let mut bytes = [0; LANES];
        self.store_int8(&mut bytes, v);
        let (fours, _) = bytes.as_chunks();
        for i in 0..4 {
            let x = u32::from_le_bytes(fours[i]);
            to[i] = (x | x >> 6 | x >> 12 | x >> 18) as u8;
        }
    }

    /// `a` where it is greater, else `b`.
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        self.select(self.greater(a, b), a, b)
    }

    /// `a` where it is less, else `b`.
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        self.select(self.greater(b, a), a, b)
    }

    /// The first `n` lanes, the others zero.
    #[inline(always)]
    fn first(self, v: Self::V, n: usize) -> Self::V {
        let mut lanes = self.lanes(v);
        lanes[n..].fill(0.0);
        self.load(&lanes)
    }

    /// The first `from.len() < LANES` lanes, the others zero.
    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::V {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first `to.len() < LANES` lanes.
    #[inline(always)]
    fn store_partial(self, to: &mut [f32], v: Self::V) {
        let lanes = self.lanes(v);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    /// `from[at..]`, as far as a vector reaches, the other lanes zero.
    #[inline(always)]
    fn load_at(self, from: &[f32], at: usize) -> Self::V {
        let rest = &from[at..];
        match rest.first_chunk() {
            Some(whole) => self.load(whole),
            None => self.load_partial(rest),
        }
    }

    /// Writes `to[at..]`, as far as a vector reaches.
    #[inline(always)]
    fn store_at(self, to: &mut [f32], at: usize, v: Self::V) {
        let rest = &mut to[at..];
        match rest.first_chunk_mut() {
            Some(whole) => self.store(whole, v),
            None => self.store_partial(rest, v),
        }
    }

    /// `of[k]` for each lane, `k` being how many of `middles`, which ascend, are below it.
    #[inline(always)]
    fn choose(self, v: Self::V, middles: &[f32; LANES - 1], of: &Lanes) -> Self::V {
        let mut chosen = self.splat(of[0]);
        for k in 0..LANES - 1 {
            let beyond = self.greater(v, self.splat(middles[k]));
            chosen = self.select(beyond, self.splat(of[k + 1]), chosen);
        }
        chosen
    }

    /// The sum of all lanes, halves added onto halves: the same order at every level.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.sums([v; 4])[0]
    }

    /// [`Simd::sum`] of each.
    #[inline(always)]
    fn sums(self, vectors: [Self::V; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        for i in 0..4 {
            sums[i] = halved(self.lanes(vectors[i]), |a, b| a + b);
        }
        sums
    }

    /// The highest lane; none is NaN.
    #[inline(always)]
    fn highest(self, v: Self::V) -> f32 {
        self.highests([v; 4])[0]
    }

    /// [`Simd::highest`] of each.
    #[inline(always)]
    fn highests(self, vectors: [Self::V; 4]) -> [f32; 4] {
        let mut highests = [0.0; 4];
        for i in 0..4 {
            highests[i] = halved(self.lanes(vectors[i]), |a, b| if b > a { b } else { a });
        }
        highests
    }

    /// In memory.
    #[inline(always)]
    fn lanes(self, v: Self::V) -> Lanes {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        lanes
    }

    /// Starts to bring the `bytes` at `at` near.
    #[inline(always)]
    fn prefetch_bytes(self, at: *const u8, bytes: usize) {
        const LINE: usize = 64;
        let skipped = at.addr() % LINE;
        let mut i = 0;
        while i < skipped + bytes {
            self.prefetch(at.wrapping_sub(skipped).wrapping_add(i));
            i += LINE;
        }
    }
}

/// All lanes in one, halves onto halves.
#[inline(always)]
fn halved(mut lanes: Lanes, onto: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = onto(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}
