//! Faults in shadow tables: two vCPUs in different parts of one guest's address space, beside one; and what the books of
//! a guest cost of which every page is mapped.
//!
//! The guest has 256 MiB in 4 KiB pages, under tables of four levels that lie in memory and are marked already. Each
//! fault is a walk of those, the slot, the backing, the lock, the shadow tables, and the page with its seven neighbours.
//! A repetition begins with empty shadow tables.
//!
//! And in instructions, under callgrind: such a fault; a CR3 load whose root is at hand, with nothing out of step and with
//! eight tables of 512 entries out of it; INVLPG. Each with the entry into the guest that follows.

#![expect(unsafe_code, reason = "the embedder's promise about table frames")]

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nestling::format::{MemoryType, Npt};
use nestling::guest::{Controls, CpuFeatures, Privilege, Request, Width};
use nestling::host::{Backing, BackingError, Extent, GuestMemory, TableFrames, Time, Vcpus};
use nestling::shadow::vcpu::{ShadowOutcome, ShadowVcpu};
use nestling::shadow::{Metadata, ShadowConfig};
use nestling::{Access, AddressSpace, Config, Gfn, Gpa, Hfn, Host, Mmu, Slot, SlotConfig, SlotFlags, SlotId, VcpuId};

use rustix::time::{ClockId, clock_gettime};

use crate::arena::{self, Claim};
use crate::clock::{Meeting, cpus, pin};
use crate::contenders::{Asymmetry, FullFences, Membarrier};
use crate::figures::{Figure, Summary};
use crate::instructions::{CountError, run_counted};
use crate::valgrind::toggle;

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
/// A second root, of the same tables below.
const OTHER_ROOT: u64 = 512;
/// Tables that are written before a CR3 load.
const WRITTEN: u64 = 8;
/// Times that a counted operation is done, where it is not a fault.
const TIMES: u64 = 64;
/// Rounds are tried so many times as often as they are wanted.
const PATIENCE: usize = 40;
/// A thread that had a CPU for this share of its time was alone on it.
const UNDISTURBED: f64 = 0.98;
/// Argument that makes the benchmark a process in which one operation is counted; its name follows.
pub const ARGUMENT: &str = "--count-shadow";

/// The embedder.
struct Machine<A> {
    tables: Box<[[AtomicU64; 512]]>,
    asymmetry: PhantomData<fn() -> A>,
}

impl<A> Machine<A> {
    fn new() -> Self {
        let tables: Box<[[AtomicU64; 512]]> = (0..=TABLES).map(|_| [const { AtomicU64::new(0) }; 512]).collect();
        let put = |table: u64, entry: u64, gfn: u64| {
            tables[table as usize][entry as usize].store(gfn << 12 | ALL, Ordering::Relaxed);
        };
        put(0, 0, 1);
        put(1, 0, 2);
        put(TABLES, 0, 1);
        (0..PAGES / 512).for_each(|table| put(2, table, 3 + table));
        (0..PAGES).for_each(|page| put(3 + page / 512, page % 512, DATA + page));
        Self { tables, asymmetry: PhantomData }
    }

    fn entry(&self, hfn: Hfn, offset: u32) -> &AtomicU64 {
        let table = if hfn.0 == HOME + OTHER_ROOT { TABLES } else { hfn.0 - HOME };
        &self.tables[table as usize][offset as usize / 8]
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

/// A guest of up to two vCPUs.
fn guest<A: Asymmetry>() -> Arc<Mmu<Machine<A>>> {
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
    mmu
}

/// A vCPU of it, in long mode, with a root.
fn vcpu<A: Asymmetry>(mmu: &Arc<Mmu<Machine<A>>>, number: u16) -> ShadowVcpu<Machine<A>> {
    let mut vcpu = mmu.shadow_vcpu(VcpuId(number)).expect("there is memory").expect("each number is used once");
    vcpu.set_controls(Controls { cr0: 1 << 31 | 1 << 16 | 1, cr4: 1 << 5, efer: 1 << 10 | 1 << 11 });
    drop(vcpu.enter().expect("there is memory for a root"));
    vcpu
}

fn fault<A: Asymmetry>(vcpu: &mut ShadowVcpu<Machine<A>>, linear: u64) -> ShadowOutcome {
    let request = Request { linear, access: Access::Write, privilege: Privilege::Supervisor { ac: false }, pkru: 0 };
    loop {
        match vcpu.fault(&request).expect("the machine has tables for all of it") {
            // The other vCPU has the same upper tables to make.
            ShadowOutcome::Retry => {}
            outcome => return outcome,
        }
    }
}

/// One repetition.
struct Repetition {
    took: Duration,
    /// The share of its time for which the thread that had the least of it had a CPU.
    on_cpu: f64,
    /// The books at its end.
    books: Metadata,
}

/// The time for which the calling thread had a CPU.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One repetition by so many threads.
fn repetition<A: Asymmetry>(threads: u16, cpus: &[usize]) -> Repetition {
    // Dropped after the MMU: its tables lie in the arena.
    let _claim = Claim::take();
    let mmu = guest::<A>();
    let meeting = Meeting::new(threads.into());
    let share = PAGES / u64::from(threads);
    let run = |number: u16, cpu: usize| {
        pin(cpu);
        let mut vcpu = vcpu(&mmu, number);
        let first = share * u64::from(number);
        meeting.wait();
        let (start, had) = (Instant::now(), thread_time());
        let pages = (first..first + share).step_by(TOGETHER as usize);
        let fixed = pages.filter(|page| fault(&mut vcpu, page << 12) == ShadowOutcome::Fixed).count() as u64;
        let (had, end) = (thread_time() - had, Instant::now());
        (start, end, had.as_secs_f64() / (end - start).as_secs_f64(), fixed)
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
    let on_cpu = runs.iter().map(|run| run.2).fold(1.0, f64::min);
    Repetition { took: end - start, on_cpu, books: mmu.shadow_metadata().expect("shadow paging is enabled") }
}

/// What is counted, with how often it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Counted {
    /// A fault that maps a page and its seven neighbours.
    Fault,
    /// A CR3 load whose root is at hand, and the entry.
    Reload,
    /// The same with [`WRITTEN`] tables out of step.
    ReloadUnsync,
    /// INVLPG, and the entry.
    Invlpg,
}

impl Counted {
    const ALL: [Self; 4] = [Self::Fault, Self::Reload, Self::ReloadUnsync, Self::Invlpg];

    const fn name(self) -> &'static str {
        match self {
            Self::Fault => "shadow_fault",
            Self::Reload => "shadow_cr3_reload",
            Self::ReloadUnsync => "shadow_cr3_reload_unsync",
            Self::Invlpg => "shadow_invlpg",
        }
    }

    const fn times(self) -> u64 {
        match self {
            Self::Fault => PAGES / TOGETHER,
            _ => TIMES,
        }
    }
}

/// Does the operation of that name, and what has to be ready before; whether there is one.
pub fn counted_process(name: &str) -> bool {
    let Some(counted) = Counted::ALL.into_iter().find(|counted| counted.name() == name) else { return false };
    let _claim = Claim::take();
    let mmu = guest::<FullFences>();
    let mut vcpu = vcpu(&mmu, 0);
    let map_all = |vcpu: &mut ShadowVcpu<_>| {
        for page in (0..PAGES).step_by(TOGETHER as usize) {
            assert_eq!(fault(vcpu, page << 12), ShadowOutcome::Fixed, "page {page} was not mapped");
        }
    };
    if counted == Counted::Fault {
        toggle();
        map_all(&mut vcpu);
        toggle();
        return true;
    }
    // The guest finds its tables at the end of its addresses, each in a page of its own.
    let window = PAGES - 512;
    for table in 0..512 {
        let entry = mmu.host().entry(Hfn(HOME + 3 + window / 512), table as u32 * 8);
        entry.store(table << 12 | ALL, Ordering::Relaxed);
    }
    for page in (0..window).step_by(TOGETHER as usize) {
        assert_eq!(fault(&mut vcpu, page << 12), ShadowOutcome::Fixed, "page {page} was not mapped");
    }
    let roots = [OTHER_ROOT << 12, 0];
    let reload = |vcpu: &mut ShadowVcpu<_>, root: u64| {
        vcpu.load_cr3(root, false);
        drop(vcpu.enter().expect("there is memory for a root"));
    };
    roots.iter().for_each(|root| reload(&mut vcpu, *root));
    fault(&mut vcpu, 0);
    for time in 0..counted.times() {
        match counted {
            Counted::ReloadUnsync => {
                for table in 0..WRITTEN {
                    assert_eq!(fault(&mut vcpu, (window + 3 + table) << 12), ShadowOutcome::Fixed);
                }
                toggle();
                reload(&mut vcpu, roots[time as usize % 2]);
                toggle();
                // A fault through them says that they are tables still.
                for table in 0..WRITTEN {
                    assert_ne!(fault(&mut vcpu, table << 21), ShadowOutcome::Retry);
                }
            }
            Counted::Invlpg => {
                toggle();
                vcpu.invlpg(time << 12);
                drop(vcpu.enter().expect("there is a root"));
                toggle();
            }
            Counted::Fault | Counted::Reload => {
                toggle();
                reload(&mut vcpu, roots[time as usize % 2]);
                toggle();
            }
        }
    }
    true
}

/// Counts each operation's instructions; none when they can not be counted.
pub fn counts() -> Vec<Figure> {
    let count = |counted: Counted| {
        let total = run_counted(None, &[ARGUMENT, counted.name()])?;
        let name = format!("{}.nestling.instructions", counted.name());
        Ok(Figure { name, value: total as f64 / counted.times() as f64 })
    };
    let counted: Result<Vec<Figure>, CountError> = Counted::ALL.into_iter().map(count).collect();
    counted.unwrap_or_else(|error| {
        println!("\ninstructions of shadow paging are not counted: {error}");
        Vec::new()
    })
}

/// How long rounds took.
#[derive(Default)]
struct Times {
    undisturbed: Vec<f64>,
    others: Vec<f64>,
}

impl Times {
    /// Those that say something, if there are any.
    fn best(self) -> Vec<f64> {
        if !self.undisturbed.is_empty() {
            return self.undisturbed;
        }
        if !self.others.is_empty() {
            println!(
                "\nshadow faults: in no round had each thread a CPU all the time; medians say nothing, minima may"
            );
        }
        self.others
    }
}

/// Measures so many rounds of one thread and of two, by turns; the figures.
///
/// Where others want the CPUs as well, a round says something only if each thread had one all the time: rounds are
/// repeated for that, a few times as many as are wanted.
pub fn figures(rounds: usize) -> Vec<Figure> {
    let repetition = if Membarrier::register() { repetition::<Membarrier> } else { repetition::<FullFences> };
    let cpus = cpus();
    let figure = |name: &str, value| Figure { name: name.into(), value };
    let nanoseconds = |took: Duration| took.as_secs_f64() * 1e9 / (PAGES / TOGETHER) as f64;
    let (mut one, mut two, mut books) = (Times::default(), Times::default(), Metadata::default());
    for _ in 0..PATIENCE * rounds {
        for (threads, times) in [(1, &mut one), (2, &mut two)] {
            if times.undisturbed.len() < rounds && cpus.len() >= usize::from(threads) {
                let done = repetition(threads, &cpus);
                books = if threads == 1 { done.books } else { books };
                let list = if done.on_cpu >= UNDISTURBED { &mut times.undisturbed } else { &mut times.others };
                list.push(nanoseconds(done.took));
            }
        }
    }
    let (one, two) = (one.best(), two.best());
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
