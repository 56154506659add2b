//! Which device a port belongs to, and the memory of ports that belong to none.
//!
//! [`decode`] is the whole I/O map in one place. A port that nobody claims reads all ones and swallows writes, as an empty
//! bus does; [`UnclaimedPorts`] counts such accesses and reports each port once, for as many ports as it has room for.
//! Where PC software looks for devices that a PC may lack ([`is_probed`]), nobody needs to be told.

use super::{debug_exit, pic, pm, reset};

/// First port of COM1.
pub const COM1: u16 = 0x3f8;

/// What answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A register of an interrupt controller.
    Pic(pic::Chip, pic::Register),
    /// A counter of the timer.
    PitChannel(usize),
    /// The timer's control word.
    PitControl,
    /// Gate and speaker, 0x61.
    Speaker,
    /// The index of the clock's memory.
    CmosIndex,
    /// The data of the clock's memory.
    CmosData,
    /// A register of the serial port.
    Uart(u8),
    /// A byte of the ACPI block.
    Pm(u16),
    /// One of the reset ports.
    Reset,
    /// The test exit port.
    DebugExit,
    /// Ports that PC software writes to pass the time or to tell how far it got: POST codes, and the data port of a
    /// keyboard controller without a keyboard. They read 0.
    Quiet,
}

/// The device at `port`.
pub const fn decode(port: u16) -> Option<Claim> {
    Some(match port {
        0x20 => Claim::Pic(pic::Chip::Master, pic::Register::Command),
        0x21 => Claim::Pic(pic::Chip::Master, pic::Register::Data),
        0x40..=0x42 => Claim::PitChannel((port - 0x40) as usize),
        0x43 => Claim::PitControl,
        0x60 | 0x80 | 0xed => Claim::Quiet,
        0x61 => Claim::Speaker,
        0x70 => Claim::CmosIndex,
        0x71 => Claim::CmosData,
        0xa0 => Claim::Pic(pic::Chip::Slave, pic::Register::Command),
        0xa1 => Claim::Pic(pic::Chip::Slave, pic::Register::Data),
        0x4d0 => Claim::Pic(pic::Chip::Master, pic::Register::EdgeLevel),
        0x4d1 => Claim::Pic(pic::Chip::Slave, pic::Register::EdgeLevel),
        COM1..=0x3ff => Claim::Uart((port - COM1) as u8),
        reset::KEYBOARD_COMMAND | reset::SYSTEM_CONTROL_A | reset::RESET_CONTROL => Claim::Reset,
        debug_exit::DEBUG_EXIT => Claim::DebugExit,
        pm::PM_BASE..=0x60b => Claim::Pm(port - pm::PM_BASE),
        _ => return None,
    })
}

const _: () = assert!(pm::PM_BASE + pm::PM_LENGTH == 0x60c);

/// Whether software finds out by using `port` that the device there is missing: a PCI host bridge, the second to fourth
/// serial port.
pub const fn is_probed(port: u16) -> bool {
    matches!(port, 0xcf8..=0xcff | 0x2f8..=0x2ff | 0x3e8..=0x3ef | 0x2e8..=0x2ef)
}

/// The direction of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// IN.
    Read,
    /// OUT.
    Write,
}

/// The first access to a port that nobody claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnclaimedPort {
    /// The port.
    pub port: u16,
    /// What the guest did.
    pub direction: Direction,
}

/// Ports that nobody claims and that the guest used all the same.
#[derive(Clone, Debug, Default)]
pub struct UnclaimedPorts {
    seen: [u16; Self::CAPACITY],
    used: usize,
    accesses: u64,
}

impl UnclaimedPorts {
    /// How many different ports are remembered. Later ones are only counted.
    pub const CAPACITY: usize = 32;

    /// Notes an access; returns it if the port is new and not just probed, and there was room to remember it.
    pub fn note(&mut self, port: u16, direction: Direction) -> Option<UnclaimedPort> {
        self.accesses = self.accesses.saturating_add(1);
        if is_probed(port) || self.ports().contains(&port) || self.used == Self::CAPACITY {
            return None;
        }
        self.seen[self.used] = port;
        self.used += 1;
        Some(UnclaimedPort { port, direction })
    }

    /// The ports seen so far, in the order of their first use.
    pub fn ports(&self) -> &[u16] {
        &self.seen[..self.used]
    }

    /// All accesses to ports that nobody claims, remembered or not.
    pub fn accesses(&self) -> u64 {
        self.accesses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_is_reported_once_and_memory_is_bounded() {
        let mut ports = UnclaimedPorts::default();
        assert!(ports.note(0x378, Direction::Read).is_some());
        assert!(ports.note(0x378, Direction::Write).is_none());
        let reported = (0..=u16::MAX).filter(|port| ports.note(*port, Direction::Write).is_some()).count();
        assert_eq!(reported, UnclaimedPorts::CAPACITY - 1);
        assert_eq!(ports.ports().len(), UnclaimedPorts::CAPACITY);
        assert_eq!(ports.accesses(), 2 + 65_536);
    }

    #[test]
    fn probing_is_counted_and_not_reported() {
        let mut ports = UnclaimedPorts::default();
        for port in [0xcf8, 0xcfc, 0x2f9, 0x3e9, 0x2e9] {
            assert_eq!(ports.note(port, Direction::Write), None);
            assert!(decode(port).is_none());
        }
        assert_eq!((ports.ports(), ports.accesses()), ([].as_slice(), 5));
    }
}
