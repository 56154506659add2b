//! Time: how fast the TSC and the local APIC's timer run, measured once at start-up.
//!
//! The reference is the ACPI power-management timer where the firmware names one (24 bits at 3.579545 MHz), else the
//! 8254's second channel (16 bits at 1.193182 MHz). A reading of the reference is bracketed by two of the TSC, and of
//! several tries the one with the narrowest bracket counts: under an emulator the CPU may be taken away between any two
//! instructions, and a wide bracket shows that it was.

use core::sync::atomic::{AtomicU64, Ordering};

use super::apic;
use super::instructions::{inb, inl, outb, rdtsc};

static TSC_KHZ: AtomicU64 = AtomicU64::new(0);
static APIC_KHZ: AtomicU64 = AtomicU64::new(0);

/// TSC ticks a millisecond.
#[must_use]
pub fn tsc_khz() -> u64 {
    TSC_KHZ.load(Ordering::Relaxed)
}

/// APIC timer ticks a millisecond.
#[must_use]
pub fn apic_khz() -> u64 {
    APIC_KHZ.load(Ordering::Relaxed)
}

/// TSC ticks in that many microseconds.
#[must_use]
pub fn tsc_from_us(us: u64) -> u64 {
    (u128::from(us) * u128::from(tsc_khz()) / 1000) as u64
}

/// Microseconds in that many TSC ticks.
#[must_use]
pub fn us_from_tsc(ticks: u64) -> u64 {
    (u128::from(ticks) * 1000 / u128::from(tsc_khz().max(1))) as u64
}

/// Starts this CPU's timer so that it fires when the TSC has reached `deadline`, or earlier when that is more than the
/// timer can count: whoever waits looks at the TSC and starts it again.
pub fn set_timer_at(deadline: u64) {
    let left = deadline.saturating_sub(rdtsc());
    let ticks = u128::from(left) * u128::from(apic_khz()) / u128::from(tsc_khz().max(1));
    // At least one tick, as zero would stop the timer; and a little more, so that it does not fire just before.
    apic::set_timer(u32::try_from(ticks + 1).unwrap_or(u32::MAX));
}

/// Waits, with interrupts off.
pub fn spin_us(us: u64) {
    let end = rdtsc() + tsc_from_us(us);
    while rdtsc() < end {
        core::hint::spin_loop();
    }
}

/// A counter of known rate.
#[derive(Clone, Copy)]
enum Reference {
    PmTimer(u16),
    Pit,
}

impl Reference {
    fn hertz(self) -> u64 {
        match self {
            Self::PmTimer(_) => 3_579_545,
            Self::Pit => 1_193_182,
        }
    }

    /// Ticks from one reading to a later one, less than one wrap apart.
    fn elapsed(self, from: u32, to: u32) -> u32 {
        match self {
            Self::PmTimer(_) => to.wrapping_sub(from) & 0xff_ffff,
            Self::Pit => from.wrapping_sub(to) & 0xffff,
        }
    }

    fn start(self) {
        if matches!(self, Self::Pit) {
            // SAFETY: the gate of channel 2 (with the speaker off) and the channel itself have no other user.
            unsafe {
                outb(0x61, inb(0x61) & !2 | 1);
                outb(0x43, 0xb4);
                outb(0x42, 0);
                outb(0x42, 0);
            }
        }
    }

    fn read(self) -> u32 {
        // SAFETY: reading a counter; the latch command affects channel 2 only.
        unsafe {
            match self {
                Self::PmTimer(port) => inl(port) & 0xff_ffff,
                Self::Pit => {
                    outb(0x43, 0x80);
                    u32::from(inb(0x42)) | u32::from(inb(0x42)) << 8
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Reading {
    tsc: u64,
    apic: u32,
    reference: u32,
}

fn sample(reference: Reference) -> Reading {
    let mut narrowest = u64::MAX;
    let mut best = Reading { tsc: 0, apic: 0, reference: 0 };
    for _ in 0..16 {
        let before = rdtsc();
        let reading = reference.read();
        let apic = apic::timer_ticks();
        let width = rdtsc() - before;
        if width < narrowest {
            narrowest = width;
            best = Reading { tsc: before + width / 2, apic, reference: reading };
        }
    }
    best
}

/// Rates in kHz from two readings `ticks` of a reference of `hertz` apart.
fn rates(ticks: u32, hertz: u64, tsc: u64, apic: u32) -> (u64, u64) {
    let rate = |count: u64| (u128::from(count) * u128::from(hertz) / u128::from(ticks.max(1)) / 1000) as u64;
    (rate(tsc), rate(u64::from(apic)))
}

/// Measures both rates for about 20 ms.
///
/// # Panics
/// When the reference does not run: no clock, no hypervisor.
pub fn calibrate(pm_timer_port: Option<u16>) {
    let reference = pm_timer_port.map_or(Reference::Pit, Reference::PmTimer);
    let wanted = (reference.hertz() / 50) as u32;
    reference.start();
    apic::set_timer(u32::MAX);
    let first = sample(reference);
    let mut tries = 0u32;
    while reference.elapsed(first.reference, reference.read()) < wanted {
        tries += 1;
        assert!(tries < 100_000_000, "the reference clock stands still");
    }
    let last = sample(reference);
    apic::set_timer(0);
    let ticks = reference.elapsed(first.reference, last.reference);
    let (tsc, apic) = rates(ticks, reference.hertz(), last.tsc - first.tsc, first.apic - last.apic);
    assert!(tsc > 0 && apic > 0, "TSC or APIC timer stand still");
    TSC_KHZ.store(tsc, Ordering::Relaxed);
    APIC_KHZ.store(apic, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_wrap_in_their_own_direction() {
        assert_eq!(Reference::PmTimer(0).elapsed(0xff_fff0, 0x10), 0x20);
        assert_eq!(Reference::Pit.elapsed(0x10, 0xfff0), 0x20);
    }

    #[test]
    fn rates_are_in_kilohertz() {
        // 20 ms of the PM timer, a 2.5 GHz TSC, a 1 GHz APIC timer.
        let (tsc, apic) = rates(71_591, 3_579_545, 50_000_000, 20_000_000);
        assert!(tsc.abs_diff(2_500_000) < 10 && apic.abs_diff(1_000_000) < 10, "{tsc} {apic}");
    }
}
