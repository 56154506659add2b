//! Page-table formats: the only place that knows a bit of an entry.
//!
//! A format turns a raw 64-bit entry into a [`State`] and back. Everything above works on states; the raw value is
//! carried along only as the expected value of a compare-and-swap.
//!
//! Three properties hold for every format and are tested for each:
//! - `ABSENT` is all zeros, so that a zeroed frame is an empty table;
//! - a raw value decodes to exactly one state, and encoding that state gives the value back (but for bits that the
//!   CPU owns);
//! - the frozen and the MMIO encodings never let the CPU translate.

mod ept;
pub(crate) mod long_mode;
mod npt;

pub use ept::Ept;
pub use npt::Npt;

use crate::addr::{Hfn, Level};

bitflags::bitflags! {
    /// What a leaf lets the guest do.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Rights: u8 {
        /// Data reads. Every leaf has it.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Instruction fetches.
        const EXECUTE = 4;
    }
}

/// How the guest's accesses through a leaf are cached, before the guest's own PAT is applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryType {
    /// Ordinary memory.
    WriteBack,
    /// Write-through.
    WriteThrough,
    /// Device memory.
    Uncacheable,
}

/// A mapping of one block of guest frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// The first host frame; aligned to the leaf's level.
    pub hfn: Hfn,
    /// What the CPU lets the guest do now.
    pub rights: Rights,
    /// The backing lets the guest write (KVM: HOST_WRITABLE). Never changes in the life of a leaf.
    pub host_writable: bool,
    /// The MMU lets the guest write: with it set and [`Rights::WRITE`] clear, only the dirty log or access tracking
    /// took the write right, and it may be given back without the lock (KVM: MMU_WRITABLE).
    pub mmu_writable: bool,
    /// Accessed since it was last cleared. May be lost.
    pub accessed: bool,
    /// Written since it was last cleared. Never lost.
    pub dirty: bool,
    /// Cache type.
    pub memory: MemoryType,
}

/// The states of an entry. `entry` says which transitions are legal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Nothing is mapped and nothing is known: an access faults.
    Absent,
    /// The next table.
    Table(Hfn),
    /// A mapping.
    Leaf(Leaf),
    /// A mapping whose rights were taken to see whether it is used, on CPUs without accessed bits. An access faults
    /// and gives the rights back.
    AccessTracked(Leaf),
    /// No memory here: an access faults with a reserved-bit (NPT) or misconfiguration (EPT) code and is emulated.
    /// Valid while the memslots are of this generation ([`MMIO_GENERATION_MASK`] of its bits).
    Mmio {
        /// Low bits of the memslot generation in which it was made.
        generation: u32,
    },
    /// Belongs to whoever froze it, until the flush that is owed for it is done. Everyone else retries.
    Frozen,
}

/// Bits of the memslot generation that an MMIO entry holds (18, as in KVM).
pub const MMIO_GENERATION_MASK: u32 = (1 << 18) - 1;

/// Where an MMIO entry of any format keeps the generation: the low 7 bits in bits 3 to 9, the others in 52 to 62. Neither
/// format gives those a meaning in an entry that the CPU refuses for another reason.
mod generation {
    use super::MMIO_GENERATION_MASK;

    const LOW: u64 = (1 << 7) - 1;
    const LOW_SHIFT: u32 = 3;
    const HIGH_SHIFT: u32 = 52;
    /// The bits that it takes.
    pub(super) const BITS: u64 = encode(MMIO_GENERATION_MASK);

    pub(super) const fn encode(generation: u32) -> u64 {
        let generation = (generation & MMIO_GENERATION_MASK) as u64;
        (generation & LOW) << LOW_SHIFT | generation >> LOW.count_ones() << HIGH_SHIFT
    }

    pub(super) const fn decode(raw: u64) -> u32 {
        let low = raw >> LOW_SHIFT & LOW;
        let high = raw >> HIGH_SHIFT << LOW.count_ones();
        (high | low) as u32 & MMIO_GENERATION_MASK
    }
}

/// One second-stage page-table format.
///
/// The functions are associated functions of a zero-sized type, so that a walker generic over the format compiles to
/// constants.
pub trait Format: Copy + Send + Sync + core::fmt::Debug + 'static {
    /// For reports.
    const NAME: &'static str;
    /// Nothing mapped. Zero in every format.
    const ABSENT: u64 = 0;
    /// Frozen by a zap that will thaw it after its flush.
    const FROZEN: u64;
    /// Frozen for good: an entry of a table that was unlinked. Decodes as [`State::Frozen`].
    const DEAD: u64;

    /// The entry that leads to a table.
    fn table(frame: Hfn) -> u64;
    /// The entry that maps a block of `level` (4 KiB, 2 MiB or 1 GiB; `leaf.hfn` aligned to it).
    fn leaf(level: Level, leaf: Leaf) -> u64;
    /// The entry of a leaf whose rights are taken for access tracking.
    fn access_tracked(level: Level, leaf: Leaf) -> u64;
    /// The entry of frames without memory, for the memslots of `generation` (masked by the format).
    fn mmio(generation: u32) -> u64;
    /// What `raw` means in a table of `level`.
    fn decode(raw: u64, level: Level) -> State;

    /// The next table, if `raw` is a table entry: `decode` for the inner loop of a walk.
    fn next_table(raw: u64, level: Level) -> Option<Hfn>;
    /// Whether `raw` is a leaf that allows an access with `rights`.
    fn permits(raw: u64, level: Level, rights: Rights) -> bool;
    /// Whether `raw` maps something: a leaf, or one whose rights are taken for access tracking.
    fn is_mapping(raw: u64, level: Level) -> bool;

    /// The bit that the CPU sets in an entry that it uses.
    const ACCESSED: u64;
    /// The bit that the CPU sets in a leaf that it writes through.
    const DIRTY: u64;
    /// The write right of a leaf.
    const WRITE: u64;
    /// The bit for [`Leaf::mmu_writable`].
    const MMU_WRITABLE: u64;
    /// Bits that the CPU sets on its own in a live entry of this format.
    const CPU_OWNED: u64 = Self::ACCESSED | Self::DIRTY;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_leaf() -> impl Strategy<Value = (Level, Leaf)> {
        (1u8..=3, 0u64..1 << 28, any::<[bool; 5]>(), 0usize..3).prop_map(|(level, block, b, memory)| {
            let level = Level::from_number(level).unwrap();
            let mut rights = Rights::READ;
            rights.set(Rights::EXECUTE, b[0]);
            // The writable bits nest: WRITE needs MMU_WRITABLE needs HOST_WRITABLE.
            let host_writable = b[1];
            let mmu_writable = b[1] && b[2];
            rights.set(Rights::WRITE, mmu_writable && b[3]);
            let memory = [MemoryType::WriteBack, MemoryType::WriteThrough, MemoryType::Uncacheable][memory];
            let hfn = Hfn((block * level.pages()) & ((1 << 40) - 1));
            (level, Leaf { hfn, rights, host_writable, mmu_writable, accessed: b[4], dirty: b[0] ^ b[4], memory })
        })
    }

    fn states_keep_apart<F: Format>(level: Level, leaf: Leaf, generation: u32, table: Hfn) {
        assert_eq!(F::decode(F::leaf(level, leaf), level), State::Leaf(leaf));
        assert_eq!(F::next_table(F::leaf(level, leaf), level), None);
        assert!(F::permits(F::leaf(level, leaf), level, leaf.rights));
        assert_eq!(F::permits(F::leaf(level, leaf), level, Rights::all()), leaf.rights.is_all());
        let State::AccessTracked(tracked) = F::decode(F::access_tracked(level, leaf), level) else {
            panic!("access-tracked entry decodes as {:?}", F::decode(F::access_tracked(level, leaf), level));
        };
        // The write right is not kept: it is derived again from MMU_WRITABLE by the next write fault.
        assert_eq!(tracked, Leaf { rights: leaf.rights - Rights::WRITE, ..tracked });
        assert_eq!((tracked.hfn, tracked.dirty, tracked.mmu_writable), (leaf.hfn, leaf.dirty, leaf.mmu_writable));
        assert!(!F::permits(F::access_tracked(level, leaf), level, Rights::READ));
        let generation = generation & MMIO_GENERATION_MASK;
        assert_eq!(F::decode(F::mmio(generation), level), State::Mmio { generation });
        assert_eq!(F::next_table(F::mmio(generation), level), None);
        assert!(!F::permits(F::mmio(generation), level, Rights::READ));
        assert_eq!(F::decode(F::ABSENT, level), State::Absent);
        assert_eq!(F::decode(F::FROZEN, level), State::Frozen);
        assert_eq!(F::decode(F::DEAD, level), State::Frozen);
        if level > Level::K4 {
            assert_eq!(F::decode(F::table(table), level), State::Table(table));
            assert_eq!(F::next_table(F::table(table), level), Some(table));
            assert!(!F::permits(F::table(table), level, Rights::READ));
        }
    }

    proptest! {
        #[test]
        fn npt_states_keep_apart((level, leaf) in any_leaf(), generation: u32, table in 0u64..1 << 39) {
            states_keep_apart::<Npt>(level, leaf, generation, Hfn(table));
        }

        #[test]
        fn ept_states_keep_apart((level, leaf) in any_leaf(), generation: u32, table in 0u64..1 << 39) {
            states_keep_apart::<Ept>(level, leaf, generation, Hfn(table));
        }
    }
}
