//! What a zap of everything costs: its front half, by how much is mapped, and its back half, to the vCPU beside it.
//!
//! The front half is what happens between the taking of the exclusive lock and its release: it is told of by trace events,
//! and nothing in it may depend on what the tables hold. The back half empties the old roots while vCPUs fault in new
//! ones, and lets go of the lock after each table.
//!
//! **Faults beside the back half.** One thread faults without end, each time the next page, and loads a new root when the old
//! one is obsolete. The other has mapped 1 GiB in 4 KiB pages and zaps it. How many faults went by while the back half ran
//! is held against how many go by in as long a time right after it, when the other thread only waits; in each round anew, so
//! that what else the machine does hits both alike.
//!
//! **Instructions of a fault beside a zap**, of a range: counted from the call to the return, waiting included, with another
//! thread in the middle of a zap of 1 GiB in 4 KiB pages of the same tables, and without one. valgrind runs one thread at a
//! time and stops it anywhere, so the one that zaps holds the lock, with frozen entries, while thousands of faults go by.

#![expect(unsafe_code, reason = "the embedder's promise about table frames")]

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nestling::events::{Event, Side};
use nestling::format::{MemoryType, Npt};
use nestling::host::{Backing, BackingError, Extent, TableFrames, Time, Vcpus};
use nestling::{
    Access, AddressSpace, Cause, Config, Fault, FaultError, Gfn, GfnRange, Gpa, Hfn, Host, Level, Mmu, Outcome, Slot,
    SlotConfig, SlotFlags, SlotId, Vcpu, VcpuId,
};

use crate::clock::{cpus, pin};
use crate::contenders::Asymmetry;
use crate::figures::{Figure, Summary};
use crate::valgrind;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 1 << 12;
const TABLE: Layout = match Layout::from_size_align(4096, 4096) {
    Ok(layout) => layout,
    Err(_) => panic!("4096 is a power of two"),
};
/// More than the caches hold.
const OTHER_BYTES: usize = 64 << 20;
/// Guest memory of the thread that faults, behind that of the one that zaps.
const BESIDE: Gpa = Gpa(1 << 40);
const BESIDE_BYTES: u64 = 256 * GIB;

/// How many faults are counted.
pub const COUNTED_FAULTS: u64 = 50_000;

/// An embedder with as many tables as its heap has, that listens to trace events.
#[derive(Debug)]
struct Machine<A> {
    free: Mutex<Vec<Hfn>>,
    start: Instant,
    /// When the exclusive lock was taken and let go last, in nanoseconds since the start.
    taken: AtomicU64,
    released: AtomicU64,
    /// The most steps of one hold of the shared side.
    longest: AtomicU64,
    /// Callgrind is to count what is done inside the exclusive lock.
    counts: AtomicBool,
    asymmetry: PhantomData<fn() -> A>,
}

impl<A> Machine<A> {
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

// SAFETY: each frame is a page of its own from the heap, aligned, which is never given back to it; its number is its address.
unsafe impl<A: Asymmetry> TableFrames for Machine<A> {
    fn alloc_table(&self) -> Option<Hfn> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(frame) = free {
            // SAFETY: the page is the caller's alone, since nobody has its frame.
            unsafe { ptr::write_bytes(self.table(frame).as_ptr().cast::<u8>(), 0, TABLE.size()) };
            return Some(frame);
        }
        // SAFETY: the layout has a size.
        let page = unsafe { alloc_zeroed(TABLE) };
        if page.is_null() {
            handle_alloc_error(TABLE);
        }
        Some(Hfn(page.expose_provenance() as u64 >> 12))
    }

    fn free_table(&self, frame: Hfn) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
    }

    #[inline]
    fn table(&self, frame: Hfn) -> NonNull<AtomicU64> {
        // SAFETY: no page of the heap is at 0.
        unsafe { NonNull::new_unchecked(ptr::with_exposed_provenance_mut((frame.0 << 12) as usize)) }
    }
}

impl<A: Asymmetry> Backing for Machine<A> {
    #[inline]
    fn resolve(&self, slot: &Slot, _gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let gfns = slot.range();
        Ok(Extent { gfns, hfn: Hfn(gfns.start.0), writable: true, memory: MemoryType::WriteBack })
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
    const TRACE: bool = true;

    #[inline(always)]
    fn trace(&self, event: Event) {
        match event {
            Event::LockTaken { side: Side::Exclusive } => {
                if self.counts.load(Ordering::Relaxed) {
                    valgrind::toggle();
                }
                self.taken.store(self.now(), Ordering::Relaxed);
            }
            Event::LockReleased { side: Side::Exclusive, .. } => {
                self.released.store(self.now(), Ordering::Relaxed);
                if self.counts.load(Ordering::Relaxed) {
                    valgrind::toggle();
                }
            }
            Event::LockReleased { side: Side::Shared, steps } => {
                self.longest.fetch_max(steps.into(), Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// How much is mapped when everything is zapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// 1 GiB, in pages of 2 MiB.
    Gibibyte,
    /// 1 TiB, in pages of 2 MiB.
    Tebibyte,
}

impl Size {
    /// All.
    pub const ALL: [Self; 2] = [Self::Gibibyte, Self::Tebibyte];

    /// As it appears in names of figures.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gibibyte => "1gib",
            Self::Tebibyte => "1tib",
        }
    }

    const fn bytes(self) -> u64 {
        match self {
            Self::Gibibyte => GIB,
            Self::Tebibyte => 1024 * GIB,
        }
    }
}

fn machine<A: Asymmetry>(largest: Level) -> Arc<Mmu<Machine<A>>> {
    let nothing = || AtomicU64::new(0);
    let machine = Machine {
        free: Mutex::default(),
        start: Instant::now(),
        taken: nothing(),
        released: nothing(),
        longest: nothing(),
        counts: AtomicBool::new(false),
        asymmetry: PhantomData,
    };
    let config = Config { vcpus: 2, workers: 2, slots: 2, largest, ..Config::default() };
    let mmu = Mmu::new(machine, config).expect("the configuration is right");
    let mut worker = mmu.worker().expect("there is memory for a worker");
    for (id, base, size) in [(0, Gpa(0), Size::Tebibyte.bytes()), (1, BESIDE, BESIDE_BYTES)] {
        let (space, flags) = (AddressSpace::Main, SlotFlags::empty());
        let slot = SlotConfig { id: SlotId(id), space, base, size, flags, backing: 0 };
        worker.add_slot(slot).expect("the slots overlap nothing");
    }
    drop(worker);
    mmu
}

fn write<A: Asymmetry>(vcpu: &mut Vcpu<Machine<A>>, gpa: u64) -> Result<Outcome, FaultError> {
    vcpu.fault(Fault { gpa: Gpa(gpa), access: Access::Write, cause: Cause::Translation })
}

fn map<A: Asymmetry>(vcpu: &mut Vcpu<Machine<A>>, bytes: u64, step: u64) {
    drop(vcpu.enter().expect("there is memory for a root"));
    for gpa in (0..bytes).step_by(step as usize) {
        assert!(matches!(write(vcpu, gpa), Ok(Outcome::Fixed { .. })), "{gpa:#x} was mapped already");
    }
}

/// What a counted process does: maps `size`, and zaps everything, counting what is done inside the exclusive lock.
pub fn counted_process<A: Asymmetry>(size: Size) {
    let mmu = machine::<A>(Level::M2);
    map(&mut mmu.vcpu(VcpuId(0)).expect("it is the first"), size.bytes(), 2 << 20);
    let mut worker = mmu.worker().expect("there is memory for a worker");
    mmu.host().counts.store(true, Ordering::Relaxed);
    worker.zap_all();
}

/// Whether a zap runs beside the faults that are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Company {
    /// None does.
    Alone,
    /// One does all the time.
    Zap,
}

impl Company {
    /// All.
    pub const ALL: [Self; 2] = [Self::Alone, Self::Zap];

    /// As it appears in names of figures.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Zap => "beside",
        }
    }
}

/// What a counted process does: [`COUNTED_FAULTS`] faults in pages that nobody has met, alone or beside zaps.
pub fn counted_faults<A: Asymmetry>(company: Company) {
    let mmu = machine::<A>(Level::K4);
    let (zaps, enough) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        if company == Company::Zap {
            scope.spawn(|| {
                let mut vcpu = mmu.vcpu(VcpuId(0)).expect("each number is used once");
                let mut worker = mmu.worker().expect("there is memory for a worker");
                while !enough.load(Ordering::Relaxed) {
                    map(&mut vcpu, GIB, PAGE);
                    zaps.store(true, Ordering::Relaxed);
                    worker.zap(GfnRange { start: Gpa(0).gfn(), end: Gpa(GIB).gfn() });
                    zaps.store(false, Ordering::Relaxed);
                }
            });
        }
        let mut vcpu = mmu.vcpu(VcpuId(1)).expect("each number is used once");
        drop(vcpu.enter().expect("there is memory for a root"));
        for gpa in (BESIDE.0..).step_by(PAGE as usize).take(COUNTED_FAULTS as usize) {
            while company == Company::Zap && !zaps.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            valgrind::toggle();
            let outcome = write(&mut vcpu, gpa);
            valgrind::toggle();
            assert!(matches!(outcome, Ok(Outcome::Fixed { .. })), "{gpa:#x}: {outcome:?}");
        }
        enough.store(true, Ordering::Relaxed);
    });
}

/// How long the front half took, over some rounds.
fn front_half<A: Asymmetry>(size: Size, rounds: usize) -> Summary {
    let mmu = machine::<A>(Level::M2);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    let mut worker = mmu.worker().expect("there is memory for a worker");
    let mut other = vec![0u64; OTHER_BYTES / size_of::<u64>()];
    let samples: Vec<f64> = (0..rounds)
        .map(|round| {
            map(&mut vcpu, size.bytes(), 2 << 20);
            // However much was mapped, the caches are full of something else then.
            other.iter_mut().for_each(|word| *word = round as u64);
            std::hint::black_box(&mut other);
            worker.zap_all();
            let host = mmu.host();
            (host.released.load(Ordering::Relaxed) - host.taken.load(Ordering::Relaxed)) as f64
        })
        .collect();
    Summary::of(&samples)
}

/// One round of faults beside a back half.
#[derive(Clone, Copy, Debug)]
struct Beside {
    /// Faults a second while the back half ran, and while it did not.
    during: f64,
    alone: f64,
    /// How long it ran.
    took: Duration,
}

/// What the thread that faults is told.
#[derive(Debug, Default)]
struct Faulter {
    /// To fault, or to wait.
    faults: AtomicBool,
    stops: AtomicBool,
    /// How many it has done.
    done: AtomicU64,
}

/// Faults whenever it is told to, until it is told to stop, counting them.
fn fault_on<A: Asymmetry>(vcpu: &mut Vcpu<Machine<A>>, told: &Faulter) {
    let mut gpa = BESIDE.0;
    let mut count = 0;
    while !told.stops.load(Ordering::Relaxed) {
        if !told.faults.load(Ordering::Relaxed) {
            // Asleep and not yielding: who yields all the time goes to the end of the line for long.
            std::thread::sleep(Duration::from_micros(50));
            continue;
        }
        match write(vcpu, gpa) {
            Ok(Outcome::Fixed { .. } | Outcome::Spurious) => {
                gpa = BESIDE.0 + (gpa + PAGE - BESIDE.0) % BESIDE_BYTES;
                count += 1;
                told.done.store(count, Ordering::Relaxed);
            }
            // The root is obsolete, or there is none yet.
            Ok(_) | Err(FaultError::NoRoot) => drop(vcpu.enter().expect("there is memory for a root")),
            Err(error) => panic!("{error}"),
        }
    }
}

fn beside<A: Asymmetry>(rounds: usize, bytes: u64, places: [usize; 2]) -> (Vec<Beside>, u64) {
    let mmu = machine::<A>(Level::K4);
    let told = Faulter::default();
    let samples = std::thread::scope(|scope| {
        let mut faulter = mmu.vcpu(VcpuId(1)).expect("each number is used once");
        let told = &told;
        scope.spawn(move || {
            pin(places[1]);
            fault_on(&mut faulter, told);
        });
        let done = || told.done.load(Ordering::Relaxed);
        let mmu = &mmu;
        let zaps = scope.spawn(move || {
            pin(places[0]);
            let mut vcpu = mmu.vcpu(VcpuId(0)).expect("each number is used once");
            let mut worker = mmu.worker().expect("there is memory for a worker");
            let zap = |_| {
                map(&mut vcpu, bytes, PAGE);
                told.faults.store(true, Ordering::Relaxed);
                // Its first one shows that it has its CPU.
                let before = done();
                while done() == before {
                    std::hint::spin_loop();
                }
                let before = done();
                let zap = Instant::now();
                worker.zap_all();
                let (took, middle) = (zap.elapsed(), done());
                // As long as that again, with nothing but a look at the clock.
                let wait = Instant::now();
                while wait.elapsed() < took {
                    std::hint::spin_loop();
                }
                let (waited, after) = (wait.elapsed(), done());
                told.faults.store(false, Ordering::Relaxed);
                let rate = |faults: u64, time: Duration| faults as f64 / time.as_secs_f64();
                Beside { during: rate(middle - before, took), alone: rate(after - middle, waited), took }
            };
            (0..rounds).map(zap).collect()
        });
        let samples = zaps.join();
        told.stops.store(true, Ordering::Relaxed);
        samples.expect("the thread that zaps panicked")
    });
    (samples, mmu.host().longest.load(Ordering::Relaxed))
}

/// Measures, prints, and gives the figures. `full` for figures to believe.
pub fn figures<A: Asymmetry>(full: bool) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut figure = |name: &str, value: f64| figures.push(Figure { name: format!("zap_all.{name}"), value });
    println!("\nzap-all: the front half, by what is mapped, wall ns: median (minimum)");
    let rounds = if full { 9 } else { 2 };
    let [small, large] = Size::ALL.map(|size| {
        let summary = front_half::<A>(size, rounds);
        println!("  {:<5} {:>8.0} ({:.0})", size.name(), summary.median, summary.min);
        figure(&format!("front_half.{}.ns", size.name()), summary.median);
        summary
    });
    figure("front_half.ns_ratio_1tib_to_1gib", large.median / small.median);
    if let [first, second, ..] = cpus()[..] {
        println!("zap-all: faults of another thread during the back half of 1 GiB in 4 KiB pages");
        let (samples, longest) = beside::<A>(if full { 11 } else { 2 }, GIB, [first, second]);
        let of = |what: fn(&Beside) -> f64| Summary::of(&samples.iter().map(what).collect::<Vec<_>>()).median;
        let (during, alone) = (of(|round| round.during), of(|round| round.alone));
        // Of rounds, and not of medians: the two parts of a round lie close together.
        let lost = 1.0 - of(|round| round.during / round.alone);
        println!("  {:.2} M/s during, {:.2} M/s after, {:.1} % lost", during / 1e6, alone / 1e6, lost * 100.0);
        println!(
            "  the back half took {:.2} ms, its longest hold {longest} step(s)",
            of(|round| round.took.as_secs_f64()) * 1e3
        );
        figure("two_threads.faults_per_second_during", during);
        figure("two_threads.faults_per_second_alone", alone);
        figure("two_threads.fault_rate_ratio", 1.0 - lost);
        figure("back_half.ms", of(|round| round.took.as_secs_f64()) * 1e3);
        figure("back_half.longest_hold_steps", longest as f64);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contenders::FullFences;

    #[test]
    fn a_back_half_lets_go_after_each_step_and_faults_go_on_beside_it() {
        let places = cpus();
        let (samples, longest) = beside::<FullFences>(2, 64 << 20, [places[0], places[places.len() - 1]]);
        assert_eq!((samples.len(), longest), (2, 1));
    }
}
