//! Which instruction set the kernels use.

#![expect(unsafe_code, reason = "the one place where a level is proved and its kernels are entered")]

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::kernels::Kernel;
use crate::kernels::scalar::Scalar;
use crate::{Result, named};

/// Environment variable that forces a level by its name.
const ENVIRONMENT: &str = "DLRM_RS_SIMD";

/// The chosen level, as its place in [`Kind::ALL`] plus one; 0 until it is chosen.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Kind {
    /// From the plainest to the fastest.
    const ALL: &[Self] = &[
        Self::Scalar,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "aarch64")]
        Self::Neon,
    ];

    fn detected(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
        }
    }
}

/// An instruction set that this CPU has: the value is the proof, and is made in this file only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Level(Kind);

impl Level {
    /// The levels of this CPU, from the plainest to the fastest.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        let kinds = Kind::ALL.iter().copied();
        kinds.filter(|kind| kind.detected()).map(Self)
    }

    /// The fastest level of this CPU.
    #[must_use]
    pub fn best() -> Self {
        Self::available().next_back().unwrap_or(Self(Kind::Scalar))
    }

    /// The level called `name`, if this CPU has it.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::named("level", name)
    }

    fn named(argument: &str, name: &str) -> Result<Self> {
        let levels: Vec<_> = Self::available().collect();
        named::find(argument, levels, Self::name, name)
    }

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.0.name()
    }

    /// The level of this process: as [`Level::make_current`], else as the environment says, else the best.
    pub fn current() -> Result<Self> {
        if let Some(i) = CHOSEN.load(Ordering::Relaxed).checked_sub(1) {
            return Ok(Self(Kind::ALL[usize::from(i)])); // only `make_current` stores it
        }
        let level = match std::env::var_os(ENVIRONMENT) {
            None => Self::best(),
            Some(name) => Self::named(ENVIRONMENT, &name.to_string_lossy())?,
        };
        level.make_current();
        Ok(level)
    }

    /// Makes this the level of this process.
    pub fn make_current(self) {
        let before = Kind::ALL.iter().take_while(|&&kind| kind != self.0);
        CHOSEN.store(before.count() as u8 + 1, Ordering::Relaxed);
    }

    /// Runs `kernel` compiled for this level.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "aarch64")]
        use crate::kernels::neon::Neon;
        #[cfg(target_arch = "x86_64")]
        use crate::kernels::{avx2::Avx2, avx512::Avx512};

        match self.0 {
            Kind::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Level` holds `Kind::Avx2` only after `detected` saw avx2, fma and f16c.
            Kind::Avx2 => unsafe { Avx2::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Level` holds `Kind::Avx512` only after `detected` saw avx512f.
            Kind::Avx512 => unsafe { Avx512::run(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: a `Level` holds `Kind::Neon` only after `detected` saw neon.
            Kind::Neon => unsafe { Neon::run(kernel) },
        }
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_found_by_name_and_unknown_ones_refused() {
        for level in Level::available() {
            assert_eq!(Level::from_name(level.name()), Ok(level));
        }
        let message = Level::from_name("sse9").unwrap_err().to_string();
        assert!(message.contains("scalar") && message.contains("sse9"), "{message}");
    }

    /// Set where every level of the architecture must be tested: a missing one then fails instead of being skipped.
    #[test]
    fn no_level_is_missing_where_all_are_required() {
        if std::env::var_os("DLRM_RS_REQUIRE_ALL_LEVELS").is_some() {
            assert_eq!(Level::available().count(), Kind::ALL.len());
        }
    }
}
