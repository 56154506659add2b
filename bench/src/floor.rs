//! The floor: a bare lock-free walk with compare-and-swap.
//!
//! What any table that is filled by several threads at once has to do, and nothing else: no lock, no slots, no
//! backing, no accounting, no protection against tables that go away, no flush. Entries are those of the CPU: present
//! (0), writable (1), user (2), accessed (5), dirty (6), huge (7).

#![expect(unsafe_code, reason = "table addresses found in entries are followed here")]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::{self, Claim, ENTRIES};

const PRESENT: u64 = 1 << 0;
const TABLE: u64 = 1 << 5 | 0b111;
const LEAF: u64 = 1 << 6 | 1 << 5 | 0b111;
const HUGE: u64 = 1 << 7;
const PAGE: u64 = 1 << 12;
const ADDRESS: u64 = (1 << 52) - (1 << 12);

/// Four levels of tables.
#[derive(Debug)]
pub struct Floor {
    root: u64,
    _claim: Claim,
}

/// The entries of the table at `address`.
#[inline]
fn entries<'a>(address: u64) -> &'a [AtomicU64; ENTRIES] {
    // SAFETY: the address is the root's or came from a table entry, so the arena gave it; it holds a table that nobody
    // frees while the floor holds the claim, and that everyone uses as atomics.
    unsafe { arena::entries(address).as_ref() }
}

/// Index of the entry for `gpa` in a table `level` levels above the leaves'.
#[inline]
fn index(gpa: u64, level: u32) -> usize {
    (gpa >> (12 + 9 * level)) as usize & (ENTRIES - 1)
}

impl Floor {
    /// An empty table.
    pub fn new(claim: Claim) -> Option<Self> {
        Some(Self { root: arena::alloc()?, _claim: claim })
    }

    /// Address of the root table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Maps the page at `gpa` to `hpa`; false if it is mapped already, lies in a huge page, or there is no frame for a table.
    #[inline]
    pub fn map(&self, gpa: u64, hpa: u64) -> bool {
        let mut table = entries(self.root);
        for level in [3, 2, 1] {
            let cell = &table[index(gpa, level)];
            let mut raw = cell.load(Ordering::Acquire);
            if raw & (PRESENT | HUGE) != PRESENT {
                match grow(cell, raw) {
                    Some(linked) => raw = linked,
                    None => return false,
                }
            }
            table = entries(raw & ADDRESS);
        }
        let leaf = hpa | LEAF;
        table[index(gpa, 0)].compare_exchange(0, leaf, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The table of leaves that `gpa` belongs to, if there is one.
    #[inline]
    fn leaves(&self, gpa: u64) -> Option<&[AtomicU64; ENTRIES]> {
        let mut table = entries(self.root);
        for level in [3, 2, 1] {
            let raw = table[index(gpa, level)].load(Ordering::Acquire);
            if raw & (PRESENT | HUGE) != PRESENT {
                return None;
            }
            table = entries(raw & ADDRESS);
        }
        Some(table)
    }

    /// The host-physical address that the page at `gpa` is mapped to.
    #[inline]
    pub fn look_up(&self, gpa: u64) -> Option<u64> {
        let raw = self.leaves(gpa)?[index(gpa, 0)].load(Ordering::Acquire);
        (raw & PRESENT != 0).then_some(raw & ADDRESS)
    }

    /// Unmaps the page at `gpa`; false if it was not mapped.
    #[inline]
    pub fn zap(&self, gpa: u64) -> bool {
        self.leaves(gpa).is_some_and(|leaves| clear(&leaves[index(gpa, 0)]))
    }

    /// Unmaps `pages` pages from `first`, with one walk a table; returns how many were mapped.
    pub fn zap_range(&self, first: u64, pages: u64) -> u64 {
        let (mut gpa, end, mut zapped) = (first, first + pages * PAGE, 0);
        while gpa < end {
            let next = ((gpa | (ENTRIES as u64 * PAGE - 1)) + 1).min(end);
            if let Some(leaves) = self.leaves(gpa) {
                let covered = &leaves[index(gpa, 0)..][..((next - gpa) / PAGE) as usize];
                zapped += covered.iter().filter(|cell| clear(cell)).count() as u64;
            }
            gpa = next;
        }
        zapped
    }
}

/// Links a new table into `cell`, which held `raw`; the entry that leads on, from whomever it is. A frame that loses
/// the race is lost until the arena starts afresh.
#[cold]
fn grow(cell: &AtomicU64, raw: u64) -> Option<u64> {
    if raw & PRESENT != 0 {
        return None;
    }
    let new = arena::alloc()? | TABLE;
    match cell.compare_exchange(raw, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Some(new),
        Err(now) => (now & (PRESENT | HUGE) == PRESENT).then_some(now),
    }
}

/// Empties a leaf's entry; whether it was mapped. A swap, because the CPU sets accessed and dirty bits at any time.
#[inline]
fn clear(cell: &AtomicU64) -> bool {
    cell.swap(0, Ordering::AcqRel) & PRESENT != 0
}
