//! A whole embedder on the host: four threads play vCPUs and fault in a guest of 256 MiB.
//!
//! Run with `cargo run --release -p nestling --example hosted`.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nestling::format::{MemoryType, Npt};
use nestling::host::{Backing, BackingError, Extent, TableFrames, Time, Vcpus};
use nestling::sync::AtomicU64 as Entry;
use nestling::{
    Access, AddressSpace, Cause, Config, Fault, Gfn, GfnRange, Gpa, Hfn, Host, Level, Mmu, Outcome, Slot, SlotConfig,
    SlotFlags, SlotId, VcpuId,
};

/// What this machine gives the library.
#[derive(Debug, Default)]
struct Machine {
    tables: AtomicU64,
}

const TABLE: Layout = match Layout::from_size_align(4096, 4096) {
    Ok(layout) => layout,
    Err(_) => panic!("4096 is a power of two"),
};

// SAFETY: a table is a live, aligned, zeroed allocation of its own from alloc_table to free_table; its frame number is
// its address, so `table` gives the same pointer on every thread.
unsafe impl TableFrames for Machine {
    fn alloc_table(&self) -> Option<Hfn> {
        // SAFETY: the layout's size is not zero.
        let page = NonNull::new(unsafe { alloc_zeroed(TABLE) })?;
        self.tables.fetch_add(1, Ordering::Relaxed);
        Some(Hfn(page.as_ptr().expose_provenance() as u64 >> 12))
    }

    fn free_table(&self, frame: Hfn) {
        self.tables.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: the library gives back what alloc_table gave it, once.
        unsafe { dealloc(self.table(frame).as_ptr().cast(), TABLE) };
    }

    fn table(&self, frame: Hfn) -> NonNull<Entry> {
        NonNull::new(std::ptr::with_exposed_provenance_mut((frame.0 << 12) as usize)).expect("a table is not at 0")
    }
}

/// Guest frame n is backed by host frame n + 1 GiB, in runs of 2 MiB: so 2 MiB leaves fit.
impl Backing for Machine {
    fn resolve(&self, _slot: &Slot, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let gfns = GfnRange::block(Level::M2, gfn);
        Ok(Extent { gfns, hfn: Hfn(gfns.start.0 + (1 << 18)), writable: true, memory: MemoryType::WriteBack })
    }
}

/// No guest runs here, so there is nobody to kick.
impl Vcpus for Machine {
    fn kick(&self, _vcpu: VcpuId) {}
}

impl Time for Machine {}

impl Host for Machine {
    type Format = Npt;
}

fn main() {
    for largest in [Level::K4, Level::M2] {
        let config = Config { vcpus: 4, largest, ..Config::default() };
        let mmu = Mmu::new(Machine::default(), config).expect("the configuration is right");
        let mut worker = mmu.worker().expect("there is memory for a worker");
        let (base, size) = (Gpa(1 << 30), 256 << 20);
        let ram =
            SlotConfig { id: SlotId(0), space: AddressSpace::Main, base, size, flags: SlotFlags::empty(), backing: 0 };
        worker.add_slot(ram).expect("the first slot overlaps nothing");

        let start = Instant::now();
        std::thread::scope(|scope| {
            for id in 0..4 {
                let mut vcpu = mmu.vcpu(VcpuId(id)).expect("each number is used once");
                scope.spawn(move || {
                    // A real vCPU would load the root and run until it faults; this one only pretends to.
                    drop(vcpu.enter().expect("there is memory for a root"));
                    for page in (u64::from(id)..size >> 12).step_by(4) {
                        let gpa = Gpa(base.0 + (page << 12));
                        let fault = Fault { gpa, access: Access::Write, cause: Cause::Translation };
                        let outcome = vcpu.fault(fault).expect("tables and backing do not run out");
                        assert!(matches!(outcome, Outcome::Fixed { .. } | Outcome::Spurious));
                    }
                });
            }
        });
        let took = start.elapsed();
        let counters = mmu.counters();
        println!("{largest:?}: {} faults in {took:?}, mapped {:?} bytes", size >> 12, counters.mapped_bytes());
        println!("    fixed {}, spurious {}", counters.faults_fixed, counters.faults_spurious);
        println!("    lost races {}, table frames {}", counters.lost_races, counters.table_frames);

        worker.delete_slot(SlotId(0)).expect("the slot is there");
        assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
        drop(worker);
        println!("    after the slot is gone: {} table frames", mmu.host().tables.load(Ordering::Relaxed));
    }
}
