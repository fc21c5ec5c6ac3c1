//! Any CPU: one lane after another. This is the specification of every other level.

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
    fn prefetch(self, _at: *const f32) {}
}
