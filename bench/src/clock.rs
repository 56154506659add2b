//! One repetition in wall time.
//!
//! Each thread is pinned to a CPU of its own. The threads meet before each phase (fault, look-up, zap) and then start
//! it together; a phase lasts from the first thread's start to the last one's end. Making the table, the seats and the
//! threads is not measured.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::arena::Claim;
use crate::contenders::{Contender, Seat, backing};
use crate::pipeline::drain;
use crate::plan::{Plan, Share};

/// What is measured, in the order of a repetition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Map by fault.
    Fault,
    /// Find the host address.
    LookUp,
    /// Unmap.
    Zap,
}

impl Operation {
    /// All, in order.
    pub const ALL: [Self; 3] = [Self::Fault, Self::LookUp, Self::Zap];

    /// As it appears in names of figures.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::LookUp => "lookup",
            Self::Zap => "zap",
        }
    }
}

/// The loop of one thread in one phase; how many pages were done as they should. Inlined, so that what counts
/// instructions has it in a function of its own.
#[inline(always)]
pub fn work<S: Seat>(operation: Operation, seat: &mut S, share: &Share) -> u64 {
    match (operation, share.range) {
        (Operation::Fault, _) => count(share, |gpa| seat.fault(gpa)),
        (Operation::LookUp, _) => count(share, |gpa| seat.look_up(gpa) == Some(backing(gpa))),
        (Operation::Zap, None) => count(share, |gpa| seat.zap(gpa)),
        (Operation::Zap, Some((first, pages))) => seat.zap_range(first, pages),
    }
}

#[inline(always)]
fn count(share: &Share, mut operation: impl FnMut(u64) -> bool) -> u64 {
    if !share.apart {
        return share.gpas.iter().filter(|&&gpa| operation(gpa)).count() as u64;
    }
    let apart = |gpa: u64| {
        let done = operation(gpa);
        drain();
        done
    };
    share.gpas.iter().copied().map(apart).filter(|&done| done).count() as u64
}

/// The CPUs that this process may use.
pub fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("a thread may ask for its own affinity");
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

/// Moves the calling thread to `cpu`, one of [`cpus`], for good.
pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("the CPU is one of those that the process may use");
}

/// Where threads meet. It spins, so that they go on at the same moment.
#[derive(Debug)]
pub(crate) struct Meeting {
    threads: u32,
    arrived: AtomicU32,
}

impl Meeting {
    /// Of so many threads.
    pub(crate) const fn new(threads: u32) -> Self {
        Self { threads, arrived: AtomicU32::new(0) }
    }

    pub(crate) fn wait(&self) {
        let place = self.arrived.fetch_add(1, Ordering::AcqRel);
        let complete = (place / self.threads + 1) * self.threads;
        let mut spins = 0u32;
        while self.arrived.load(Ordering::Acquire) < complete {
            spins += 1;
            // The other one may have lost its CPU to something else than a benchmark.
            if spins.is_multiple_of(1 << 14) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// How long each phase of one repetition took, in the order of [`Operation::ALL`].
///
/// # Panics
/// When a contender did not map, find or unmap each page of the plan exactly once, or there are fewer `cpus` than
/// threads in the plan.
pub fn repetition<C: Contender>(plan: &Plan, cpus: &[usize]) -> [Duration; 3] {
    assert!(cpus.len() >= plan.shares.len(), "each thread has a CPU of its own");
    let table = C::new(Claim::take());
    let meeting = Meeting::new(plan.shares.len() as u32);
    let phases = |mut seat: C::Seat<'_>, share: &Share, cpu: usize| {
        pin(cpu);
        Operation::ALL.map(|operation| {
            meeting.wait();
            let start = Instant::now();
            let done = work(operation, &mut seat, share);
            (start, Instant::now(), done)
        })
    };
    let threads: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> = (0u16..)
            .zip(&plan.shares)
            .zip(cpus)
            .map(|((number, share), &cpu)| {
                let (seat, phases) = (table.seat(number), &phases);
                scope.spawn(move || phases(seat, share, cpu))
            })
            .collect();
        started.into_iter().map(|thread| thread.join().expect("a contender panicked")).collect()
    });
    Operation::ALL.map(|operation| {
        let phase = threads.iter().map(|phases| phases[operation as usize]);
        let done: u64 = phase.clone().map(|(.., done)| done).sum();
        assert_eq!(done, plan.pages, "{}: {operation:?} of {} pages did {done}", C::NAME, plan.pages);
        let start = phase.clone().map(|(start, ..)| start).min().expect("a plan has a thread");
        let end = phase.map(|(_, end, _)| end).max().expect("a plan has a thread");
        end - start
    })
}
