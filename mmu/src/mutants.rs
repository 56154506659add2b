//! Seeded mutants: bugs of the past, put back one at a time, so that the model checks can show that they would find them.
//!
//! Compiled in only together with a model checker's atomics; everywhere else [`is`] is the constant `false` and nothing
//! of a mutant is left. Each stands for a bug that KVM or a peer shipped, or for an invariant that the types leave
//! expressible.

/// A bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Mutant {
    /// Zap-all asks vCPUs to drop their roots when it has emptied them, after the lock was released.
    RequestAfterUnlock = 1,
    /// A flush kicks vCPUs and does not wait until they have left guest mode.
    KickWithoutWaiting,
    /// A flush reaches the caller's CPU and no other.
    LocalFlushOnly,
    /// A host invalidation visits valid roots only (CVE-2021-47639).
    NotifierOnValidRootsOnly,
    /// Tables go back before the flush.
    FreeBeforeFlush,
    /// Tables go back after the flush, but while readers may still walk them.
    FreeWithoutGracePeriod,
    /// A zapped entry may be filled again before the flush.
    ThawBeforeFlush,
    /// A fault fills an entry that a zap has frozen.
    FrozenFilled,
    /// A zap that finds an entry frozen by another one does not flush for it.
    FrozenByAnotherNotFlushed,
    /// A table is unlinked and never freed (KVM, 524a1e4e381f).
    UnlinkedTableLeaked,
    /// An invalidation leaves the leaf, and the next fault puts the new host frame in its place.
    LeafChangedInPlace,
    /// The invalidation sequence is compared before the lock is taken, and not inside.
    RetryTestBeforeTheLockOnly,
    /// The invalidation sequence is read after the backing was asked.
    SnapshotAfterBacking,
    /// The memslot generation is compared before the lock is taken, and not inside.
    SlotsTestedBeforeTheLockOnly,
    /// A memslot update does not wait for the faults that have checked the old generation.
    SlotWithoutGracePeriod,
    /// The invalidation sequence is kept in too few bits.
    SequenceTruncated,
    /// A fault installs into a root that was invalidated.
    FaultIntoObsoleteRoot,
    /// Zap-all leaves its roots to whoever puts them last.
    ObsoleteRootsNotEmptied,
    /// The previous roots of a vCPU are dropped if the current one is obsolete (KVM, cf4a8693d97a).
    PreviousRootsJudgedByCurrent,
    /// A vCPU drops all its roots when it is told to drop obsolete ones (KVM, before the change that the project began
    /// with).
    CurrentRootsDropped,
    /// A root is found whatever its role is.
    RootOfAnotherRole,
    /// Slots change while an invalidation is in flight.
    SlotsSwappedDuringInvalidation,
    /// A vCPU looks for requests and flushes first, and then says that it is in guest mode.
    ModeAfterTheLook,
    /// A vCPU looks for requests first, and then says that it is in guest mode.
    RequestsBeforeMode,
    /// A reader's mark is made odd without ordering what it did before.
    EnterRelaxed,
    /// A reader's mark is made even without ordering what it did inside.
    LeaveRelaxed,
    /// A reader does not look for a writer.
    SharedWithoutLook,
    /// A vCPU that fixes a fault in guest mode waits for a writer to go.
    GuestWaitsForWriter,
    /// The exclusive side does not fence between its announcement and its look at the readers.
    ExclusiveWithoutFence,
    /// The exclusive side does not wait for readers.
    ExclusiveWithoutWaiting,
    /// The entries of a table that is unlinked are not seized.
    UnlinkedTableNotSeized,
    /// A zap forgets that what it removes was dirty.
    DirtyBitDroppedByZap,
    /// A fault sets the bit of the log before the entry becomes writable.
    DirtyBeforeWritable,
    /// Dirty pages are handed out before the vCPUs have forgotten that they may write them.
    DirtyHandedOutBeforeFlush,
    /// Pages whose entries are write-protected are not flushed (KVM, 7c8a4742c4ab).
    ProtectedWithoutFlush,
    /// Entries that track writes by protection are armed as if the CPU set their dirty bits (CVE-2024-26990).
    DirtyBitClearedWhereProtectionTracks,
    /// Splitting or protecting a leaf loses its software bits.
    SoftwareBitsLost,
    /// A shadow page is reused for its frame, whatever its role is (CVE-2026-53359).
    ShadowRoleNotCompared,
    /// A fault uses a root that the quota zapped after it was looked at (CVE-2026-64561).
    ShadowFaultNotFresh,
    /// A page is linked before it was brought in step (KVM, 65855ed8b034).
    ShadowLinkedOutOfStep,
    /// A guest's table becomes writable first, and is marked out of step then.
    ShadowUnsyncAfterWritable,
    /// A guest's entry is not read again when the shadow entry is made of it.
    ShadowEntryNotReadAgain,
    /// A shadow page counts as in step before the guest's table is out of all TLBs as writable.
    ShadowPageWithoutFlush,
    /// The leaves of a slot that is deleted stay in shadow pages (KVM, fcd1ec9cb59c).
    ShadowSlotNotZapped,
    /// A leaf is taken out of the reverse map of the frame that the guest's entry names by then (CVE-2026-46113).
    ShadowUnmappedByGuestEntry,
    /// A leaf of another frame is overwritten, and stays in that one's reverse map (CVE-2026-23401's kind).
    ShadowLeafOverwritten,
    /// What entries above do not allow is not taken from a page's role (CVE-2021-38198).
    ShadowAccessNotInherited,
    /// A link is made without a look at whether anything below is out of step again.
    ShadowLinkWithoutLook,
    /// A page of leaves that is out of step is linked under a root that takes it for one that is not reached.
    ShadowLinkUnnoticed,
    /// A large leaf is made although a frame of its block is a table that is shadowed.
    ShadowLargeOverTable,
    /// Whether a large leaf may be made is found out under the lock of its block, and it is made under that lock later.
    ShadowLargeDecidedEarly,
    /// A large leaf is made beside an invalidation of a frame of its block.
    ShadowLargeFreshInPart,
    /// Neighbours are mapped while memory is being taken away.
    ShadowNeighboursNotFresh,
    /// A vCPU that has flushed what it has by one tag takes its other tags for flushed.
    ShadowTagKeptBehind,
    /// Whether a table was opened again while its page was brought in step is told by whether it is open.
    ShadowOpenedAgainUnnoticed,
    /// A page gets on the list of those out of step before it is marked as one.
    ShadowListedBeforeMarked,
    /// What was opened below a link that stays, while the link was looked at, is not compared.
    ShadowLookedOnce,
}

#[cfg(any(feature = "loom", feature = "shuttle"))]
static ACTIVE: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// Turns one mutant on for the process.
#[cfg(any(feature = "loom", feature = "shuttle"))]
pub fn activate(mutant: Mutant) {
    ACTIVE.store(mutant as u32, core::sync::atomic::Ordering::Relaxed);
}

/// Whether this bug is to be.
#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(crate) fn is(mutant: Mutant) -> bool {
    ACTIVE.load(core::sync::atomic::Ordering::Relaxed) == mutant as u32
}

/// Never.
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
#[inline(always)]
pub(crate) const fn is(_: Mutant) -> bool {
    false
}

/// Gives others time, where the bug shows in a window of a few steps.
pub(crate) fn dawdle(mutant: Mutant, relax: impl Fn()) {
    if is(mutant) {
        relax();
    }
}
