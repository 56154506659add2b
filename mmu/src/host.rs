//! What an embedder gives the library: frames for tables, the memory behind a slot, the means to reach a vCPU, and
//! time.
//!
//! The library calls up through these traits and through nothing else. When it calls what is said at each method;
//! in short: [`TableFrames::alloc_table`] and [`Backing::resolve`] are called *outside* the MMU lock and may take the
//! embedder's own locks; [`Backing::page`], [`Vcpus::kick`], [`Time::relax`] and the fences may be called under it and must
//! not call back into the library.

use core::fmt;
use core::ptr::NonNull;

use crate::addr::{Gfn, GfnRange, Hfn};
use crate::format::{Format, MemoryType};
use crate::guest::Width;
use crate::slots::Slot;
use crate::sync::AtomicU64;

/// Frames below 4 GiB: see [`TableFrames::alloc_low_table`].
pub const LOW_FRAMES: u64 = 1 << 20;

/// Names a vCPU of one MMU: the number its embedder gave it, below [`crate::Config::vcpus`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VcpuId(pub u16);

/// Where page tables live. Every table is one 4 KiB host frame.
///
/// # Safety
/// From the return of `alloc_table` until the matching `free_table`, `table` must give the same valid, writable,
/// 4 KiB-aligned pointer for that frame, to 512 `u64` that nobody but this library (and the CPU's page walker)
/// touches; `table` must be callable from any thread.
#[expect(unsafe_code, reason = "implementing it is a promise about memory")]
pub unsafe trait TableFrames {
    /// A frame of zeros, or `None` when there is none; then the operation that wanted it fails with an error and
    /// nothing is changed. Called outside the MMU lock.
    fn alloc_table(&self) -> Option<Hfn>;

    /// The same for a table that the CPU can only reach below 4 GiB: the top one of a shadowed guest that runs without long
    /// mode, whose CR3 has 32 bits. Rare. An embedder whose frames may lie above has a better answer than this one, which
    /// is that there is none.
    fn alloc_low_table(&self) -> Option<Hfn> {
        let frame = self.alloc_table()?;
        if frame.0 < LOW_FRAMES {
            return Some(frame);
        }
        self.free_table(frame);
        None
    }

    /// Takes a frame back. The library calls this once for each frame, after no CPU can reach it any more: neither a
    /// software walker (a grace period has passed) nor a TLB or paging-structure cache (they were flushed).
    fn free_table(&self, frame: Hfn);

    /// The table's entries. On the fault path: four or five calls a fault, so a plain addition is best.
    fn table(&self, frame: Hfn) -> NonNull<AtomicU64>;
}

/// What kind of access a guest made, or is about to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// A data read, or a read of the guest's own page tables.
    Read,
    /// A data write, or a page-table walk that sets accessed or dirty bits in the guest's tables.
    Write,
    /// An instruction fetch.
    Execute,
}

/// A run of host frames that stands behind a run of guest frames.
///
/// `gfns.start` is backed by `hfn`, the next one by `hfn + 1`, and so on: "how far it is contiguous". The longer the
/// run, the larger the leaf that can map it; the run may start before the frame that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The guest frames of the run. Must hold the frame that was asked for.
    pub gfns: GfnRange,
    /// The host frame behind `gfns.start`.
    pub hfn: Hfn,
    /// Whether the guest may write. A write fault on a run that is not writable is [`crate::Outcome::ReadOnly`].
    pub writable: bool,
    /// How the guest's accesses are cached.
    pub memory: MemoryType,
}

impl Extent {
    /// What it says of one frame; `None` if it does not hold it.
    #[inline]
    pub fn page(&self, gfn: Gfn) -> Option<Page> {
        let hfn = || Hfn(self.hfn.0 + (gfn.0 - self.gfns.start.0));
        self.gfns.contains(gfn).then(|| Page { hfn: hfn(), writable: self.writable, memory: self.memory })
    }
}

/// The host frame behind one guest frame; see [`Extent`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// The host frame.
    pub hfn: Hfn,
    /// Whether the guest may write.
    pub writable: bool,
    /// How the guest's accesses are cached.
    pub memory: MemoryType,
}

/// Why a guest frame has no host frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackingError {
    /// The host is out of memory. The guest's access can be retried once there is some.
    OutOfMemory,
    /// The slot says there is memory here, the backing disagrees: the embedder's mistake.
    NotBacked,
    /// The host frame is broken (a machine check took it).
    Poisoned,
}

impl fmt::Display for BackingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfMemory => "the host is out of memory for the guest",
            Self::NotBacked => "no host memory stands behind this slot's frame",
            Self::Poisoned => "the host frame behind this guest frame is poisoned",
        })
    }
}

impl core::error::Error for BackingError {}

/// What stands behind the guest's frames (KVM's `faultin_pfn`, F4).
pub trait Backing {
    /// The host frames behind `gfn` of `slot`, and how far they are contiguous.
    ///
    /// Called outside the MMU lock, from several vCPUs at once, also for one frame. The answer must stay true until
    /// the embedder says otherwise with [`crate::Worker::invalidate`]; the library retries a fault whose answer
    /// was overtaken by an invalidation.
    fn resolve(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Extent, BackingError>;

    /// What [`Backing::resolve`] would say of `gfn` alone, where that can be told at once: without memory that would have
    /// to be got first, and without waiting for anybody: the vCPU that asks may be in guest mode. `None` is always right.
    ///
    /// The usual fault, of a page whose table is there already, asks this first and needs no more: an embedder that finds
    /// a frame faster than the run that it is in says so here. The others go on to `resolve`.
    ///
    /// A fault in shadow tables asks for neighbours of its page *inside* the MMU lock, where no invalidation is in progress
    /// and none can begin. The answer must be true then, and not one that was overtaken: it is used without another look.
    #[inline]
    fn page(&self, _slot: &Slot, _gfn: Gfn, _access: Access) -> Option<Page> {
        None
    }
}

/// The means to reach vCPUs.
pub trait Vcpus {
    /// Makes the vCPU leave guest mode soon, if it is in it: an IPI to the CPU that runs it, or a signal to its
    /// thread. May be called for a vCPU that is not in guest mode (it lost a race), and must then do no harm; must
    /// not wait. May be called again for a vCPU that does not leave for long. The library waits for the consequence itself.
    fn kick(&self, vcpu: VcpuId);

    /// Removes all translations of `range`, whatever address space and root they are of, from every TLB that a vCPU of this
    /// VM has used or uses, by means of its own: an instruction that reaches all CPUs, or a request to the hypervisor
    /// below (KVM: `kvm_arch_flush_remote_tlbs_range`).
    ///
    /// [`ByRange::Done`] is a promise: no CPU goes on with a translation of these frames, a cached pointer to a table that
    /// served only such frames, or a page walk that met either, if it was there at the call. vCPUs in guest mode stay in
    /// it. May be called inside the MMU lock, and then by several threads at once.
    ///
    /// The default can not, and vCPUs are made to flush instead.
    fn flush_range(&self, _range: GfnRange) -> ByRange {
        ByRange::Unsupported
    }
}

/// Whether a range was flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ByRange {
    /// On all CPUs.
    Done,
    /// On none; the embedder can not, or finds the range too long to be worth it.
    Unsupported,
}

/// Guest memory by host frame, for what reads the guest's own page tables: shadow paging.
///
/// The library asks only while it knows that the frame is the guest's: since [`Backing::resolve`] gave it, no invalidation
/// of it has returned.
pub trait GuestMemory {
    /// The entry at `offset` bytes into the frame, which is a multiple of its width, read in one piece. Called inside the
    /// MMU lock, or by a vCPU in guest mode for a frame that its CPU may read: must not wait.
    fn load(&self, hfn: Hfn, offset: u32, width: Width) -> u64;

    /// Replaces `old` by `new` in one step if the entry still is `old`; whether it did. As [`GuestMemory::load`].
    fn compare_exchange(&self, hfn: Hfn, offset: u32, width: Width, old: u64, new: u64) -> bool;
}

/// Time, yielding and the two halves of the asymmetric fence.
pub trait Time {
    /// A hint in a loop that waits for another CPU (PAUSE; a hosted embedder may yield its thread).
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// Whether a long operation should let go of the lock for a moment (another task waits for this CPU).
    fn should_yield(&self) -> bool {
        false
    }

    /// Called by long operations between two holds of the lock, when [`Time::should_yield`] said so or the lock was
    /// contended.
    fn yield_now(&self) {
        self.relax();
    }

    /// The reader's half of the fence that the MMU lock needs between "I am inside" and "is there a writer".
    ///
    /// The default is a full fence, which is right everywhere together with the default of
    /// [`Time::heavy_fence`]. An embedder that can make all its CPUs execute a full fence on request may override
    /// both: this one with a compiler fence, that one with the request.
    #[inline]
    fn light_fence(&self) {
        crate::sync::fence(crate::sync::Ordering::SeqCst);
    }

    /// The writer's half: when it returns, every CPU on which another thread may hold or take the MMU lock has
    /// executed a full memory barrier since the call (`membarrier(2)`, or an NMI that is answered). Rare: lock for
    /// exclusive use, memslot update, freeing of tables.
    fn heavy_fence(&self) {
        crate::sync::fence(crate::sync::Ordering::SeqCst);
    }
}

/// Everything an embedder gives, in one type.
pub trait Host: TableFrames + Backing + Vcpus + Time + Send + Sync + 'static {
    /// The second-stage page-table format of this machine: [`crate::format::Npt`] or [`crate::format::Ept`].
    type Format: Format;

    /// Whether [`Host::trace`] is called at all. When `false` (the default), trace points compile to nothing.
    const TRACE: bool = false;

    /// Receives trace events, on the CPU and in the context where they happen, possibly under the MMU lock: it must
    /// not block and not call back into the library.
    #[inline]
    fn trace(&self, _event: crate::events::Event) {}
}
