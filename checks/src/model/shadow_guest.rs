//! The CPU of a shadowed guest under a model checker, and one execution of a scenario.
//!
//! The CPU keeps every translation of the guest's that it found, by the tag under which it did, until it is told to flush,
//! and uses it as long as it may. A turn in guest mode is one access; a kick ends it before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::checker::library::addr::ENTRIES;
use super::checker::library::guest::{Controls, Privilege, Request};
use super::checker::library::host::TableFrames;
use super::checker::library::shadow::tags::{Tag, TagFlush};
use super::checker::library::shadow::vcpu::{ShadowOutcome, ShadowVcpu};
use super::checker::library::{Access, Counters, FaultError, Gfn, GfnRange, Hfn, Mmu, VcpuId};
use super::checker::{spawn, yield_now};
use super::shadow_machine::{ShadowMachine, machine, work};
use crate::model::shadow::{Do, FRAMES, LARGE_PAGE, ROOT, ShadowScenario, Written};

/// PAE: PG, WP and PE; PAE.
const CONTROLS: Controls = Controls { cr0: 1 << 31 | 1 << 16 | 1, cr4: 1 << 5, efer: 0 };
/// Pages of the guest's address space.
const PAGES: u64 = 8;
/// Times that an access is tried: in some orders of the checker's others get in the way for ever.
const TRIES: usize = 8;

/// How an access ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Done {
    Memory,
    /// The guest got a page fault.
    Fault,
    /// Without memory, or not yet.
    Otherwise,
}

struct Guest {
    vcpu: ShadowVcpu<ShadowMachine>,
    /// The frame of its root.
    root: u64,
    /// By tag: page, frame, whether it can be written.
    tlb: [Vec<(u64, Hfn, bool)>; Tag::COUNT],
    tag: usize,
    /// When the guest last asked to forget everything, and each page.
    flushed: u64,
    pages: [u64; PAGES as usize],
}

impl Guest {
    fn new(mmu: &Arc<Mmu<ShadowMachine>>, id: u16) -> Self {
        let mut vcpu = mmu.shadow_vcpu(VcpuId(id)).unwrap().expect("each vCPU is made once");
        vcpu.load_cr3(ROOT << 12, false);
        vcpu.set_controls(CONTROLS);
        let flushed = mmu.host().ghost().tick();
        Self { vcpu, root: ROOT, tlb: Default::default(), tag: 0, flushed, pages: [0; PAGES as usize] }
    }

    fn step(&mut self, what: Do) {
        match what {
            Do::Read(page) => {
                self.access(page, Access::Read, None);
            }
            Do::Write(page) => {
                self.access(page, Access::Write, None);
            }
            Do::Set(Written { page, entry, value }) => {
                self.access(page, Access::Write, Some((entry as u32 * 8, value)));
            }
            Do::Reload => self.load(self.root),
            Do::Load(root) => self.load(root),
            Do::Invlpg(page) => {
                self.pages[page as usize] = self.vcpu.mmu().host().ghost().tick();
                self.vcpu.invlpg(page << 12);
            }
            Do::Zap | Do::ZapAll | Do::Move(_) | Do::Delete => {}
        }
    }

    fn load(&mut self, root: u64) {
        self.flushed = self.vcpu.mmu().host().ghost().tick();
        self.root = root;
        self.vcpu.load_cr3(root << 12, false);
    }

    fn access(&mut self, page: u64, access: Access, store: Option<(u32, u64)>) -> Done {
        let privilege = Privilege::Supervisor { ac: false };
        let request = Request { linear: page << 12, access, privilege, pkru: 0 };
        for _ in 0..TRIES {
            match self.turn(page, access, store) {
                Ok(true) => return Done::Memory,
                Ok(false) => {}
                Err(FaultError::OutOfTables) => return Done::Otherwise,
                Err(error) => panic!("a turn ended as {error}"),
            }
            match self.vcpu.fault(&request) {
                Ok(ShadowOutcome::Fixed | ShadowOutcome::Spurious) => {}
                Ok(ShadowOutcome::Retry) => yield_now(),
                Ok(ShadowOutcome::Inject(_)) => {
                    // A CPU forgets what it faulted on.
                    self.tlb[self.tag].retain(|(other, ..)| *other != page);
                    return Done::Fault;
                }
                Ok(_) | Err(FaultError::OutOfTables | FaultError::Backing(_)) => return Done::Otherwise,
                Err(error) => panic!("a fault ended as {error}"),
            }
        }
        Done::Otherwise
    }

    /// One turn in guest mode; whether the access was made.
    fn turn(&mut self, page: u64, access: Access, store: Option<(u32, u64)>) -> Result<bool, FaultError> {
        let Self { vcpu, root, tlb, tag, flushed, pages } = self;
        let (mmu, id) = (Arc::clone(vcpu.mmu()), usize::from(vcpu.id().0));
        let machine = mmu.host();
        let mut inside = vcpu.enter()?;
        *tag = inside.tag().number();
        let tlb = &mut tlb[*tag];
        match inside.take_flush() {
            Some(TagFlush::All) => tlb.clear(),
            Some(TagFlush::Address(linear)) => tlb.retain(|(page, ..)| *page != linear >> 12),
            None => {}
        }
        // A kick ends the turn at an instruction's boundary; an instruction takes its time.
        if machine.kicks[id].swap(false, Ordering::SeqCst) {
            return Ok(false);
        }
        machine.kicks[id].load(Ordering::Relaxed);
        let suits = |(_, _, writable): &(u64, Hfn, bool)| *writable || access != Access::Write;
        let cached = tlb.iter().find(|cached| cached.0 == page && suits(cached)).copied();
        let hfn = match cached {
            Some((_, hfn, _)) => hfn,
            None => {
                let found = walk(machine, inside.root().hfn(), page);
                let Some(Found { leaf, first, hfn, pages }) = found.filter(|found| suits(&found.leaf)) else {
                    return Ok(false);
                };
                tlb.extend((0..pages).map(|page| (first + page, Hfn(hfn.0 + page), leaf.2)));
                leaf.1
            }
        };
        let from = pages[page as usize].max(*flushed);
        let may = machine.ghost().may(*root, from, page, access, hfn);
        assert!(may, "the guest reaches {hfn:?} by page {page} for {access:?}, which it was told to forget");
        if let Some((offset, value)) = store {
            machine.store(hfn, offset, value);
        }
        Ok(true)
    }
}

/// A leaf, as the CPU finds it.
struct Found {
    /// The page that was asked for, its frame, whether it can be written.
    leaf: (u64, Hfn, bool),
    /// All that the leaf maps: the first page and its frame, and how many there are.
    first: u64,
    hfn: Hfn,
    pages: u64,
}

/// The CPU's page walker, in PAE format.
fn walk(machine: &ShadowMachine, root: Hfn, page: u64) -> Option<Found> {
    let mut frame = root;
    for level in (1..=3).rev() {
        let raw = machine.pool.entry(frame, (page >> (level - 1)) as usize % ENTRIES).load(Ordering::Acquire);
        // Still live, after the look as well.
        machine.table(frame);
        if raw & 1 == 0 {
            return None;
        }
        frame = Hfn((raw & 0xf_ffff_ffff_f000) >> 12);
        if level == 1 || level == 2 && raw & LARGE_PAGE != 0 {
            let pages = if level == 1 { 1 } else { ENTRIES as u64 };
            let offset = page % pages;
            let leaf = (page, Hfn(frame.0 + offset), raw & 2 != 0);
            return Some(Found { leaf, first: page - offset, hfn: frame, pages });
        }
    }
    None
}

/// One execution of `scenario`, each thread's part so many times. The counters at its end.
pub(super) fn execute(scenario: &ShadowScenario, times: usize) -> Counters {
    let mmu = machine(scenario);
    let (prepared, before) = (Arc::clone(&mmu), scenario.before);
    // In a thread of its own: the checker does not look behind what a thread has read before it writes.
    spawn(move || run(&prepared, 0, before, 1)).join().unwrap();
    let mut vcpus = 0;
    let mut numbered: Vec<_> = scenario
        .threads
        .iter()
        .map(|steps| {
            let id = vcpus;
            vcpus += u16::from(steps[0].is_guest());
            (*steps, id)
        })
        .collect();
    let main = numbered.pop().expect("a scenario has threads");
    let threads: Vec<_> = numbered
        .into_iter()
        .map(|(steps, id)| {
            let mmu = Arc::clone(&mmu);
            spawn(move || run(&mmu, id, steps, times))
        })
        .collect();
    run(&mmu, main.1, main.0, times);
    for thread in threads {
        thread.join().unwrap();
    }
    settle(&mmu)
}

fn run(mmu: &Arc<Mmu<ShadowMachine>>, id: u16, steps: &[Do], times: usize) {
    if steps.first().is_some_and(|first| first.is_guest()) {
        let mut guest = Guest::new(mmu, id);
        (0..times).for_each(|_| steps.iter().for_each(|what| guest.step(*what)));
    } else {
        let mut worker = mmu.worker().unwrap();
        (0..times).for_each(|_| steps.iter().for_each(|what| work(&mut worker, *what)));
    }
}

/// When nobody races any more: the guest gets what its tables say, the books agree with the machine, and nothing is left
/// of what is taken away.
fn settle(mmu: &Arc<Mmu<ShadowMachine>>) -> Counters {
    let machine = mmu.host();
    let mut guest = Guest::new(mmu, 0);
    let reads = [0, 1, 2, 4].map(|page| (page, Access::Read));
    for (page, access) in reads.into_iter().chain([0, 2].map(|page| (page, Access::Write))) {
        let expected = machine.ghost().allows_now(page, access);
        let done = guest.access(page, access, None);
        assert_eq!(done == Done::Memory, expected, "{access:?} of page {page} ended as {done:?}");
    }
    drop(guest);
    let mut worker = mmu.worker().unwrap();
    worker.collect();
    let counters = mmu.counters();
    assert_eq!(
        counters.leaves_4k + counters.leaves_2m,
        machine.leaves(),
        "the books and the machine disagree on leaves"
    );
    assert_eq!(counters.table_frames, machine.pool.in_use(), "the books and the machine disagree on tables");
    // Through the reverse maps, then by tables: neither leaves anything to the other.
    worker.zap(GfnRange::new(Gfn(0), FRAMES).unwrap());
    let leaves = mmu.counters();
    assert_eq!((leaves.leaves_4k, leaves.leaves_2m, machine.leaves()), (0, 0, 0), "a leaf was in no reverse map");
    worker.zap_all();
    worker.collect();
    assert_eq!(mmu.shadow_metadata().unwrap().pages, 0, "shadow pages are left behind");
    assert_eq!(machine.pool.in_use(), 0, "tables are left behind");
    counters
}
