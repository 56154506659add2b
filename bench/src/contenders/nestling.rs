//! `nestling`, the full path: a fault finds its slot, asks the backing, enters the lock, walks, keeps the books; a zap
//! freezes, flushes and thaws, and tables go back after a grace period.

#![expect(unsafe_code, reason = "the embedder's promise about table frames")]

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence, fence};

use nestling::format::{MemoryType, Npt};
use nestling::host::{Backing, BackingError, Extent, Page, TableFrames, Time, Vcpus};
use nestling::{
    Access, AddressSpace, Cause, Config, Fault, Gfn, GfnRange, Gpa, Hfn, Host, Hpa, Level, Mmu, Outcome, Slot,
    SlotConfig, SlotFlags, SlotId, Vcpu, VcpuId, Worker,
};
use rustix::thread::{MembarrierCommand, membarrier};

use super::{Contender, FIRST, PAGE, PAGES, Seat, backing};
use crate::arena::{self, Claim};

/// The two halves of the fence that the MMU lock needs.
pub trait Asymmetry: Send + Sync + 'static {
    /// As it appears in the output.
    const NAME: &'static str;
    /// See [`Time::light_fence`].
    fn light();
    /// See [`Time::heavy_fence`].
    fn heavy();
}

/// A compiler fence for readers, `membarrier(2)` for the rare writer.
#[derive(Debug)]
pub struct Membarrier;

impl Membarrier {
    /// Whether the kernel lets this process use it. To be called before the first fence.
    pub fn register() -> bool {
        membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
    }
}

impl Asymmetry for Membarrier {
    const NAME: &'static str = "membarrier";

    #[inline]
    fn light() {
        compiler_fence(Ordering::SeqCst);
    }

    fn heavy() {
        membarrier(MembarrierCommand::PrivateExpedited).expect("the process has registered for it");
    }
}

/// Full fences on both sides, where the kernel refuses `membarrier(2)`.
#[derive(Debug)]
pub struct FullFences;

impl Asymmetry for FullFences {
    const NAME: &'static str = "full fences";

    #[inline]
    fn light() {
        fence(Ordering::SeqCst);
    }

    fn heavy() {
        fence(Ordering::SeqCst);
    }
}

/// The embedder: tables from the arena, memory in one run, no guest that runs.
#[derive(Debug)]
pub(crate) struct Machine<A> {
    asymmetry: PhantomData<fn() -> A>,
}

// SAFETY: the arena gives each frame once and takes none back before its next claim, which waits for the MMU to go; a
// frame's number is its address, the same on every thread.
unsafe impl<A: Asymmetry> TableFrames for Machine<A> {
    #[inline]
    fn alloc_table(&self) -> Option<Hfn> {
        arena::alloc().map(|address| Hfn(address >> 12))
    }

    fn free_table(&self, _frame: Hfn) {}

    #[inline]
    fn table(&self, frame: Hfn) -> NonNull<AtomicU64> {
        // SAFETY: no frame of the arena is at 0.
        unsafe { arena::entries(frame.0 << 12) }.cast()
    }
}

impl<A: Asymmetry> Backing for Machine<A> {
    #[inline]
    fn resolve(&self, slot: &Slot, _gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        Ok(Extent { gfns: slot.range(), hfn: Hfn(slot.backing()), writable: true, memory: MemoryType::WriteBack })
    }

    #[inline]
    fn page(&self, slot: &Slot, gfn: Gfn, access: Access) -> Option<Page> {
        self.resolve(slot, gfn, access).ok()?.page(gfn)
    }
}

impl<A: Asymmetry> Vcpus for Machine<A> {
    fn kick(&self, _vcpu: VcpuId) {}
}

impl<A: Asymmetry> Time for Machine<A> {
    #[inline]
    fn light_fence(&self) {
        A::light();
    }

    fn heavy_fence(&self) {
        A::heavy();
    }
}

impl<A: Asymmetry> Host for Machine<A> {
    type Format = Npt;
}

/// An MMU with one slot over all of the benchmark's memory, and leaves up to `largest`. The caller has claimed the arena.
pub(crate) fn vm<A: Asymmetry>(largest: Level) -> Arc<Mmu<Machine<A>>> {
    let config = Config { vcpus: 2, workers: 3, slots: 4, largest, ..Config::default() };
    let mmu = Mmu::new(Machine { asymmetry: PhantomData }, config).expect("the configuration is right");
    let ram = SlotConfig {
        id: SlotId(0),
        space: AddressSpace::Main,
        base: Gpa(FIRST),
        size: PAGES * PAGE,
        flags: SlotFlags::empty(),
        backing: Hpa(backing(FIRST)).hfn().0,
    };
    mmu.worker().expect("there is memory for a worker").add_slot(ram).expect("the first slot overlaps nothing");
    mmu
}

/// See the module head.
#[derive(Debug)]
pub struct Nestling<A: Asymmetry> {
    // Dropped before the claim: its tables lie in the arena.
    mmu: Arc<Mmu<Machine<A>>>,
    _claim: Claim,
}

impl<A: Asymmetry> Contender for Nestling<A> {
    const NAME: &'static str = "nestling";
    type Seat<'c> = NestlingSeat<A>;

    fn new(claim: Claim) -> Self {
        Self { mmu: vm(Level::K4), _claim: claim }
    }

    fn seat(&self, number: u16) -> NestlingSeat<A> {
        let mut vcpu = self.mmu.vcpu(VcpuId(number)).expect("each number is used once");
        // Loads the root, as a vCPU does before its guest can fault.
        drop(vcpu.enter().expect("there is memory for a root"));
        NestlingSeat { vcpu, worker: self.mmu.worker().expect("there is memory for a worker") }
    }

    fn root(&self) -> u64 {
        let mut vcpu = self.mmu.vcpu(VcpuId(0)).expect("no seat is in use");
        let root = vcpu.enter().expect("there is memory for a root").root();
        root.0
    }
}

/// A vCPU and a worker.
#[derive(Debug)]
pub struct NestlingSeat<A: Asymmetry> {
    vcpu: Vcpu<Machine<A>>,
    worker: Worker<Machine<A>>,
}

impl<A: Asymmetry> Seat for NestlingSeat<A> {
    #[inline(never)]
    fn fault(&mut self, gpa: u64) -> bool {
        let fault = Fault { gpa: Gpa(gpa), access: Access::Write, cause: Cause::Translation };
        matches!(self.vcpu.fault(fault), Ok(Outcome::Fixed { .. }))
    }

    #[inline(never)]
    fn look_up(&mut self, gpa: u64) -> Option<u64> {
        self.vcpu.translate(Gpa(gpa), Access::Read).map(|hpa| hpa.0)
    }

    #[inline(never)]
    fn zap(&mut self, gpa: u64) -> bool {
        self.zap_range(gpa, 1) == 1
    }

    fn zap_range(&mut self, first: u64, pages: u64) -> u64 {
        let range = GfnRange::new(Gpa(first).gfn(), pages).expect("the benchmark's memory is within 52 bits");
        self.worker.zap(range).leaves
    }
}
