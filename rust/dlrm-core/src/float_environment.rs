//! How the CPU rounds and what it does with denormals: the standard's way in every call, whatever the caller has set.
//!
//! `torch.set_flush_denormal(True)`, for one, changes it for the calling thread only, and results would depend on which
//! thread computed them. The threads of the pool are made inside a call and inherit its environment.

#![expect(unsafe_code, reason = "control registers")]

use std::arch::asm;

/// The caller's environment, which comes back when this is dropped.
pub(crate) struct FloatEnvironment {
    before: Register,
}

impl FloatEnvironment {
    /// Sets the environment that Rust assumes: round to nearest, keep denormals, raise nothing.
    pub(crate) fn standard() -> Self {
        let before = read();
        if before != STANDARD {
            write(STANDARD);
        }
        Self { before }
    }
}

impl Drop for FloatEnvironment {
    fn drop(&mut self) {
        if self.before != STANDARD {
            write(self.before);
        }
    }
}

#[cfg(target_arch = "x86_64")]
type Register = u32;

/// MXCSR with all exceptions masked and none seen.
#[cfg(target_arch = "x86_64")]
const STANDARD: Register = 0x1F80;

#[cfg(target_arch = "x86_64")]
fn read() -> Register {
    /// Exceptions seen, which are history and not a setting.
    const SEEN: Register = 0x3F;
    let mut register: Register = 0;
    // SAFETY: stores the register's 4 bytes in `register`.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut register, options(nostack, preserves_flags)) };
    register & !SEEN
}

#[cfg(target_arch = "x86_64")]
fn write(register: Register) {
    // SAFETY: the value is one that was read before, or STANDARD; no reserved bit is set. What a call computes is
    // between the two writes, inside functions that the compiler does not move across an asm block.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const register, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "aarch64")]
type Register = u64;

/// FPCR: round to nearest, keep denormals, trap nothing.
#[cfg(target_arch = "aarch64")]
const STANDARD: Register = 0;

#[cfg(target_arch = "aarch64")]
fn read() -> Register {
    let register: Register;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, fpcr", out(reg) register, options(nomem, nostack, preserves_flags)) };
    register
}

#[cfg(target_arch = "aarch64")]
fn write(register: Register) {
    // SAFETY: as on x86-64.
    unsafe { asm!("msr fpcr, {}", in(reg) register, options(nostack, preserves_flags)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "x86_64")]
    const FLUSH: Register = STANDARD | 0x8040;
    #[cfg(target_arch = "aarch64")]
    const FLUSH: Register = 1 << 24;

    #[test]
    fn a_call_has_the_standard_environment_and_the_caller_keeps_its_own() {
        write(FLUSH);
        {
            let _standard = FloatEnvironment::standard();
            assert_eq!(read(), STANDARD);
        }
        let after = read();
        write(STANDARD);
        assert_eq!(after, FLUSH);
    }
}
