//! The tables of shadow paging: first-stage tables, which the CPU walks from linear to host addresses.
//!
//! Entries of 8 bytes in the layout of long mode, which PAE shares but for its top table (APM vol 2, 5.2.3 and 5.3). The
//! format is a room of its own beside the second-stage formats, because what it says is different: a leaf knows user and
//! supervisor, carries the guest's protection key, and is always of 4 KiB. What KVM calls SPTE.
//!
//! | bits | meaning |
//! |---|---|
//! | 0 P, 1 W, 2 U, 63 NX | rights of a leaf; a table entry allows everything: rights are the leaf's business |
//! | 3 PWT, 4 PCD | cache type by the host's PAT, as in `npt` |
//! | 5 A, 6 D | set with W, so that the CPU need not write them; A is cleared by aging |
//! | 9 HOST_WRITABLE (software) | the backing lets the guest write, whatever W says |
//! | 12–51 | frame |
//! | 59–62 | the guest's protection key; looked at by the CPU only while CR4.PKE is set |
//!
//! NX needs EFER.NXE in the real register, whatever the guest has in its own. The four entries of a PAE top table
//! ([`Top::Pointers`]) have neither rights nor marks: those bits are reserved there.

use super::MemoryType;
use crate::addr::{Hfn, MAX_FRAME, PAGE_SHIFT};

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const HOST_WRITABLE: u64 = 1 << 9;
const KEY_SHIFT: u32 = 59;
const NX: u64 = 1 << 63;
const FRAME: u64 = (MAX_FRAME - 1) << PAGE_SHIFT;

/// Nothing mapped.
pub(crate) const ABSENT: u64 = 0;

/// Which kind of table an entry that leads to another is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Top {
    /// The top table of PAE.
    Pointers,
    /// Any other.
    Usual,
}

/// A mapping of one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ShadowLeaf {
    pub(crate) hfn: Hfn,
    pub(crate) user: bool,
    pub(crate) write: bool,
    pub(crate) execute: bool,
    pub(crate) host_writable: bool,
    pub(crate) key: u8,
    pub(crate) memory: MemoryType,
}

/// The entry that leads to a table.
pub(crate) const fn table(frame: Hfn, top: Top) -> u64 {
    let frame = frame.0 << PAGE_SHIFT;
    match top {
        Top::Pointers => P | frame,
        Top::Usual => P | W | U | A | frame,
    }
}

/// The table that an entry above level 1 leads to.
#[inline]
pub(crate) fn next_table(raw: u64) -> Option<Hfn> {
    (raw & P != 0).then_some(Hfn((raw & FRAME) >> PAGE_SHIFT))
}

/// The entry of a leaf.
pub(crate) fn leaf(leaf: ShadowLeaf) -> u64 {
    let mut raw = P | A | leaf.hfn.0 << PAGE_SHIFT | u64::from(leaf.key) << KEY_SHIFT;
    if leaf.user {
        raw |= U;
    }
    if leaf.write {
        raw |= W | D;
    }
    if !leaf.execute {
        raw |= NX;
    }
    if leaf.host_writable {
        raw |= HOST_WRITABLE;
    }
    raw | match leaf.memory {
        MemoryType::WriteBack => 0,
        MemoryType::WriteThrough => PWT,
        MemoryType::Uncacheable => PCD | PWT,
    }
}

/// The leaf that an entry of level 1 is.
pub(crate) fn decode_leaf(raw: u64) -> Option<ShadowLeaf> {
    (raw & P != 0).then_some(ShadowLeaf {
        hfn: Hfn((raw & FRAME) >> PAGE_SHIFT),
        user: raw & U != 0,
        write: raw & W != 0,
        execute: raw & NX == 0,
        host_writable: raw & HOST_WRITABLE != 0,
        key: (raw >> KEY_SHIFT) as u8 & 15,
        memory: match raw & (PCD | PWT) {
            0 => MemoryType::WriteBack,
            PWT => MemoryType::WriteThrough,
            _ => MemoryType::Uncacheable,
        },
    })
}

/// Whether an entry of level 1 lets the guest write.
#[inline]
pub(crate) const fn is_writable(raw: u64) -> bool {
    raw & (P | W) == P | W
}

/// The same leaf without the right to write.
#[inline]
pub(crate) const fn write_protected(raw: u64) -> u64 {
    raw & !W
}

/// The same leaf, not used yet.
#[inline]
pub(crate) const fn aged(raw: u64) -> u64 {
    raw & !A
}

const _: () = {
    assert!(ABSENT & P == 0 && FRAME & (NX | HOST_WRITABLE | 15 << KEY_SHIFT) == 0);
    // Reserved in the top table of PAE: 1, 2, 5 to 8, 63:52 (APM vol 2, 5.2.3).
    assert!(table(Hfn(1), Top::Pointers) & (W | U | A | D | 1 << 7 | 1 << 8) == 0);
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_leaf_is_what_it_was_made_of(hfn in 0u64..MAX_FRAME, b: [bool; 4], key in 0u8..16, memory in 0usize..3) {
            let memory = [MemoryType::WriteBack, MemoryType::WriteThrough, MemoryType::Uncacheable][memory];
            let [user, write, execute, host_writable] = b;
            let made = ShadowLeaf { hfn: Hfn(hfn), user, write, execute, host_writable, key, memory };
            let raw = leaf(made);
            prop_assert_eq!(decode_leaf(raw), Some(made));
            prop_assert_eq!(is_writable(raw), write);
            prop_assert_eq!(decode_leaf(write_protected(raw)), Some(ShadowLeaf { write: false, ..made }));
            prop_assert_eq!((raw & A, aged(raw)), (A, raw & !A));
            prop_assert_eq!(next_table(table(Hfn(hfn), Top::Usual)), Some(Hfn(hfn)));
            prop_assert_eq!(next_table(table(Hfn(hfn), Top::Pointers)), Some(Hfn(hfn)));
        }
    }
}
