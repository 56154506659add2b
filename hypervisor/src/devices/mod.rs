//! The devices a guest sees, one file a device.
//!
//! Protocol. Nothing here touches the CPU, reads a clock or blocks: every call says what time it is, so that a device
//! behaves the same in the hypervisor and in a test on the host. A device keeps no reference to another one; whoever owns
//! several (see [`platform`]) carries a level from one to the next.
//!
//! * The port devices belong to one [`platform::Platform`] a VM. The caller serialises access to it (a spin mutex).
//! * A [`lapic::Lapic`] belongs to the thread of its vCPU and to nobody else. Other CPUs reach it only through its
//!   [`lapic::LapicShared`], which is all atomics.
//!
//! Time is counted in nanoseconds since the VM started ([`Now::ns`]) and never goes back. A device that is given an
//! earlier time than before treats it as the time it already knows.
//!
//! Everything a guest can write is legal input: no register value makes a device panic, loop without bound or allocate
//! without bound.

pub mod board;
pub mod cmos;
pub mod debug_exit;
pub mod fw_cfg;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pci_testdev;
pub mod pic;
pub mod pit;
pub mod platform;
pub mod pm;
pub mod ports;
pub mod reset;
pub mod saved;
pub mod shutdown;
pub mod testdev;
pub mod uart;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod uart_reference;

/// The moment at which something happens to a vCPU, on both clocks that a device may count with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Nanoseconds since the VM started. The same on all vCPUs.
    pub ns: u64,
    /// What RDTSC would return on the vCPU concerned, in the guest's ticks.
    pub tsc: u64,
}

/// The access is illegal: the vCPU takes #GP(0) and nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp;

/// The operand size of a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits (AL).
    Byte,
    /// 16 bits (AX).
    Word,
    /// 32 bits (EAX).
    Dword,
}

impl Width {
    /// The width of `bytes` bytes, if an IN or OUT can have it.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            _ => None,
        }
    }

    /// How many bytes, and so how many consecutive ports, the access covers.
    pub const fn bytes(self) -> u16 {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
        }
    }

    /// The bits of the register that the access moves; also what reading a port that nobody claims returns.
    pub const fn mask(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
        }
    }
}

const NS_PER_S: u64 = 1_000_000_000;

/// Converts a number of ticks of a clock of `hz` Hz into nanoseconds, rounded up: waiting that long is enough.
pub(crate) const fn ticks_to_ns_ceil(ticks: u64, hz: u64) -> u64 {
    // Every port access converts times; for hours of them 64 bits do, at a fraction of the cost.
    if let Some(product) = ticks.checked_mul(NS_PER_S) {
        return product.div_ceil(hz);
    }
    let ns = (ticks as u128 * NS_PER_S as u128).div_ceil(hz as u128);
    if ns > u64::MAX as u128 { u64::MAX } else { ns as u64 }
}

/// Converts nanoseconds into whole ticks, rounded down, of a clock of `hz` Hz.
pub(crate) const fn ns_to_ticks(ns: u64, hz: u64) -> u64 {
    if let Some(product) = ns.checked_mul(hz) {
        return product / NS_PER_S;
    }
    let ticks = ns as u128 * hz as u128 / NS_PER_S as u128;
    if ticks > u64::MAX as u128 { u64::MAX } else { ticks as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_agree_at_any_size() {
        let mut random = testing::Random::new(12);
        for _ in 0..100_000 {
            let hz = 1 + random.of_any_length(33);
            let ticks = random.of_any_length(40);
            let ns = ticks_to_ns_ceil(ticks, hz);
            assert_eq!(
                u128::from(ns),
                (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(hz)).min(u64::MAX.into())
            );
            if ns != u64::MAX && hz < 1_000_000_000 {
                assert_eq!(ns_to_ticks(ns, hz), ticks, "{ticks} ticks at {hz} Hz");
                assert!(ns == 0 || ns_to_ticks(ns - 1, hz) < ticks);
            }
        }
    }

    #[test]
    fn widths_are_one_two_and_four_bytes() {
        for bytes in 0..=16 {
            let width = Width::from_bytes(bytes);
            assert_eq!(width.map(|width| usize::from(width.bytes())), [1, 2, 4].contains(&bytes).then_some(bytes));
        }
    }
}
