//! What a fuzzer calls, one function a target: bytes go in, and nothing comes out but a panic where something is wrong.
//!
//! The functions are here, and not with the fuzzer, so that the tests of a plain `cargo test` run them too: over every seed
//! input ([`seeds`]) and over thousands of random changes of each. Inputs are made by code; no file is kept.

mod emulator;
mod images;
mod parsers;

use crate::source::{Bytes, Seeded, Source};

pub use emulator::emulator;
pub use images::{bzimage, multiboot};
pub use parsers::{bundle, firmware_tables, frames, fw_cfg};

/// A target: its name, and the function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 8] = [
    ("devices", devices),
    ("emulator", emulator),
    ("bzimage", bzimage),
    ("multiboot", multiboot),
    ("bundle", bundle),
    ("fw_cfg", fw_cfg),
    ("frames", frames),
    ("firmware_tables", firmware_tables),
];

/// Accesses to all devices, chosen by the bytes.
pub fn devices(bytes: &[u8]) {
    crate::run(&mut Bytes::new(bytes), u64::MAX);
}

/// Inputs from which a fuzzer of the target of that name begins.
#[must_use]
pub fn seeds(name: &str) -> Vec<Vec<u8>> {
    match name {
        "emulator" => emulator::seeds(),
        "bzimage" => images::bzimage_seeds(),
        "multiboot" => images::multiboot_seeds(),
        "bundle" => parsers::bundle_seeds(),
        "frames" => parsers::frame_seeds(),
        "firmware_tables" => parsers::table_seeds(),
        _ => (0..8).map(|seed| noise(seed, 400)).collect(),
    }
}

/// Bytes that look random.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut source = Seeded::new(seed);
    (0..length).map(|_| source.next() as u8).collect()
}

/// Changes a seed at random, as a fuzzer does that knows nothing.
pub fn mutate(input: &mut Vec<u8>, source: &mut impl Source) {
    for _ in 0..1 + source.below(6) {
        let length = input.len() as u64;
        let at = source.below(length.max(1)) as usize;
        match source.below(6) {
            _ if input.is_empty() => input.push(source.next() as u8),
            0 => input[at] ^= 1 << source.below(8),
            1 => input[at] = source.of(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => input[at] = source.next() as u8,
            3 => input.truncate(at),
            4 => {
                let value = source.value().to_le_bytes();
                let end = (at + source.of(&[2, 4, 8])).min(input.len());
                input[at..end].copy_from_slice(&value[..end - at]);
            }
            _ => input.insert(at, source.next() as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_survives_its_seeds_and_what_is_near_them() {
        for (name, target) in TARGETS {
            let seeds = seeds(name);
            assert!(!seeds.is_empty(), "{name}");
            let mut source = Seeded::new(99);
            for round in 0..600 {
                let mut input = seeds[round % seeds.len()].clone();
                if round >= seeds.len() {
                    mutate(&mut input, &mut source);
                }
                target(&input);
            }
        }
    }
}
