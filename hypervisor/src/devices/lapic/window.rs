//! The registers of a local APIC in xAPIC mode: a window of memory (AMD APM vol. 2, 16.3.2).
//!
//! Registers are 32 bits wide, at multiples of 16 bytes, and are the same state as the MSRs of x2APIC mode: offset
//! `16 * n` is MSR `0x800 + n`. What differs: bits that don't exist are ignored instead of faulting, the ID is in the
//! upper byte, LDR and DFR are the guest's to write, ICR has two halves, and there is no SELF_IPI. A register that does not
//! exist reads 0 and is noted in ESR.
//!
//! A read of part of a register gives that part; a write of anything but a whole one is ignored.

use super::ipi::{self, Addressing};
use super::{
    APIC_BASE_ENABLE, APIC_BASE_X2APIC, EOI, ESR, ESR_REGISTER_ILLEGAL, ICR, ID, IRR, ISR, LDR, LVT_ERROR,
    LVT_READ_ONLY, LVT_TIMER, LVT_VALID, Lapic, LapicEffect, PPR, SVR, SVR_VALID, TIMER_CURRENT, TIMER_DIVIDE,
    TIMER_INITIAL, TPR, VERSION, X2APIC_FIRST, lvt_index,
};
use crate::devices::Now;

/// Length of the window in bytes.
pub const APIC_WINDOW_BYTES: u64 = 4096;

const ARBITRATION: u32 = 0x809;
const DFR: u32 = 0x80e;
const ICR_HIGH: u32 = 0x831;

const LDR_WRITABLE: u32 = 0xff00_0000;
/// The bits of DFR below the model are all ones.
const DFR_FIXED: u32 = 0x0fff_ffff;
const DIVIDE_VALID: u32 = 0x0b;

impl Lapic {
    /// Puts the APIC into xAPIC mode, in which firmware leaves it.
    #[must_use]
    pub fn in_xapic_mode(mut self) -> Self {
        self.base &= !APIC_BASE_X2APIC;
        self.announce = true;
        self
    }

    /// The offset of `gpa` in the window, if the window is there.
    #[must_use]
    pub fn window_offset(&self, gpa: u64) -> Option<u64> {
        if self.base & (APIC_BASE_ENABLE | APIC_BASE_X2APIC) != APIC_BASE_ENABLE {
            return None;
        }
        gpa.checked_sub(self.window()).filter(|offset| *offset < APIC_WINDOW_BYTES)
    }

    /// Reads at an offset of the window. `bytes` is 1, 2, 4 or 8.
    pub fn window_read(&mut self, now: Now, offset: u64, bytes: usize) -> u64 {
        self.poll(now);
        let within = offset & 0xf;
        if within >= 4 {
            return 0;
        }
        let value = u64::from(self.register(now, offset)) >> (8 * within);
        if bytes >= 4 { value } else { value & ((1 << (8 * bytes)) - 1) }
    }

    fn register(&mut self, now: Now, offset: u64) -> u32 {
        let register = X2APIC_FIRST + (offset >> 4) as u32;
        match register {
            ID => self.id << 24,
            ARBITRATION => u32::from(self.ppr()),
            LDR => self.ldr,
            DFR => self.dfr,
            ICR => self.icr as u32,
            ICR_HIGH => (self.icr >> 32) as u32,
            VERSION | TPR | PPR | SVR | ISR..=ESR | LVT_TIMER..=TIMER_CURRENT | TIMER_DIVIDE => {
                self.read_register(now, register).unwrap_or(0) as u32
            }
            // Written only.
            EOI => 0,
            _ => {
                self.error(ESR_REGISTER_ILLEGAL);
                0
            }
        }
    }

    /// Writes at an offset of the window.
    pub fn window_write(&mut self, now: Now, offset: u64, bytes: usize, value: u64) -> LapicEffect {
        self.poll(now);
        if bytes != 4 || !offset.is_multiple_of(16) {
            return LapicEffect::None;
        }
        let value = value as u32;
        let register = X2APIC_FIRST + (offset >> 4) as u32;
        let valid = match register {
            TPR => 0xff,
            SVR => SVR_VALID,
            EOI | ESR => 0,
            LVT_TIMER..=LVT_ERROR => LVT_VALID[lvt_index(register)] | LVT_READ_ONLY,
            TIMER_INITIAL => u32::MAX,
            TIMER_DIVIDE => DIVIDE_VALID,
            LDR => {
                self.ldr = value & LDR_WRITABLE;
                self.announce = true;
                return LapicEffect::None;
            }
            DFR => {
                self.dfr = value | DFR_FIXED;
                self.announce = true;
                return LapicEffect::None;
            }
            ICR => return self.send(u64::from(value & ipi::XAPIC_VALID) | self.icr & !0xffff_ffff),
            ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                return LapicEffect::None;
            }
            // Read only.
            ID | VERSION | ARBITRATION | PPR | ISR..IRR | IRR..ESR | TIMER_CURRENT => return LapicEffect::None,
            _ => {
                self.error(ESR_REGISTER_ILLEGAL);
                return LapicEffect::Interrupts;
            }
        };
        // What is refused in x2APIC mode by #GP (a timer mode that does not exist) has no effect here.
        self.write_register(now, register, value & valid).unwrap_or(LapicEffect::None)
    }

    fn send(&mut self, icr: u64) -> LapicEffect {
        self.write_icr(icr, ipi::decode_xapic(icr))
    }

    /// How messages with a logical destination find this APIC.
    pub(super) fn addressing(&self) -> Addressing {
        if self.base & APIC_BASE_X2APIC != 0 {
            Addressing::X2Apic
        } else if self.dfr >> 28 == 0 {
            Addressing::Cluster((self.ldr >> 24) as u8)
        } else {
            Addressing::Flat((self.ldr >> 24) as u8)
        }
    }
}
