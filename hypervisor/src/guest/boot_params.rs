//! The boot parameters of the Linux/x86 boot protocol, the page that RSI or ESI points to.

use super::bzimage::{BzImage, HEADER_START};
use super::layout::{ACPI, ACPI_ROOM, LOW_END, PAGE_BYTES, RamLayout, RamRange};

/// Offsets in the page, from the protocol's documentation and `struct boot_params`.
mod offset {
    pub(super) const ACPI_RSDP: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const VID_MODE: usize = 0x1fa;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The mode that the setup code would have chosen by itself.
const VID_MODE_NORMAL: u16 = 0xffff;
/// KEEP_SEGMENTS and CAN_USE_HEAP concern the setup code, which doesn't run; QUIET is the command line's to say.
const LOADFLAGS_KEPT: u8 = 1 << 0;

/// Type of a region of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum E820Kind {
    /// Memory for the guest to use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables; usable after they have been read.
    Acpi = 3,
}

/// What the boot parameters say beyond the kernel's own header.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo<'a> {
    /// The guest's RAM.
    pub ram: &'a RamLayout,
    /// Where the initrd is, if there is one. Below 4 GiB.
    pub initrd: Option<RamRange>,
    /// Where the zero-terminated command line is. Below 4 GiB.
    pub command_line: u64,
    /// Where the ACPI root pointer is.
    pub rsdp: u64,
}

/// Makes the page.
pub fn build(kernel: &BzImage<'_>, info: &BootInfo<'_>) -> [u8; PAGE_BYTES as usize] {
    let mut page = [0; PAGE_BYTES as usize];
    let header = kernel.header();
    put(&mut page, HEADER_START, header);
    let loadflags = page[offset::LOADFLAGS] & LOADFLAGS_KEPT;
    put(&mut page, offset::LOADFLAGS, &[loadflags]);
    put(&mut page, offset::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(&mut page, offset::VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
    put(&mut page, offset::CODE32_START, &(kernel.load_address() as u32).to_le_bytes());
    put(&mut page, offset::CMD_LINE_PTR, &(info.command_line as u32).to_le_bytes());
    put(&mut page, offset::ACPI_RSDP, &info.rsdp.to_le_bytes());
    if let Some(initrd) = info.initrd {
        put(&mut page, offset::RAMDISK_IMAGE, &(initrd.gpa as u32).to_le_bytes());
        put(&mut page, offset::RAMDISK_SIZE, &(initrd.bytes as u32).to_le_bytes());
    }
    let mut entries = 0;
    for (range, kind) in e820(info.ram) {
        let at = offset::E820_TABLE + 20 * usize::from(entries);
        put(&mut page, at, &range.gpa.to_le_bytes());
        put(&mut page, at + 8, &range.bytes.to_le_bytes());
        put(&mut page, at + 16, &(kind as u32).to_le_bytes());
        entries += 1;
    }
    put(&mut page, offset::E820_ENTRIES, &[entries]);
    page
}

/// The memory map: RAM, less the ACPI tables at the end of conventional memory, and the reserved area below 1 MiB where a
/// PC has its firmware.
pub fn e820(ram: &RamLayout) -> impl Iterator<Item = (RamRange, E820Kind)> + '_ {
    let low = [
        (RamRange { gpa: 0, bytes: ACPI }, E820Kind::Ram),
        (RamRange { gpa: ACPI, bytes: ACPI_ROOM }, E820Kind::Acpi),
        (RamRange { gpa: LOW_END, bytes: super::layout::HIGH_START - LOW_END }, E820Kind::Reserved),
    ];
    low.into_iter().chain(ram.ranges().iter().skip(1).map(|range| (*range, E820Kind::Ram)))
}

fn put(page: &mut [u8; PAGE_BYTES as usize], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::kernel;
    use alloc::vec::Vec;

    #[test]
    fn memory_map_is_sorted_and_never_overlaps() {
        for bytes in [2 << 20, 1 << 30, 3 << 30, 6u64 << 30] {
            let ram = RamLayout::new(bytes).expect("legal");
            let map: Vec<_> = e820(&ram).collect();
            assert!(map.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.gpa));
            let usable: u64 =
                map.iter().filter(|(_, kind)| *kind != E820Kind::Reserved).map(|(range, _)| range.bytes).sum();
            assert_eq!(usable, ram.usable_bytes());
        }
    }

    #[test]
    fn fields_are_where_the_protocol_wants_them() {
        let mut image = kernel(1000);
        image[0x211] = 0xff;
        let kernel = BzImage::parse(&image).expect("good");
        let ram = RamLayout::new(6 << 30).expect("legal");
        let initrd = Some(RamRange { gpa: 0x7654_3000, bytes: 0x1234 });
        let page = build(&kernel, &BootInfo { ram: &ram, initrd, command_line: 0x2_0000, rsdp: 0x9_0000 });
        let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!((page[0x210], page[0x211]), (0xff, 0x01));
        assert_eq!(
            (u32_at(0x214), u32_at(0x218), u32_at(0x21c), u32_at(0x228)),
            (0x100_0000, 0x7654_3000, 0x1234, 0x2_0000)
        );
        assert_eq!(u64_at(0x70), 0x9_0000);
        assert_eq!(page[0x1e8], 5);
        let last = 0x2d0 + 4 * 20;
        assert_eq!((u64_at(last), u64_at(last + 8), u32_at(last + 16)), (4 << 30, 3 << 30, 1));
        assert_eq!(&page[..0x70], [0; 0x70], "screen information stays empty");
    }
}
