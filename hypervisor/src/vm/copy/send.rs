//! The job that sends a VM.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::fmt::Display;
use core::hint::spin_loop;

use nestling::Gfn;
use nestling_control::message::{GuestExit, MigrateLimits};
use nestling_control::window::{
    self, Copied, DATA_BYTES, FromCommand, FromHypervisor, HugePages, PAGE_BYTES, Receiver, Sender, Way,
};

use super::rounds::Logs;
use super::throttle::Throttle;
use crate::control::log;
use crate::control::window::Window;
use crate::cpu::{clock, instructions, rtc};
use crate::memory::guest::GuestRam;
use crate::vm::pause::Phase;
use crate::vm::saved::{Likeness, SavedMachine, VERSION};
use crate::vm::shared::{End, Shared};

/// How long the other side may take to make room or to answer.
const PATIENCE_US: u64 = 60_000_000;
/// The same for the last message, for which a VM that ends is waiting.
const LAST_PATIENCE_US: u64 = 10_000_000;

/// How a snapshot goes about it: a guest that writes much is not slowed down for long.
const SNAPSHOT: MigrateLimits = MigrateLimits { downtime_ms: 200, rounds: 4 };

/// What is to become of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::vm) enum Purpose {
    /// It goes on.
    Snapshot,
    /// It is to be given away.
    Migrate(MigrateLimits),
}

/// What of a VM does not change and is in its state all the same.
#[derive(Clone, Debug)]
pub(in crate::vm) struct Fixed {
    pub(in crate::vm) likeness: Likeness,
    pub(in crate::vm) wall_clock_s: u64,
}

/// Why a guest was not copied.
#[derive(Debug)]
pub(super) enum Stop {
    /// The VM ends: there is nothing left to be copied.
    Ended,
    /// For this reason.
    Because(String),
}

pub(super) fn because(error: impl Display) -> Stop {
    Stop::Because(error.to_string())
}

/// Sends the VM.
pub(in crate::vm) fn send(vm: &Arc<Shared>, fixed: &Fixed, window: &Window, purpose: Purpose) {
    let sender = Sender::new(Way::ToCommand);
    let began = instructions::rdtsc();
    let throttle = Throttle::default();
    let mut copy = Copy {
        vm,
        window,
        sender,
        pages: 0,
        last_pages: 0,
        rounds: 0,
        longest_stall: 0,
        throttle,
        began,
        logs: None,
        held_at: None,
    };
    let mut last = match copy.run(fixed, purpose) {
        Ok(last) => last,
        Err(Stop::Ended) => FromHypervisor::Kept("the guest has ended".to_string()),
        Err(Stop::Because(text)) => FromHypervisor::Kept(text),
    };
    if last == FromHypervisor::Given {
        vm.end(End::Exit(GuestExit::Migrated));
    } else {
        copy.release();
    }
    let huge_pages = copy.logs.take().map(|mut logs| logs.stop());
    vm.storm.go_on();
    if let (FromHypervisor::Complete(copied), Some(huge_pages)) = (&mut last, huge_pages) {
        copied.huge_pages = huge_pages;
        log::info!("{} of {} MiB are on huge pages again", huge_pages.after >> 20, huge_pages.before >> 20);
    }
    // The command empties the ring until it has this, also when it has given up.
    copy.wait_for_room(false).and_then(|()| copy.put(&last)).unwrap_or_default();
}

/// A copy under way.
pub(super) struct Copy<'a> {
    pub(super) vm: &'a Arc<Shared>,
    window: &'a Window,
    sender: Sender<FromHypervisor>,
    /// Pages sent.
    pub(super) pages: u64,
    /// Of these, the ones that were sent while the guest was held.
    last_pages: u64,
    pub(super) rounds: u32,
    /// In ticks of the TSC, until the guest was held.
    longest_stall: u64,
    pub(super) throttle: Throttle,
    began: u64,
    logs: Option<Logs>,
    /// The TSC, and the ticks of the VM's time, when the guest was stopped.
    held_at: Option<(u64, u64)>,
}

impl Copy<'_> {
    fn run(&mut self, fixed: &Fixed, purpose: Purpose) -> Result<FromHypervisor, Stop> {
        window::check(self.window).map_err(because)?;
        let limits = match purpose {
            Purpose::Snapshot => SNAPSHOT,
            Purpose::Migrate(limits) => limits,
        };
        // A storm deletes and moves slots, and their logs with them: it does other things meanwhile.
        while !self.vm.storm.spares_slots() {
            self.look()?;
            spin_loop();
        }
        let mut logs = Logs::start(self.vm).map_err(Stop::Because)?;
        let sent = self.send_behind(&mut logs, limits);
        // They are stopped when the guest goes on: it does not wait for that.
        self.logs = Some(logs);
        sent?;
        self.send_state(fixed)?;
        match purpose {
            Purpose::Snapshot => {
                let copied = self.copied();
                self.release();
                Ok(FromHypervisor::Complete(copied))
            }
            Purpose::Migrate(_) => {
                self.wait_for_room(true)?;
                self.put(&FromHypervisor::Sent(self.copied()))?;
                self.wait_for_the_other_side()
            }
        }
    }

    /// Sends memory while the guest runs, and then, while it is held, what it has written since.
    fn send_behind(&mut self, logs: &mut Logs, limits: MigrateLimits) -> Result<(), Stop> {
        self.vm.storm.measure(true);
        let sent = self.send_rounds(logs, limits);
        self.longest_stall = self.vm.storm.longest_stall();
        self.vm.storm.measure(false);
        sent?;
        self.hold()?;
        let before = self.pages;
        self.send_dirty(logs)?;
        self.last_pages = self.pages - before;
        Ok(())
    }

    fn copied(&self) -> Copied {
        let now = instructions::rdtsc();
        let ns = |ticks| self.vm.clock.ns_in(ticks);
        Copied {
            pages: self.pages,
            last_pages: self.last_pages,
            rounds: self.rounds,
            stopped_ns: self.held_at.map_or(0, |(tsc, _)| ns(now - tsc)),
            total_ns: ns(now - self.began),
            longest_stall_ns: ns(self.longest_stall),
            huge_pages: HugePages::default(),
        }
    }

    /// Keeps every vCPU from its guest, whose time goes on.
    pub(super) fn stop_vcpus(&mut self) -> Result<(), Stop> {
        self.vm.set_phase(Phase::Hold);
        while self.vm.pause.held() < self.vm.vcpus.len() {
            self.look()?;
            spin_loop();
        }
        Ok(())
    }

    /// Lets the vCPUs run.
    pub(super) fn start_vcpus(&self) {
        self.vm.set_phase(Phase::Run);
        // A later hold must not count those that have not left this one.
        while self.vm.pause.held() > 0 && !self.vm.stopping() {
            spin_loop();
        }
    }

    /// Stops every vCPU, and the guest's time.
    fn hold(&mut self) -> Result<(), Stop> {
        self.stop_vcpus()?;
        // Whatever CPU 0 did to the devices before this came at a time before the one at which everything stands still.
        self.vm.freeze_ports();
        self.held_at = Some((instructions::rdtsc(), self.vm.clock.ticks()));
        Ok(())
    }

    /// Lets the guest go on, if it does not. Its time goes on from where it was stopped.
    fn release(&mut self) {
        if let Some((_, ticks)) = self.held_at.take()
            && !self.vm.stopping()
        {
            self.vm.clock.go_on_from(ticks);
        }
        self.vm.thaw_ports();
        self.start_vcpus();
    }

    /// Sends pages, at most a slot's.
    pub(super) fn send_pages(&mut self, ram: &GuestRam, frames: &[u64]) -> Result<(), Stop> {
        self.wait_for_room(true)?;
        let mut failed = None;
        let message = FromHypervisor::Pages(window::runs(frames));
        let fill = &mut |data: &mut [u8]| {
            for (page, &frame) in data.chunks_exact_mut(PAGE_BYTES).zip(frames) {
                if let Err(error) = ram.read(Gfn(frame).gpa(), page) {
                    failed = Some(error);
                }
            }
        };
        self.sender.send(self.window, &message, frames.len() * PAGE_BYTES, fill).map_err(because)?;
        self.pages += frames.len() as u64;
        failed.map_or(Ok(()), |error| Err(because(error)))
    }

    fn send_state(&mut self, fixed: &Fixed) -> Result<(), Stop> {
        let Some((_, ticks)) = self.held_at else { return Err(because("the guest is not held")) };
        let vm = Arc::clone(self.vm);
        let (platform, line) = vm.ports_state();
        vm.pause.make_room(vm.vcpus.len());
        vm.set_phase(Phase::Export);
        while vm.pause.exported() < vm.vcpus.len() {
            self.look()?;
            spin_loop();
        }
        let machine = SavedMachine {
            version: VERSION,
            likeness: fixed.likeness.clone(),
            tsc_khz: vm.clock.khz(),
            ticks,
            saved_at_s: rtc::unix_seconds(),
            wall_clock_s: fixed.wall_clock_s,
            ready_ns: vm.ready(),
            line,
            platform,
            vcpus: vm.pause.take_states().ok_or_else(|| because("a vCPU left no state"))?,
        };
        let bytes = machine.to_bytes().map_err(Stop::Because)?;
        for piece in bytes.chunks(DATA_BYTES) {
            self.wait_for_room(true)?;
            let message = FromHypervisor::State(piece.len() as u32);
            let fill = &mut |data: &mut [u8]| data.copy_from_slice(piece);
            self.sender.send(self.window, &message, piece.len(), fill).map_err(because)?;
        }
        Ok(())
    }

    /// Waits for what the command has to say about a guest that was sent and is held.
    fn wait_for_the_other_side(&mut self) -> Result<FromHypervisor, Stop> {
        let answers = Receiver::<FromCommand>::new(Way::ToHypervisor);
        loop {
            // How long it takes is the command's business, which knows more of the other side; it ends this when it ends.
            self.look()?;
            match answers.peek(self.window).map_err(because)? {
                None => spin_loop(),
                Some((FromCommand::GiveAway, _)) => return Ok(FromHypervisor::Given),
                Some(_) => return Err(because("the command gave an answer that is none")),
            }
        }
    }

    pub(super) fn put(&mut self, message: &FromHypervisor) -> Result<(), Stop> {
        self.sender.send(self.window, message, 0, &mut |_| ()).map_err(because)
    }

    /// Waits until the command has taken in all that was sent: a ring full of pages that the link is too slow for would look
    /// as if they had been sent.
    pub(super) fn drain(&mut self) -> Result<(), Stop> {
        let (mut since, mut before) = (instructions::rdtsc(), u32::MAX);
        loop {
            let unread = self.sender.unread(self.window);
            if unread == 0 {
                return Ok(());
            }
            if unread != before {
                (since, before) = (instructions::rdtsc(), unread);
            }
            if clock::us_from_tsc(instructions::rdtsc() - since) > PATIENCE_US {
                return Err(because("the command takes nothing any more"));
            }
            self.look()?;
            self.take_turn()?;
            spin_loop();
        }
    }

    pub(super) fn wait_for_room(&mut self, unless_aborted: bool) -> Result<(), Stop> {
        let began = instructions::rdtsc();
        while !self.sender.has_room(self.window).map_err(because)? {
            if unless_aborted {
                self.look()?;
                self.take_turn()?;
            }
            let patience = if unless_aborted { PATIENCE_US } else { LAST_PATIENCE_US };
            if clock::us_from_tsc(instructions::rdtsc() - began) > patience {
                return Err(because("the command takes nothing any more"));
            }
            spin_loop();
        }
        Ok(())
    }

    /// Whether the copy is still wanted.
    pub(super) fn look(&self) -> Result<(), Stop> {
        if self.vm.stopping() {
            Err(Stop::Ended)
        } else if window::aborted(self.window) {
            Err(because("the command wants no more of it"))
        } else {
            Ok(())
        }
    }
}
