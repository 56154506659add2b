//! All port devices of one VM and the wires between them.
//!
//! Protocol. One `Platform` a VM, behind the caller's lock. Each entry point first brings the devices up to the time it is
//! given, then does its work, then settles the wires (timer → IRQ 0, UART → IRQ 4, clock → IRQ 8, ACPI → IRQ 9,
//! controllers → CPU). An access to the serial port, which knows no time, moves no wire but its own: the others are left
//! alone then, unless one of them is due. What
//! the caller must act on accumulates in [`Effects`]; take them, still under the lock, after each call:
//!
//! * `interrupt_changed`: the level that the bootstrap vCPU sees on LINT0 has changed. If that vCPU is another one than the
//!   caller's, it must be kicked. It then looks at [`Platform::interrupt_asserted`] and, when it can take the interrupt,
//!   calls [`Platform::interrupt_acknowledge`]. The request may have gone by then; the answer is then a spurious vector,
//!   which is delivered like any other.
//! * `end`: the guest has ended. Later accesses behave as before; the first end counts.
//! * `console_output`: there is something for [`Platform::console_take`]. Not taking it stops the guest's console but
//!   loses nothing.
//!
//! * `suspended`, `resumed`: the guest has gone to sleep (ACPI S3), or wakes. What is not memory, clock or ACPI has lost its
//!   power then, and so are the vCPUs to: all of them at the one, of which none runs until the other.
//! * `messages`: the I/O APIC has something for the local APICs, which [`Platform::take_message`] gives.
//! * `flush`: the mapping of a guest page is to be forgotten.
//!
//! A machine for test kernels has a [`Board`] in addition, with an I/O APIC whose inputs get the same lines as the 8259s
//! (the timer's at input 2, as on every PC), and three windows of memory.
//!
//! Whoever keeps time for the VM calls [`Platform::poll`] no later than [`Platform::next_deadline_ns`], which may have
//! moved after any call.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::board::{self, Board, BoardConfig, BoardEffect};
use super::cmos::Cmos;
use super::debug_exit;
use super::ioapic::Message;
use super::pic::PicPair;
use super::pit::Pit;
use super::pm::{Pm, PmRequest};
use super::ports::{COM1, Claim, Direction, UnclaimedPort, UnclaimedPorts, decode};
use super::reset::{RESET_CONTROL, ResetPorts};
use super::saved::{BadState, LATEST_NS, require};
use super::uart::Uart;
use super::{Width, pm};

const IRQ_TIMER: u8 = 0;
/// The I/O APIC's input for the timer's line; the MADT says so.
pub const TIMER_INPUT: u8 = 2;
const IRQ_COM1: u8 = 4;
const IRQ_CLOCK: u8 = 8;
/// The system control interrupt, as the FADT names it.
pub const IRQ_SCI: u8 = 9;

/// What a VM's port devices are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformConfig {
    /// What the clock shows when the VM starts: Unix seconds, UTC.
    pub wall_clock_s: u64,
    /// Most bytes of console output that are kept for the caller.
    pub console_output: usize,
    /// Most bytes of console input that are kept for the guest.
    pub console_input: usize,
    /// What a machine for test kernels has in addition.
    pub board: Option<BoardConfig>,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self { wall_clock_s: 0, console_output: 4096, console_input: 1024, board: None }
    }
}

/// How the guest ended by its own doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// ACPI soft-off.
    PowerOff,
    /// A reset, by any of the ports that can.
    Reset,
    /// A write to the test exit port.
    Exit {
        /// The machine's exit status, `value << 1 | 1`.
        status: u32,
    },
}

/// What the caller of a [`Platform`] must act on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Effects {
    /// The interrupt line to the bootstrap vCPU has changed.
    pub interrupt_changed: bool,
    /// The guest has sent something to the console.
    pub console_output: bool,
    /// The guest has ended.
    pub end: Option<GuestEnd>,
    /// A port that nobody claims was used for the first time.
    pub unclaimed: Option<UnclaimedPort>,
    /// The I/O APIC has messages.
    pub messages: bool,
    /// Guest-physical address of a page whose mapping the host is to forget.
    pub flush: Option<u64>,
    /// The machine has gone to sleep.
    pub suspended: bool,
    /// It wakes.
    pub resumed: bool,
}

/// The port devices of one VM. Serialised, it is their saved state (see [`super::saved`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Platform {
    pic: PicPair,
    pit: Pit,
    cmos: Cmos,
    uart: Uart,
    pm: Pm,
    reset: ResetPorts,
    board: Option<Board>,
    /// What was told of is told of again: a log is no state.
    #[serde(skip)]
    unclaimed: UnclaimedPorts,
    now_ns: u64,
    interrupt: bool,
    /// Suspended to RAM.
    asleep: bool,
    /// What the serial port, the clock and ACPI last said to their lines.
    wires: [bool; 3],
    /// Before this time no device does anything by itself. Known when all were looked at last; 0: not known.
    #[serde(skip)]
    calm_until_ns: u64,
    /// Effects or the deadline may be others than at the last [`Platform::take_news`].
    #[serde(skip)]
    news: bool,
    /// Taken before a state is saved.
    #[serde(skip)]
    effects: Effects,
}

impl Platform {
    /// The devices after power-on; with a board, as firmware hands them over: kernels that go back to real mode lean on what
    /// a PC's has left (see [`crate::guest::firmware`]).
    pub fn new(config: PlatformConfig) -> Self {
        let by_firmware = config.board.is_some();
        Self {
            pic: if by_firmware { PicPair::handed_over() } else { PicPair::new() },
            pit: if by_firmware { Pit::handed_over() } else { Pit::new() },
            cmos: Cmos::new(config.wall_clock_s),
            uart: Uart::new(config.console_output, config.console_input),
            pm: Pm::new(),
            reset: ResetPorts::new(),
            board: config.board.map(Board::new),
            unclaimed: UnclaimedPorts::default(),
            now_ns: 0,
            interrupt: false,
            asleep: false,
            wires: [false; 3],
            calm_until_ns: 0,
            news: true,
            effects: Effects::default(),
        }
    }

    /// Makes a restored platform one that can be used, or refuses it. `config` is what it would have been made with;
    /// `now_ns` is the VM's time; `away_s` says how many seconds went by outside since it was saved, which the date goes on
    /// with.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&mut self, config: PlatformConfig, now_ns: u64, away_s: u64) -> Result<(), BadState> {
        self.pic.check()?;
        self.pit.check()?;
        self.cmos.check()?;
        self.uart.check(config.console_output, config.console_input)?;
        self.pm.check()?;
        match (&self.board, config.board) {
            (Some(board), Some(config)) => board.check(config)?,
            (None, None) => {}
            _ => return Err(BadState { device: "machine", what: "board" }),
        }
        require("machine", "time", self.now_ns <= now_ns && now_ns <= LATEST_NS)?;
        self.cmos.catch_up(away_s);
        // Whatever has become of them, the caller looks at all wires.
        self.settle();
        self.effects.interrupt_changed = true;
        Ok(())
    }

    /// The guest executes IN: the value, zero-extended.
    pub fn io_read(&mut self, now_ns: u64, port: u16, width: Width) -> u32 {
        if let Some(register) = self.serial(now_ns, port, width) {
            let value = self.uart.read(register);
            self.settle_serial();
            return u32::from(value);
        }
        self.advance(now_ns);
        if let (Some(board), Some(claim)) = (&mut self.board, board::decode(port, width)) {
            let value = board.input(claim, width);
            self.settle();
            return value;
        }
        let value = match decode(port) {
            Some(Claim::Pm(offset)) => self.pm.read(self.now_ns, offset, width),
            // The reset register shares its ports with a PCI host bridge's address register, whose accesses are wider.
            Some(Claim::Reset) if port == RESET_CONTROL && width != Width::Byte => self.unclaimed_read(port, width),
            Some(_) => (0..width.bytes())
                .fold(0, |value, lane| value | u32::from(self.read_byte(port.wrapping_add(lane))) << (8 * lane)),
            None => match self.board.as_ref().and_then(|board| board.bar_input(port, width)) {
                Some(value) => value,
                None => self.unclaimed_read(port, width),
            },
        };
        self.settle();
        value
    }

    /// The guest executes OUT. Bits of `value` beyond `width` are ignored.
    pub fn io_write(&mut self, now_ns: u64, port: u16, width: Width, value: u32) {
        if let Some(register) = self.serial(now_ns, port, width) {
            self.uart.write(register, value as u8);
            return self.settle_serial();
        }
        self.advance(now_ns);
        let value = value & width.mask();
        if let (Some(board), Some(claim)) = (&mut self.board, board::decode(port, width)) {
            let effect = board.output(claim, width, value);
            self.carry_out(effect);
            return self.settle();
        }
        match decode(port) {
            Some(Claim::Pm(offset)) => {
                let request = self.pm.write(self.now_ns, offset, width, value);
                self.go_to(request);
            }
            Some(Claim::DebugExit) => self.end(GuestEnd::Exit { status: debug_exit::exit_status(value) }),
            Some(Claim::Reset) if port == RESET_CONTROL && width != Width::Byte => {
                self.note_unclaimed(port, Direction::Write);
            }
            Some(_) => {
                for lane in 0..width.bytes() {
                    self.write_byte(port.wrapping_add(lane), (value >> (8 * lane)) as u8);
                }
            }
            None => {
                if !self.board.as_mut().is_some_and(|board| board.bar_output(port, width, value)) {
                    self.note_unclaimed(port, Direction::Write);
                }
            }
        }
        self.settle();
    }

    /// Whether this is a machine for test kernels.
    pub fn has_board(&self) -> bool {
        self.board.is_some()
    }

    /// The guest reads device memory; `None` where no device is. `bytes` is 1, 2, 4 or 8.
    pub fn memory_read(&mut self, now_ns: u64, gpa: u64, bytes: usize) -> Option<u64> {
        // Reading changes nothing, so only time can have.
        if now_ns >= self.calm_until_ns {
            self.poll(now_ns);
        }
        self.board.as_ref()?.read(gpa, bytes)
    }

    /// The guest writes device memory; `false` where no device is.
    pub fn memory_write(&mut self, now_ns: u64, gpa: u64, bytes: usize, value: u64) -> bool {
        self.advance(now_ns);
        let written = self.board.as_mut().is_some_and(|board| board.write(gpa, bytes, value));
        self.settle();
        written
    }

    /// The guest replaces `old` in device memory; `None` where there are only registers, or nothing.
    pub fn memory_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Option<bool> {
        self.board.as_mut()?.compare_exchange(gpa, bytes, old, new)
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        if let Some(board) = &mut self.board {
            board.ioapic.end_of_interrupt(vector);
        }
        self.settle();
    }

    /// What the I/O APIC sends next.
    pub fn take_message(&mut self) -> Option<Message> {
        self.board.as_mut()?.ioapic.take_message()
    }

    /// Lets time pass.
    pub fn poll(&mut self, now_ns: u64) {
        self.advance(now_ns);
        self.settle();
    }

    /// When [`Self::poll`] is due next, in VM nanoseconds. `None`: nothing will happen by itself.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        // An edge of a masked timer need not wake anybody: it is caught up with when the mask is written, because every
        // access polls first. Guests that time with the local APIC leave the timer running behind its mask.
        let masked = self.pic.is_masked(IRQ_TIMER)
            && self.board.as_ref().is_none_or(|board| board.ioapic.is_masked(TIMER_INPUT));
        let timer = if masked { None } else { self.pit.next_edge_ns() };
        [timer, self.cmos.next_deadline_ns(), self.pm.next_deadline_ns()].into_iter().flatten().min()
    }

    /// The level of the interrupt line to the bootstrap vCPU's LINT0.
    pub fn interrupt_asserted(&self) -> bool {
        self.interrupt
    }

    /// The bootstrap vCPU acknowledges the interrupt: its vector. To be called only when the vector will be delivered.
    pub fn interrupt_acknowledge(&mut self) -> u8 {
        let vector = self.pic.acknowledge();
        self.settle();
        vector
    }

    /// Types `bytes` at the console; returns how many fitted.
    pub fn console_push(&mut self, now_ns: u64, bytes: &[u8]) -> usize {
        self.advance(now_ns);
        let accepted = self.uart.push_input(bytes);
        self.settle();
        accepted
    }

    /// Moves what the guest has sent to the console to the end of `into`.
    pub fn console_take(&mut self, now_ns: u64, into: &mut Vec<u8>) {
        self.advance(now_ns);
        self.uart.take_output(into);
        self.settle();
    }

    /// The operator asks the guest to shut down (ACPI power button).
    pub fn press_power_button(&mut self, now_ns: u64) {
        self.advance(now_ns);
        self.pm.press_power_button();
        self.settle();
    }

    /// Whether [`Self::take_effects`] or [`Self::next_deadline_ns`] may have something new to say since this was last asked.
    pub fn take_news(&mut self) -> bool {
        core::mem::take(&mut self.news)
    }

    /// What has happened since this was last asked.
    pub fn take_effects(&mut self) -> Effects {
        core::mem::take(&mut self.effects)
    }

    /// The ports that nobody claims.
    pub fn unclaimed(&self) -> &UnclaimedPorts {
        &self.unclaimed
    }

    /// The register of the serial port that an access is for, if it is for nothing else and no device is due. On a machine
    /// with a board as well: the board has no port there.
    #[inline]
    fn serial(&self, now_ns: u64, port: u16, width: Width) -> Option<u8> {
        let register = port.wrapping_sub(COM1);
        (register < 8 && width == Width::Byte && now_ns < self.calm_until_ns).then_some(register as u8)
    }

    /// Carries the serial port's level along its wire.
    #[inline]
    fn settle_serial(&mut self) {
        if self.uart.interrupt() != self.wires[0] || self.uart.has_output() {
            self.settle();
        }
    }

    /// Time never goes back: vCPUs read the clock before they take the lock, so two of them may arrive in the wrong order.
    fn advance(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        self.pm.poll(self.now_ns);
        self.cmos.poll(self.now_ns);
        if self.pit.take_edge(self.now_ns) {
            self.set_line(IRQ_TIMER, false);
            self.set_line(IRQ_TIMER, true);
        }
        // Whoever comes this way may change what time brings.
        self.calm_until_ns = 0;
    }

    /// A line takes a level, at both kinds of interrupt controller.
    fn set_line(&mut self, line: u8, high: bool) {
        if line < 16 {
            self.pic.set_irq(line, high);
        }
        if let Some(board) = &mut self.board {
            board.ioapic.set_line(if line == IRQ_TIMER { TIMER_INPUT } else { line }, high);
        }
    }

    fn carry_out(&mut self, effect: BoardEffect) {
        match effect {
            BoardEffect::None => {}
            BoardEffect::Line { line, high } => {
                // Lines of a PC are shared by a wired OR; here the device that spoke last wins, as in QEMU.
                self.set_line(line, high);
            }
            BoardEffect::Flush(gpa) => self.effects.flush = Some(gpa),
            BoardEffect::PowerOff => self.end(GuestEnd::PowerOff),
        }
    }

    /// Carries out what was asked of the power management.
    fn go_to(&mut self, request: PmRequest) {
        match request {
            PmRequest::None => {}
            PmRequest::PowerOff => self.end(GuestEnd::PowerOff),
            PmRequest::Suspend => self.suspend(),
        }
    }

    /// Suspend to RAM, where the tables offer it: on a machine with a board.
    fn suspend(&mut self) {
        let Some(board) = &mut self.board else { return };
        if self.asleep {
            return;
        }
        self.asleep = true;
        self.effects.suspended = true;
        board.power_cycle();
        (self.pic, self.pit, self.reset) = (PicPair::new(), Pit::new(), ResetPorts::new());
        self.uart.power_cycle();
        // Whatever is high finds its way to the new controllers.
        self.wires = [false; 3];
    }

    /// Carries every level along its wire.
    fn settle(&mut self) {
        if self.asleep && self.pm.wakes(self.cmos.alarm()) {
            self.pm.wake(self.cmos.alarm());
            self.asleep = false;
            self.effects.resumed = true;
        }
        let levels = [(IRQ_COM1, self.uart.interrupt()), (IRQ_CLOCK, self.cmos.interrupt()), (IRQ_SCI, self.pm.sci())];
        for (wire, (line, high)) in levels.into_iter().enumerate() {
            // Only a device's own change moves its line: the test device may be pulling at it.
            if core::mem::replace(&mut self.wires[wire], high) != high {
                self.set_line(line, high);
            }
        }
        self.effects.messages |= self.board.as_ref().is_some_and(|board| board.ioapic.has_message());
        self.effects.console_output |= self.uart.has_output();
        let interrupt = self.pic.output();
        self.effects.interrupt_changed |= interrupt != self.interrupt;
        self.interrupt = interrupt;
        self.news = true;
        // The timer's edges count also where they are masked: the controllers latch them.
        let by_themselves = [self.pit.next_edge_ns(), self.cmos.next_deadline_ns(), self.pm.next_deadline_ns()];
        self.calm_until_ns = by_themselves.into_iter().flatten().min().unwrap_or(u64::MAX);
    }

    fn end(&mut self, end: GuestEnd) {
        self.effects.end.get_or_insert(end);
    }

    fn note_unclaimed(&mut self, port: u16, direction: Direction) {
        let first = self.unclaimed.note(port, direction);
        self.effects.unclaimed = self.effects.unclaimed.or(first);
    }

    fn unclaimed_read(&mut self, port: u16, width: Width) -> u32 {
        self.note_unclaimed(port, Direction::Read);
        width.mask()
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        let now_ns = self.now_ns;
        let Some(claim) = decode(port) else {
            return self.unclaimed_read(port, Width::Byte) as u8;
        };
        match claim {
            Claim::Pic(chip, register) => self.pic.read(chip, register),
            Claim::PitChannel(channel) => self.pit.read_channel(now_ns, channel),
            Claim::Speaker => self.pit.read_speaker(now_ns),
            Claim::CmosData => self.cmos.read(now_ns),
            Claim::Uart(offset) => self.uart.read(offset),
            Claim::Pm(offset) => self.pm.read(now_ns, offset, Width::Byte) as u8,
            Claim::Reset => self.reset.read(port),
            // Write-only registers float.
            Claim::PitControl | Claim::CmosIndex => 0xff,
            Claim::DebugExit | Claim::Quiet => 0,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        let now_ns = self.now_ns;
        let Some(claim) = decode(port) else {
            return self.note_unclaimed(port, Direction::Write);
        };
        match claim {
            Claim::Pic(chip, register) => self.pic.write(chip, register, value),
            Claim::PitChannel(channel) => {
                self.pit.write_channel(now_ns, channel, value);
                self.settle_timer(channel);
            }
            Claim::PitControl => {
                self.pit.write_control(now_ns, value);
                self.settle_timer(usize::from(value >> 6));
            }
            Claim::Speaker => self.pit.write_speaker(now_ns, value),
            Claim::CmosIndex => self.cmos.select(value),
            Claim::CmosData => self.cmos.write(now_ns, value),
            Claim::Uart(offset) => self.uart.write(offset, value),
            Claim::Pm(offset) => {
                let request = self.pm.write(now_ns, offset, Width::Byte, u32::from(value));
                self.go_to(request);
            }
            Claim::Reset => {
                if self.reset.write(port, value) {
                    self.end(GuestEnd::Reset);
                }
            }
            Claim::DebugExit | Claim::Quiet => {}
        }
    }

    /// Programming channel 0 takes back a request whose output has fallen, so that a stale tick doesn't outlive it.
    fn settle_timer(&mut self, channel: usize) {
        if channel == 0 && !self.pit.output(self.now_ns) {
            self.set_line(IRQ_TIMER, false);
        }
    }
}

const _: () = assert!(pm::PM_CONTROL + 2 <= pm::PM_TIMER);

#[cfg(test)]
mod tests;
