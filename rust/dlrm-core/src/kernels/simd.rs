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
pub(crate) trait Simd: Copy {
    /// [`LANES`] floats in registers.
    type V: Copy;
    /// [`LANES`] truths in registers.
    type M: Copy;
    /// How many vectors a sum keeps in registers at once; a power of two.
    const BLOCK: usize;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &Lanes) -> Self::V;
    fn store(self, to: &mut Lanes, v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// `a > b`; false where either is NaN.
    fn greater(self, a: Self::V, b: Self::V) -> Self::M;
    /// Where `a` and `b` have the same bits.
    fn same_bits(self, a: Self::V, b: Self::V) -> Self::M;
    /// `a` where `m`, else `b`.
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V;
    /// Starts to bring the cache line at `at` near; `at` may be any address.
    fn prefetch(self, at: *const f32);

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
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
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

    /// The sum of all lanes, halves added onto halves: the same order at every level.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// Starts to bring `len` floats at `at` near.
    #[inline(always)]
    fn prefetch_row(self, at: *const f32, len: usize) {
        let mut i = 0;
        while i < len {
            self.prefetch(at.wrapping_add(i));
            i += LANES; // a cache line holds 16 floats
        }
    }
}
