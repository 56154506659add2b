//! Images of guests, loaded as far as they let themselves be loaded. Memory is sparse, and everything that is written must
//! lie in RAM.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use nestling_hypervisor::guest::layout::RamLayout;
use nestling_hypervisor::guest::{
    GuestMemory, GuestMemoryError, LinuxConfig, MultibootConfig, load_linux, load_multiboot,
};

const PAGE: u64 = 4096;
const MEMORY: u64 = 64 << 20;
/// No image of some kilobytes may make a loader write more than RAM has.
const MOST_WRITTEN: u64 = 2 * MEMORY;

/// Guest memory that is there where it was written.
struct Sparse {
    layout: RamLayout,
    pages: RefCell<BTreeMap<u64, Box<[u8; PAGE as usize]>>>,
    written: Cell<u64>,
}

impl Sparse {
    fn new() -> Option<Self> {
        let layout = RamLayout::new(MEMORY).ok()?;
        Some(Self { layout, pages: RefCell::default(), written: Cell::new(0) })
    }

    fn check(&self, gpa: u64, bytes: usize) -> Result<(), GuestMemoryError> {
        let bytes = bytes as u64;
        match gpa.checked_add(bytes) {
            Some(end) if end <= self.layout.low_end() => Ok(()),
            _ => Err(GuestMemoryError::NotRam { gpa, bytes }),
        }
    }
}

impl GuestMemory for Sparse {
    fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.check(gpa, into.len())?;
        let pages = self.pages.borrow();
        for (at, byte) in (gpa..).zip(into) {
            *byte = pages.get(&(at / PAGE)).map_or(0, |page| page[(at % PAGE) as usize]);
        }
        Ok(())
    }

    fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        self.check(gpa, bytes.len())?;
        self.written.set(self.written.get() + bytes.len() as u64);
        assert!(self.written.get() <= MOST_WRITTEN, "a loader writes without end");
        let mut pages = self.pages.borrow_mut();
        for (at, byte) in (gpa..).zip(bytes) {
            pages.entry(at / PAGE).or_insert_with(|| Box::new([0; PAGE as usize]))[(at % PAGE) as usize] = *byte;
        }
        Ok(())
    }
}

/// The input as a bzImage: parameters, tables and all.
pub fn bzimage(bytes: &[u8]) {
    let Some(memory) = Sparse::new() else { return };
    let (image, initrd) = bytes.split_at(bytes.len() - bytes.len() / 8);
    let machine = LinuxConfig { memory_bytes: MEMORY, vcpus: 2 };
    if let Ok(init) = load_linux(&memory, image, initrd, "console=ttyS0", &machine) {
        assert!(init.rip < MEMORY && init.rsi < MEMORY, "{init:x?}");
    }
}

/// The input as a Multiboot image.
pub fn multiboot(bytes: &[u8]) {
    let Some(memory) = Sparse::new() else { return };
    let machine = MultibootConfig { memory_bytes: MEMORY, vcpus: 2 };
    let module = &bytes[bytes.len() - bytes.len() / 8..];
    if let Ok(init) = load_multiboot(&memory, bytes, module, "kernel words", &machine) {
        assert!(init.rip < MEMORY && init.rbx < MEMORY, "{init:x?}");
    }
}

/// A file with some fields set.
fn file(length: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut file = vec![0; length];
    for (at, bytes) in fields {
        file[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    file
}

pub(super) fn bzimage_seeds() -> Vec<Vec<u8>> {
    let length: usize = 0x1000;
    let paragraphs = ((length - length / 8 - 0x400) / 16) as u32;
    vec![file(
        length,
        &[
            (0x1f1, &[1]),
            (0x1f4, &paragraphs.to_le_bytes()),
            (0x1fe, &[0x55, 0xaa]),
            (0x200, &[0xeb, 0x6a]),
            (0x202, b"HdrS"),
            (0x206, &0x020f_u16.to_le_bytes()),
            (0x211, &[1]),
            (0x214, &0x100_0000_u32.to_le_bytes()),
            (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
            (0x230, &0x20_0000_u32.to_le_bytes()),
            (0x234, &[1]),
            (0x236, &1_u16.to_le_bytes()),
            (0x238, &2047_u32.to_le_bytes()),
            (0x258, &0x100_0000_u64.to_le_bytes()),
            (0x260, &0x10_0000_u32.to_le_bytes()),
        ],
    )]
}

pub(super) fn multiboot_seeds() -> Vec<Vec<u8>> {
    let header = |at: usize, flags: u32, rest: &[u32]| {
        let words = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)];
        let bytes: Vec<u8> = words.iter().chain(rest).flat_map(|word| word.to_le_bytes()).collect();
        (at, bytes)
    };
    // With addresses: header, load, end of load, end of BSS, entry.
    let (at, flat) = header(16, 1 << 16, &[0x10_0010, 0x10_0000, 0, 0x10_2000, 0x10_0030]);
    let flat = file(512, &[(at, &flat)]);
    let (at, bytes) = header(0x100, 3, &[]);
    // ELF32 and ELF64, one segment of 256 bytes at 1 MiB.
    let elf_32 = file(
        0x300,
        &[
            (0, b"\x7fELF\x01\x01\x01"),
            (16, &[2, 0, 3, 0, 1, 0, 0, 0]),
            (24, &0x10_0000_u32.to_le_bytes()),
            (28, &52_u32.to_le_bytes()),
            (40, &[52, 0, 32, 0, 1, 0, 40, 0]),
            (52, &[1, 0, 0, 0, 0, 2, 0, 0]),
            (60, &0x10_0000_u32.to_le_bytes()),
            (64, &0x10_0000_u32.to_le_bytes()),
            (68, &[0, 1, 0, 0, 0, 2, 0, 0, 7, 0, 0, 0]),
            (at, &bytes),
        ],
    );
    let elf_64 = file(
        0x300,
        &[
            (0, b"\x7fELF\x02\x01\x01"),
            (16, &[2, 0, 0x3e, 0, 1, 0, 0, 0]),
            (24, &0x10_0000_u64.to_le_bytes()),
            (32, &64_u64.to_le_bytes()),
            (52, &[64, 0, 56, 0, 1, 0, 64, 0]),
            (64, &[1, 0, 0, 0, 7, 0, 0, 0]),
            (72, &0x200_u64.to_le_bytes()),
            (80, &0x10_0000_u64.to_le_bytes()),
            (88, &0x10_0000_u64.to_le_bytes()),
            (96, &0x100_u64.to_le_bytes()),
            (104, &0x200_u64.to_le_bytes()),
            (at, &bytes),
        ],
    );
    vec![flat, elf_32, elf_64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_loaded() {
        let memory = || Sparse::new().expect("a legal size");
        let machine = LinuxConfig { memory_bytes: MEMORY, vcpus: 2 };
        for image in bzimage_seeds() {
            load_linux(&memory(), &image, &[], "", &machine).expect("a kernel");
        }
        let machine = MultibootConfig { memory_bytes: MEMORY, vcpus: 2 };
        for image in multiboot_seeds() {
            load_multiboot(&memory(), &image, &[], "", &machine).expect("an image");
        }
    }
}
