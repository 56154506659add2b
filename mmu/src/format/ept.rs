//! Intel extended page tables (SDM vol 3, 30.3).
//!
//! | bits | meaning |
//! |---|---|
//! | 0 R, 1 W, 2 X | rights |
//! | 3–5, 6 IPAT | leaf: memory type; the guest's PAT is honoured (IPAT clear) but for device memory |
//! | 7 | leaf above 4 KiB |
//! | 8 A, 9 D | set by the CPU when EPTP bit 6 turns them on |
//! | 11 PRESENT (software) | a table or leaf of ours |
//! | 12–51 | frame |
//! | 53 HOST_WRITABLE, 55 MMU_WRITABLE | software |
//! | 56 R, 58 X (software) | access-tracked: the rights as they were, while bits 0–2 are clear |
//! | MMIO: 110b in bits 0–2 | write without read is a misconfiguration; generation in 3–9, 52–62 |

use super::{Format, Leaf, MemoryType, Rights, State, generation};
use crate::addr::{Hfn, Level, MAX_FRAME, PAGE_SHIFT};

const R: u64 = 1 << 0;
const W: u64 = 1 << 1;
const X: u64 = 1 << 2;
const RWX: u64 = R | W | X;
const TYPE_SHIFT: u32 = 3;
const TYPE_MASK: u64 = 7 << TYPE_SHIFT;
const TYPE_UC: u64 = 0 << TYPE_SHIFT;
const TYPE_WT: u64 = 4 << TYPE_SHIFT;
const TYPE_WB: u64 = 6 << TYPE_SHIFT;
const IPAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const PRESENT: u64 = 1 << 11;
const HOST_WRITABLE: u64 = 1 << 53;
const MMU_WRITABLE: u64 = 1 << 55;
const SAVED_SHIFT: u32 = 56;
const FRAME: u64 = (MAX_FRAME - 1) << PAGE_SHIFT;

const MMIO: u64 = W | X;
const MMIO_MASK: u64 = RWX | PRESENT;

/// The EPT format. 4 and 5 levels differ in the root's level alone.
#[derive(Clone, Copy, Debug)]
pub struct Ept;

impl Ept {
    #[inline]
    fn leaf_bits(level: Level, leaf: Leaf) -> u64 {
        let mut raw = PRESENT | leaf.hfn.0 << PAGE_SHIFT;
        if level > Level::K4 {
            raw |= LARGE;
        }
        if leaf.host_writable {
            raw |= HOST_WRITABLE;
        }
        if leaf.mmu_writable {
            raw |= MMU_WRITABLE;
        }
        if leaf.accessed {
            raw |= A;
        }
        if leaf.dirty {
            raw |= D;
        }
        raw | match leaf.memory {
            MemoryType::WriteBack => TYPE_WB,
            MemoryType::WriteThrough => TYPE_WT,
            MemoryType::Uncacheable => TYPE_UC | IPAT,
        }
    }

    #[inline]
    fn right_bits(rights: Rights) -> u64 {
        let mut raw = R;
        if rights.contains(Rights::WRITE) {
            raw |= W;
        }
        if rights.contains(Rights::EXECUTE) {
            raw |= X;
        }
        raw
    }

    #[inline]
    fn decode_leaf(raw: u64, rights: u64) -> Leaf {
        let mut allowed = Rights::READ;
        allowed.set(Rights::WRITE, rights & W != 0);
        allowed.set(Rights::EXECUTE, rights & X != 0);
        Leaf {
            hfn: Hfn((raw & FRAME) >> PAGE_SHIFT),
            rights: allowed,
            host_writable: raw & HOST_WRITABLE != 0,
            mmu_writable: raw & MMU_WRITABLE != 0,
            accessed: raw & A != 0,
            dirty: raw & D != 0,
            memory: match raw & TYPE_MASK {
                TYPE_WB => MemoryType::WriteBack,
                TYPE_WT => MemoryType::WriteThrough,
                _ => MemoryType::Uncacheable,
            },
        }
    }
}

impl Format for Ept {
    const NAME: &'static str = "ept";
    const FROZEN: u64 = 0x1a0;
    const DEAD: u64 = 0x3a0;
    const ACCESSED: u64 = A;
    const DIRTY: u64 = D;
    const WRITE: u64 = W;
    const MMU_WRITABLE: u64 = MMU_WRITABLE;

    #[inline]
    fn table(frame: Hfn) -> u64 {
        RWX | A | PRESENT | frame.0 << PAGE_SHIFT
    }

    #[inline]
    fn leaf(level: Level, leaf: Leaf) -> u64 {
        Self::right_bits(leaf.rights) | Self::leaf_bits(level, leaf)
    }

    fn access_tracked(level: Level, leaf: Leaf) -> u64 {
        // W is not saved: it is derived again from MMU_WRITABLE by the write fault that wants it.
        let saved = (Self::right_bits(leaf.rights) & !W) << SAVED_SHIFT;
        saved | Self::leaf_bits(level, Leaf { accessed: false, ..leaf })
    }

    fn mmio(generation: u32) -> u64 {
        MMIO | generation::encode(generation)
    }

    fn decode(raw: u64, level: Level) -> State {
        if raw & PRESENT != 0 {
            if raw & RWX == 0 {
                State::AccessTracked(Self::decode_leaf(raw, raw >> SAVED_SHIFT))
            } else if level == Level::K4 || raw & LARGE != 0 {
                State::Leaf(Self::decode_leaf(raw, raw))
            } else {
                State::Table(Hfn((raw & FRAME) >> PAGE_SHIFT))
            }
        } else if raw & MMIO_MASK == MMIO {
            State::Mmio { generation: generation::decode(raw) }
        } else if raw == Self::FROZEN || raw == Self::DEAD {
            State::Frozen
        } else {
            State::Absent
        }
    }

    #[inline]
    fn next_table(raw: u64, level: Level) -> Option<Hfn> {
        let table = level > Level::K4 && raw & (R | PRESENT | LARGE) == R | PRESENT;
        table.then_some(Hfn((raw & FRAME) >> PAGE_SHIFT))
    }

    #[inline]
    fn is_mapping(raw: u64, level: Level) -> bool {
        raw & PRESENT != 0 && (level == Level::K4 || raw & LARGE != 0 || raw & RWX == 0)
    }

    #[inline]
    fn permits(raw: u64, level: Level, rights: Rights) -> bool {
        let mut need = R | PRESENT;
        if level > Level::K4 {
            need |= LARGE;
        }
        if rights.contains(Rights::WRITE) {
            need |= W;
        }
        if rights.contains(Rights::EXECUTE) {
            need |= X;
        }
        raw & need == need
    }
}

const _: () = {
    assert!(Ept::FROZEN & (RWX | PRESENT) == 0 && Ept::FROZEN != 0);
    assert!(Ept::DEAD & (RWX | PRESENT) == 0 && Ept::DEAD != Ept::FROZEN);
    assert!(MMIO & PRESENT == 0 && FRAME & (HOST_WRITABLE | MMU_WRITABLE | PRESENT) == 0);
    // The generation's bits must not touch what tells an MMIO entry from the others.
    assert!(generation::BITS & (MMIO_MASK) == 0);
};
