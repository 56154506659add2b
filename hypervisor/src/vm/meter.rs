//! The meter: a port through which a measuring guest has its slot changed, and learns what that cost (`nestling-meter`).
//!
//! An operation is carried out by the vCPU that asks, on its CPU and outside the guest, by a worker of the meter's own: no
//! lock of the port devices is held, so an operation may wait for other vCPUs. What is timed is the library's work, as an
//! embedder that is told "delete this slot" would do it.

use alloc::boxed::Box;

use nestling::slots::dirty::{LogConfig, LogError, LogStart, Tracking};
use nestling::{AddressSpace, GfnRange, Gpa, SlotConfig, SlotError, SlotFlags, SlotId, Worker};
use nestling_meter::{BASE, COUNT, DONE, NOT_HERE, Operation, PORT, STATE, TICKS_HIGH};

use crate::cpu::instructions::rdtsc;
use crate::memory::embedder::{self, Machine};
use crate::memory::frames::FRAME;
use crate::memory::usage;

/// How often [`Operation::SwitchRoot`] turns.
const TURNS: u32 = 1000;
/// No other slot has this number: a guest's RAM has few.
const SLOT: SlotId = SlotId(u32::MAX);

/// The frames of a slot of so many pages.
pub(super) fn range(pages: u32) -> GfnRange {
    let start = Gpa(BASE).gfn();
    GfnRange { start, end: nestling::Gfn(start.0 + u64::from(pages)) }
}

/// The slot, backed by this bank.
pub(super) fn slot(pages: u32, bank: u64) -> SlotConfig {
    SlotConfig {
        id: SLOT,
        space: AddressSpace::Main,
        base: Gpa(BASE),
        size: u64::from(pages) * FRAME,
        flags: SlotFlags::empty(),
        backing: bank,
    }
}

/// See the module head.
#[derive(Debug)]
pub struct Meter {
    worker: Worker<Machine>,
    slot: SlotConfig,
    ticks: u64,
    count: u32,
    state: u32,
    /// A log of the slot, as it was read last.
    words: Box<[u64]>,
    /// One that turns from root to root, and never runs. `None` with shadow paging.
    turner: Option<nestling::Vcpu<Machine>>,
    /// Of the last zap of everything.
    front_ticks: u64,
}

impl Meter {
    pub(super) fn new(worker: Worker<Machine>, slot: SlotConfig, turner: Option<nestling::Vcpu<Machine>>) -> Self {
        let words = alloc::vec![0; (slot.size / FRAME).div_ceil(64) as usize].into();
        Self { worker, slot, ticks: 0, count: 0, state: NOT_HERE, words, turner, front_ticks: 0 }
    }

    /// A register; what is none reads as the bus floats.
    pub(super) fn read(&self, port: u16) -> u32 {
        match port {
            PORT => self.ticks as u32,
            TICKS_HIGH => (self.ticks >> 32) as u32,
            COUNT => self.count,
            STATE => self.state,
            _ => u32::MAX,
        }
    }

    /// Carries an operation out. A number that is none, or an operation that the slot refuses (a guest may delete it
    /// twice), changes nothing and leaves [`NOT_HERE`]. `exits`: how often the vCPU that asks has left its guest.
    pub(super) fn write(&mut self, port: u16, value: u32, exits: u64) {
        if port != PORT {
            return;
        }
        let start = rdtsc();
        let done = Operation::from_number(value).map(|operation| self.carry_out(operation, exits));
        self.ticks = rdtsc() - start;
        if value == Operation::ZapAllFront as u32 {
            self.ticks = self.front_ticks;
        }
        (self.state, self.count) = match done {
            Some(Ok(count)) => (DONE, count),
            Some(Err(_)) | None => (NOT_HERE, 0),
        };
    }

    fn carry_out(&mut self, operation: Operation, exits: u64) -> Result<u32, Refused> {
        match operation {
            Operation::Nothing => {}
            Operation::Add => self.worker.add_slot(self.slot)?,
            Operation::Delete => self.worker.delete_slot(self.slot.id)?,
            Operation::Populate => self.populate()?,
            Operation::Invalidate => drop(self.worker.invalidate(self.range())),
            Operation::ZapAll => {
                let before = self.exclusive_ticks();
                self.worker.zap_all();
                self.front_ticks = self.exclusive_ticks() - before;
            }
            Operation::ZapAllFront => {}
            Operation::Mark => mark(),
            Operation::LogStart => self.start_log(LogStart::Clean)?,
            Operation::LogStartAllSet => self.start_log(LogStart::AllDirty)?,
            Operation::Harvest => {
                let dirty = self.worker.harvest_dirty(self.slot.id, 0, &mut self.words)?;
                return Ok(dirty as u32);
            }
            Operation::LogStop => self.worker.stop_log(self.slot.id)?,
            Operation::Age => {
                let age = self.worker.clear_young(AddressSpace::Main, self.range());
                return Ok(age.young as u32);
            }
            Operation::Split => self.worker.split(self.slot.id)?,
            Operation::Collapse => return Ok(self.worker.collapse(self.slot.id)?.leaves_2m as u32),
            Operation::Tables => return Ok(embedder::table_frames().0 as u32),
            Operation::SwitchRoot => return self.switch_roots(),
            Operation::Exits => return Ok(exits as u32),
            Operation::Books => return Ok(usage::heap_bytes() as u32),
        }
        Ok(0)
    }

    fn exclusive_ticks(&self) -> u64 {
        self.worker.mmu().host().exclusive_ticks()
    }

    /// To the root of system-management mode and back, as far as a vCPU gets without running on either.
    fn switch_roots(&mut self) -> Result<u32, Refused> {
        let turner = self.turner.as_mut().ok_or(Refused)?;
        let usual = turner.role();
        for role in [usual.in_space(AddressSpace::Smm), usual].into_iter().cycle().take(TURNS as usize) {
            turner.set_role(role);
            let mut inside = turner.enter().map_err(|_| Refused)?;
            core::hint::black_box((inside.root(), inside.take_flush()));
        }
        Ok(TURNS)
    }

    /// As KVM does without a CPU's help: by write protection, a page at a time.
    fn start_log(&mut self, start: LogStart) -> Result<(), LogError> {
        let config = LogConfig { start, tracking: Tracking::WriteProtect, ..LogConfig::default() };
        self.worker.start_log(self.slot.id, config)
    }

    fn range(&self) -> GfnRange {
        range((self.slot.size / FRAME) as u32)
    }

    fn populate(&self) -> Result<(), Refused> {
        let ram = self.worker.mmu().host().ram();
        let mut next = self.range().start;
        while next < self.range().end {
            let access = nestling::Access::Write;
            next = ram.resolve(self.slot.backing, next, access).map_err(|_| Refused)?.gfns.end;
        }
        Ok(())
    }
}

/// A place that whoever follows the CPU's instructions can recognise.
#[inline(never)]
fn mark() {
    core::hint::black_box(());
}

/// Another one, where the work of a VM's end begins and ends. It is not the same code, which would be linked once for both.
#[inline(never)]
pub(super) fn mark_end() {
    core::hint::black_box(TURNS);
}

/// Not carried out.
struct Refused;

impl From<LogError> for Refused {
    fn from(_: LogError) -> Self {
        Self
    }
}

impl From<SlotError> for Refused {
    fn from(_: SlotError) -> Self {
        Self
    }
}
