//! What a CPU keeps about itself, reached through its GS base.
//!
//! The first fields are read by assembly at fixed offsets. Everything is an atomic or constant after start-up, so that
//! any CPU may read any other's.

use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use super::{MAX_CPUS, instructions};

const MSR_GS_BASE: u32 = 0xc000_0101;

/// One CPU's own cache lines.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Local {
    /// Its own address, for one-instruction access.
    this: AtomicPtr<Local>,
    /// NMIs taken; counted by the handler.
    nmis: AtomicU64,
    /// Set by the timer's handler, cleared by whoever looks.
    pub timer_fired: AtomicBool,
    /// Its number: 0 is the boot CPU.
    number: AtomicUsize,
    apic_id: AtomicU32,
    online: AtomicBool,
    away: AtomicBool,
}

/// Offset of the NMI counter, for the handler.
pub(super) const NMIS: usize = offset_of!(Local, nmis);
/// Offset of the timer flag, for the handler.
pub(super) const TIMER_FIRED: usize = offset_of!(Local, timer_fired);
const _: () = assert!(offset_of!(Local, this) == 0, "`this` is read as gs:[0]");

impl Local {
    const fn new() -> Self {
        Self {
            this: AtomicPtr::new(core::ptr::null_mut()),
            nmis: AtomicU64::new(0),
            timer_fired: AtomicBool::new(false),
            number: AtomicUsize::new(0),
            apic_id: AtomicU32::new(0),
            online: AtomicBool::new(false),
            away: AtomicBool::new(false),
        }
    }

    /// The CPU's number.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number.load(Ordering::Relaxed)
    }

    /// The CPU's local APIC id.
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        self.apic_id.load(Ordering::Relaxed)
    }

    /// Whether the CPU has set itself up.
    #[must_use]
    pub fn is_online(&self) -> bool {
        self.online.load(Ordering::Acquire)
    }

    /// Whether the CPU is halted: see [`super::barrier`].
    #[must_use]
    pub(super) fn is_away(&self) -> bool {
        self.away.load(Ordering::Acquire)
    }

    /// Lets this CPU be away while `run` halts it, and does nothing that [`super::barrier`] orders.
    #[inline]
    pub fn away<R>(&self, run: impl FnOnce() -> R) -> R {
        // Release: who sees it sees what was done before.
        self.away.store(true, Ordering::Release);
        let result = run();
        self.away.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        result
    }

    /// How many NMIs it has taken. A full fence stands behind each increment.
    #[must_use]
    pub fn nmis(&self) -> u64 {
        self.nmis.load(Ordering::Acquire)
    }
}

static LOCALS: [Local; MAX_CPUS] = [const { Local::new() }; MAX_CPUS];

/// All CPUs that may exist, by number.
#[must_use]
pub fn all() -> &'static [Local] {
    &LOCALS
}

/// Makes `number` this CPU's number and GS its way to its data.
///
/// # Safety
/// Ring 0, once a CPU, each with its own number.
pub unsafe fn install(number: usize, apic_id: u32) {
    let local = &LOCALS[number];
    local.number.store(number, Ordering::Relaxed);
    local.apic_id.store(apic_id, Ordering::Relaxed);
    let address = core::ptr::from_ref(local).cast_mut();
    local.this.store(address, Ordering::Relaxed);
    // SAFETY: GS is used for nothing else.
    unsafe { instructions::wrmsr(MSR_GS_BASE, address.expose_provenance() as u64) };
}

/// Tells the others that this CPU takes NMIs and interrupts from now on.
pub fn set_online() {
    this().online.store(true, Ordering::Release);
}

/// This CPU's data.
#[inline]
#[must_use]
pub fn this() -> &'static Local {
    let local: *const Local;
    // SAFETY: `install` came first on this CPU; the word at offset 0 is the address of a static.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) local, options(nostack, pure, readonly, preserves_flags));
        &*local
    }
}
