//! Starting the other CPUs, and giving them work.
//!
//! One INIT for each, 10 ms, then one start-up IPI after another (AMD APM vol. 2, 7.3 and 16.5): a CPU is only started when the one
//! before it has left the mailbox. A CPU that does not come within a second ends the starting: it might still read the
//! mailbox, which therefore is not changed any more.
//!
//! A started CPU halts until it is given a job, runs it, and halts again. Jobs are handed over under a lock and
//! announced by an IPI; the CPU looks again after each wake-up, and an IPI that comes between the look and the HLT is
//! taken by the HLT ([`instructions::halt`]).

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use spin::Mutex;

use crate::cpu::apic::{self, Command};
use crate::cpu::{self, MAX_CPUS, clock, instructions, local, vector};
use crate::memory::frames;
use crate::svm;

/// What the start code reads. The order of the fields is known there.
#[derive(Debug)]
#[repr(C)]
pub struct Mailbox {
    cr3: AtomicU64,
    stack: AtomicU64,
    cpu: AtomicU64,
    reserved: u64,
}

/// Read by the start code of each CPU.
pub static MAILBOX: Mailbox =
    Mailbox { cr3: AtomicU64::new(0), stack: AtomicU64::new(0), cpu: AtomicU64::new(0), reserved: 0 };

const STACK_ORDER: u32 = 4;
const START_LIMIT_US: u64 = 1_000_000;

/// Work for a CPU.
pub type Job = Box<dyn FnOnce() + Send>;

static JOBS: [Mutex<Option<Job>>; MAX_CPUS] = [const { Mutex::new(None) }; MAX_CPUS];

/// Jobs that are not through: their memory is not given back.
static BUSY: AtomicUsize = AtomicUsize::new(0);

/// Whether every job is through and all that belonged to it is gone.
#[must_use]
pub fn all_idle() -> bool {
    BUSY.load(Ordering::Acquire) == 0
}

/// Starts the CPUs with these APIC ids as numbers 1, 2, …; returns how many came.
///
/// # Safety
/// Once, on the boot CPU, with the start code at `page`, below 1 MiB, its own local data, tables, APIC and clock set up.
pub unsafe fn start(page: u64, apic_ids: impl Iterator<Item = u32> + Clone) -> usize {
    // SAFETY: ring 0.
    MAILBOX.cr3.store(unsafe { instructions::read_cr3() }, Ordering::Relaxed);
    for id in apic_ids.clone() {
        apic::send(id, Command::Init);
    }
    clock::spin_us(10_000);
    for (index, id) in apic_ids.take(MAX_CPUS - 1).enumerate() {
        let number = index + 1;
        let Some(stack) = frames::alloc(STACK_ORDER) else { return index };
        MAILBOX.stack.store(stack + (frames::FRAME << STACK_ORDER), Ordering::Relaxed);
        MAILBOX.cpu.store(number as u64, Ordering::Release);
        let page = (page / frames::FRAME) as u8;
        apic::send(id, Command::Startup(page));
        let began = instructions::rdtsc();
        let mut repeated = false;
        while !local::all()[number].is_online() {
            let waited = clock::us_from_tsc(instructions::rdtsc() - began);
            if waited > START_LIMIT_US {
                return index;
            }
            // The second start-up IPI that the manuals ask for: a CPU that runs already ignores it.
            if waited > 1000 && !repeated {
                apic::send(id, Command::Startup(page));
                repeated = true;
            }
            core::hint::spin_loop();
        }
    }
    local::all().iter().filter(|cpu| cpu.is_online()).count() - 1
}

/// A started CPU's life.
///
/// # Safety
/// Called once a CPU by the start code, on a stack of its own, with the number from the mailbox.
pub unsafe fn enter(number: usize) -> ! {
    let id = apic::id();
    // SAFETY: each number is given out once; ring 0, interrupts off.
    unsafe {
        local::install(number, id);
        cpu::load();
        apic::enable();
    }
    svm::enable();
    local::set_online();
    loop {
        let job = JOBS[number].lock().take();
        match job {
            Some(job) => {
                job();
                BUSY.fetch_sub(1, Ordering::Release);
            }
            // SAFETY: ring 0, interrupts off, no lock held.
            None => local::this().away(|| unsafe { instructions::halt() }),
        }
    }
}

/// Gives a CPU work. It must have none.
///
/// # Panics
/// When the CPU has not begun the job before this one.
pub fn run_on(number: usize, job: Job) {
    BUSY.fetch_add(1, Ordering::Relaxed);
    let before = JOBS[number].lock().replace(job);
    assert!(before.is_none(), "CPU {number} was given two jobs");
    apic::send(local::all()[number].apic_id(), Command::Fixed(vector::KICK));
}
