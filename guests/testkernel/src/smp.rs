//! The other processors: starting them, and having them all do something.
//!
//! Processor 0 leads. The others wait for a job's number to rise, run the job, and count themselves done.

use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::boot::{NEXT_NUMBER, NEXT_STACK, TRAMPOLINE, trampoline};
use crate::{apic, machine};

/// The most processors that are used.
pub(crate) const MOST: usize = 8;
const STACK_BYTES: usize = 32 << 10;

#[repr(align(16))]
struct Stack(#[expect(dead_code, reason = "the processor writes it")] [u8; STACK_BYTES]);

static mut STACKS: [Stack; MOST] = [const { Stack([0; STACK_BYTES]) }; MOST];
static STARTED: AtomicUsize = AtomicUsize::new(1);
static JOB: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static TURN: AtomicUsize = AtomicUsize::new(0);
static DONE: AtomicUsize = AtomicUsize::new(0);

/// What a processor is to do; it gets its number.
type Job = fn(usize);

/// How many processors there are.
pub(crate) fn count() -> usize {
    STARTED.load(Ordering::Acquire)
}

/// Starts all processors that fw_cfg tells of, one after the other.
pub(crate) fn start_all() {
    let processors = usize::from(u16::from_le_bytes(machine::fw_cfg(5))).min(MOST);
    for number in 1..processors {
        start(number);
    }
}

/// Starts one processor and waits until it runs.
pub(crate) fn start(number: usize) {
    prepare(number, 0);
    let before = count();
    apic::send(number as u32, apic::INIT | apic::ASSERT);
    apic::send(number as u32, apic::STARTUP | (TRAMPOLINE >> 12) as u32);
    apic::send(number as u32, apic::STARTUP | (TRAMPOLINE >> 12) as u32);
    while count() == before {
        core::hint::spin_loop();
    }
}

/// Puts the start code of a processor in its page, so far from its beginning.
pub(crate) fn prepare(number: usize, offset: usize) {
    let code = trampoline();
    // SAFETY: the page is below what the loader uses and above what anybody else does.
    unsafe {
        let page = core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE + offset);
        page.copy_from_nonoverlapping(code.as_ptr(), code.len());
    }
    let stack = (&raw mut STACKS).expose_provenance() + (number + 1) * STACK_BYTES;
    NEXT_STACK.store(stack as u32, Ordering::SeqCst);
    NEXT_NUMBER.store(number as u32, Ordering::SeqCst);
}

/// A processor that has been started counts itself less: it will be started anew.
pub(crate) fn forget_one() {
    STARTED.fetch_sub(1, Ordering::AcqRel);
}

/// What a processor does from its start on.
pub(crate) fn work(number: usize) -> ! {
    let mut seen = TURN.load(Ordering::Acquire);
    STARTED.fetch_add(1, Ordering::AcqRel);
    loop {
        while TURN.load(Ordering::Acquire) == seen {
            core::hint::spin_loop();
        }
        seen += 1;
        run(number);
        DONE.fetch_add(1, Ordering::AcqRel);
    }
}

fn run(number: usize) {
    let job = JOB.load(Ordering::Acquire);
    // SAFETY: only `everywhere` stores here, and what it stores is a `Job`.
    let job: Job = unsafe { core::mem::transmute::<*mut (), Job>(job) };
    job(number);
}

/// Has every processor do a job, this one too, and waits for all.
pub(crate) fn everywhere(job: Job) {
    begin(job);
    job(0);
    finish();
}

/// Has every other processor begin a job.
pub(crate) fn begin(job: Job) {
    DONE.store(0, Ordering::Release);
    JOB.store(job as *mut (), Ordering::Release);
    TURN.fetch_add(1, Ordering::AcqRel);
}

/// Waits for the others to be through.
pub(crate) fn finish() {
    while DONE.load(Ordering::Acquire) + 1 < count() {
        core::hint::spin_loop();
    }
}
