//! A vCPU's life on its CPU.
//!
//! One turn of the loop: serve what others posted, deliver an event if there is one that can be taken, start the CPU's
//! timer for the guest's next deadline, enter, and handle the exit. Work that came too late for its place in the turn is
//! seen by the last look before entry, and the turn starts again.
//!
//! Most turns have nothing to do but the last two. Whatever asks for more says so in one of two words: others in the
//! vCPU's news ([`super::shared`]), the vCPU itself in [`Due`]. A turn looks at these two and at nothing else, so
//! whoever adds something to be looked at sees to it that one of them is set.
//!
//! **A fault within a turn.** Most second-stage faults are fixed in guest mode, and so is what a guest on shadow tables asks of
//! its TLB, if there is nothing to compare; the guest runs on at once: nothing of the turn's front is looked at, and neither
//! the library nor the VM is told that the guest was left. That is right because it is as if the guest had not been left. Interrupts are off, so whoever posts something meanwhile finds the vCPU in the guest,
//! and kicks it: the kick stays pending, ends the run that follows at once, and its exit is looked at like any other. Of its
//! own making is nothing, for the turn had nothing due and none of that makes anything due; and the library waits for nobody
//! there ([`nestling::InGuest::fix_at_once`], [`nestling::shadow::vcpu::at_once`]). The guest's CR8, which is compared at
//! exits, may have changed: that matters once something is held back by it, and then each write to it exits.
//!
//! A physical interrupt only ends the guest's run; it is taken in a window right behind ([`instructions::interrupt_window`])
//! and has no other effect than that turn and, if it was the timer, a look at the deadlines.

use core::sync::atomic::Ordering;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Debug;

use nestling::{FaultError, Hpa, VcpuId};
use nestling_control::message::{DeathReason, VcpuState};
use serde::{Deserialize, Serialize};

use super::exit::{self, Exit};
use super::guest_cpu::{GuestCpu, NmiWindow};
use super::handle::{MSR_TSC_AUX, Next, Policy};
use super::pause::Phase;
use super::refused::Refused;
use super::ring::Ring;
use super::saved::SavedVcpu;
use super::shared::{End, Place, Reach, Shared};
use super::storm::Stall;
use super::translation::{AtOnce, Inside, VcpuMemory};
use crate::cpu::extended::{self, XCR0_RESET};
use crate::cpu::{apic, clock, instructions, local};
use crate::devices::lapic::{Lapic, LapicConfig};
use crate::devices::saved::{BadState, require};
use crate::emulate::Kept;
use crate::ghost;
use crate::guest::VcpuInit;
use crate::memory::embedder;
use crate::seams;

/// How long a guest runs in which something waits for the next instruction.
const SHADOW_NS: u64 = 10_000;

/// What a local APIC answers when it has nothing after all.
const SPURIOUS: u8 = 0xff;

/// What is left of a vCPU when it has stopped.
#[derive(Debug)]
pub struct Remains {
    /// Exits by [`Exit::index`].
    pub exits: [u64; exit::KINDS],
    /// Its state, if the guest died and the vCPU was ever started.
    pub state: Option<VcpuState>,
    /// The library's vCPU: its tables and counters are there until this is dropped.
    pub memory: Box<dyn Debug + Send>,
    /// The root it ran on last; 0 if it never ran.
    pub root: Hpa,
    /// Ticks for which it had nothing to run.
    pub idle_ticks: u64,
}

/// A vCPU of either kind, for whoever makes it and starts it.
pub trait AnyVcpu: Send {
    /// See [`Vcpu::start`].
    fn start(&mut self, init: &VcpuInit);

    /// See [`Vcpu::restore`].
    ///
    /// # Errors
    /// What of that is impossible.
    fn restore(&mut self, saved: SavedVcpu) -> Result<(), BadState>;

    /// See [`Vcpu::run`].
    #[must_use]
    fn run(self: Box<Self>) -> Remains;
}

impl<C: GuestCpu> AnyVcpu for Vcpu<C> {
    fn start(&mut self, init: &VcpuInit) {
        Self::start(self, init);
    }

    fn restore(&mut self, saved: SavedVcpu) -> Result<(), BadState> {
        Self::restore(self, saved)
    }

    fn run(self: Box<Self>) -> Remains {
        Self::run(*self)
    }
}

/// Whether the vCPU runs instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Activity {
    /// It does.
    Running,
    /// HLT.
    Halted,
    /// INIT, and no start-up IPI yet.
    WaitingForStartup,
}

bitflags::bitflags! {
    /// What a vCPU has to look at before it enters again.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(super) struct Due: u8 {
        /// Something may have been posted, or the CPU's timer may have fired.
        const POSTED = 1 << 0;
        /// There may be an event to deliver.
        const EVENTS = 1 << 1;
        /// The guest's next deadline may have changed.
        const TIMER = 1 << 2;
    }
}

/// What follows a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum After {
    /// The next one, whose last look finds what came meanwhile.
    Turn,
    /// News, most likely: it is taken in first, so that the next turn is not one in vain.
    News,
}

/// One vCPU.
#[derive(Debug)]
pub struct Vcpu<C: GuestCpu> {
    pub(super) number: usize,
    pub(super) vm: Arc<Shared>,
    /// Its own part of that.
    pub(super) reach: Arc<Reach>,
    pub(super) cpu: C,
    pub(super) memory: C::Memory,
    pub(super) lapic: Lapic,
    pub(super) policy: Policy,
    pub(super) activity: Activity,
    pub(super) due: Due,
    /// NMIs that wait: at most one while the guest handles one, at most two otherwise.
    pub(super) nmis: u8,
    /// The guest is to be left as soon as it is entered: behind the event that goes in, there is another.
    leave_at_once: bool,
    /// It is to be left soon: something waits for the end of an interrupt shadow.
    leave_soon: bool,
    /// What the CPU's timer was started for, as a TSC value; `u64::MAX`: it is off.
    armed: u64,
    /// The port devices' deadline that it was started with, on vCPU 0.
    ports_seen: u64,
    pub(super) exits: [u64; exit::KINDS],
    idle_ticks: u64,
    pub(super) refused: Refused,
    ring: Ring,
    /// For instructions that are executed in software.
    pub(super) kept: Kept,
    root: Hpa,
    stall: Stall,
    started: bool,
    /// What is to be in the CPU when it first runs there.
    extended: Option<extended::State>,
}

impl<C: GuestCpu> Vcpu<C> {
    /// A vCPU that waits to be started; `None` without memory, or if the number is taken.
    #[must_use]
    pub(super) fn new(number: usize, vm: &Arc<Shared>, mut cpu: C, policy: Policy) -> Option<Self> {
        let memory = C::Memory::new(&vm.mmu, VcpuId(number as u16))?;
        cpu.set_tsc_offset(policy.msrs.tsc_offset());
        // As firmware leaves it. A kernel goes on to x2APIC mode by itself; one that was told not to, or to do without its
        // APIC at all, could not come back from there.
        let mut lapic = Lapic::new(lapic_config(number, vm)).in_xapic_mode();
        let reach = Arc::clone(&vm.vcpus[number]);
        lapic.publish(&reach.lapic);
        Some(Self {
            number,
            vm: Arc::clone(vm),
            reach,
            cpu,
            memory,
            lapic,
            policy,
            activity: Activity::WaitingForStartup,
            due: Due::all(),
            nmis: 0,
            leave_at_once: false,
            leave_soon: false,
            armed: u64::MAX,
            ports_seen: u64::MAX,
            exits: [0; exit::KINDS],
            idle_ticks: 0,
            refused: Refused::default(),
            ring: Ring::default(),
            kept: Kept::default(),
            root: Hpa(0),
            stall: Stall::default(),
            started: false,
            extended: None,
        })
    }

    /// Makes it the first to run, in the state that a loader left.
    pub fn start(&mut self, init: &VcpuInit) {
        self.cpu.load(init);
        self.activity = Activity::Running;
        self.started = true;
    }

    /// Makes it go on where another one was saved. Before it runs.
    ///
    /// # Errors
    /// What of that is impossible.
    pub fn restore(&mut self, saved: SavedVcpu) -> Result<(), BadState> {
        let SavedVcpu { cpu, extended, mut lapic, msrs, activity, nmis, started } = saved;
        lapic.check(lapic_config(self.number, &self.vm))?;
        extended.check(self.policy.cpuid.xcr0())?;
        require("vCPU", "XCR0", extended.xcr0 == XCR0_RESET || self.policy.cpuid.allows_xcr0(extended.xcr0))?;
        require("vCPU", "NMIs", nmis <= 2)?;
        self.cpu.import(&cpu)?;
        self.policy.msrs.restore(&msrs)?;
        self.lapic = lapic;
        self.lapic.publish(&self.reach.lapic);
        self.extended = Some(extended);
        (self.activity, self.nmis, self.started) = (activity, nmis, started);
        Ok(())
    }

    /// Runs until the VM ends. On the CPU that belongs to this vCPU.
    #[must_use]
    pub fn run(mut self) -> Remains {
        self.cpu.bind();
        extended::reset();
        if let Some(state) = self.extended.take() {
            // SAFETY: it was checked for this CPU; all are alike.
            unsafe { extended::load(&state) };
        }
        if self.policy.tsc_aux {
            // SAFETY: the host has the register and does not use it.
            unsafe { instructions::wrmsr(MSR_TSC_AUX, u64::from(self.policy.msrs.tsc_aux())) };
        }
        self.take_time();
        let mut goes_on = self.hear();
        while goes_on {
            goes_on = match self.turn() {
                Ok(After::Turn) => true,
                Ok(After::News) => self.hear(),
                Err(error) => {
                    let text = alloc::format!("{error}");
                    self.die(DeathReason::Internal { text });
                    self.hear()
                }
            };
        }
        apic::set_timer(0);
        extended::reset();
        // Reports walk tables.
        self.vm.wait_for_workers();
        let died = matches!(self.vm.cause(), Some(End::Death(..)));
        let state = (died && self.started).then(|| super::state::report(&self, self.root, &self.ring));
        let Self { exits, idle_ticks, root, .. } = self;
        Remains { exits, state, memory: Box::new(self.memory), root, idle_ticks }
    }

    /// Takes over where the VM's time begins; it may have been moved.
    fn take_time(&mut self) {
        self.policy.msrs.rebase(self.vm.clock.started().wrapping_neg());
        self.cpu.set_tsc_offset(self.policy.msrs.tsc_offset());
        self.due = Due::all();
        self.armed = u64::MAX;
    }

    /// Takes in the news that there may be: whether the VM has not ended. If it is held, this takes as long.
    #[cold]
    fn hear(&mut self) -> bool {
        self.reach.take_news();
        self.due |= Due::POSTED;
        if !self.vm.stopping() && self.vm.pause.phase() != Phase::Run {
            self.wait();
        }
        !self.vm.stopping()
    }

    /// Does what whoever holds the VM wants, until the guest may run or the VM ends.
    #[cold]
    fn wait(&mut self) {
        let vm = Arc::clone(&self.vm);
        vm.pause.arrive();
        let mut exported = false;
        while !vm.stopping() {
            let phase = vm.pause.phase();
            match phase {
                Phase::Run => break,
                Phase::Export if !exported => {
                    // Nobody posts any more: what is taken in here is all there is.
                    self.receive();
                    let state = self.save();
                    vm.pause.leave(self.number, state);
                    exported = true;
                }
                Phase::Hold | Phase::Export => {}
            }
            self.reach.go(Place::Halted);
            if vm.pause.phase() == phase && !vm.stopping() {
                // SAFETY: ring 0, interrupts off, and no lock is held.
                unsafe { instructions::halt() };
            }
            self.reach.back();
        }
        self.take_time();
        vm.pause.depart();
    }

    fn save(&mut self) -> SavedVcpu {
        SavedVcpu {
            cpu: self.cpu.export(),
            extended: extended::save(self.policy.cpuid.xcr0()),
            lapic: self.lapic.clone(),
            msrs: self.policy.msrs.save(),
            activity: self.activity,
            nmis: self.nmis,
            started: self.started,
        }
    }

    /// Ends the VM because of this vCPU.
    pub(super) fn die(&self, reason: DeathReason) {
        self.vm.end(End::Death(reason, Some(self.number as u32)));
    }

    #[inline]
    fn turn(&mut self) -> Result<After, FaultError> {
        let mut leave_at_once = false;
        if !self.due.is_empty() {
            if !self.prepare() {
                self.rest();
                return Ok(After::News);
            }
            leave_at_once = self.leave_at_once;
        }
        let vm = &*self.vm;
        let reach = &*self.reach;
        reach.go(Place::Guest);
        let mut inside = self.memory.enter(&mut self.cpu)?;
        // Also when the guest is not entered after all: the root before this one may be gone.
        self.root = inside.root();
        // The last look: what is not seen here comes with a kick.
        if reach.has_news() {
            drop(inside);
            reach.back();
            return Ok(After::News);
        }
        inside.load(&mut self.cpu);
        let flushes = inside.flush(&mut self.cpu);
        ghost::entering(self.number, inside.tag(), self.root, flushes);
        if leave_at_once {
            self.leave_at_once = false;
            // With interrupts off it stays pending, and ends the run behind the event's delivery (15.13.1, 15.20).
            embedder::kick(self.number);
        }
        self.stall.entering(&vm.storm);
        let Self { cpu, exits, ring, stall, root, .. } = self;
        let (nothing_due, number, physical_bits) = (self.due.is_empty(), self.number, self.policy.physical_bits);
        let exit = cpu.run(|cpu, met| {
            if vm.storm.is_measuring() {
                stall.left(&vm.storm, met.exit);
            }
            if !nothing_due {
                return false;
            }
            let done = inside.fix_at_once(cpu, met, physical_bits);
            match done {
                AtOnce::No => return false,
                AtOnce::Fixed => {}
                AtOnce::Turned | AtOnce::Flushed => {
                    *root = inside.root();
                    ghost::left(number);
                    ghost::entering(number, inside.tag(), *root, done == AtOnce::Flushed);
                }
            }
            exits[met.exit.index()] += 1;
            ring.note(met.raw.code, met.rip, met.raw.info1);
            stall.entering(&vm.storm);
            seams::exit(met.exit.index());
            seams::at_once();
            true
        });
        ghost::left(self.number);
        drop(inside);
        reach.back();
        self.stall.left(&vm.storm, exit);
        seams::exit(exit.index());
        self.exits[exit.index()] += 1;
        let raw = self.cpu.raw_exit();
        self.ring.note(raw.code, self.cpu.rip(), raw.info1);
        if self.cpu.task_priority() != self.lapic.cr8() {
            self.lapic.set_cr8(self.cpu.task_priority());
            self.due |= Due::EVENTS;
        }
        match exit {
            Exit::Interrupt => {
                // SAFETY: ring 0, interrupts off, and no lock is held.
                unsafe { instructions::interrupt_window() };
                self.due |= Due::POSTED;
                // Most kicks come with some.
                Ok(if self.reach.has_news() { After::News } else { After::Turn })
            }
            _ => self.act_on(&exit),
        }
    }

    #[inline]
    fn act_on(&mut self, exit: &Exit) -> Result<After, FaultError> {
        match self.handle(exit)? {
            Next::Continue => {}
            Next::Halt => {
                self.activity = Activity::Halted;
                self.due |= Due::EVENTS;
            }
            Next::Die(reason) => {
                self.die(reason);
                return Ok(After::News);
            }
        }
        Ok(After::Turn)
    }

    /// Looks at what is due; says whether the guest has something to run.
    #[inline(never)]
    fn prepare(&mut self) -> bool {
        if self.due.contains(Due::POSTED) {
            self.due.remove(Due::POSTED);
            self.serve();
        }
        if self.activity == Activity::WaitingForStartup || !self.deliver() {
            return false;
        }
        self.arm_timer();
        // Whatever changes the APIC's own makes events due.
        self.cpu.set_task_priority(self.lapic.cr8());
        true
    }

    /// Takes in what others posted and what time has brought.
    fn serve(&mut self) {
        let vm = &*self.vm;
        let fired = &local::this().timer_fired;
        if fired.load(Ordering::Relaxed) {
            fired.store(false, Ordering::Relaxed);
            self.armed = u64::MAX;
            self.due |= Due::EVENTS | Due::TIMER;
            let now = self.now();
            self.lapic.poll(now);
            if self.number == 0 && vm.ports_due() <= now.ns {
                vm.with_ports(|platform, now| platform.poll(now));
            }
        }
        if self.number == 0 {
            self.due.set(Due::TIMER, self.due.contains(Due::TIMER) || vm.ports_due() != self.ports_seen);
            self.due.set(Due::EVENTS, self.due.contains(Due::EVENTS) || vm.line());
        }
        if self.reach.lapic.has_pending() {
            self.receive();
        }
    }

    /// Takes in what other vCPUs sent.
    #[cold]
    fn receive(&mut self) {
        self.due |= Due::EVENTS;
        let pending = self.lapic.sync(&self.reach.lapic);
        if pending.power_loss {
            self.lose_power();
        }
        if pending.init {
            self.lapic.init();
            extended::clear_breakpoints();
            self.activity = Activity::WaitingForStartup;
            self.nmis = 0;
            self.due |= Due::TIMER;
        }
        if let Some(page) = pending.startup
            && self.activity == Activity::WaitingForStartup
        {
            self.start(&VcpuInit::startup(page));
        }
        if pending.resume && self.activity == Activity::WaitingForStartup {
            self.resume();
        }
        // A CPU takes the first before the second arrives, and keeps one that arrives while it handles another. Here both may
        // have arrived since the last look.
        let most = if self.cpu.nmis_masked() { 1 } else { 2 };
        self.nmis = (self.nmis + pending.nmis).min(most);
    }

    /// Gives the guest the most important event that it can take; says whether it has something to run.
    ///
    /// Looks only when something may have come: what is there and could not be taken keeps events due. The guest alone
    /// can make an event that was refused acceptable (IF, the shadow, IRET, CR8, its APIC's registers), and each of these is
    /// noticed: by the window that was asked for, or by the next look.
    fn deliver(&mut self) -> bool {
        if self.due.contains(Due::EVENTS) {
            let more = self.deliver_one();
            self.due.set(Due::EVENTS, more);
        }
        if self.cpu.has_event() {
            // A halted one as well, if it stepped over its HLT: the trap behind that ends it.
            self.activity = Activity::Running;
        }
        self.activity == Activity::Running
    }

    /// Gives the guest one event; says whether there may be more.
    #[cold]
    fn deliver_one(&mut self) -> bool {
        if self.nmis != 0 && self.cpu.can_take_nmi() {
            self.nmis -= 1;
            self.cpu.nmi();
            self.activity = Activity::Running;
        } else if self.nmis != 0 {
            match self.cpu.open_nmi_window() {
                NmiWindow::Watched => {}
                NmiWindow::BehindEvent => self.leave_at_once = true,
                NmiWindow::BehindInstruction => self.look_soon(),
            }
        }
        let external = self.number == 0 && self.vm.line() && self.lapic.accepts_extint();
        if !external && self.lapic.deliverable().is_none() {
            // The guest may lower CR8 without an exit, and run on for ever without what that lets through.
            self.cpu.watch_task_priority(self.lapic.is_held_back());
            return self.nmis != 0;
        }
        if self.cpu.can_take_interrupt() {
            let vector = if external {
                self.vm.with_ports(|platform, _| platform.interrupt_acknowledge())
            } else {
                self.lapic.acknowledge().unwrap_or(SPURIOUS)
            };
            self.cpu.interrupt(vector);
            self.activity = Activity::Running;
        } else if self.activity == Activity::Running {
            if self.cpu.in_shadow() {
                // The window that was asked for earlier could open too early.
                self.cpu.close_interrupt_window();
                self.look_soon();
            } else {
                self.cpu.open_interrupt_window();
            }
        }
        true
    }

    /// Has the CPU's timer end the next run after a few instructions.
    fn look_soon(&mut self) {
        self.leave_soon = true;
        self.due |= Due::TIMER;
    }

    /// Starts the CPU's timer for what the guest waits for next, if that may have changed.
    fn arm_timer(&mut self) {
        if self.due.contains(Due::TIMER) {
            self.due.remove(Due::TIMER);
            self.start_timer();
        }
    }

    #[cold]
    fn start_timer(&mut self) {
        let now = self.now();
        let mut due = self.lapic.next_deadline_ns(now).unwrap_or(u64::MAX);
        if self.number == 0 {
            self.ports_seen = self.vm.ports_due();
            due = due.min(self.ports_seen);
        }
        if core::mem::take(&mut self.leave_soon) {
            due = due.min(now.ns + SHADOW_NS);
        }
        let deadline = if due == u64::MAX { u64::MAX } else { self.vm.clock.tsc(due) };
        if deadline == self.armed {
            return;
        }
        self.armed = deadline;
        if deadline == u64::MAX {
            apic::set_timer(0);
        } else {
            clock::set_timer_at(deadline);
        }
    }

    /// Halts the CPU until something comes, unless something has.
    #[cold]
    fn rest(&mut self) {
        self.arm_timer();
        self.reach.go(Place::Halted);
        if !self.reach.has_news() {
            let start = instructions::rdtsc();
            // SAFETY: ring 0, interrupts off, and no lock is held.
            local::this().away(|| unsafe { instructions::halt() });
            let idle = instructions::rdtsc() - start;
            self.idle_ticks += idle;
            seams::idle(idle);
        }
        self.reach.back();
        // The timer may have been what ended it; and it goes on resting until something else is found.
        self.due |= Due::POSTED;
    }
}

pub(super) fn lapic_config(number: usize, vm: &Shared) -> LapicConfig {
    LapicConfig { apic_id: number as u32, bootstrap: number == 0, tsc_khz: vm.clock.khz() }
}

/// States of vCPUs that were started, in the order of their numbers.
#[must_use]
pub fn states(remains: &mut [Remains]) -> Vec<VcpuState> {
    remains.iter_mut().filter_map(|r| r.state.take()).collect()
}
