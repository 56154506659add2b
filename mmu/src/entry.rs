//! The entry state machine: the one place where an entry of a live table changes.
//!
//! # Who may change what
//! Entries change by compare-and-swap from the value that the walker saw, by any thread that is inside the MMU lock
//! (either side). Two racing updates of one entry: one wins, the other learns the value that won and starts over from
//! it; nothing is overwritten unseen. The CPU's page walker sets accessed and dirty bits at any time, so even an
//! owner changes a live entry by read-modify-write, never by a store.
//!
//! # Legal transitions
//! | from | to | by whom, and what is owed |
//! |---|---|---|
//! | absent, MMIO | leaf, table, MMIO | a fault; nothing: an absent entry is in no TLB |
//! | leaf | leaf with more rights | a fault; nothing: a stale TLB faults again and finds it (spurious) |
//! | leaf | leaf without W or D ([`weaken`]) | dirty logging; a flush that may wait until what was learned is told ([`Debt`]) |
//! | leaf, access-tracked | the same without W and MMU_WRITABLE ([`restrict`]) | write tracking; a flush before the lock is left: others conclude "not MMU_WRITABLE, so in no TLB as writable" |
//! | leaf | leaf without A ([`age`]), access-tracked ([`track`]) | aging; nothing: at worst a page in use looks old |
//! | access-tracked | leaf | a fault; nothing |
//! | leaf | table of leaves of the same frames, rights and dirty bits | a split; nothing: both translate alike |
//! | leaf, table, access-tracked, MMIO | frozen | a zap; a flush, and the entry stays frozen until it is done |
//! | frozen | absent | the zap that froze it, after its flush |
//! | table | frozen, then leaf | a collapse, after its flush; the leaf says what the table's leaves said |
//! | any | dead (frozen for good) | the unlinker of a table, for each of its entries |
//!
//! Never legal: a present leaf that becomes a leaf of another host frame (KVM BUGs on it, invariant I9). The way is
//! zap, flush, fill. [`legal`] states the table above; it is asserted on every change in debug builds.
//!
//! # What the types say
//! An [`Entry`] has no store: the functions here are the only way to change one. What takes something away wants to see
//! that a hold is open in which the flush is owed ([`Owed`]), what gives an entry free again that it was paid
//! ([`Flushed`]). What a weaker leaf owes is written down as it is made ([`Debt`]).

use crate::addr::{ENTRIES, Level};
use crate::events::{Counter, SeatCounters};
use crate::format::{Format, State};
use crate::mutants::{self, Mutant};
use crate::reclaim::Owed;
use crate::sync::{AtomicU64, Ordering, load_for_update};
use crate::tlb::{Debt, Flushed};
use crate::watch::watched;
use core::ops::Range;

/// One entry of a table that the CPU may be walking. Read anywhere inside the lock, changed by the functions below.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Entry(AtomicU64);

impl Entry {
    /// What it holds: the value to hand to [`change`].
    #[inline]
    pub(crate) fn read(&self) -> u64 {
        load_for_update(&self.0)
    }

    /// What it holds, unordered: for a look on which nothing rests that another thread wrote elsewhere.
    #[inline]
    pub(crate) fn glance(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn exchange(&self, level: Level, old: u64, new: u64, made: Ordering, lost: Ordering) -> Result<u64, u64> {
        watched(core::ptr::from_ref(self).addr(), level, new, || self.0.compare_exchange(old, new, made, lost))
    }

    #[inline(always)]
    fn swap(&self, level: Level, new: u64) -> u64 {
        let swapped = || Ok(self.0.swap(new, Ordering::AcqRel));
        match watched(core::ptr::from_ref(self).addr(), level, new, swapped) {
            Ok(old) | Err(old) => old,
        }
    }
}

/// Whether an entry of `level` may go from `old` to `new`, and nothing but rights differ where a leaf stays a leaf.
pub(crate) fn legal<F: Format>(old: u64, new: u64, level: Level) -> bool {
    match (F::decode(old, level), F::decode(new, level)) {
        (State::Absent | State::Mmio { .. }, State::Leaf(_) | State::Table(_) | State::Mmio { .. }) => true,
        (State::Leaf(old) | State::AccessTracked(old), State::Leaf(new)) => {
            old.hfn == new.hfn
                && new.rights.contains(old.rights)
                && old.memory == new.memory
                && (new.dirty || !old.dirty)
        }
        // What stands in the table is the splitter's to show.
        (State::Leaf(_) | State::AccessTracked(_), State::Table(_)) => level > Level::K4,
        (State::Frozen, State::Absent) => true,
        (_, State::Frozen) => true,
        _ => false,
    }
}

/// Whether the mapping `old` may lose `bits` while a TLB may still have it with them: what is lost is noticed no later
/// than the flush, which may wait until someone is told. Not so for MMU_WRITABLE: others conclude from its absence.
pub(crate) fn may_wait<F: Format>(old: u64, bits: u64, level: Level) -> bool {
    F::is_mapping(old, level) && bits & !(F::WRITE | F::CPU_OWNED) == 0
}

/// Takes `bits` (of W, A and D) from the mapping `old`, or says what `cell` holds now. The flush that this owes goes to
/// `debt`, which outlives the hold.
#[inline]
pub(crate) fn weaken<F: Format>(cell: &Entry, level: Level, old: u64, bits: u64, debt: &mut Debt) -> Result<(), u64> {
    let lost = if mutants::is(Mutant::SoftwareBitsLost) { F::MMU_WRITABLE } else { 0 };
    let new = old & !(bits | lost);
    debug_assert!(may_wait::<F>(old, old ^ new, level), "{} {level:?}: {old:#x} -> {new:#x}", F::NAME);
    cell.exchange(level, old, new, Ordering::AcqRel, Ordering::Acquire)?;
    debt.note();
    Ok(())
}

/// Takes W and MMU_WRITABLE from the mapping `old`, or says what `cell` holds now: nobody may write through it, and who
/// finds it so concludes that no TLB may either. Hence the flush that is owed before the lock is left.
pub(crate) fn restrict<F: Format>(cell: &Entry, level: Level, old: u64, _owed: Owed<'_>) -> Result<(), u64> {
    debug_assert!(F::is_mapping(old, level), "{} {level:?}: {old:#x}", F::NAME);
    let new = old & !(F::WRITE | F::MMU_WRITABLE);
    cell.exchange(level, old, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
}

/// Clears the accessed bit of the mapping `old`, or says what `cell` holds now. Owes nothing: the bit may be lost.
#[inline]
pub(crate) fn age<F: Format>(cell: &Entry, level: Level, old: u64) -> Result<(), u64> {
    debug_assert!(F::is_mapping(old, level), "{} {level:?}: {old:#x}", F::NAME);
    cell.0.compare_exchange(old, old & !F::ACCESSED, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
}

/// Takes all rights of the leaf `old`, to see whether it is used, or says what `cell` holds now. Owes nothing: who has the
/// leaf in a TLB may go on, MMU_WRITABLE says that it may write, and the dirty bit stays.
pub(crate) fn track<F: Format>(cell: &Entry, level: Level, old: u64) -> Result<(), u64> {
    let State::Leaf(leaf) = F::decode(old, level) else { return Err(old) };
    let new = F::access_tracked(level, leaf);
    cell.exchange(level, old, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
}

/// Writes an entry of a table that nothing leads to yet.
#[inline]
pub(crate) fn prepare(cell: &Entry, raw: u64) {
    // Relaxed: the compare-and-swap that links the table releases it.
    cell.0.store(raw, Ordering::Relaxed);
}

/// Which books a change has to be entered in. The caller knows it at compile time; debug builds check that it is so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Books {
    LeafAdded,
    /// A leaf becomes a table of leaves of the level below.
    LeafSplit,
    None,
}

fn books<F: Format>(old: u64, new: u64, level: Level) -> Books {
    match (F::decode(old, level), F::decode(new, level)) {
        (State::Leaf(_) | State::AccessTracked(_), State::Leaf(_)) => Books::None,
        (_, State::Leaf(_)) => Books::LeafAdded,
        (State::Leaf(_) | State::AccessTracked(_), State::Table(_)) => Books::LeafSplit,
        _ => Books::None,
    }
}

/// Changes `cell` from `old` to `new`, or says what it holds now.
///
/// Release, so that what a new table holds is seen by whoever follows the entry; acquire on failure, because the
/// caller goes on from the value it learns.
#[inline]
pub(crate) fn change<F: Format>(
    cell: &Entry,
    level: Level,
    old: u64,
    new: u64,
    book: Books,
    seat: &SeatCounters,
) -> Result<(), u64> {
    debug_assert!(legal::<F>(old, new, level), "{} {level:?}: {old:#x} -> {new:#x}", F::NAME);
    debug_assert_eq!(books::<F>(old, new, level), book, "{} {level:?}: {old:#x} -> {new:#x}", F::NAME);
    match cell.exchange(level, old, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            match book {
                Books::LeafAdded => seat.leaf(level, 1),
                Books::LeafSplit => {
                    seat.leaf(level, 1u64.wrapping_neg());
                    seat.leaf(level.down().unwrap_or(Level::K4), ENTRIES as u64);
                }
                Books::None => {}
            }
            Ok(())
        }
        Err(now) => {
            seat.add(Counter::LostRace, 1);
            Err(now)
        }
    }
}

/// Gives an absent entry its first leaf, or says what `cell` holds. Nobody has to have looked that it is absent, so a
/// refusal is not counted as a lost race; see [`change`] for the ordering.
#[inline]
pub(crate) fn fill<F: Format>(cell: &Entry, level: Level, leaf: u64, seat: &SeatCounters) -> Result<(), u64> {
    debug_assert!(matches!(F::decode(leaf, level), State::Leaf(_)), "{} {level:?}: {leaf:#x}", F::NAME);
    cell.exchange(level, F::ABSENT, leaf, Ordering::AcqRel, Ordering::Acquire)?;
    seat.leaf(level, 1);
    Ok(())
}

/// Freezes `cell`, which held `old`; fails with what it holds now. The caller becomes the entry's owner and owes a
/// flush if `old` was present, in the hold that `_owed` stands for.
pub(crate) fn freeze<F: Format>(
    cell: &Entry,
    level: Level,
    old: u64,
    seat: &SeatCounters,
    _owed: Owed<'_>,
) -> Result<(), u64> {
    change::<F>(cell, level, old, F::FROZEN, Books::None, seat)?;
    note_removed::<F>(old, level, seat);
    Ok(())
}

/// What [`seize`] met in a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seized {
    /// Leaves.
    pub(crate) leaves: u64,
    /// A bit for each of them that had the dirty bit set.
    dirty: [u64; WORDS],
}

const WORD: usize = u64::BITS as usize;
/// Of a bitmap of a table's entries. (A model checker's tables are small.)
const WORDS: usize = ENTRIES.div_ceil(WORD);

impl Seized {
    /// Whether any leaf was dirty.
    pub(crate) fn any_dirty(&self) -> bool {
        self.dirty != [0; WORDS]
    }

    /// The entries that held dirty leaves, those that follow each other together.
    pub(crate) fn dirty(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let next = |from: usize, flip: u64| {
            let mut at = from;
            while at < ENTRIES {
                let left = (self.dirty[at / WORD] ^ flip) >> (at % WORD);
                if left != 0 {
                    return ENTRIES.min(at + left.trailing_zeros() as usize);
                }
                at = (at / WORD + 1) * WORD;
            }
            ENTRIES
        };
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = next(at, 0);
            at = next(start, u64::MAX);
            (start < at).then_some(start..at)
        })
    }
}

/// Freezes all entries of a table of `level` that the caller has unlinked, whatever they hold; says what leaves they were,
/// and hands what led to tables to `take` with its index. A fault that is still walking the table loses its
/// compare-and-swap against this, or won before and is undone by it.
///
/// Of leaves nothing is said one by one: this is what a zap costs a page.
pub(crate) fn seize<F: Format>(
    entries: &[Entry; ENTRIES],
    level: Level,
    seat: &SeatCounters,
    _owed: Owed<'_>,
    mut take: impl FnMut(usize, u64),
) -> Seized {
    let mut seized = Seized { leaves: 0, dirty: [0; WORDS] };
    for (word, (dirty, cells)) in seized.dirty.iter_mut().zip(entries.chunks(WORD)).enumerate() {
        for (bit, cell) in cells.iter().enumerate() {
            let old = cell.swap(level, F::DEAD);
            // In tables of level 1, which most are, the compiler makes two tests of a bit of this.
            let is_leaf = if level == Level::K4 { F::is_mapping(old, Level::K4) } else { F::is_mapping(old, level) };
            if is_leaf {
                seized.leaves += 1;
                *dirty |= u64::from(old & F::DIRTY != 0) << bit;
            } else if F::next_table(old, level).is_some() {
                take(word * WORD + bit, old);
            }
        }
    }
    // Booked once a table and not once an entry.
    seat.leaf(level, seized.leaves.wrapping_neg());
    seat.add(Counter::Zapped, seized.leaves);
    seized
}

/// What a frozen entry becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Thaw {
    /// Absent: it was zapped.
    Absent,
    /// A leaf of this level, in the place of a table of leaves.
    Leaf(Level, u64),
}

/// Ends the ownership of a frozen entry. `_flushed` is the proof that what freezing it owed was paid.
pub(crate) fn thaw<F: Format>(cell: &Entry, becomes: Thaw, _flushed: &Flushed, seat: &SeatCounters) {
    // Only one thing can have happened to it: another zap unlinked its table and made it dead, and so it stays.
    let thawed = match becomes {
        Thaw::Absent => cell.0.compare_exchange(F::FROZEN, F::ABSENT, Ordering::AcqRel, Ordering::Relaxed),
        Thaw::Leaf(level, leaf) => cell.exchange(level, F::FROZEN, leaf, Ordering::AcqRel, Ordering::Relaxed),
    };
    debug_assert!(thawed.is_ok() || thawed == Err(F::DEAD), "a frozen entry was changed: {thawed:x?}");
    if let (Ok(_), Thaw::Leaf(level, leaf)) = (thawed, becomes) {
        debug_assert!(matches!(F::decode(leaf, level), State::Leaf(_)), "{} {level:?}: {leaf:#x}", F::NAME);
        seat.leaf(level, 1);
        seat.add(Counter::LeafCollapsed, 1);
    }
}

#[inline]
fn note_removed<F: Format>(old: u64, level: Level, seat: &SeatCounters) {
    if old == F::ABSENT {
        return;
    }
    if matches!(F::decode(old, level), State::Leaf(_) | State::AccessTracked(_)) {
        seat.leaf(level, 1u64.wrapping_neg());
        seat.add(Counter::Zapped, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hfn;
    use crate::format::{Leaf, MemoryType, Npt, Rights};
    use alloc::vec;
    use alloc::vec::Vec;

    fn leaf(hfn: u64, rights: Rights) -> u64 {
        let memory = MemoryType::WriteBack;
        let write = true;
        let leaf = Leaf {
            hfn: Hfn(hfn),
            rights,
            host_writable: write,
            mmu_writable: write,
            accessed: false,
            dirty: false,
            memory,
        };
        Npt::leaf(Level::K4, leaf)
    }

    #[test]
    fn a_leaf_never_changes_its_frame_in_place() {
        let all = Rights::all();
        assert!(!legal::<Npt>(leaf(1, all), leaf(2, all), Level::K4));
        assert!(legal::<Npt>(leaf(1, Rights::READ), leaf(1, all), Level::K4));
        assert!(!legal::<Npt>(leaf(1, all), leaf(1, Rights::READ), Level::K4), "taking rights owes a flush");
        assert!(!legal::<Npt>(leaf(1, all), Npt::ABSENT, Level::K4), "zap goes through frozen");
        assert!(
            !legal::<Npt>(Npt::FROZEN, leaf(1, all), Level::K4),
            "a frozen entry is filled only after it is thawed"
        );
    }

    #[test]
    fn the_loser_of_a_race_learns_the_winner() {
        let seat = SeatCounters::new();
        let (owed, flushed) = (Owed::in_a_test(), Flushed::in_a_test());
        let cell = Entry(AtomicU64::new(leaf(1, Rights::all())));
        let lost = change::<Npt>(&cell, Level::K4, Npt::ABSENT, leaf(2, Rights::all()), Books::LeafAdded, &seat);
        assert_eq!(lost, Err(leaf(1, Rights::all())));
        freeze::<Npt>(&cell, Level::K4, leaf(1, Rights::all()), &seat, owed).unwrap();
        thaw::<Npt>(&cell, Thaw::Absent, &flushed, &seat);
        assert_eq!(cell.read(), Npt::ABSENT);
    }

    #[test]
    fn a_seized_table_is_dead_and_its_leaves_are_booked() {
        let seat = SeatCounters::new();
        let (owed, flushed) = (Owed::in_a_test(), Flushed::in_a_test());
        let entries = [const { Entry(AtomicU64::new(Npt::ABSENT)) }; ENTRIES];
        fill::<Npt>(&entries[3], Level::K4, leaf(1, Rights::all()), &seat).unwrap();
        fill::<Npt>(&entries[511], Level::K4, leaf(2, Rights::READ), &seat).unwrap();
        entries[4].0.store(Npt::FROZEN, Ordering::Relaxed);
        let seized = seize::<Npt>(&entries, Level::K4, &seat, owed, |index, met| panic!("{index}: {met:?}"));
        let booked = crate::events::Counters::sum([&seat].into_iter());
        assert_eq!((seized.leaves, booked.leaves_4k, booked.leaves_zapped), (2, 0, 2));
        assert!(!seized.any_dirty() && seized.dirty().next().is_none());
        thaw::<Npt>(&entries[4], Thaw::Absent, &flushed, &seat);
        assert!(entries.iter().all(|cell| cell.read() == Npt::DEAD), "dead entries stay dead");
        let new = leaf(1, Rights::all());
        assert_eq!(fill::<Npt>(&entries[3], Level::K4, new, &seat), Err(Npt::DEAD), "a late fault loses");
        let tables = core::cell::Cell::new(None);
        let upper = [const { Entry(AtomicU64::new(Npt::ABSENT)) }; ENTRIES];
        upper[7].0.store(Npt::table(Hfn(9)), Ordering::Relaxed);
        let seized = seize::<Npt>(&upper, Level::M2, &seat, owed, |index, met| tables.set(Some((index, met))));
        assert_eq!((seized.leaves, tables.get()), (0, Some((7, Npt::table(Hfn(9))))));
    }

    #[test]
    fn dirty_leaves_of_a_seized_table_are_told_in_runs() {
        let (seat, owed) = (SeatCounters::new(), Owed::in_a_test());
        let whole = Range { start: 0, end: ENTRIES };
        for runs in [vec![0..1, 2..3], vec![whole], vec![63..65, 128..192, 511..512], vec![], vec![5..300, 302..303]] {
            let entries = [const { Entry(AtomicU64::new(Npt::ABSENT)) }; ENTRIES];
            let clean = leaf(1, Rights::READ);
            entries.iter().step_by(3).for_each(|cell| cell.0.store(clean, Ordering::Relaxed));
            let dirty = clean | Npt::DIRTY;
            runs.iter().cloned().flatten().for_each(|index| entries[index].0.store(dirty, Ordering::Relaxed));
            let seized = seize::<Npt>(&entries, Level::K4, &seat, owed, |_, _| {});
            assert_eq!(seized.dirty().collect::<Vec<_>>(), runs);
            assert_eq!(seized.any_dirty(), !runs.is_empty());
        }
    }
}
