//! The target `fw_cfg`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nestling_surface::targets::fw_cfg(bytes));
