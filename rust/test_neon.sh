#!/usr/bin/env bash
# Runs the engine's tests for aarch64 on another machine: compiled by Debian's Rust, whose standard library comes for
# every architecture, and run by QEMU's emulation of one process. Debian 12 or newer; installs packages when run by root.
set -euo pipefail
cd "$(dirname "$0")/.."

packages="rustc-web cargo-web libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"
if ! dpkg -s $packages >/dev/null 2>&1; then
    dpkg --add-architecture arm64
    apt-get update
    apt-get install --yes --no-install-recommends $packages
fi

export RUSTC=/usr/bin/rustc
export CARGO_TARGET_DIR=target/neon
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static"
# Linked statically: QEMU 7.2 hangs in the first thread of a program linked otherwise.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
export DLRM_RS_REQUIRE_ALL_LEVELS=1
/usr/bin/cargo test --package dlrm-core --target aarch64-unknown-linux-gnu --lib --tests "$@"
