//! What `nestling` asks of its embedder, on this machine.
//!
//! Tables are frames, zeroed; backing is [`GuestRam`]; vCPU *i* runs on CPU *i* + 1, so a kick is an IPI to that CPU;
//! and the asymmetric fence is a compiler fence on the side of the fault path and an NMI to every CPU on the other
//! ([`crate::cpu::barrier`]).

use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nestling::events::{Event, Side};
use nestling::format::{MemoryType, Npt};
use nestling::guest::Width;
use nestling::host::{
    Access, Backing, BackingError, Extent, GuestMemory, Host, LOW_FRAMES, Page, TableFrames, Time, VcpuId, Vcpus,
};
use nestling::sync::AtomicU64 as Entry;
use nestling::{Gfn, Hfn, Hpa, Slot};

use super::frames::{self, FRAME};
use super::guest::GuestRam;
use crate::cpu::apic::{self, Command};
use crate::cpu::{MAX_CPUS, barrier, instructions, local, vector};
use crate::ghost;

/// The CPU that runs a vCPU. CPU 0 runs none: see [`crate::vm`].
#[must_use]
pub const fn cpu_of(vcpu: usize) -> usize {
    vcpu + 1
}

/// Makes the CPU of a vCPU leave guest mode or HLT, if it is in one.
pub fn kick(vcpu: usize) {
    apic::send(local::all()[cpu_of(vcpu)].apic_id(), Command::Fixed(vector::KICK));
}

/// Makes the CPU of a vCPU leave guest mode by an NMI, if it is in it.
pub fn insist(vcpu: usize) {
    apic::send(local::all()[cpu_of(vcpu)].apic_id(), Command::Nmi);
}

/// Makes CPU 0 look around.
pub fn kick_housekeeper() {
    apic::send(local::all()[0].apic_id(), Command::Fixed(vector::KICK));
}

/// One VM's side of the bargain.
#[derive(Debug)]
pub struct Machine {
    ram: GuestRam,
    /// When the hold that goes on now began, by CPU.
    holds: [AtomicU64; MAX_CPUS],
    longest_hold: AtomicU64,
    exclusive: AtomicU64,
}

/// Table frames of all VMs, now and at most.
static TABLES: AtomicU64 = AtomicU64::new(0);
static TABLES_PEAK: AtomicU64 = AtomicU64::new(0);

/// Table frames in use now, and the most there ever were at one time.
#[must_use]
pub fn table_frames() -> (u64, u64) {
    (TABLES.load(Ordering::Relaxed), TABLES_PEAK.load(Ordering::Relaxed))
}

impl Machine {
    /// An embedder whose slots are backed by `ram`.
    #[must_use]
    pub fn new(ram: GuestRam) -> Self {
        Self {
            ram,
            holds: [const { AtomicU64::new(0) }; MAX_CPUS],
            longest_hold: AtomicU64::new(0),
            exclusive: AtomicU64::new(0),
        }
    }

    /// The longest time for which a worker held the MMU lock, in ticks of the TSC.
    #[must_use]
    pub fn longest_hold(&self) -> u64 {
        self.longest_hold.load(Ordering::Relaxed)
    }

    /// For how long workers have had the MMU lock to themselves in all, in ticks of the TSC.
    #[must_use]
    pub fn exclusive_ticks(&self) -> u64 {
        self.exclusive.load(Ordering::Relaxed)
    }

    /// The guest's RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }
}

// SAFETY: a frame from the allocator is ours until it is given back, and the identity map makes its address a pointer
// on every CPU.
unsafe impl TableFrames for Machine {
    fn alloc_table(&self) -> Option<Hfn> {
        Some(clean_table(frames::alloc(0)?))
    }

    fn alloc_low_table(&self) -> Option<Hfn> {
        Some(clean_table(frames::alloc_below(0, LOW_FRAMES * FRAME)?))
    }

    fn free_table(&self, frame: Hfn) {
        ghost::table_freed(frame);
        TABLES.fetch_sub(1, Ordering::Relaxed);
        frames::free(frame.hpa().0, 0);
    }

    #[inline]
    fn table(&self, frame: Hfn) -> NonNull<Entry> {
        let table = ptr::with_exposed_provenance_mut(frame.hpa().0 as usize);
        // SAFETY: no table lies at address 0: the first MiB is not in the allocator.
        unsafe { NonNull::new_unchecked(table) }
    }
}

/// A frame that was just allocated, for a table.
#[inline]
fn clean_table(frame: u64) -> Hfn {
    // SAFETY: just allocated.
    unsafe { frames::block(frame, 0) }.fill(0);
    let now = TABLES.fetch_add(1, Ordering::Relaxed) + 1;
    TABLES_PEAK.fetch_max(now, Ordering::Relaxed);
    Hpa(frame).hfn()
}

impl Backing for Machine {
    #[inline]
    fn resolve(&self, slot: &Slot, gfn: Gfn, access: Access) -> Result<Extent, BackingError> {
        self.ram.resolve(slot.backing(), gfn, access)
    }

    #[inline]
    fn page(&self, slot: &Slot, gfn: Gfn, _access: Access) -> Option<Page> {
        let hfn = self.ram.frame_at_hand(slot.backing(), gfn)?;
        Some(Page { hfn, writable: true, memory: MemoryType::WriteBack })
    }
}

/// The guest's own page tables, by host frame.
///
/// Nothing is pinned here. The library is inside its lock and knows that no invalidation of the frame has begun; what moves
/// a page or takes it away begins one first, which waits for whoever is inside, and copies the page afterwards. So a load
/// is of the page as it is, and no mark is lost in a copy.
impl GuestMemory for Machine {
    #[inline]
    fn load(&self, hfn: Hfn, offset: u32, width: Width) -> u64 {
        let at = entry_at(hfn, offset);
        // SAFETY: the frame is guest RAM now, identity-mapped, and the offset is inside it and a multiple of the width.
        // Guests change it at the same time, atomically or not; it is read in one piece, and means nothing to this program.
        unsafe {
            match width {
                Width::Four => u64::from(AtomicU32::from_ptr(at.cast()).load(Ordering::Acquire)),
                Width::Eight => AtomicU64::from_ptr(at.cast()).load(Ordering::Acquire),
            }
        }
    }

    #[inline]
    fn compare_exchange(&self, hfn: Hfn, offset: u32, width: Width, old: u64, new: u64) -> bool {
        let at = entry_at(hfn, offset);
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        // SAFETY: as in `load`.
        unsafe {
            match width {
                Width::Four => {
                    let entry = AtomicU32::from_ptr(at.cast());
                    entry.compare_exchange(old as u32, new as u32, success, failure).is_ok()
                }
                Width::Eight => AtomicU64::from_ptr(at.cast()).compare_exchange(old, new, success, failure).is_ok(),
            }
        }
    }
}

/// Where an entry of a guest's table is.
#[inline]
fn entry_at(hfn: Hfn, offset: u32) -> *mut u8 {
    ptr::with_exposed_provenance_mut((hfn.hpa().0 + u64::from(offset)) as usize)
}

impl Vcpus for Machine {
    fn kick(&self, vcpu: VcpuId) {
        kick(usize::from(vcpu.0));
    }
}

impl Time for Machine {
    #[inline]
    fn light_fence(&self) {
        barrier::light();
    }

    fn heavy_fence(&self) {
        barrier::heavy();
    }
}

impl Host for Machine {
    type Format = Npt;
    const TRACE: bool = true;

    /// Inlined, so that nothing is left of it where the event is none that is looked at: on the fault path above all.
    #[inline(always)]
    fn trace(&self, event: Event) {
        match event {
            Event::LockTaken { .. } => {
                self.holds[local::this().number()].store(instructions::rdtsc(), Ordering::Relaxed);
            }
            Event::LockReleased { side, .. } => {
                let began = self.holds[local::this().number()].load(Ordering::Relaxed);
                let ticks = instructions::rdtsc().wrapping_sub(began);
                self.longest_hold.fetch_max(ticks, Ordering::Relaxed);
                if side == Side::Exclusive {
                    self.exclusive.fetch_add(ticks, Ordering::Relaxed);
                }
            }
            _ => {}
        }
    }
}
