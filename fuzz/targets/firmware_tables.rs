//! The target `firmware_tables`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nestling_surface::targets::firmware_tables(bytes));
