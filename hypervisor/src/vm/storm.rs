//! A storm: operations on the MMU, fired at a guest that runs.
//!
//! It has a CPU of its own, behind those of the vCPUs. Its operations wait for every vCPU to leave the guest, which takes
//! as long as the slowest CPU takes to answer; CPU 0, which must see keys, console and time limits in the meantime,
//! does not. It also means that nothing in the guest or around it stands still for an operation.
//!
//! **Slots.** A real VMM stops its vCPUs before it takes RAM away for a moment, or never does. Here they run on, which is
//! the point: under a storm, low RAM is cut into slots of 32 MiB ([`cut`]), of which some are away at any time, and an access
//! to RAM that finds no slot is tried again until its slot is back ([`Storm::may_have_taken`]).
//!
//! **Copies.** Whoever copies the VM needs the slots to stay, and their logs. It says so and waits until the storm has
//! heard ([`Storm::spares_slots`]): from then on until it is done ([`Storm::go_on`]) the storm neither deletes nor moves
//! slots, nor logs them, and counts those operations as skipped; all others go on. The word is a number that is odd
//! while a copy is made, and the storm answers by repeating it between two operations: what it heard of one copy is no
//! answer to the next.
//!
//! **The end.** The storm carries its operation to its end, so that every slot is back and every range given back. vCPUs
//! wait for that ([`Storm::wait_for_end`]) before anybody walks tables for a report. They have left the guest by then, so no
//! operation waits for them.

mod dirty;

use alloc::string::ToString;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nestling::{Fault, Gfn, GfnRange, Gpa, SlotConfig, SlotError, SlotFlags, Worker};
use nestling_control::config::{self, STORM_KINDS, StormKind};
use nestling_control::message::StormReport;

use super::exit::Exit;
use super::shared::Shared;
use crate::control::log;
use crate::cpu::{apic, clock, instructions, local};
use crate::ghost;
use crate::memory::embedder::Machine;
use crate::memory::frames::FRAME;
use crate::memory::relocate::Skipped;

/// The size of the slots that a storm takes away.
const SLOT_BYTES: u64 = 32 << 20;
/// Where slots are moved to: above all RAM ([`config::MAX_MEMORY_BYTES`]), inside 40 bits.
const ELSEWHERE: u64 = 768 << 30;
const _: () = assert!(config::MAX_MEMORY_BYTES + (4 << 30) <= ELSEWHERE && ELSEWHERE + SLOT_BYTES <= 1 << 40);
/// Frames tried before an operation on a random page of RAM is given up: most RAM may be untouched.
const TRIES: usize = 64;
/// How long the storm rests after an operation at most. It rests as long as the operation took: a guest whose mappings are
/// taken back to back, each time before it has faulted in what one interrupt needs, gets nowhere, and it is the slower to
/// get anywhere the longer operations wait for its CPUs.
const LONGEST_REST_US: u64 = 20_000;
/// How often the storm looks whether the VM ends.
const LOOK_US: u64 = 10_000;

/// The slots for a bank of RAM: one, or those that a storm can take away.
pub(super) fn cut(range: GfnRange, storm: bool) -> impl Iterator<Item = GfnRange> {
    let pages = if storm { SLOT_BYTES / FRAME } else { u64::MAX };
    let mut start = range.start;
    core::iter::from_fn(move || {
        let piece = GfnRange { start, end: Gfn(start.0.saturating_add(pages).min(range.end.0)) };
        start = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What vCPUs and the housekeeper know of a storm.
#[derive(Debug, Default)]
pub struct Storm {
    plan: Option<config::Storm>,
    blowing: AtomicBool,
    done: [AtomicU64; STORM_KINDS],
    skipped: [AtomicU64; STORM_KINDS],
    /// Accesses to RAM that found no slot.
    without_slot: AtomicU64,
    /// In ticks of the TSC.
    longest_stall: AtomicU64,
    /// Stalls are measured: always in a storm, now and then without one.
    measuring: AtomicBool,
    /// Odd while a copy is made.
    copies: AtomicU64,
    /// The last such number that the storm has heard.
    heard: AtomicU64,
}

impl Storm {
    /// A storm that blows from now on, or none.
    #[must_use]
    pub fn new(plan: Option<config::Storm>) -> Self {
        let planned = plan.is_some();
        Self { plan, blowing: AtomicBool::new(planned), measuring: AtomicBool::new(planned), ..Self::default() }
    }

    /// Whether there is one.
    #[must_use]
    pub fn is_planned(&self) -> bool {
        self.plan.is_some()
    }

    /// Whether an access without memory met a slot that the storm has taken away for a moment.
    #[cold]
    pub(super) fn may_have_taken(&self, vm: &Shared, gpa: Gpa) -> bool {
        let taken = self.plan.is_some() && vm.mmu.host().ram().contains(gpa.gfn());
        self.without_slot.fetch_add(u64::from(taken), Ordering::Relaxed);
        taken
    }

    /// Accesses to RAM that were tried again because their slot was away.
    #[must_use]
    pub fn without_slot(&self) -> u64 {
        self.without_slot.load(Ordering::Relaxed)
    }

    /// Measures how long vCPUs are kept from their guest, from now on, or no longer.
    pub(super) fn measure(&self, on: bool) {
        if on {
            self.longest_stall.store(0, Ordering::Relaxed);
        }
        self.measuring.store(on || self.plan.is_some(), Ordering::Relaxed);
    }

    /// Whether stalls are measured.
    #[inline]
    pub(super) fn is_measuring(&self) -> bool {
        self.measuring.load(Ordering::Relaxed)
    }

    /// The longest time that a vCPU was kept from its guest, in ticks of the TSC.
    #[must_use]
    pub fn longest_stall(&self) -> u64 {
        self.longest_stall.load(Ordering::Relaxed)
    }

    /// Whether slots and their logs are left alone from here on; asks for it. By whoever copies the VM.
    pub(super) fn spares_slots(&self) -> bool {
        let copies = self.copies.load(Ordering::SeqCst) | 1;
        self.copies.store(copies, Ordering::SeqCst);
        !self.blowing.load(Ordering::SeqCst) || self.heard.load(Ordering::SeqCst) == copies
    }

    /// They need not be any longer.
    pub(super) fn go_on(&self) {
        // No one else writes it.
        self.copies.store((self.copies.load(Ordering::SeqCst) | 1) + 1, Ordering::SeqCst);
    }

    /// Waits until the tables are left alone. By a CPU that runs no guest.
    pub(super) fn wait_for_end(&self) {
        while self.blowing.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
    }

    /// What it did.
    #[must_use]
    pub fn report(&self) -> Option<StormReport> {
        let plan = self.plan?;
        let counts = |counts: &[AtomicU64; STORM_KINDS]| {
            let wanted = StormKind::ALL.into_iter().filter(|&kind| plan.rates[kind as usize] > 0);
            wanted.map(|kind| (kind.name().to_string(), counts[kind as usize].load(Ordering::Relaxed))).collect()
        };
        Some(StormReport { seed: plan.seed, done: counts(&self.done), skipped: counts(&self.skipped) })
    }
}

/// For how long a vCPU is kept from its guest.
///
/// From a fault, or an interrupt of the host's, to the next entry; faults on one address in a row are tries of one access.
#[derive(Debug, Default)]
pub(super) struct Stall {
    since: Option<u64>,
    gpa: Option<Gpa>,
}

impl Stall {
    /// The guest was left.
    #[inline]
    pub(super) fn left(&mut self, storm: &Storm, exit: Exit) {
        if storm.is_measuring() {
            self.note(exit);
        } else {
            self.since = None;
        }
    }

    #[cold]
    fn note(&mut self, exit: Exit) {
        let gpa = match exit {
            Exit::Fault(Fault { gpa, .. }) => Some(gpa),
            // An address that the guest means, and tries again as well.
            Exit::PageFault(fault) => Some(Gpa(fault.address)),
            Exit::Interrupt => None,
            _ => return *self = Self::default(),
        };
        if gpa.is_none() || gpa != self.gpa {
            *self = Self { since: Some(instructions::rdtsc()), gpa };
        }
    }

    /// The guest is about to be entered.
    #[inline]
    pub(super) fn entering(&self, storm: &Storm) {
        if let Some(since) = self.since {
            storm.longest_stall.fetch_max(instructions::rdtsc().wrapping_sub(since), Ordering::Relaxed);
        }
    }
}

/// Blows until the VM ends. On a CPU that runs no vCPU and does nothing else.
pub(super) fn blow(vm: &Shared, worker: Worker<Machine>) {
    if let Some(plan) = vm.storm.plan {
        let mut engine = Engine { vm, worker, random: Random(plan.seed), logs: dirty::Logs::default() };
        engine.run(plan.rates);
    }
    apic::set_timer(0);
    vm.storm.blowing.store(false, Ordering::Release);
}

struct Engine<'a> {
    vm: &'a Shared,
    worker: Worker<Machine>,
    random: Random,
    logs: dirty::Logs,
}

impl Engine<'_> {
    fn run(&mut self, rates: [u32; STORM_KINDS]) {
        let start = instructions::rdtsc();
        // A kind that is not wanted is never due.
        let period = rates.map(|rate| 1_000_000u64.checked_div(u64::from(rate)).map(clock::tsc_from_us));
        let mut due = period.map(|period| period.map_or(u64::MAX, |period| start + period));
        while !self.vm.stopping() {
            let (next, &at) = due.iter().enumerate().min_by_key(|&(_, at)| at).expect("there are kinds");
            let now = instructions::rdtsc();
            if at > now {
                self.hear();
                rest_until(at.min(now + clock::tsc_from_us(LOOK_US)));
                continue;
            }
            let kind = StormKind::ALL[next];
            let began = instructions::rdtsc();
            let spared =
                self.hear() && matches!(kind, StormKind::SlotDelete | StormKind::SlotMove | StormKind::DirtyLog);
            let counts = if !spared && self.fire(kind) { &self.vm.storm.done } else { &self.vm.storm.skipped };
            counts[next].fetch_add(1, Ordering::Relaxed);
            // What is late stays late: no operation is left out, and none waits for another kind's.
            due[next] = at + period[next].unwrap_or(u64::MAX - at);
            let now = instructions::rdtsc();
            if now.saturating_sub(due[next]) > clock::tsc_from_us(1_000_000) {
                due[next] = now;
            }
            rest_until(now + (now - began).min(clock::tsc_from_us(LONGEST_REST_US)));
        }
    }

    /// Hears whether slots are to be left alone, and says so.
    fn hear(&mut self) -> bool {
        let copies = self.vm.storm.copies.load(Ordering::SeqCst);
        let spared = copies % 2 == 1;
        if spared && self.vm.storm.heard.load(Ordering::SeqCst) != copies {
            self.logs.stop(self.vm, &mut self.worker);
            self.vm.storm.heard.store(copies, Ordering::SeqCst);
        }
        spared
    }

    /// One operation; whether it was carried out.
    fn fire(&mut self, kind: StormKind) -> bool {
        match kind {
            StormKind::ZapAll => {
                self.worker.zap_all();
                true
            }
            StormKind::SlotDelete => self.delete_slot(),
            StormKind::SlotMove => self.move_slot(),
            StormKind::MovePage => self.on_a_page(|ram, gfn, whole, worker| {
                if whole {
                    ram.move_chunk(gfn, move |range| worker.invalidate(range))
                } else {
                    ram.move_page(gfn, move |range| worker.invalidate(range))
                }
            }),
            StormKind::TakePage => {
                self.on_a_page(|ram, gfn, _, worker| ram.take_page(gfn, move |range| worker.invalidate(range)))
            }
            StormKind::DirtyLog => match self.any_slot().and_then(|slot| Some((slot.id, range_of(&slot)?))) {
                Some((id, range)) => self.logs.step(self.vm, &mut self.worker, &mut self.random, id, range),
                None => false,
            },
            StormKind::Split => {
                let Some(slot) = self.any_slot() else { return false };
                // A slot that is logged stays split.
                self.worker.split(slot.id).is_ok() && self.worker.collapse(slot.id).is_ok()
            }
        }
    }

    fn delete_slot(&mut self) -> bool {
        let Some(slot) = self.any_slot() else { return false };
        let deleted = self.worker.delete_slot(slot.id);
        if deleted.is_ok() {
            told_gone(&slot);
        }
        let result = deleted.and_then(|()| self.put_back(|worker| worker.add_slot(slot)));
        self.tell(result)
    }

    fn move_slot(&mut self) -> bool {
        let Some(slot) = self.any_slot() else { return false };
        let away = self.worker.move_slot(slot.id, Gpa(ELSEWHERE));
        if away.is_ok() {
            told_gone(&slot);
        }
        let result = away.and_then(|()| self.put_back(|worker| worker.move_slot(slot.id, slot.base)));
        self.tell(result)
    }

    /// Without its slot the guest can't go on, so a lack of memory is waited out; until the VM ends.
    fn put_back(
        &mut self,
        mut back: impl FnMut(&mut Worker<Machine>) -> Result<(), SlotError>,
    ) -> Result<(), SlotError> {
        loop {
            match back(&mut self.worker) {
                Err(SlotError::OutOfMemory) if !self.vm.stopping() => core::hint::spin_loop(),
                result => return result,
            }
        }
    }

    fn tell(&self, result: Result<(), SlotError>) -> bool {
        if let Err(error) = result {
            log::warning!("storm: {error}");
        }
        result.is_ok()
    }

    /// A random slot of the guest's RAM, as it was added.
    fn any_slot(&mut self) -> Option<SlotConfig> {
        let slots = self.worker.slots();
        let slot = slots.get(self.random.below(slots.len() as u64) as usize)?;
        let (range, flags) = (slot.range(), SlotFlags::empty());
        let (base, size) = (range.start.gpa(), range.pages() * FRAME);
        Some(SlotConfig { id: slot.id(), space: slot.space(), base, size, flags, backing: slot.backing() })
    }

    /// Does something to a random page, or in one of four cases to all around it.
    fn on_a_page(
        &mut self,
        mut work: impl FnMut(&crate::memory::guest::GuestRam, Gfn, bool, &mut Worker<Machine>) -> Result<(), Skipped>,
    ) -> bool {
        let ram = self.vm.mmu.host().ram();
        let pages: u64 = ram.ranges().map(GfnRange::pages).sum();
        for _ in 0..TRIES {
            let mut place = self.random.below(pages);
            let bank = ram.ranges().find(|range| {
                let inside = place < range.pages();
                place -= if inside { 0 } else { range.pages() };
                inside
            });
            let Some(bank) = bank else { return false };
            let whole = self.random.below(4) == 0;
            let mut result = work(ram, Gfn(bank.start.0 + place), whole, &mut self.worker);
            if whole && result.is_err() {
                // With 4 KiB chunks there is no larger piece; and a host whose memory is in pieces has no room for one.
                result = work(ram, Gfn(bank.start.0 + place), false, &mut self.worker);
            }
            match result {
                Ok(()) => return true,
                Err(Skipped::Nothing) => {}
                Err(Skipped::NoMemory) => return false,
            }
        }
        false
    }
}

fn range_of(slot: &SlotConfig) -> Option<GfnRange> {
    GfnRange::new(slot.base.gfn(), slot.size / FRAME)
}

fn rest_until(deadline: u64) {
    local::this().timer_fired.store(false, Ordering::Relaxed);
    clock::set_timer_at(deadline);
    // SAFETY: ring 0, interrupts off, no lock held. The timer ends it at the latest.
    local::this().away(|| unsafe { instructions::halt() });
}

/// A small generator of numbers that look random (SplitMix64), the same ones for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(word ^ word >> 31) * u128::from(end)) >> 64) as u64
    }
}

/// The slot's old place has no memory any more.
fn told_gone(slot: &SlotConfig) {
    if let Some(range) = GfnRange::new(slot.base.gfn(), slot.size / FRAME) {
        ghost::gone(range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn ram_is_cut_without_gaps() {
        let bank = GfnRange { start: Gfn(0x10_0000), end: Gfn(0x10_0000 + 3 * 8192 + 5) };
        let pieces: Vec<_> = cut(bank, true).collect();
        assert_eq!(pieces.len(), 4);
        assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!((pieces[0].start, pieces[3].end), (bank.start, bank.end));
        assert_eq!(cut(bank, false).collect::<Vec<_>>(), [bank]);
    }

    #[test]
    fn places_are_spread_over_the_whole_range() {
        let mut random = Random(1);
        let mut met = [0; 10];
        (0..1000).for_each(|_| met[random.below(10) as usize] += 1);
        assert!(met.iter().all(|&times| times > 50), "{met:?}");
        assert_eq!(random.below(0), 0);
    }
}
