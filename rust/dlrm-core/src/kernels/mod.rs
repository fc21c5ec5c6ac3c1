//! The loops over elements, each written once and compiled for every level.
//!
//! A [`Kernel`] is an algorithm over [`Simd`], the operations of one level on vectors of [`LANES`] numbers. A vector has
//! 16 lanes at every level (one register of AVX-512, two of AVX2, four of NEON), so an algorithm adds the same numbers
//! in the same order everywhere and the results have the same bits. For the same reason a multiplication is fused
//! with an addition at every level (`mul_add`) or at none. [`scalar`] is the specification.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod codes;
pub(crate) mod compare;
pub(crate) mod decode;
pub(crate) mod dot;
pub(crate) mod encode;
pub(crate) mod fit;
mod minmax;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod pool;
pub(crate) mod reduce;
pub(crate) mod scalar;
mod simd;
pub(crate) mod stochastic;
pub(crate) mod sum;
pub(crate) mod touch;
pub(crate) mod touched;
pub(crate) mod train;
pub(crate) mod within;

pub(crate) use simd::{Kernel, LANES, Lanes, Simd};
