//! The tables that cases use, and what they map beside: this kernel, to itself.
//!
//! A case has a set of tables, one a level, and a root of its own with them: what a hypervisor keeps of a table that was a
//! case's is met by a later one that writes other entries to it.

use core::sync::atomic::{AtomicU64, Ordering};

use nestling_conformance::{LEVELS, Paging, TABLE_SETS};

use super::shooter::USER_CODE;

/// What is mapped of this kernel's memory, as 2 MiB pages.
const MAPPED: u64 = 32;
const LARGE_SHIFT: u32 = 21;

/// Present, writable, accessed, dirty.
const OWN: u64 = 0x63;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;

#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

impl Table {
    const fn empty() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }

    fn address(&self) -> u64 {
        core::ptr::from_ref(self).expose_provenance() as u64
    }

    fn set(&self, index: u64, entry: u64) {
        self.0[index as usize].store(entry, Ordering::SeqCst);
    }

    /// Writes a 4-byte entry.
    fn set_short(&self, index: u64, entry: u64) {
        let shift = 32 * (index & 1);
        let both = self.0[index as usize / 2].load(Ordering::SeqCst);
        self.set(index / 2, both & !(0xffff_ffff << shift) | entry << shift);
    }
}

/// A case's tables: by set, then by level − 1.
static SETS: [[Table; LEVELS]; TABLE_SETS as usize] =
    [const { [const { Table::empty() }; LEVELS] }; TABLE_SETS as usize];
/// What maps this kernel: the directory of 2 MiB pages, what leads to it, and tables of 4-byte entries.
static DIRECTORY: Table = Table::empty();
static ABOVE: [Table; 2] = [const { Table::empty() }; 2];
static SHORT: [Table; MAPPED as usize / 2] = [const { Table::empty() }; MAPPED as usize / 2];

/// The address of the table of a level.
pub(super) fn table(set: u8, level: u8) -> u64 {
    SETS[usize::from(set)][usize::from(level) - 1].address()
}

/// Makes all sets ready for a mode.
pub(super) fn set_up(paging: Paging) {
    let user = USER_CODE >> LARGE_SHIFT;
    let rights = |page: u64| OWN | if page == user { USER } else { 0 };
    for page in 0..MAPPED {
        DIRECTORY.set(page, page << LARGE_SHIFT | rights(page) | LARGE);
        for small in 0..512 {
            let index = page * 512 + small;
            SHORT[index as usize / 1024].set_short(index % 1024, index << 12 | rights(page));
        }
    }
    ABOVE[0].set(0, DIRECTORY.address() | OWN | USER);
    ABOVE[1].set(0, ABOVE[0].address() | OWN | USER);
    for set in &SETS {
        set.iter().flat_map(|table| &table.0).for_each(|entry| entry.store(0, Ordering::SeqCst));
        let root = &set[usize::from(paging.levels()) - 1];
        match paging {
            Paging::Legacy => {
                for (index, table) in SHORT.iter().enumerate() {
                    root.set_short(index as u64, table.address() | OWN | USER);
                }
            }
            // The top entries of PAE have no rights.
            Paging::Pae => root.set(0, DIRECTORY.address() | 1),
            Paging::Long4 => root.set(0, ABOVE[0].address() | OWN | USER),
            Paging::Long5 => root.set(0, ABOVE[1].address() | OWN | USER),
        }
    }
}
