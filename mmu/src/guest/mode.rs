//! What the control registers say of paging, put into masks once for many walks.

use core::ops::RangeInclusive;

use super::Width;
use crate::addr::{Gpa, INDEX_BITS, PAGE_SHIFT};

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

pub(super) const LARGE: u64 = 1 << 7;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// Levels of the deepest table.
const LEVELS: u8 = 5;
/// Bits of an 8-byte entry that can hold an address.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The registers that choose a mode, as the guest wrote them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Controls {
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// What the guest's CPU is, as far as its page tables depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuFeatures {
    /// Physical address bits (CPUID 0x8000_0008 EAX); entries that name an address above are reserved. 32 to 52, or they
    /// are taken for the nearest of these.
    pub physical_bits: u8,
    /// 1 GiB pages (CPUID 0x8000_0001 EDX bit 26). Without them the large bit at that level is reserved.
    pub gigantic_pages: bool,
}

/// How a table is laid out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Format {
    /// Two levels of 1024 4-byte entries.
    Legacy,
    /// Four 8-byte entries, and two levels of 512.
    Pae,
    /// Four or five levels of 512 8-byte entries.
    Long,
}

/// A way to translate: everything but CR3.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Mode {
    /// `None`: paging is off.
    pub(super) format: Option<Format>,
    pub(super) levels: u8,
    /// Levels at which the large bit makes a leaf, by bit.
    pub(super) large_levels: u8,
    pub(super) write_protect: bool,
    pub(super) smep: bool,
    pub(super) smap: bool,
    pub(super) keys: bool,
    pub(super) no_execute: bool,
    /// Bits that must be 0 in a present entry that leads to a table, and in one that maps a page; by level − 1.
    pub(super) reserved: [[u64; 2]; LEVELS as usize],
    root_mask: u64,
}

impl Mode {
    /// The mode of these registers on that CPU. Registers that no CPU would accept together give a mode as well: the
    /// bits that are looked at first decide.
    pub fn new(controls: Controls, cpu: CpuFeatures) -> Self {
        Self::of_levels(controls, cpu, 1..=LEVELS)
    }

    /// The same for who judges entries of one level alone: at all others everything is reserved.
    pub(crate) fn of_level(controls: Controls, cpu: CpuFeatures, level: u8) -> Self {
        Self::of_levels(controls, cpu, level..=level)
    }

    #[inline]
    fn of_levels(controls: Controls, cpu: CpuFeatures, levels_in_use: RangeInclusive<u8>) -> Self {
        let Controls { cr0, cr4, efer } = controls;
        let address = FRAME & ((1 << cpu.physical_bits.clamp(32, 52)) - 1);
        let (format, levels, root_mask) = if cr0 & CR0_PG == 0 {
            (None, 0, 0)
        } else if efer & EFER_LMA != 0 {
            (Some(Format::Long), if cr4 & CR4_LA57 != 0 { 5 } else { 4 }, address)
        } else if cr4 & CR4_PAE != 0 {
            // Four entries in 32 bytes, which may begin anywhere below 4 GiB (APM vol. 2, 5.2.3).
            (Some(Format::Pae), 3, 0xffff_ffe0)
        } else {
            (Some(Format::Legacy), 2, 0xffff_f000)
        };
        let large_levels = match format {
            None => 0,
            Some(Format::Legacy) => u8::from(cr4 & CR4_PSE != 0) << 2,
            Some(Format::Pae) => 1 << 2,
            Some(Format::Long) => 1 << 2 | u8::from(cpu.gigantic_pages) << 3,
        };
        // The bit has no meaning in 4-byte entries, and fetches are told apart by it in the others.
        let no_execute = efer & EFER_NXE != 0 && matches!(format, Some(Format::Pae | Format::Long));
        let mut mode = Self {
            format,
            levels,
            large_levels,
            write_protect: cr0 & CR0_WP != 0,
            smep: cr4 & CR4_SMEP != 0,
            smap: cr4 & CR4_SMAP != 0,
            keys: cr4 & CR4_PKE != 0 && format == Some(Format::Long),
            no_execute,
            reserved: [[u64::MAX; 2]; LEVELS as usize],
            root_mask,
        };
        if let Some(format) = format {
            for level in levels_in_use {
                let [table, leaf] = &mut mode.reserved[usize::from(level) - 1];
                (*table, *leaf) = reserved(format, level, address, no_execute, large_levels);
            }
        }
        mode
    }

    /// Whether linear addresses are translated at all.
    pub const fn is_paging(&self) -> bool {
        self.format.is_some()
    }

    /// Levels of tables: 0 without paging, 2 to 5 with it.
    pub const fn levels(&self) -> u8 {
        self.levels
    }

    /// The size of an entry; of no meaning without paging.
    #[inline]
    pub const fn entry_width(&self) -> Width {
        if matches!(self.format, Some(Format::Legacy)) { Width::Four } else { Width::Eight }
    }

    /// The address of the top table that `cr3` names.
    pub const fn root(&self, cr3: u64) -> Gpa {
        Gpa(cr3 & self.root_mask)
    }
}

/// Bits that must be 0 at `level`, in an entry that leads to a table and in a leaf (APM vol. 2, 5.2 to 5.4).
fn reserved(format: Format, level: u8, address: u64, no_execute: bool, large_levels: u8) -> (u64, u64) {
    match format {
        // Bits 20:13 of a 4 MiB page are address bits 39:32 (PSE-36); bit 21 is none.
        Format::Legacy => (0, if level == 2 { 1 << 21 } else { 0 }),
        Format::Pae if level == 3 => {
            // No rights here, and no marks. Bits 8:5 and 2:1 are reserved as well, and judged when CR3 is loaded. With nested
            // paging each walk reads these entries (15.25.4), and there are CPUs (QEMU's is one) that mark them as
            // accessed then: what is judged here is the address alone.
            let bits = !address & !0xfff;
            (bits, bits)
        }
        Format::Pae | Format::Long => {
            let mut common = FRAME & !address;
            if !no_execute {
                common |= NO_EXECUTE;
            }
            if format == Format::Pae {
                common |= 0x7ff << 52;
            }
            let large_is_reserved = level > 1 && large_levels & 1 << level == 0;
            let table = if large_is_reserved { common | LARGE } else { common };
            // Below the page's own alignment only the PAT bit (12) means something.
            let offset =
                if level > 1 { (1 << (PAGE_SHIFT + INDEX_BITS * (u32::from(level) - 1))) - (1 << 13) } else { 0 };
            (table, common | offset)
        }
    }
}
