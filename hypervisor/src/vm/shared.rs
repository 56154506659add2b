//! What a VM's vCPUs and its housekeeper share.
//!
//! **Reaching a vCPU.** Whoever has something for a vCPU makes it visible first (a posted vector, the interrupt line, the
//! port devices' next deadline, a phase, the end) and then calls [`Shared::wake`], which sets that vCPU's *news*, one flag
//! for all of these, and sends an IPI if the vCPU has said that it is in the guest or halted. The vCPU says so first and
//! looks at the flag second. All of it is sequentially consistent, so either the vCPU sees the flag, or the other side sees
//! where the vCPU is. The IPI itself is never lost: interrupts are off between the look and guest entry or HLT, so it stays
//! pending and ends either at once.
//!
//! The flag says no more than that something may have come, so that a turn in which nothing has looks at nothing else. The
//! vCPU takes it back *before* it looks at what it stands for: what was made visible before that it finds, and what comes
//! later sets the flag again. A vCPU that has done something of this kind to itself, as vCPU 0 does when it moves the port
//! devices' line or deadline, sets it too. A vector that finds another one posted wakes nobody: the flag is about to be set
//! by whoever posted that, or the vCPU has not yet taken in what it was set for.
//!
//! **The port devices** are behind one lock. Console output leaves them in pieces, as far as the queue of
//! [`crate::control`] has room; what has no room stays in the UART, whose transmitter then looks busy to the guest. So no
//! vCPU ever waits for the console while it holds the lock.
//!
//! **A guest that sleeps** (ACPI S3) has had every vCPU's power loss posted, by whoever put it to sleep, before that one lets
//! go of the ports; its own too, which it takes in before it enters the guest again. The wake is posted to vCPU 0 behind that.
//! A vCPU that is still handling an exit meanwhile may start others by its APIC once more: what runs then is the guest's
//! own mistake, and the wake finds no vCPU 0 that waits for it.
//!
//! **The end** is decided once: the first cause counts, and then every vCPU is made to leave.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};

use nestling::{AddressSpace, GfnRange, Gpa, Mmu, Worker};
use nestling_control::config::MmuKind;
use nestling_control::message::{DeathReason, GuestExit, ToCommand};
use spin::Mutex;

use super::marker::Marker;
use super::meter::Meter;
use super::pause::{Pause, Phase};
use super::storm::Storm;
use super::time::VmClock;
use crate::control::{self, log};
use crate::devices::ioapic::Message;
use crate::devices::lapic::{IpiCommand, LapicShared, route};
use crate::devices::platform::{GuestEnd, Platform};
use crate::memory::embedder::{self, Machine};

/// How many different surprises of one kind are told; the rest is counted by nobody.
const TOLD: usize = 64;

/// Where a vCPU is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Place {
    /// In the hypervisor: it will look for work before it leaves.
    Host = 0,
    /// In the guest, or about to be.
    Guest = 1,
    /// In HLT, or about to be.
    Halted = 2,
}

/// The part of a vCPU that others reach.
#[derive(Debug)]
#[repr(align(128))]
pub struct Reach {
    place: AtomicU8,
    news: AtomicBool,
    /// Its APIC's outer half.
    pub lapic: LapicShared,
}

impl Reach {
    /// The vCPU says where it is going. To be followed by a look for work.
    #[inline]
    pub fn go(&self, place: Place) {
        self.place.store(place as u8, Ordering::SeqCst);
    }

    /// The vCPU is back. Nobody has to see that in time.
    #[inline]
    pub fn back(&self) {
        self.place.store(Place::Host as u8, Ordering::Release);
    }

    /// Whether something may have come for the vCPU since it last took that.
    #[inline]
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.news.load(Ordering::SeqCst)
    }

    /// Takes that back. By the vCPU, which looks at everything next.
    pub fn take_news(&self) {
        self.news.swap(false, Ordering::SeqCst);
    }
}

/// The port devices and what belongs to their output.
#[derive(Debug)]
pub struct Ports {
    /// The devices.
    pub platform: Platform,
    output: Vec<u8>,
    marker: Marker,
    /// The end of what was printed, if its line has not ended yet.
    line: Vec<u8>,
    /// No time passes here, and nobody types ([`super::pause`]).
    frozen: bool,
}

/// The most that is remembered of a line.
const LINE_BYTES: usize = 512;

impl Ports {
    /// Remembers the unended line at the end of what was printed.
    fn note_line(&mut self, printed: &[u8]) {
        let tail = printed.rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
        if tail.len() != printed.len() {
            self.line.clear();
        }
        let room = LINE_BYTES.saturating_sub(self.line.len());
        self.line.extend_from_slice(&tail[..tail.len().min(room)]);
    }
}

/// Why the VM ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// By the guest's own doing, or the operator's.
    Exit(GuestExit),
    /// Its slice of a series is over.
    Slice,
    /// It died; the vCPU, if it was one.
    Death(DeathReason, Option<u32>),
}

/// One VM.
#[derive(Debug)]
pub struct Shared {
    /// Its memory.
    pub mmu: Arc<Mmu<Machine>>,
    /// Its clock.
    pub clock: VmClock,
    /// Its vCPUs, by number. Shared with each, so that it goes to its own without a look at this list.
    pub vcpus: Box<[Arc<Reach>]>,
    /// Where nothing answers, the bus floats; else such an access ends the guest.
    pub floating: bool,
    /// What translates.
    pub mmu_kind: MmuKind,
    /// What is fired at it.
    pub storm: Storm,
    /// What it prints is thrown away, and nothing is said of what it does.
    pub silent: bool,
    /// For a guest that measures.
    pub meter: Option<Mutex<Meter>>,
    /// What holds its vCPUs.
    pub pause: Pause,
    /// Forgets mappings on the guest's demand, and reports the hypervisor's own writes to logs.
    forgetter: Mutex<Worker<Machine>>,
    /// Slots are logged: the hypervisor's own writes have to be reported.
    logged: AtomicBool,
    /// Somebody copies the VM.
    pub(super) copying: AtomicBool,
    ports: Mutex<Ports>,
    /// The level of LINT0 of vCPU 0.
    line: AtomicBool,
    /// When the port devices want to be polled (VM nanoseconds); vCPU 0 does it.
    ports_due: AtomicU64,
    /// When the console last printed something (VM nanoseconds).
    last_output: AtomicU64,
    /// When the ready marker was seen, plus 1; 0 before.
    ready: AtomicU64,
    stopping: AtomicBool,
    end: Mutex<Option<End>>,
    surprises: AtomicUsize,
}

impl Shared {
    /// A VM about to start.
    #[must_use]
    pub fn new(
        mmu: Arc<Mmu<Machine>>,
        forgetter: Worker<Machine>,
        clock: VmClock,
        vcpus: usize,
        platform: Platform,
        marker: &str,
    ) -> Self {
        let reach = |id: u32| {
            Arc::new(Reach {
                place: AtomicU8::new(Place::Host as u8),
                news: AtomicBool::new(true),
                lapic: LapicShared::new(id),
            })
        };
        Self {
            mmu,
            clock,
            vcpus: (0..vcpus as u32).map(reach).collect(),
            floating: platform.has_board(),
            mmu_kind: MmuKind::default(),
            storm: Storm::default(),
            silent: false,
            meter: None,
            pause: Pause::default(),
            forgetter: Mutex::new(forgetter),
            logged: AtomicBool::new(false),
            copying: AtomicBool::new(false),
            line: AtomicBool::new(platform.interrupt_asserted()),
            ports_due: AtomicU64::new(platform.next_deadline_ns().unwrap_or(u64::MAX)),
            ports: Mutex::new(Ports {
                platform,
                output: Vec::new(),
                marker: Marker::new(marker),
                line: Vec::new(),
                frozen: false,
            }),
            last_output: AtomicU64::new(0),
            ready: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            end: Mutex::new(None),
            surprises: AtomicUsize::new(0),
        }
    }

    /// Makes a vCPU look for work; it is kicked if it is where it would not look by itself.
    #[inline]
    pub fn wake(&self, vcpu: usize) {
        let reach = &self.vcpus[vcpu];
        reach.news.store(true, Ordering::SeqCst);
        if reach.place.load(Ordering::SeqCst) != Place::Host as u8 {
            embedder::kick(vcpu);
        }
    }

    /// Sends an interprocessor interrupt.
    pub fn send(&self, sender: u32, command: &IpiCommand) {
        for vcpu in route(command, sender, self.vcpus.iter().map(|reach| &reach.lapic)).iter() {
            if self.vcpus[vcpu].lapic.post(command.kind) {
                self.wake(vcpu);
            }
        }
    }

    /// Sends what the I/O APIC has sent.
    fn deliver(&self, message: &Message) {
        // No sender has this ID, so no destination leaves anybody out.
        const NOBODY: u32 = u32::MAX;
        let Some(command) = message.command() else { return };
        for vcpu in route(&command, NOBODY, self.vcpus.iter().map(|reach| &reach.lapic)).iter() {
            let lapic = &self.vcpus[vcpu].lapic;
            let must_wake = if message.level { lapic.post_level(message.vector) } else { lapic.post(command.kind) };
            if must_wake {
                self.wake(vcpu);
            }
        }
    }

    /// Forgets the mapping of the page at `gpa`: the guest's next access faults.
    fn forget(&self, gpa: u64) {
        let start = Gpa(gpa).gfn();
        let _ = self.forgetter.lock().zap(GfnRange { start, end: nestling::Gfn(start.0 + 1) });
    }

    /// Whether the hypervisor's own writes are to be reported to logs.
    pub(super) fn note_writes(&self, on: bool) {
        self.logged.store(on, Ordering::SeqCst);
    }

    /// The hypervisor has written to the guest's memory. Behind the write, and before the guest is told.
    #[inline]
    pub(super) fn note_write(&self, gpa: u64, bytes: usize) {
        if self.mmu_kind == MmuKind::Shadow {
            // What was made of a table that stood there is not right any more.
            return self.report_write(gpa, bytes);
        }
        self.note_mark(gpa, bytes);
    }

    /// The same, of a mark in an entry of a page table.
    #[inline]
    pub(super) fn note_mark(&self, gpa: u64, bytes: usize) {
        // Either this sees that writes are to be reported, or whoever wants that sees what was written.
        fence(Ordering::SeqCst);
        if self.logged.load(Ordering::SeqCst) {
            self.report_write(gpa, bytes);
        }
    }

    #[cold]
    fn report_write(&self, gpa: u64, bytes: usize) {
        let last = gpa.saturating_add(bytes.max(1) as u64 - 1);
        let range = GfnRange { start: Gpa(gpa).gfn(), end: nestling::Gfn(Gpa(last).gfn().0 + 1) };
        self.forgetter.lock().mark_dirty(AddressSpace::Main, range);
    }

    /// Uses the port devices, then carries what they did to where it belongs.
    #[inline]
    pub fn with_ports<R>(&self, work: impl FnOnce(&mut Platform, u64) -> R) -> R {
        let now = self.clock.now().ns;
        let mut ports = self.ports.lock();
        let result = work(&mut ports.platform, now);
        let forget = self.settle(&mut ports, now);
        // A zap waits for vCPUs to leave the guest, and must not do so while they may wait for the ports.
        drop(ports);
        if let Some(gpa) = forget {
            self.forget(gpa);
        }
        result
    }

    /// As [`Shared::with_ports`] if nobody else is using them.
    pub fn try_with_ports(&self, work: impl FnOnce(&mut Platform, u64)) -> bool {
        let Some(mut ports) = self.ports.try_lock() else { return false };
        if ports.frozen {
            return false;
        }
        // Behind the look: before, it could be the time of a guest that was held meanwhile, whose time did not go on.
        let now = self.clock.now().ns;
        work(&mut ports.platform, now);
        // Only a vCPU's access can ask for a page to be forgotten.
        let _ = self.settle(&mut ports, now);
        true
    }

    #[inline]
    fn settle(&self, ports: &mut Ports, now: u64) -> Option<u64> {
        if ports.platform.take_news() { self.settle_news(ports, now) } else { None }
    }

    #[inline(never)]
    fn settle_news(&self, ports: &mut Ports, now: u64) -> Option<u64> {
        let effects = ports.platform.take_effects();
        if effects.suspended || effects.resumed {
            self.settle_power(effects.suspended, effects.resumed);
        }
        if effects.messages {
            while let Some(message) = ports.platform.take_message() {
                self.deliver(&message);
            }
        }
        let due = ports.platform.next_deadline_ns().unwrap_or(u64::MAX);
        let mut wake_first = false;
        if effects.interrupt_changed {
            let asserted = ports.platform.interrupt_asserted();
            self.line.store(asserted, Ordering::SeqCst);
            wake_first |= asserted;
        }
        if due != self.ports_due.load(Ordering::Relaxed) {
            self.ports_due.store(due, Ordering::SeqCst);
            wake_first = true;
        }
        if wake_first {
            // Also if it is vCPU 0 that asks: it is outside its guest, and is not kicked.
            self.wake(0);
        }
        if effects.console_output {
            self.settle_output(ports, now);
        }
        if let Some(port) = effects.unclaimed {
            self.surprise(format_args!(
                "the guest used port {:#x}, which no device has: {:?}",
                port.port, port.direction
            ));
        }
        if let Some(end) = effects.end {
            self.end(End::Exit(match end {
                GuestEnd::PowerOff => GuestExit::PowerOff,
                GuestEnd::Reset => GuestExit::Reset,
                GuestEnd::Exit { status } => GuestExit::DebugExit { value: status >> 1 },
            }));
        }
        effects.flush
    }

    /// The guest has gone to sleep, or wakes, or both.
    #[cold]
    fn settle_power(&self, suspended: bool, resumed: bool) {
        for (vcpu, reach) in self.vcpus.iter().enumerate().filter(|_| suspended) {
            if reach.lapic.post_power_loss() {
                self.wake(vcpu);
            }
        }
        if resumed && self.vcpus[0].lapic.post_resume() {
            self.wake(0);
        }
    }

    fn settle_output(&self, ports: &mut Ports, now: u64) {
        if !self.silent && control::console_room() < CONSOLE_PIECE {
            // It is not the guest that is silent: nobody takes what it has said already.
            self.last_output.store(now, Ordering::Relaxed);
            return;
        }
        let mut output = core::mem::take(&mut ports.output);
        ports.platform.console_take(now, &mut output);
        if self.silent {
            output.clear();
            ports.output = output;
            return;
        }
        // Taking output changes the transmitter's state, whose interrupt is settled with the next access.
        if ports.marker.feed(&output) {
            self.ready.store(now + 1, Ordering::Relaxed);
            control::send(&ToCommand::GuestReady { guest_ns: now });
        }
        control::console_write(&output);
        ports.note_line(&output);
        output.clear();
        ports.output = output;
        self.last_output.store(now, Ordering::Relaxed);
    }

    /// Whether an interrupt controller's request waits for vCPU 0.
    #[inline]
    #[must_use]
    pub fn line(&self) -> bool {
        self.line.load(Ordering::SeqCst)
    }

    /// When vCPU 0 is to poll the port devices.
    #[inline]
    #[must_use]
    pub fn ports_due(&self) -> u64 {
        self.ports_due.load(Ordering::SeqCst)
    }

    /// When the console last printed something.
    #[must_use]
    pub fn last_output(&self) -> u64 {
        self.last_output.load(Ordering::Relaxed)
    }

    /// When the ready marker was seen.
    #[must_use]
    pub fn ready(&self) -> Option<u64> {
        self.ready.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Makes the vCPUs do what `phase` says.
    pub(super) fn set_phase(&self, phase: Phase) {
        self.pause.set_phase(phase);
        (0..self.vcpus.len()).for_each(|vcpu| self.wake(vcpu));
    }

    /// Lets no time pass in the port devices any more, and nobody type. While the vCPUs are held.
    pub(super) fn freeze_ports(&self) {
        self.ports.lock().frozen = true;
    }

    /// A copy of the port devices, and of the console's last line if it has not ended.
    pub(super) fn ports_state(&self) -> (Platform, Vec<u8>) {
        let ports = self.ports.lock();
        (ports.platform.clone(), ports.line.clone())
    }

    /// Ends that.
    pub(super) fn thaw_ports(&self) {
        self.ports.lock().frozen = false;
    }

    /// Goes on with a console whose last line was `line`, and which had been ready at `ready`. Before the guest runs.
    pub(super) fn resume_console(&self, line: &[u8], ready: Option<u64>) {
        control::console_write(line);
        let mut ports = self.ports.lock();
        ports.note_line(line);
        if let Some(ready) = ready {
            ports.marker = Marker::new("");
            self.ready.store(ready + 1, Ordering::Relaxed);
        }
        self.last_output.store(self.clock.now().ns, Ordering::Relaxed);
    }

    /// Waits until the tables are left alone: a storm and a copy end with the VM. By a CPU that runs no guest any more.
    pub(super) fn wait_for_workers(&self) {
        self.storm.wait_for_end();
        while self.copying.load(Ordering::SeqCst) {
            core::hint::spin_loop();
        }
    }

    /// Whether the VM is ending.
    #[inline]
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Ends the VM. The first cause counts.
    pub fn end(&self, end: End) {
        self.end.lock().get_or_insert(end);
        self.stopping.store(true, Ordering::SeqCst);
        self.wake_all();
        embedder::kick_housekeeper();
    }

    /// Where the vCPUs are.
    pub fn places(&self) -> Vec<Place> {
        let place = |reach: &Arc<Reach>| match reach.place.load(Ordering::SeqCst) {
            0 => Place::Host,
            1 => Place::Guest,
            _ => Place::Halted,
        };
        self.vcpus.iter().map(place).collect()
    }

    /// Makes every vCPU look for work.
    pub fn wake_all(&self) {
        (0..self.vcpus.len()).for_each(|vcpu| self.wake(vcpu));
    }

    /// Why it ended.
    #[must_use]
    pub fn cause(&self) -> Option<End> {
        self.end.lock().clone()
    }

    /// Tells something unusual, so often and no more.
    pub fn surprise(&self, text: core::fmt::Arguments<'_>) {
        if !self.silent && self.surprises.fetch_add(1, Ordering::Relaxed) < TOLD {
            log::info!("{text}");
        }
    }
}

/// The most that the UART holds, and so the most that is moved at once.
pub const CONSOLE_PIECE: usize = 4096;
