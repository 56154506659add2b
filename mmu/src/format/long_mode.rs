//! The tables of shadow paging: first-stage tables, which the CPU walks from linear to host addresses.
//!
//! Entries of 8 bytes in the layout of long mode, which PAE shares but for its top table (APM vol 2, 5.2.3 and 5.3). The
//! format is a room of its own beside the second-stage formats, because what it says is different: a leaf knows user and
//! supervisor, and carries the guest's protection key. What KVM calls SPTE.
//!
//! | bits | meaning |
//! |---|---|
//! | 0 P, 1 W, 2 U, 63 NX | rights of a leaf; a table entry allows everything: rights are the leaf's business |
//! | 3 PWT, 4 PCD | cache type by the host's PAT, as in `npt` |
//! | 5 A, 6 D | set with W, so that the CPU need not write them; A is cleared by aging |
//! | 7 PS | in a table of level 2: a leaf of 2 MiB. (In one of level 1 the bit is PAT's, and is 0; PAT's of 2 MiB, 12, too) |
//! | 9 HOST_WRITABLE (software) | the backing lets the guest write, whatever W says |
//! | 12–51 | frame |
//! | 59–62 | the guest's protection key; looked at by the CPU only while CR4.PKE is set |
//!
//! NX needs EFER.NXE in the real register, whatever the guest has in its own. The four entries of a PAE top table
//! ([`Top::Pointers`]) have neither rights nor marks: those bits are reserved there.

use super::MemoryType;
use crate::addr::{Hfn, MAX_FRAME, PAGE_SHIFT};
use crate::guest::Rights;

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const HOST_WRITABLE: u64 = 1 << 9;
const KEY_SHIFT: u32 = 59;
const NX: u64 = 1 << 63;
const FRAME: u64 = (MAX_FRAME - 1) << PAGE_SHIFT;

/// Bits of a leaf that the guest's entries decide, where a guest's entry of 8 bytes has them as well.
pub(crate) const WRITE: u64 = W;
/// See [`WRITE`].
pub(crate) const USER: u64 = U;
/// See [`WRITE`].
pub(crate) const NO_EXECUTE: u64 = NX;
/// See [`WRITE`].
pub(crate) const KEY: u64 = 15 << KEY_SHIFT;
/// What a guest's entry must have before anything is made of it.
pub(crate) const PRESENT_AND_ACCESSED: u64 = P | A;

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
    (raw & (P | PS) == P).then_some(Hfn((raw & FRAME) >> PAGE_SHIFT))
}

/// The bits of a leaf that the guest decides.
pub(crate) const fn rights(rights: Rights, key: u8) -> u64 {
    let mut raw = (key as u64) << KEY_SHIFT;
    if rights.user {
        raw |= U;
    }
    if rights.write {
        raw |= W;
    }
    if !rights.execute {
        raw |= NX;
    }
    raw
}

/// The entry of a leaf: the bits that the guest decides, as [`rights`] gives them, and what the host does.
#[inline]
pub(crate) fn leaf(bits: u64, hfn: Hfn, host_writable: bool, memory: MemoryType) -> u64 {
    let raw = bits | (bits & W) << (D.ilog2() - W.ilog2()) | P | A | hfn.0 << PAGE_SHIFT;
    let raw = if host_writable { raw | HOST_WRITABLE } else { raw };
    raw | match memory {
        MemoryType::WriteBack => 0,
        MemoryType::WriteThrough => PWT,
        MemoryType::Uncacheable => PCD | PWT,
    }
}

/// The same as a leaf of 2 MiB, of frames from this one on.
pub(crate) const fn large(leaf: u64) -> u64 {
    leaf | PS
}

/// The leaf of 4 KiB that says of one frame, counted from the first, what a leaf of 2 MiB says of it.
#[inline]
pub(crate) const fn part(large: u64, index: usize) -> u64 {
    (large & !PS) + ((index as u64) << PAGE_SHIFT)
}

/// The frame that a leaf maps, or the first one, if it is present.
#[inline]
pub(crate) fn mapped(raw: u64) -> Option<Hfn> {
    (raw & P != 0).then_some(frame(raw))
}

/// The frame that a leaf maps, or the first one; it is present.
#[inline]
pub(crate) const fn frame(raw: u64) -> Hfn {
    Hfn((raw & FRAME) >> PAGE_SHIFT)
}

/// Whether a leaf lets the guest write.
#[inline]
pub(crate) const fn is_writable(raw: u64) -> bool {
    raw & (P | W) == P | W
}

/// The same leaf without the right to write.
#[inline]
pub(crate) const fn write_protected(raw: u64) -> u64 {
    raw & !W
}

/// Whether the leaf `new` in the place of `old`, of the same frame, lets anybody do less: rights that were added alone are
/// nothing that a TLB would have to forget. (That a page has become the user's takes it from a supervisor under SMAP.)
#[inline]
pub(crate) const fn takes_away(old: u64, new: u64) -> bool {
    (old ^ new) & (U | KEY) | old & !new & W | new & !old & NX != 0
}

/// Whether a leaf was used since it was made, or made old.
#[inline]
pub(crate) const fn is_young(raw: u64) -> bool {
    raw & (P | A) == P | A
}

/// The same leaf, not used yet.
#[inline]
pub(crate) const fn aged(raw: u64) -> u64 {
    raw & !A
}

const _: () = {
    assert!(ABSENT & P == 0 && FRAME & (NX | HOST_WRITABLE | PS | 15 << KEY_SHIFT) == 0);
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
            let bits = rights(Rights { user, write, execute }, key);
            let raw = leaf(bits, Hfn(hfn), host_writable, memory);
            prop_assert_eq!(frame(raw), Hfn(hfn));
            prop_assert_eq!([raw & U != 0, raw & W != 0, raw & NX == 0, raw & HOST_WRITABLE != 0], b);
            prop_assert_eq!((raw >> KEY_SHIFT & 15, raw & D != 0, raw & P), (u64::from(key), write, P));
            prop_assert_eq!(raw & (PCD | PWT), leaf(0, Hfn(0), false, memory) & (PCD | PWT));
            prop_assert_eq!(is_writable(raw), write);
            prop_assert_eq!((raw ^ write_protected(raw)) & !W, 0);
            prop_assert!(!is_writable(write_protected(raw)));
            prop_assert_eq!((raw & A, aged(raw)), (A, raw & !A));
            let (first, index) = (hfn & !0x1ff, hfn as usize & 0x1ff);
            let whole = large(leaf(bits, Hfn(first), host_writable, memory));
            prop_assert_eq!((part(whole, index), next_table(whole)), (raw, None));
            prop_assert_eq!((mapped(whole), mapped(ABSENT)), (Some(Hfn(first)), None));
            prop_assert!(!takes_away(raw, raw) && !takes_away(raw, raw | W) && !takes_away(raw, raw & !NX));
            prop_assert_eq!((takes_away(raw, raw & !W), takes_away(raw, raw | NX)), (write, execute));
            prop_assert!(takes_away(raw, raw ^ U) && takes_away(raw, raw ^ 1 << KEY_SHIFT));
            prop_assert_eq!(next_table(table(Hfn(hfn), Top::Usual)), Some(Hfn(hfn)));
            prop_assert_eq!(next_table(table(Hfn(hfn), Top::Pointers)), Some(Hfn(hfn)));
        }
    }
}
