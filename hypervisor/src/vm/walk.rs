//! Page walks for reports: the guest's own tables, and the nested ones. Nothing here changes a bit or allocates guest
//! memory; a walk ends where there is nothing to read.

use alloc::vec::Vec;
use core::ptr;

use nestling_control::message::WalkStep;

const PRESENT: u64 = 1 << 0;
const ACCESSED: u64 = 1 << 5;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// The registers that say how a guest translates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagingRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER, without the bit that belongs to the hypervisor.
    pub efer: u64,
}

/// Entries read, and the address they lead to.
#[derive(Debug, Default)]
pub struct Walk {
    /// Root first.
    pub steps: Vec<WalkStep>,
    /// The translation, if there is one.
    pub address: Option<u64>,
}

/// Walks the guest's tables for a linear address; `read` gives 8 bytes of guest-physical memory.
#[must_use]
pub fn guest(paging: PagingRegisters, linear: u64, read: impl Fn(u64) -> Option<u64>) -> Walk {
    let PagingRegisters { cr0, cr3, cr4, efer } = paging;
    if cr0 & CR0_PG == 0 {
        return Walk { steps: Vec::new(), address: Some(linear & 0xffff_ffff) };
    }
    if efer & EFER_LMA != 0 {
        let levels = if cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        return walk(cr3 & ADDRESS, levels, linear, read);
    }
    let linear = linear & 0xffff_ffff;
    if cr4 & CR4_PAE != 0 {
        // The third level of PAE is four entries in 32 bytes that CR3 addresses exactly.
        let address = (cr3 & 0xffff_ffe0) + (linear >> 30) * 8;
        let Some(entry) = read(address) else { return Walk::default() };
        let mut walked = Walk::default();
        if entry & PRESENT != 0 {
            walked = walk(entry & ADDRESS, 2, linear, read);
        }
        walked.steps.insert(0, WalkStep { level: 3, address, entry });
        return walked;
    }
    walk_32(cr3, linear, read)
}

/// 32-bit paging: two levels of 4-byte entries.
fn walk_32(cr3: u64, linear: u64, read: impl Fn(u64) -> Option<u64>) -> Walk {
    let read_4 = |at: u64| read(at & !7).map(|word| word >> (8 * (at & 4)) & 0xffff_ffff);
    let mut walked = Walk::default();
    let mut table = cr3 & 0xffff_f000;
    for level in [2, 1] {
        let address = table + (linear >> (2 + 10 * u64::from(level)) & 0x3ff) * 4;
        let Some(entry) = read_4(address) else { return walked };
        walked.steps.push(WalkStep { level, address, entry });
        if entry & PRESENT == 0 {
            return walked;
        }
        if level == 2 && entry & LARGE != 0 {
            walked.address = Some(entry & 0xffc0_0000 | linear & 0x3f_ffff);
            return walked;
        }
        table = entry & 0xffff_f000;
    }
    walked.address = Some(table | linear & 0xfff);
    walked
}

/// Tables of 512 8-byte entries, from `level` down.
fn walk(root: u64, levels: u8, address: u64, read: impl Fn(u64) -> Option<u64>) -> Walk {
    let mut walked = Walk::default();
    let mut table = root;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * u32::from(level - 1);
        let at = table + (address >> shift & 0x1ff) * 8;
        let Some(entry) = read(at) else { return walked };
        walked.steps.push(WalkStep { level, address: at, entry });
        if entry & PRESENT == 0 {
            return walked;
        }
        if level == 1 || (level <= 3 && entry & LARGE != 0) {
            let offset = (1 << shift) - 1;
            walked.address = Some(entry & ADDRESS & !offset | address & offset);
            return walked;
        }
        table = entry & ADDRESS;
    }
    walked
}

/// Walks a nested table of four levels for a guest physical address.
///
/// # Safety
/// `root` is the root of a table that is not taken down meanwhile, in identity-mapped memory.
#[must_use]
pub unsafe fn nested(root: u64, gpa: u64) -> Walk {
    // SAFETY: the walk follows present entries of the caller's table only.
    walk(root, 4, gpa, |at| Some(unsafe { ptr::with_exposed_provenance::<u64>(at as usize).read_volatile() }))
}

/// Bytes that the leaves of a nested table of four levels map and whose accessed bit is set.
///
/// # Safety
/// As [`nested`].
#[must_use]
pub unsafe fn accessed_bytes(root: u64) -> u64 {
    // SAFETY: the caller vouches for the table.
    unsafe { accessed_below(root, 4) }
}

/// # Safety
/// As [`nested`], for a table of that level.
unsafe fn accessed_below(table: u64, level: u32) -> u64 {
    let size = 1u64 << (12 + 9 * (level - 1));
    (0..512)
        .map(|index| {
            // SAFETY: a table has 512 entries.
            let entry = unsafe { ptr::with_exposed_provenance::<u64>((table + index * 8) as usize).read_volatile() };
            match entry {
                _ if entry & PRESENT == 0 => 0,
                _ if level == 1 || (level <= 3 && entry & LARGE != 0) => u64::from(entry & ACCESSED != 0) * size,
                // SAFETY: a present entry that is no leaf leads to a table of the level below.
                _ => unsafe { accessed_below(entry & ADDRESS, level - 1) },
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;

    fn memory(entries: &[(u64, u64)]) -> impl Fn(u64) -> Option<u64> {
        let entries: BTreeMap<u64, u64> = entries.iter().copied().collect();
        move |at| entries.get(&at).copied()
    }

    const LONG: PagingRegisters = PagingRegisters { cr0: CR0_PG, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA };

    #[test]
    fn four_levels_and_large_pages() {
        let read = memory(&[(0x1000, 0x2001), (0x2008, 0x3001), (0x3010, 0x20_0081 | 0x40_0000), (0x3018, 0x5001)]);
        let large = guest(LONG, 0x4040_1234, &read);
        assert_eq!((large.steps.len(), large.address), (3, Some(0x60_1234)));
        let missing = guest(LONG, 0x4060_0000, &read);
        assert_eq!((missing.steps.len(), missing.address), (3, None), "the last table can't be read");
    }

    #[test]
    fn older_modes() {
        let off = guest(PagingRegisters { cr0: 0, ..LONG }, 0x1_0000_7c00, |_| None);
        assert_eq!(off.address, Some(0x7c00));
        let pae = guest(
            PagingRegisters { efer: 0, cr3: 0x1020, ..LONG },
            0xc000_1000,
            memory(&[(0x1038, 0x2001), (0x2000, 0x3001), (0x3008, 0x7001)]),
        );
        assert_eq!((pae.steps.len(), pae.address), (3, Some(0x7000)));
        let old = guest(
            PagingRegisters { efer: 0, cr4: 0, ..LONG },
            0x0040_3004,
            memory(&[(0x1000, 0x2001 << 32), (0x2008, 0x9001 << 32)]),
        );
        assert_eq!((old.steps.len(), old.address), (2, Some(0x9004)));
    }
}
