//! What a VM's vCPUs and its housekeeper share.
//!
//! **Reaching a vCPU.** Whoever has something for a vCPU makes it visible first (a posted vector, the interrupt line, the
//! end) and then calls [`Shared::wake`], which sends an IPI if that vCPU has said that it is in the guest or halted. The
//! vCPU says so first and looks for work second. All four operations are sequentially consistent, so either the vCPU sees
//! the work, or the other side sees where the vCPU is. The IPI itself is never lost: interrupts are off between the
//! look and guest entry or HLT, so it stays pending and ends either at once.
//!
//! **The port devices** are behind one lock. Console output leaves them in pieces, as far as the queue of
//! [`crate::control`] has room; what has no room stays in the UART, whose transmitter then looks busy to the guest. So no
//! vCPU ever waits for the console while it holds the lock.
//!
//! **The end** is decided once: the first cause counts, and then every vCPU is made to leave.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use nestling::{GfnRange, Gpa, Mmu, Worker};
use nestling_control::message::{DeathReason, GuestExit, ToCommand};
use spin::Mutex;

use super::marker::Marker;
use super::meter::Meter;
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
}

/// The port devices and what belongs to their output.
#[derive(Debug)]
pub struct Ports {
    /// The devices.
    pub platform: Platform,
    output: Vec<u8>,
    marker: Marker,
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
    /// Its vCPUs, by number.
    pub vcpus: Box<[Reach]>,
    /// Where nothing answers, the bus floats; else such an access ends the guest.
    pub floating: bool,
    /// What is fired at it.
    pub storm: Storm,
    /// What it prints is thrown away, and nothing is said of what it does.
    pub silent: bool,
    /// For a guest that measures.
    pub meter: Option<Mutex<Meter>>,
    /// Forgets mappings on the guest's demand.
    forgetter: Mutex<Worker<Machine>>,
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
        let reach = |id: u32| Reach { place: AtomicU8::new(Place::Host as u8), lapic: LapicShared::new(id) };
        Self {
            mmu,
            clock,
            vcpus: (0..vcpus as u32).map(reach).collect(),
            floating: platform.has_board(),
            storm: Storm::default(),
            silent: false,
            meter: None,
            forgetter: Mutex::new(forgetter),
            ports: Mutex::new(Ports { platform, output: Vec::new(), marker: Marker::new(marker) }),
            line: AtomicBool::new(false),
            ports_due: AtomicU64::new(u64::MAX),
            last_output: AtomicU64::new(0),
            ready: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            end: Mutex::new(None),
            surprises: AtomicUsize::new(0),
        }
    }

    /// Makes a vCPU look for work, if it is where it would not look by itself.
    #[inline]
    pub fn wake(&self, vcpu: usize) {
        if self.vcpus[vcpu].place.load(Ordering::SeqCst) != Place::Host as u8 {
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

    /// Uses the port devices, then carries what they did to where it belongs. `vcpu` is who asks, if a vCPU does.
    #[inline]
    pub fn with_ports<R>(&self, vcpu: Option<usize>, work: impl FnOnce(&mut Platform, u64) -> R) -> R {
        let now = self.clock.now().ns;
        let mut ports = self.ports.lock();
        let result = work(&mut ports.platform, now);
        let forget = self.settle(&mut ports, vcpu, now);
        // A zap waits for vCPUs to leave the guest, and must not do so while they may wait for the ports.
        drop(ports);
        if let Some(gpa) = forget {
            self.forget(gpa);
        }
        result
    }

    /// As [`Shared::with_ports`] if nobody else is using them.
    pub fn try_with_ports(&self, work: impl FnOnce(&mut Platform, u64)) -> bool {
        let now = self.clock.now().ns;
        let Some(mut ports) = self.ports.try_lock() else { return false };
        work(&mut ports.platform, now);
        // Only a vCPU's access can ask for a page to be forgotten.
        let _ = self.settle(&mut ports, None, now);
        true
    }

    #[inline]
    fn settle(&self, ports: &mut Ports, vcpu: Option<usize>, now: u64) -> Option<u64> {
        let effects = ports.platform.take_effects();
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
        if wake_first && vcpu != Some(0) {
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

    fn settle_output(&self, ports: &mut Ports, now: u64) {
        if !self.silent && control::console_room() < CONSOLE_PIECE {
            return;
        }
        let Ports { platform, output, marker } = ports;
        platform.console_take(now, output);
        if self.silent {
            output.clear();
            return;
        }
        // Taking output changes the transmitter's state, whose interrupt is settled with the next access.
        if marker.feed(output) {
            self.ready.store(now + 1, Ordering::Relaxed);
            control::send(&ToCommand::GuestReady { guest_ns: now });
        }
        control::console_write(output);
        output.clear();
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
