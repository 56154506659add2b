//! The states in which vCPUs start, as plain data.
//!
//! Where Linux's boot protocol (64-bit and 32-bit) and Multiboot put the first vCPU, where a start-up IPI puts any other
//! (real mode, AMD APM vol. 2, 14.1.3), and where firmware puts the first after a sleep. Registers that are not named are
//! 0. Segment attributes are in the packed form that a VMCB holds (APM vol. 2, appendix B): type and S in 4:0, DPL in 6:5,
//! P in 7, AVL, L, D/B and G in 11:8.

use super::layout::{GDT, PAGE_BYTES, PAGE_TABLES, STACK_TOP};
use super::{GuestMemory, GuestMemoryError};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always 1.
const RFLAGS_FIXED: u64 = 1 << 1;

/// PAT after reset (APM vol. 2, 7.8.2).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const DR6_RESET: u64 = 0xffff_0ff0;
const DR7_RESET: u64 = 0x400;

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Null, unused, flat 64-bit code, flat data.
const GDT_64: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// The same for a kernel that is entered in protected mode: its code is 32-bit.
const GDT_32: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const GDT_LIMIT: u16 = size_of_val(&GDT_64) as u16 - 1;

/// Selectors of the flat segments that Multiboot asks for without saying which.
const MULTIBOOT_CS: u16 = 0x08;
const MULTIBOOT_DS: u16 = 0x10;

const ATTR_CODE_64: u16 = 0xa9b;
const ATTR_CODE_32: u16 = 0xc9b;
const ATTR_DATA_FLAT: u16 = 0xc93;
const ATTR_CODE_REAL: u16 = 0x09b;
const ATTR_DATA_REAL: u16 = 0x093;
const ATTR_LDT: u16 = 0x082;
const ATTR_TSS_BUSY: u16 = 0x08b;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
const PTE_LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

/// A segment register with its hidden part. Laid out as in a control block, from which it is copied for each instruction
/// that is executed in software.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// The selector.
    pub selector: u16,
    /// Packed attributes, 12 bits.
    pub attributes: u16,
    /// Limit in bytes, after the granularity is applied.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRegister {
    /// Limit in bytes.
    pub limit: u16,
    /// Base address.
    pub base: u64,
}

/// Everything about a starting vCPU that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuInit {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// The magic number, for Multiboot.
    pub rax: u64,
    /// The information structure, for Multiboot.
    pub rbx: u64,
    /// The boot parameters, for the boot protocol.
    pub rsi: u64,
    /// Flags.
    pub rflags: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// The guest's view of EFER: without SVME, which the VMCB needs in addition.
    pub efer: u64,
    /// Debug register 6.
    pub dr6: u64,
    /// Debug register 7.
    pub dr7: u64,
    /// Page attribute table.
    pub pat: u64,
    /// Code segment.
    pub cs: Segment,
    /// Data segments, all alike: DS, ES, FS, GS and SS.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
}

impl VcpuInit {
    /// The state of the 64-bit boot protocol. [`write_tables`] must have written what CR3 and GDTR point to.
    pub const fn linux_64(entry: u64, boot_params: u64) -> Self {
        let flat = Segment { selector: BOOT_DS, attributes: ATTR_DATA_FLAT, limit: u32::MAX, base: 0 };
        Self {
            rip: entry,
            rsp: STACK_TOP,
            rax: 0,
            rbx: 0,
            rsi: boot_params,
            rflags: RFLAGS_FIXED,
            cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
            cr3: PAGE_TABLES,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            dr6: DR6_RESET,
            dr7: DR7_RESET,
            pat: PAT_RESET,
            cs: Segment { selector: BOOT_CS, attributes: ATTR_CODE_64, limit: u32::MAX, base: 0 },
            data: flat,
            tr: Segment { selector: 0, attributes: ATTR_TSS_BUSY, limit: 0xffff, base: 0 },
            ldtr: Segment { selector: 0, attributes: ATTR_LDT, limit: 0xffff, base: 0 },
            gdtr: TableRegister { limit: GDT_LIMIT, base: GDT },
            idtr: TableRegister { limit: 0, base: 0 },
        }
    }

    /// The state of the 32-bit boot protocol: protected mode with flat segments, no paging, interrupts off, and EBP, EDI
    /// and EBX 0. [`write_descriptors_32`] must have written what GDTR points to.
    pub const fn linux_32(entry: u32, boot_params: u32) -> Self {
        Self {
            rip: entry as u64,
            rsi: boot_params as u64,
            cr0: CR0_PE | CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            cs: Segment { selector: BOOT_CS, attributes: ATTR_CODE_32, limit: u32::MAX, base: 0 },
            ..Self::linux_64(0, 0)
        }
    }

    /// The state of Multiboot (specification 0.6.96, 3.2): 32-bit protected mode with flat segments, no paging, and no
    /// descriptor table that could be relied on.
    pub const fn multiboot(entry: u32, magic: u32, info: u32) -> Self {
        let flat = Segment { selector: MULTIBOOT_DS, attributes: ATTR_DATA_FLAT, limit: u32::MAX, base: 0 };
        let none = TableRegister { limit: 0, base: 0 };
        Self {
            rip: entry as u64,
            rsp: 0,
            rax: magic as u64,
            rbx: info as u64,
            rsi: 0,
            rflags: RFLAGS_FIXED,
            cr0: CR0_PE | CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr6: DR6_RESET,
            dr7: DR7_RESET,
            pat: PAT_RESET,
            cs: Segment { selector: MULTIBOOT_CS, attributes: ATTR_CODE_32, limit: u32::MAX, base: 0 },
            data: flat,
            tr: Segment { selector: 0, attributes: ATTR_TSS_BUSY, limit: 0xffff, base: 0 },
            ldtr: Segment { selector: 0, attributes: ATTR_LDT, limit: 0xffff, base: 0 },
            gdtr: none,
            idtr: none,
        }
    }

    /// The state after INIT and a start-up IPI with `vector`: real mode, at `vector << 12`. CR0 has the caches on, as
    /// firmware left them; INIT doesn't change CD and NW.
    pub const fn startup(vector: u8) -> Self {
        let data = Segment { selector: 0, attributes: ATTR_DATA_REAL, limit: 0xffff, base: 0 };
        Self {
            rip: 0,
            rsp: 0,
            rax: 0,
            rbx: 0,
            rsi: 0,
            rflags: RFLAGS_FIXED,
            cr0: CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr6: DR6_RESET,
            dr7: DR7_RESET,
            pat: PAT_RESET,
            cs: Segment {
                selector: (vector as u16) << 8,
                attributes: ATTR_CODE_REAL,
                limit: 0xffff,
                base: (vector as u64) << 12,
            },
            data,
            tr: Segment { selector: 0, attributes: ATTR_TSS_BUSY, limit: 0xffff, base: 0 },
            ldtr: Segment { selector: 0, attributes: ATTR_LDT, limit: 0xffff, base: 0 },
            gdtr: TableRegister { limit: 0xffff, base: 0 },
            idtr: TableRegister { limit: 0xffff, base: 0 },
        }
    }

    /// The state in which firmware leaves a machine that wakes: real mode, at a vector below 1 MiB whose paragraph is the
    /// code segment (ACPI 6.5, 5.2.10).
    pub const fn waking(vector: u32) -> Self {
        let start = Self::startup(0);
        let paragraph = vector >> 4;
        let cs = Segment { selector: paragraph as u16, base: (paragraph as u64) << 4, ..start.cs };
        Self { rip: (vector & 0xf) as u64, cs, ..start }
    }
}

/// Writes the descriptor table and the page tables of [`VcpuInit::linux_64`]: the first 4 GiB mapped to themselves by
/// 2 MiB pages, which covers the kernel, the initrd, the boot parameters and the command line wherever they may be.
pub fn write_tables(memory: &impl GuestMemory) -> Result<(), GuestMemoryError> {
    write_descriptors(memory, GDT_64)?;
    let table = |index: u64| PAGE_TABLES + index * PAGE_BYTES;
    let flags = PTE_PRESENT | PTE_WRITABLE;
    memory.write(table(0), &page(|index| if index == 0 { table(1) | flags } else { 0 }))?;
    memory.write(table(1), &page(|index| if index < 4 { table(2 + index) | flags } else { 0 }))?;
    for gib in 0..4 {
        memory.write(table(2 + gib), &page(|index| (gib * 512 + index) * LARGE_PAGE + (flags | PTE_LARGE)))?;
    }
    Ok(())
}

/// Writes the descriptor table of [`VcpuInit::linux_32`].
pub fn write_descriptors_32(memory: &impl GuestMemory) -> Result<(), GuestMemoryError> {
    write_descriptors(memory, GDT_32)
}

fn write_descriptors(memory: &impl GuestMemory, entries: [u64; 4]) -> Result<(), GuestMemoryError> {
    (0u64..).zip(entries).try_for_each(|(index, entry)| memory.write(GDT + 8 * index, &entry.to_le_bytes()))
}

fn page(entry: impl Fn(u64) -> u64) -> [u8; PAGE_BYTES as usize] {
    let mut page = [0; PAGE_BYTES as usize];
    for (index, bytes) in (0..).zip(page.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&entry(index).to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::TestMemory;

    /// A walk as the CPU does it, for 4-level tables with large pages.
    fn translate(memory: &TestMemory, cr3: u64, address: u64) -> Option<u64> {
        let mut table = cr3;
        for level in [3, 2, 1] {
            let shift = 12 + 9 * level;
            let entry = memory.u64(table + (address >> shift & 0x1ff) * 8);
            if entry & PTE_PRESENT == 0 {
                return None;
            }
            if level == 1 && entry & PTE_LARGE != 0 {
                return Some(entry & !(LARGE_PAGE - 1) | address & (LARGE_PAGE - 1));
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        None
    }

    #[test]
    fn first_four_gigabytes_map_to_themselves() {
        let memory = TestMemory::new(16 << 20);
        write_tables(&memory).expect("low memory is RAM");
        let init = VcpuInit::linux_64(0x100_0200, 0x1_0000);
        for address in [0, 0x1_0000, 0x100_0200, 0x3fff_ffff, 0x4000_0000, 0xbfff_f123, 0xffff_ffff] {
            assert_eq!(translate(&memory, init.cr3, address), Some(address));
        }
        assert_eq!(translate(&memory, init.cr3, 1 << 32), None);
        assert_eq!(translate(&memory, init.cr3, 1 << 39), None);
    }

    #[test]
    fn hidden_segment_parts_agree_with_the_descriptors() {
        let memory = TestMemory::new(16 << 20);
        let agree = |init: VcpuInit| {
            for segment in [init.cs, init.data] {
                let descriptor = memory.u64(init.gdtr.base + u64::from(segment.selector));
                let attributes = (descriptor >> 40 & 0xff) | (descriptor >> 52 & 0xf) << 8;
                assert_eq!(attributes, u64::from(segment.attributes));
            }
            assert!(init.gdtr.limit >= BOOT_DS + 7);
        };
        write_tables(&memory).expect("low memory is RAM");
        agree(VcpuInit::linux_64(0, 0));
        write_descriptors_32(&memory).expect("low memory is RAM");
        agree(VcpuInit::linux_32(0, 0));
    }

    #[test]
    fn the_32_bit_protocol_neither_pages_nor_is_in_long_mode() {
        let init = VcpuInit::linux_32(0x100_0000, 0x1_0000);
        assert_eq!((init.rip, init.rsi, init.rbx, init.rflags), (0x100_0000, 0x1_0000, 0, RFLAGS_FIXED));
        assert_eq!((init.cr0, init.cr3, init.cr4, init.efer), (CR0_PE | CR0_ET, 0, 0, 0));
        assert_eq!((init.cs.selector, init.data.selector), (0x10, 0x18));
    }

    #[test]
    fn startup_vector_is_the_page() {
        let init = VcpuInit::startup(0x9a);
        assert_eq!((init.cs.base, init.cs.selector, init.rip), (0x9_a000, 0x9a00, 0));
        assert_eq!((init.cr0 & 1, init.efer, init.rflags), (0, 0, 2));
        let init = VcpuInit::waking(0x9_a347);
        assert_eq!((init.cs.base, init.cs.selector, init.rip), (0x9_a340, 0x9a34, 7));
    }
}
