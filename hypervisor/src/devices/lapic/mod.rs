//! The local APIC of one vCPU, in xAPIC and x2APIC mode (AMD APM vol. 2, 16.3 to 16.16).
//!
//! Two halves, after who may touch them:
//!
//! * [`Lapic`] holds the registers and belongs to the thread that runs the vCPU. It has no locks.
//! * [`LapicShared`] is what other CPUs may do to it: post a vector, an NMI, an INIT or a start-up IPI. It is all atomics.
//!
//! Sending. A write to ICR returns an [`IpiCommand`]; [`route`] says which vCPUs it means; the caller posts it to each
//! one's `LapicShared` and then kicks that vCPU. The order matters: post, then kick.
//!
//! Receiving. Before each entry into the guest the vCPU's thread calls [`Lapic::sync`], which moves what was posted into
//! IRR and returns the events that are not vectors. It must look at [`LapicShared::has_pending`] once more after it has
//! announced that it is in guest mode: a sender that posted before it could see the announcement sends no kick, and both
//! sides use sequentially consistent operations, so one of the two always sees the other.
//!
//! Delivering. [`Lapic::deliverable`] names the vector that the processor priority lets through;
//! [`Lapic::acknowledge`] moves it from IRR to ISR and must be called exactly when the injection is committed.
//!
//! **Two modes.** x2APIC mode's MSRs are here; the memory window of xAPIC mode is in `window`, over the same state. How
//! an APIC is addressed logically depends on its mode and, in xAPIC mode, on what its guest writes: [`Lapic::publish`] tells
//! [`LapicShared`], where [`route`] finds it. It may be a moment late for a sender on another CPU, as on a bus.
//!
//! **Level-triggered** vectors come from an I/O APIC ([`LapicShared::post_level`]) and are remembered in TMR. When one is
//! ended, [`Lapic::take_ended`] names it, and whoever owns the I/O APIC tells it.

use serde::{Deserialize, Serialize};

mod ipi;
mod shared;
mod timer;
mod window;

pub use ipi::{Addressing, Destination, IpiCommand, IpiKind, MAX_VCPUS, VcpuSet, logical_id, route};
pub use shared::{LapicShared, Pending};
pub use window::APIC_WINDOW_BYTES;

use super::saved::{BadState, require};
use super::{Gp, Now};
use timer::{Timer, TimerMode};

/// First MSR of the x2APIC range.
pub const X2APIC_FIRST: u32 = 0x800;
/// Last MSR of the x2APIC range.
pub const X2APIC_LAST: u32 = 0x8ff;
/// Address of the window after reset.
pub const APIC_DEFAULT_BASE: u64 = 0xfee0_0000;

/// Bits of APIC_BASE that hold the window's address: what 40 physical address bits leave, which every SVM CPU has.
const APIC_BASE_ADDRESS: u64 = 0xff_ffff_f000;
const APIC_BASE_BSP: u64 = 1 << 8;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ENABLE: u64 = 1 << 11;

const ID: u32 = 0x802;
const VERSION: u32 = 0x803;
const TPR: u32 = 0x808;
const PPR: u32 = 0x80a;
const EOI: u32 = 0x80b;
const LDR: u32 = 0x80d;
const SVR: u32 = 0x80f;
const ISR: u32 = 0x810;
const TMR: u32 = 0x818;
const IRR: u32 = 0x820;
const ESR: u32 = 0x828;
const ICR: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const LVT_LINT0: u32 = 0x835;
const LVT_ERROR: u32 = 0x837;
const TIMER_INITIAL: u32 = 0x838;
const TIMER_CURRENT: u32 = 0x839;
const TIMER_DIVIDE: u32 = 0x83e;
const SELF_IPI: u32 = 0x83f;

/// Version 0x14, six LVT entries.
const VERSION_VALUE: u64 = 0x0005_0014;
const SVR_ENABLE: u32 = 1 << 8;
/// Vector, enable and focus checking.
const SVR_VALID: u32 = 0x3ff;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE_MASK: u32 = 7 << 8;
const LVT_MODE_NMI: u32 = 4 << 8;
const LVT_MODE_EXTINT: u32 = 7 << 8;

const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_REGISTER_ILLEGAL: u32 = 1 << 7;

/// Vectors below this are exceptions and can't be delivered as interrupts.
const FIRST_VECTOR: u8 = 16;

/// Writable bits of the entries from LVT_TIMER to LVT_ERROR.
const LVT_VALID: [u32; 6] = [
    0x0007_00ff, // timer: vector, mask, mode
    0x0001_07ff, // thermal: vector, delivery mode, mask
    0x0001_07ff, // performance counters
    0x0001_a7ff, // LINT0: also polarity and trigger mode
    0x0001_a7ff, // LINT1
    0x0001_07ff, // error
];

/// Delivery status and remote IRR: read as 0, and what is written to them has no effect.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

/// What a write did beyond the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LapicEffect {
    /// Nothing.
    None,
    /// What can be delivered may have changed.
    Interrupts,
    /// The next deadline may have changed, and with it what can be delivered.
    Timer,
    /// An interprocessor interrupt is to be sent.
    Ipi(IpiCommand),
}

/// What a local APIC is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicConfig {
    /// Its ID.
    pub apic_id: u32,
    /// Whether it belongs to the bootstrap vCPU, whose LINT0 the interrupt controllers drive.
    pub bootstrap: bool,
    /// Rate of the guest's TSC in kHz, for TSC deadlines. At least 1.
    pub tsc_khz: u64,
}

/// The local APIC of a vCPU; belongs to the thread that runs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lapic {
    id: u32,
    bootstrap: bool,
    base: u64,
    tpr: u8,
    svr: u32,
    irr: Vectors,
    isr: Vectors,
    /// Of the vectors requested or in service, those that are level-triggered.
    tmr: Vectors,
    /// A level-triggered vector that was ended.
    ended: Option<u8>,
    /// Logical destination and destination format, in xAPIC mode.
    ldr: u32,
    dfr: u32,
    /// How the APIC is addressed has changed.
    announce: bool,
    /// What the guest reads.
    esr: u32,
    /// What has gone wrong since the guest last wrote ESR.
    errors: u32,
    icr: u64,
    lvt: [u32; 6],
    /// Disabling by software has masked a LINT0 that was in virtual wire mode.
    wire_held: bool,
    timer: Timer,
}

impl Lapic {
    /// The APIC as firmware hands it over, but in x2APIC mode: on the bootstrap vCPU, enabled in virtual wire mode (LINT0
    /// takes the interrupt controllers' requests, LINT1 is NMI).
    pub fn new(config: LapicConfig) -> Self {
        let bsp = if config.bootstrap { APIC_BASE_BSP } else { 0 };
        let mut lapic = Self {
            id: config.apic_id,
            bootstrap: config.bootstrap,
            base: APIC_DEFAULT_BASE | APIC_BASE_ENABLE | APIC_BASE_X2APIC | bsp,
            tpr: 0,
            svr: 0,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            ended: None,
            ldr: 0,
            dfr: u32::MAX,
            announce: true,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; 6],
            wire_held: false,
            timer: Timer::new(config.tsc_khz),
        };
        lapic.init();
        if config.bootstrap {
            lapic.svr |= SVR_ENABLE;
            lapic.lvt[lvt_index(LVT_LINT0)] = LVT_MODE_EXTINT;
            lapic.lvt[lvt_index(LVT_LINT0) + 1] = LVT_MODE_NMI;
        }
        lapic
    }

    /// Refuses what no APIC made so was ever in. One that passes has still to be published.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&mut self, config: LapicConfig) -> Result<(), BadState> {
        let same = (self.id, self.bootstrap) == (config.apic_id, config.bootstrap);
        require("local APIC", "ID", same)?;
        let mode = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
        let base = self.base & !(mode | APIC_BASE_BSP | APIC_BASE_ADDRESS) == 0 && self.base & mode != APIC_BASE_X2APIC;
        require("local APIC", "base", base)?;
        require("local APIC", "spurious vector", self.svr & !SVR_VALID == 0)?;
        let lvt = self.lvt.iter().zip(LVT_VALID).all(|(entry, valid)| entry & !valid == 0);
        require("local APIC", "vector table", lvt)?;
        let below = (1 << FIRST_VECTOR) - 1;
        require("local APIC", "vectors", (self.irr.0[0] | self.isr.0[0]) & below == 0)?;
        self.timer.check(config.tsc_khz)?;
        self.announce = true;
        Ok(())
    }

    /// INIT: all registers to their reset values, except the ID and APIC_BASE (APM vol. 2, 16.3.5 and table 14-1).
    pub fn init(&mut self) {
        self.tpr = 0;
        self.svr = 0xff;
        self.irr = Vectors::default();
        self.isr = Vectors::default();
        self.tmr = Vectors::default();
        self.ended = None;
        (self.ldr, self.dfr, self.announce) = (0, u32::MAX, true);
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        self.wire_held = false;
        self.timer.reset();
    }

    /// The APIC's ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Takes in what other CPUs have posted, and returns what is not a vector.
    pub fn sync(&mut self, shared: &LapicShared) -> Pending {
        self.publish(shared);
        shared.drain(|vector, level| self.accept_enabled(vector, level))
    }

    /// Tells senders how this APIC is addressed, if that has changed. After each write to its registers.
    #[inline]
    pub fn publish(&mut self, shared: &LapicShared) {
        if core::mem::take(&mut self.announce) {
            shared.set_addressing(self.addressing());
        }
    }

    /// Whether it is enabled in APIC_BASE: CPUID says so too.
    pub fn is_enabled(&self) -> bool {
        self.base & APIC_BASE_ENABLE != 0
    }

    /// The level-triggered vector that the guest has ended since this was last asked.
    #[inline]
    pub fn take_ended(&mut self) -> Option<u8> {
        self.ended.take()
    }

    /// Lets time pass: a timer that is due requests its vector.
    pub fn poll(&mut self, now: Now) {
        if self.timer.expire(now, self.timer_mode()) {
            self.raise_lvt(LVT_TIMER);
        }
    }

    /// When [`Self::poll`] is due next, in VM nanoseconds; `None` while the timer could not interrupt anyway.
    pub fn next_deadline_ns(&self, now: Now) -> Option<u64> {
        let masked = self.lvt[0] & LVT_MASKED != 0 || !self.accepts_vectors();
        if masked { None } else { self.timer.deadline_ns(now, self.timer_mode()) }
    }

    /// The requested vector that is above the processor priority, if there is one.
    pub fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| self.accepts_vectors() && vector >> 4 > self.ppr() >> 4)
    }

    /// Whether a vector is requested that the processor priority holds back: lowering CR8 may let it through.
    pub fn is_held_back(&self) -> bool {
        self.accepts_vectors() && self.irr.highest().is_some_and(|vector| vector >> 4 <= self.ppr() >> 4)
    }

    /// Takes [`Self::deliverable`] into service and returns it.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.clear(vector);
        self.isr.set(vector);
        Some(vector)
    }

    /// Whether a request of the interrupt controllers reaches this vCPU: LINT0 is wired to the bootstrap vCPU only, and
    /// goes straight to the processor while the APIC is disabled.
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.lvt[lvt_index(LVT_LINT0)];
        self.bootstrap && (self.base & APIC_BASE_ENABLE == 0 || lint0 & (LVT_MASKED | LVT_MODE_MASK) == LVT_MODE_EXTINT)
    }

    /// CR8: the class of the task priority.
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// The guest has written CR8 (0..=15).
    pub fn set_cr8(&mut self, class: u8) {
        self.tpr = class << 4;
    }

    /// The task priority register.
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// The processor priority register (APM vol. 2, 16.6.4).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    /// Reads APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// Writes APIC_BASE. Legal are the transitions of APM vol. 2, 16.9: to x2APIC mode from xAPIC mode, away from it only
    /// by disabling, and no enabling of both at once.
    pub fn set_apic_base(&mut self, value: u64) -> Result<LapicEffect, Gp> {
        let mode = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
        if value & !(mode | APIC_BASE_BSP | APIC_BASE_ADDRESS) != 0 {
            return Err(Gp);
        }
        let (from, to) = (self.base & mode, value & mode);
        let legal = match to {
            _ if from == to => true,
            0 => true,
            APIC_BASE_ENABLE => from == 0,
            APIC_BASE_X2APIC => false,
            _ => from == APIC_BASE_ENABLE,
        };
        if !legal {
            return Err(Gp);
        }
        self.base = value;
        self.announce = true;
        if to == 0 && from != 0 {
            self.init();
        }
        Ok(LapicEffect::Timer)
    }

    /// Reads IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&mut self, now: Now) -> u64 {
        self.poll(now);
        if self.timer_mode() == TimerMode::TscDeadline { self.timer.tsc_deadline() } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE: ignored unless the timer is in that mode, 0 disarms.
    pub fn set_tsc_deadline(&mut self, now: Now, value: u64) -> LapicEffect {
        self.poll(now);
        if self.timer_mode() != TimerMode::TscDeadline {
            return LapicEffect::None;
        }
        self.timer.arm_tsc(value);
        self.poll(now);
        LapicEffect::Timer
    }

    /// Reads a register by its MSR number. Registers that don't exist, can't be read, or belong to a mode that is off
    /// raise #GP.
    pub fn rdmsr(&mut self, now: Now, msr: u32) -> Result<u64, Gp> {
        if !self.x2apic() {
            return Err(Gp);
        }
        self.poll(now);
        self.read_register(now, msr)
    }

    fn read_register(&mut self, now: Now, msr: u32) -> Result<u64, Gp> {
        Ok(match msr {
            ID => u64::from(self.id),
            VERSION => VERSION_VALUE,
            TPR => u64::from(self.tpr),
            PPR => u64::from(self.ppr()),
            LDR => u64::from(logical_id(self.id)),
            SVR => u64::from(self.svr),
            ISR..TMR => u64::from(self.isr.0[(msr - ISR) as usize]),
            TMR..IRR => u64::from(self.tmr.0[(msr - TMR) as usize]),
            IRR..ESR => u64::from(self.irr.0[(msr - IRR) as usize]),
            ESR => u64::from(self.esr),
            ICR => self.icr,
            LVT_TIMER..=LVT_ERROR => u64::from(self.lvt[lvt_index(msr)]),
            TIMER_INITIAL => u64::from(self.timer.initial()),
            TIMER_CURRENT => u64::from(self.timer.current(now, self.timer_mode())),
            TIMER_DIVIDE => u64::from(self.timer.divide_register()),
            _ => return Err(Gp),
        })
    }

    /// Writes a register by its MSR number. Registers that don't exist, can't be written, or belong to a mode that is off
    /// raise #GP, and so do reserved bits; then nothing has changed.
    pub fn wrmsr(&mut self, now: Now, msr: u32, value: u64) -> Result<LapicEffect, Gp> {
        if !self.x2apic() {
            return Err(Gp);
        }
        self.poll(now);
        if msr == ICR {
            return Ok(self.write_icr(value, ipi::decode(value)?));
        }
        self.write_register(now, msr, u32::try_from(value).map_err(|_| Gp)?)
    }

    fn write_register(&mut self, now: Now, msr: u32, value: u32) -> Result<LapicEffect, Gp> {
        let fits = |valid: u32| if value & !valid == 0 { Ok(value) } else { Err(Gp) };
        match msr {
            TPR => self.tpr = fits(0xff)? as u8,
            EOI => {
                fits(0)?;
                if let Some(vector) = self.isr.highest() {
                    self.isr.clear(vector);
                    if self.tmr.contains(vector) {
                        self.ended = Some(vector);
                    }
                }
            }
            SVR => {
                self.svr = fits(SVR_VALID)?;
                if self.accepts_vectors() {
                    if core::mem::take(&mut self.wire_held) {
                        self.lvt[lvt_index(LVT_LINT0)] &= !LVT_MASKED;
                    }
                } else {
                    // While disabled by software all entries are masked, and stay so (APM vol. 2, 16.4.1). All but one:
                    // Linux disables and enables the APIC when it takes it over, and then keeps LINT0 for the interrupt
                    // controllers only if it is not masked. Without an I/O APIC there is no other way for them, so virtual
                    // wire mode comes back when the APIC does.
                    self.wire_held |= self.accepts_extint();
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            ESR => {
                fits(0)?;
                self.esr = core::mem::take(&mut self.errors);
                return Ok(LapicEffect::None);
            }
            LVT_TIMER..=LVT_ERROR => {
                let index = lvt_index(msr);
                let before = self.timer_mode();
                let valid = fits(LVT_VALID[index] | LVT_READ_ONLY)? & !LVT_READ_ONLY;
                if msr == LVT_TIMER && TimerMode::from_lvt(valid) == TimerMode::Reserved {
                    return Err(Gp);
                }
                self.wire_held &= msr != LVT_LINT0;
                self.lvt[index] = if self.accepts_vectors() { valid } else { valid | LVT_MASKED };
                let after = self.timer_mode();
                if (before == TimerMode::TscDeadline) != (after == TimerMode::TscDeadline) {
                    self.timer.stop();
                }
                return Ok(LapicEffect::Timer);
            }
            TIMER_INITIAL => {
                self.timer.start(now, value, self.timer_mode());
                return Ok(LapicEffect::Timer);
            }
            TIMER_DIVIDE => {
                self.timer.set_divide(now, fits(0x0b)?, self.timer_mode());
                return Ok(LapicEffect::Timer);
            }
            SELF_IPI => self.accept_enabled(fits(0xff)? as u8, false),
            _ => return Err(Gp),
        }
        Ok(LapicEffect::Interrupts)
    }

    fn write_icr(&mut self, value: u64, command: Option<IpiCommand>) -> LapicEffect {
        self.icr = value;
        match command {
            None => LapicEffect::None,
            Some(IpiCommand { kind: IpiKind::Fixed(vector) | IpiKind::LowestPriority(vector), .. })
                if vector < FIRST_VECTOR =>
            {
                self.error(ESR_SEND_ILLEGAL);
                LapicEffect::Interrupts
            }
            Some(IpiCommand { kind: IpiKind::Fixed(vector), destination: Destination::Myself }) => {
                self.accept_enabled(vector, false);
                LapicEffect::Interrupts
            }
            Some(command) => LapicEffect::Ipi(command),
        }
    }

    /// Address of the window.
    fn window(&self) -> u64 {
        self.base & APIC_BASE_ADDRESS
    }

    fn x2apic(&self) -> bool {
        let mode = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
        self.base & mode == mode
    }

    /// Enabled in APIC_BASE and by software.
    fn accepts_vectors(&self) -> bool {
        self.base & APIC_BASE_ENABLE != 0 && self.svr & SVR_ENABLE != 0
    }

    fn timer_mode(&self) -> TimerMode {
        TimerMode::from_lvt(self.lvt[0])
    }

    /// A vector arrives from outside; while the APIC is disabled it is lost.
    fn accept_enabled(&mut self, vector: u8, level: bool) {
        if self.accepts_vectors() {
            self.accept(vector, level);
        }
    }

    fn accept(&mut self, vector: u8, level: bool) {
        if vector < FIRST_VECTOR {
            self.error(ESR_RECEIVE_ILLEGAL);
        } else {
            self.irr.set(vector);
            if level {
                self.tmr.set(vector);
            } else {
                self.tmr.clear(vector);
            }
        }
    }

    fn raise_lvt(&mut self, register: u32) {
        let entry = self.lvt[lvt_index(register)];
        if entry & LVT_MASKED == 0 && self.accepts_vectors() {
            self.accept(entry as u8, false);
        }
    }

    fn error(&mut self, bit: u32) {
        let news = self.errors & bit == 0;
        self.errors |= bit;
        // An error entry with an illegal vector is an error too, the one that is recorded by now, so this ends.
        if news {
            self.raise_lvt(LVT_ERROR);
        }
    }
}

/// Index of an LVT entry among the six.
const fn lvt_index(msr: u32) -> usize {
    (msr - LVT_TIMER) as usize
}

/// One bit a vector, as IRR and ISR lay them out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & 1 << (vector & 31) != 0
    }

    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((word as u8) << 5 | self.0[word].ilog2() as u8)
    }
}

#[cfg(test)]
mod tests;
