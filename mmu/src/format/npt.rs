//! AMD nested page tables: long-mode page tables walked as user accesses (APM vol 2, 15.25.5).
//!
//! | bits | meaning |
//! |---|---|
//! | 0 P, 1 W, 2 U, 63 NX | rights; U is always set, a nested walk counts as a user access |
//! | 3 PWT, 4 PCD | cache type by the host's PAT, whose power-on entries 0 WB, 1 WT, 3 UC are relied on |
//! | 5 A, 6 D | set by the CPU |
//! | 7 PS | leaf above 4 KiB (at 4 KiB it would be PAT and stays clear) |
//! | 9 HOST_WRITABLE, 10 MMU_WRITABLE, 11 PRESENT (software) | software bits of a table or leaf |
//! | 12–51 | frame |
//! | 52 | access-tracked: the rights as they were, but P is clear |
//! | MMIO: P, W, U, bit 51 | reserved-bit fault while the CPU has fewer than 52 address bits; generation in 3–9, 52–62 |

use super::{Format, Leaf, MemoryType, Rights, State, generation};
use crate::addr::{Hfn, Level, MAX_FRAME, PAGE_SHIFT};

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const PRESENT: u64 = 1 << 11;
const TRACKED: u64 = 1 << 52;
const NX: u64 = 1 << 63;
const FRAME: u64 = (MAX_FRAME - 1) << PAGE_SHIFT;

/// P so that the fault is a reserved-bit fault and not a mere absence, bit 51 as the reserved bit.
const MMIO: u64 = P | W | U | 1 << 51;
const MMIO_MASK: u64 = MMIO | PRESENT;

/// The NPT format. 4 and 5 levels differ in the root's level alone.
#[derive(Clone, Copy, Debug)]
pub struct Npt;

impl Npt {
    #[inline]
    fn leaf_bits(level: Level, leaf: Leaf) -> u64 {
        let mut raw = U | PRESENT | leaf.hfn.0 << PAGE_SHIFT;
        if level > Level::K4 {
            raw |= PS;
        }
        if !leaf.rights.contains(Rights::EXECUTE) {
            raw |= NX;
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
            MemoryType::WriteBack => 0,
            MemoryType::WriteThrough => PWT,
            MemoryType::Uncacheable => PCD | PWT,
        }
    }

    #[inline]
    fn decode_leaf(raw: u64) -> Leaf {
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, raw & W != 0);
        rights.set(Rights::EXECUTE, raw & NX == 0);
        Leaf {
            hfn: Hfn((raw & FRAME) >> PAGE_SHIFT),
            rights,
            host_writable: raw & HOST_WRITABLE != 0,
            mmu_writable: raw & MMU_WRITABLE != 0,
            accessed: raw & A != 0,
            dirty: raw & D != 0,
            memory: match raw & (PCD | PWT) {
                0 => MemoryType::WriteBack,
                PWT => MemoryType::WriteThrough,
                _ => MemoryType::Uncacheable,
            },
        }
    }
}

impl Format for Npt {
    const NAME: &'static str = "npt";
    const FROZEN: u64 = 0x1a0;
    const DEAD: u64 = 0x3a0;
    const ACCESSED: u64 = A;
    const DIRTY: u64 = D;
    const WRITE: u64 = W;
    const MMU_WRITABLE: u64 = MMU_WRITABLE;

    #[inline]
    fn table(frame: Hfn) -> u64 {
        // Rights are the leaf's business alone: a table entry allows everything. A is set because nothing ever reads
        // it there, and so the CPU need not write it.
        P | W | U | A | PRESENT | frame.0 << PAGE_SHIFT
    }

    #[inline]
    fn leaf(level: Level, leaf: Leaf) -> u64 {
        let write = if leaf.rights.contains(Rights::WRITE) { W } else { 0 };
        P | write | Self::leaf_bits(level, leaf)
    }

    fn access_tracked(level: Level, leaf: Leaf) -> u64 {
        TRACKED | Self::leaf_bits(level, Leaf { accessed: false, ..leaf })
    }

    fn mmio(generation: u32) -> u64 {
        MMIO | generation::encode(generation)
    }

    fn decode(raw: u64, level: Level) -> State {
        if raw & PRESENT != 0 {
            if raw & P == 0 {
                State::AccessTracked(Self::decode_leaf(raw))
            } else if level == Level::K4 || raw & PS != 0 {
                State::Leaf(Self::decode_leaf(raw))
            } else {
                State::Table(Hfn((raw & FRAME) >> PAGE_SHIFT))
            }
        } else if raw & MMIO_MASK == MMIO {
            State::Mmio { generation: generation::decode(raw) }
        } else if raw == Self::FROZEN || raw == Self::DEAD {
            State::Frozen
        } else {
            // Nothing but zero is ever written besides the above; a stray value is treated as what it does to the CPU.
            State::Absent
        }
    }

    #[inline]
    fn next_table(raw: u64, level: Level) -> Option<Hfn> {
        let table = level > Level::K4 && raw & (P | PRESENT | PS) == P | PRESENT;
        table.then_some(Hfn((raw & FRAME) >> PAGE_SHIFT))
    }

    #[inline]
    fn is_mapping(raw: u64, level: Level) -> bool {
        raw & PRESENT != 0 && (level == Level::K4 || raw & PS != 0 || raw & P == 0)
    }

    #[inline]
    fn permits(raw: u64, level: Level, rights: Rights) -> bool {
        let mut need = P | PRESENT;
        if level > Level::K4 {
            need |= PS;
        }
        if rights.contains(Rights::WRITE) {
            need |= W;
        }
        raw & need == need && (raw & NX == 0 || !rights.contains(Rights::EXECUTE))
    }
}

const _: () = {
    assert!(Npt::FROZEN & (P | PRESENT) == 0 && Npt::FROZEN != 0);
    assert!(Npt::DEAD & (P | PRESENT) == 0 && Npt::DEAD != Npt::FROZEN);
    assert!(MMIO & PRESENT == 0 && FRAME & (NX | TRACKED | PRESENT) == 0);
    // The generation's bits must not touch what tells an MMIO entry from the others.
    assert!(generation::BITS & (MMIO_MASK | NX) == 0);
};
