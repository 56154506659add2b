//! Faults in shadow tables: two vCPUs in different parts of one guest's address space, beside one; and what the books of
//! a guest cost of which every page is mapped.
//!
//! The guest has 256 MiB in 4 KiB pages, under tables of four levels that lie in memory and are marked already. Each
//! fault is a walk of those, the slot, the backing, the lock, the shadow tables, and the page with its seven neighbours.
//! A repetition begins with empty shadow tables.

#![expect(unsafe_code, reason = "the embedder's promise about table frames")]

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nestling::format::{MemoryType, Npt};
use nestling::guest::{Controls, CpuFeatures, Privilege, Request, Width};
use nestling::host::{Backing, BackingError, Extent, GuestMemory, TableFrames, Time, Vcpus};
use nestling::shadow::vcpu::ShadowOutcome;
use nestling::shadow::{Metadata, ShadowConfig};
use nestling::{Access, AddressSpace, Config, Gfn, Gpa, Hfn, Host, Mmu, Slot, SlotConfig, SlotFlags, SlotId, VcpuId};

use crate::arena::{self, Claim};
use crate::clock::{Meeting, cpus, pin};
use crate::contenders::{Asymmetry, FullFences, Membarrier};
use crate::figures::{Figure, Summary};

/// Pages of data: with the frames before them, 256 MiB.
const PAGES: u64 = (1 << 16) - DATA;
/// Pages that one fault maps.
const TOGETHER: u64 = 8;
/// The guest's tables: one each of levels 4 to 2, then those of level 1.
const TABLES: u64 = 3 + PAGES / 512;
/// First frame of data.
const DATA: u64 = 1024;
/// The host frame of guest frame 0.
const HOME: u64 = 1 << 24;
/// P, W, U, A, D.
const ALL: u64 = 0x67;

/// The embedder.
struct Machine<A> {
    tables: Box<[[AtomicU64; 512]]>,
    asymmetry: PhantomData<fn() -> A>,
}

impl<A> Machine<A> {
    fn new() -> Self {
        let tables: Box<[[AtomicU64; 512]]> = (0..TABLES).map(|_| [const { AtomicU64::new(0) }; 512]).collect();
        let put = |table: u64, entry: u64, gfn: u64| {
            tables[table as usize][entry as usize].store(gfn << 12 | ALL, Ordering::Relaxed);
        };
        put(0, 0, 1);
        put(1, 0, 2);
        (0..PAGES / 512).for_each(|table| put(2, table, 3 + table));
        (0..PAGES).for_each(|page| put(3 + page / 512, page % 512, DATA + page));
        Self { tables, asymmetry: PhantomData }
    }

    fn entry(&self, hfn: Hfn, offset: u32) -> &AtomicU64 {
        &self.tables[(hfn.0 - HOME) as usize][offset as usize / 8]
    }
}

// SAFETY: as for the contender: the arena gives each frame once and takes none back before its next claim, which waits
// for the MMU to go; a frame's number is its address, the same on every thread.
unsafe impl<A: Asymmetry> TableFrames for Machine<A> {
    fn alloc_table(&self) -> Option<Hfn> {
        arena::alloc().map(|address| Hfn(address >> 12))
    }

    fn free_table(&self, _frame: Hfn) {}

    fn table(&self, frame: Hfn) -> NonNull<AtomicU64> {
        // SAFETY: no frame of the arena is at 0.
        unsafe { arena::entries(frame.0 << 12) }.cast()
    }
}

impl<A: Asymmetry> Backing for Machine<A> {
    fn resolve(&self, slot: &Slot, _gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        Ok(Extent { gfns: slot.range(), hfn: Hfn(HOME), writable: true, memory: MemoryType::WriteBack })
    }
}

impl<A: Asymmetry> GuestMemory for Machine<A> {
    fn load(&self, hfn: Hfn, offset: u32, _width: Width) -> u64 {
        self.entry(hfn, offset).load(Ordering::Acquire)
    }

    fn compare_exchange(&self, hfn: Hfn, offset: u32, _width: Width, old: u64, new: u64) -> bool {
        self.entry(hfn, offset).compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

impl<A: Asymmetry> Vcpus for Machine<A> {
    fn kick(&self, _vcpu: VcpuId) {}
}

impl<A: Asymmetry> Time for Machine<A> {
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

/// One repetition by so many threads: how long it took, and the books at its end.
fn repetition<A: Asymmetry>(threads: u16, cpus: &[usize]) -> (Duration, Metadata) {
    // Dropped after the MMU: its tables lie in the arena.
    let _claim = Claim::take();
    let config = Config { vcpus: 2, workers: 1, slots: 2, ..Config::default() };
    let mmu = Mmu::new(Machine::<A>::new(), config).expect("the configuration is right");
    let cpu = CpuFeatures { physical_bits: 48, gigantic_pages: true };
    mmu.enable_shadow(ShadowConfig { pages: 512, cpu }).expect("there is memory");
    let ram = SlotConfig {
        id: SlotId(0),
        space: AddressSpace::Main,
        base: Gpa(0),
        size: (DATA + PAGES) << 12,
        flags: SlotFlags::empty(),
        backing: 0,
    };
    mmu.worker().expect("there is memory for a worker").add_slot(ram).expect("the first slot overlaps nothing");
    let meeting = Meeting::new(threads.into());
    let share = PAGES / u64::from(threads);
    let run = |number: u16, cpu: usize| {
        pin(cpu);
        let mut vcpu = mmu.shadow_vcpu(VcpuId(number)).expect("there is memory").expect("each number is used once");
        vcpu.set_controls(Controls { cr0: 1 << 31 | 1 << 16 | 1, cr4: 1 << 5, efer: 1 << 10 | 1 << 11 });
        drop(vcpu.enter().expect("there is memory for a root"));
        let first = share * u64::from(number);
        let request = |page: u64| Request {
            linear: page << 12,
            access: Access::Write,
            privilege: Privilege::Supervisor { ac: false },
            pkru: 0,
        };
        meeting.wait();
        let start = Instant::now();
        let pages = (first..first + share).step_by(TOGETHER as usize);
        let fixed = pages.filter(|page| {
            loop {
                match vcpu.fault(&request(*page)) {
                    // The other vCPU has the same upper tables to make.
                    Ok(ShadowOutcome::Retry) => {}
                    outcome => break outcome == Ok(ShadowOutcome::Fixed),
                }
            }
        });
        let fixed = fixed.count() as u64;
        (start, Instant::now(), fixed)
    };
    let runs: Vec<_> = std::thread::scope(|scope| {
        let run = &run;
        let started: Vec<_> =
            (0..threads).zip(cpus).map(|(number, &cpu)| scope.spawn(move || run(number, cpu))).collect();
        started.into_iter().map(|thread| thread.join().expect("a vCPU panicked")).collect()
    });
    let fixed: u64 = runs.iter().map(|(.., fixed)| fixed).sum();
    assert_eq!(fixed, PAGES / TOGETHER, "each fault maps what was not mapped");
    assert_eq!(mmu.counters().leaves_4k, PAGES, "every page is mapped once");
    let start = runs.iter().map(|run| run.0).min().expect("there is a thread");
    let end = runs.iter().map(|run| run.1).max().expect("there is a thread");
    (end - start, mmu.shadow_metadata().expect("shadow paging is enabled"))
}

/// Measures so many rounds; the figures.
pub fn figures(rounds: usize) -> Vec<Figure> {
    let repetition = if Membarrier::register() { repetition::<Membarrier> } else { repetition::<FullFences> };
    let cpus = cpus();
    let figure = |name: &str, value| Figure { name: name.into(), value };
    let nanoseconds = |took: Duration| took.as_secs_f64() * 1e9 / (PAGES / TOGETHER) as f64;
    let (mut one, mut two, mut books) = (Vec::new(), Vec::new(), Metadata::default());
    for _ in 0..rounds {
        let (took, metadata) = repetition(1, &cpus);
        one.push(nanoseconds(took));
        books = metadata;
        if cpus.len() > 1 {
            two.push(nanoseconds(repetition(2, &cpus).0));
        }
    }
    let percent = books.bytes() as f64 * 100.0 / ((DATA + PAGES) << 12) as f64;
    let one = Summary::of(&one);
    let mut figures = vec![
        figure("shadow_fault.one_thread.nestling.ns_per_fault", one.median),
        figure("shadow.metadata_percent_of_guest_memory", percent),
    ];
    if !two.is_empty() {
        let two = Summary::of(&two);
        figures.push(figure("shadow_fault.two_threads.nestling.ns_per_fault", two.median));
        figures.push(figure("shadow_fault.two_threads.speedup_over_one_thread", one.median / two.median));
        figures.push(figure("shadow_fault.two_threads.min_speedup_over_one_thread", one.min / two.min));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Timings decide nothing; that every page is mapped by its fault, and what it costs, is asserted.
    #[test]
    fn every_page_is_mapped_and_the_books_are_small() {
        let figures = figures(1);
        let percent = figures.iter().find(|figure| figure.name.contains("percent")).expect("there is one");
        assert!((0.1..0.25).contains(&percent.value), "{percent}");
    }
}
