//! The paravirtual clock (KVM's `pvclock` ABI, version 1).
//!
//! The guest gives an address by MSR; the hypervisor writes there how to turn its TSC into nanoseconds since the VM
//! started: `system_time + ((tsc - tsc_timestamp) << shift) * mul >> 32`. As the TSC neither stops nor changes its rate and
//! is the same on all CPUs, the structure is written when it is asked for and once more whenever the guest itself moves
//! its TSC; in between it stays true, and the flag that says so lets the guest compare clocks across vCPUs.
//!
//! A reader on any vCPU may run while the structure is written, so its version is odd meanwhile. Only the vCPU's own
//! thread writes.

use core::sync::atomic::{Ordering, fence};

use crate::guest::{GuestMemory, GuestMemoryError};

/// Time is the same on all vCPUs.
const FLAG_TSC_STABLE: u8 = 1 << 0;

const NS_PER_S: u64 = 1_000_000_000;
/// Keeps the arithmetic within 128 bits.
const MAX_KHZ: u64 = 1 << 40;

/// Length of the clock's structure in bytes.
pub const CLOCK_BYTES: usize = 32;
/// Length of the wall clock's structure in bytes.
pub const WALL_CLOCK_BYTES: usize = 12;

/// How TSC ticks become nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    /// Multiplier, a binary fraction with 32 places.
    pub mul: u32,
    /// Shift of the ticks before multiplying; negative is to the right.
    pub shift: i8,
}

impl TscScale {
    /// The scale of a TSC of `tsc_khz` kHz (1 to 2^40; others count as the nearest). The multiplier uses all its 32 bits,
    /// so the rate is right to one part in 2^31.
    pub const fn new(tsc_khz: u64) -> Self {
        let hz = match tsc_khz {
            0 => 1000,
            1..MAX_KHZ => tsc_khz as u128 * 1000,
            _ => MAX_KHZ as u128 * 1000,
        };
        // The shift brings the rate between 1 and 2 GHz, the multiplier then lies between 1/2 and 1.
        let mut shift = 0i8;
        let mut scaled = hz << 64;
        let low = (NS_PER_S as u128) << 64;
        while scaled <= low {
            scaled <<= 1;
            shift += 1;
        }
        while scaled > 2 * low {
            scaled >>= 1;
            shift -= 1;
        }
        // scaled is hz << (64 + shift); what is needed is 2^32 * 10^9 / (hz << shift).
        let mul = (low << 24) / (scaled >> 8);
        Self { mul: if mul > u32::MAX as u128 { u32::MAX } else { mul as u32 }, shift }
    }

    /// Nanoseconds for a number of ticks, as the guest computes them.
    pub const fn ns(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 { ticks >> -self.shift } else { ticks << self.shift };
        ((shifted as u128 * self.mul as u128) >> 32) as u64
    }
}

/// The clock of one vCPU.
#[derive(Clone, Debug)]
pub struct KvmClock {
    scale: TscScale,
    gpa: Option<u64>,
    version: u32,
}

impl KvmClock {
    /// A clock that the guest has not asked for yet.
    pub const fn new(tsc_khz: u64) -> Self {
        Self { scale: TscScale::new(tsc_khz), gpa: None, version: 0 }
    }

    /// Where the structure is, and its version: the state of the clock.
    pub const fn save(&self) -> (Option<u64>, u32) {
        (self.gpa, self.version)
    }

    /// Goes on with the state of another clock of this rate.
    pub const fn restore(&mut self, (gpa, version): (Option<u64>, u32)) {
        (self.gpa, self.version) = (gpa, version);
    }

    /// The guest has written the clock's MSR: `gpa` is where it wants the structure, `None` that it wants none.
    pub fn set_address(&mut self, gpa: Option<u64>) {
        self.gpa = gpa;
    }

    /// Where the structure is.
    pub fn address(&self) -> Option<u64> {
        self.gpa
    }

    /// Writes the structure if the guest wants one. `tsc_at_start` is what the vCPU's TSC would have read at VM time 0:
    /// the value it started with, plus all that the guest has added to it since.
    pub fn publish(&mut self, memory: &impl GuestMemory, tsc_at_start: u64) -> Result<(), GuestMemoryError> {
        let Some(gpa) = self.gpa else { return Ok(()) };
        // Odd while writing, and never the value that a reader may have seen before.
        self.version = self.version.wrapping_add(2) & !1;
        memory.write(gpa, &(self.version | 1).to_le_bytes())?;
        fence(Ordering::SeqCst);
        memory.write(gpa + 4, &self.structure(tsc_at_start)[4..])?;
        fence(Ordering::SeqCst);
        memory.write(gpa, &self.version.to_le_bytes())
    }

    /// `struct pvclock_vcpu_time_info`.
    fn structure(&self, tsc_at_start: u64) -> [u8; CLOCK_BYTES] {
        let mut bytes = [0; CLOCK_BYTES];
        bytes[..4].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&tsc_at_start.to_le_bytes());
        // system_time, 16..24, is 0: the VM's time began there.
        bytes[24..28].copy_from_slice(&self.scale.mul.to_le_bytes());
        bytes[28] = self.scale.shift.to_le_bytes()[0];
        bytes[29] = FLAG_TSC_STABLE;
        bytes
    }
}

/// Writes the wall clock at VM time 0 (Unix seconds, UTC) to where the guest has asked for it by MSR.
pub fn write_wall_clock(memory: &impl GuestMemory, gpa: u64, wall_clock_s: u64) -> Result<(), GuestMemoryError> {
    // The version that is there counts on: a kernel may ask again, and compares.
    let mut version = [0; 4];
    memory.read(gpa, &mut version)?;
    let version = u32::from_le_bytes(version).wrapping_add(2) & !1;
    memory.write(gpa, &(version | 1).to_le_bytes())?;
    fence(Ordering::SeqCst);
    memory.write(gpa + 4, &(wall_clock_s as u32).to_le_bytes())?;
    memory.write(gpa + 8, &0u32.to_le_bytes())?;
    fence(Ordering::SeqCst);
    memory.write(gpa, &version.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::TestMemory;

    #[test]
    fn scale_is_exact_to_a_microsecond_in_an_hour() {
        for khz in [
            1,
            999,
            1000,
            10_000,
            999_999,
            1_000_000,
            1_000_001,
            1_999_999,
            2_000_000,
            2_445_123,
            5_000_000,
            100_000_000,
        ] {
            let scale = TscScale::new(khz);
            let seconds = 3600;
            let ns = scale.ns(khz * 1000 * seconds);
            let off = ns.abs_diff(seconds * NS_PER_S);
            assert!(off < 2000, "{khz} kHz: {off} ns off in an hour, {scale:?}");
            assert!(khz < 1000 || scale.mul >= 1 << 31, "{scale:?}");
        }
    }

    #[test]
    fn absurd_rates_give_a_scale() {
        for khz in [0, MAX_KHZ, u64::MAX] {
            let _ = TscScale::new(khz);
        }
    }

    #[test]
    fn structure_says_what_the_tsc_was_at_the_start() {
        let memory = TestMemory::new(16 << 20);
        let mut clock = KvmClock::new(2_000_000);
        clock.publish(&memory, 7).expect("nothing to write");
        assert_eq!(memory.u64(0x5000), 0);
        clock.set_address(Some(0x5000));
        clock.publish(&memory, 1234).expect("RAM");
        assert_eq!(memory.u32(0x5000), 2);
        assert_eq!((memory.u64(0x5008), memory.u64(0x5010)), (1234, 0));
        assert_eq!((memory.u32(0x5018), memory.bytes(0x501c, 2)), (1 << 31, alloc::vec![0, 1]));
        clock.publish(&memory, 99).expect("RAM");
        assert_eq!((memory.u32(0x5000), memory.u64(0x5008)), (4, 99), "a new version, even again");
    }

    #[test]
    fn an_address_outside_ram_is_an_error() {
        let memory = TestMemory::new(16 << 20);
        let mut clock = KvmClock::new(2_000_000);
        for gpa in [0x10_0000_0000, u64::MAX - 3] {
            clock.set_address(Some(gpa));
            assert!(clock.publish(&memory, 0).is_err());
            assert!(write_wall_clock(&memory, gpa, 0).is_err());
        }
    }

    #[test]
    fn wall_clock() {
        let memory = TestMemory::new(16 << 20);
        memory.write(0x6000, &5u32.to_le_bytes()).expect("RAM");
        write_wall_clock(&memory, 0x6000, 1_700_000_000).expect("RAM");
        assert_eq!((memory.u32(0x6000), memory.u32(0x6004), memory.u32(0x6008)), (6, 1_700_000_000, 0));
    }
}
