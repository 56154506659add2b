//! The three ways of a PC to reset itself by a port: the reset control register at 0xcf9 (which the FADT names), the
//! keyboard controller's pulse command at 0x64, and bit 0 of the system control port A at 0x92.
//!
//! There is no keyboard behind the controller: its status register reads 0 (both buffers empty), which is what a kernel
//! waits for before it sends the reset command.

use serde::{Deserialize, Serialize};

/// The reset control register.
pub const RESET_CONTROL: u16 = 0xcf9;
/// The value that the FADT tells the guest to write there.
pub const RESET_VALUE: u8 = 0x06;
/// Status and command register of the keyboard controller.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// System control port A.
pub const SYSTEM_CONTROL_A: u16 = 0x92;

/// The keyboard controller's command 0xf0..=0xff pulses the output lines whose bit is 0; line 0 is the CPU's reset.
const PULSE: u8 = 0xf0;
/// 0xcf9 bit 2: reset the CPU on its rising edge.
const RST_CPU: u8 = 1 << 2;
/// 0xcf9 bits that keep their value: RST_CPU, SYS_RST and FULL_RST.
const CONTROL_KEPT: u8 = 0x0e;
const FAST_RESET: u8 = 1 << 0;
const FAST_A20: u8 = 1 << 1;

/// The registers behind the three ports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResetPorts {
    control: u8,
    system: u8,
}

impl Default for ResetPorts {
    fn default() -> Self {
        Self::new()
    }
}

impl ResetPorts {
    /// After power-on; the A20 gate is open and stays so.
    pub fn new() -> Self {
        Self { control: 0, system: FAST_A20 }
    }

    /// Reads one of the ports.
    pub fn read(&self, port: u16) -> u8 {
        match port {
            RESET_CONTROL => self.control,
            SYSTEM_CONTROL_A => self.system,
            _ => 0,
        }
    }

    /// Writes one of the ports; `true` when that resets the machine.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        match port {
            RESET_CONTROL => {
                let rises = value & !self.control & RST_CPU != 0;
                self.control = value & CONTROL_KEPT;
                rises
            }
            SYSTEM_CONTROL_A => {
                let rises = value & !self.system & FAST_RESET != 0;
                self.system = value & (FAST_RESET | FAST_A20) | FAST_A20;
                rises
            }
            KEYBOARD_COMMAND => value & PULSE == PULSE && value & 1 == 0,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acpi_reset_value_resets() {
        let mut ports = ResetPorts::new();
        assert!(ports.write(RESET_CONTROL, RESET_VALUE));
    }

    #[test]
    fn reset_control_needs_a_rising_edge() {
        let mut ports = ResetPorts::new();
        assert!(!ports.write(RESET_CONTROL, 0x02));
        assert!(ports.write(RESET_CONTROL, 0x06));
        assert!(!ports.write(RESET_CONTROL, 0x06));
        assert_eq!(ports.read(RESET_CONTROL), 0x06);
    }

    #[test]
    fn keyboard_pulse() {
        let mut ports = ResetPorts::new();
        assert_eq!(ports.read(KEYBOARD_COMMAND), 0);
        let resets = (0..=255).filter(|value| ports.write(KEYBOARD_COMMAND, *value)).count();
        assert_eq!(resets, 8, "0xf0, 0xf2 .. 0xfe");
        assert!(ports.write(KEYBOARD_COMMAND, 0xfe));
    }

    #[test]
    fn fast_reset_and_a20() {
        let mut ports = ResetPorts::new();
        assert_eq!(ports.read(SYSTEM_CONTROL_A), FAST_A20);
        assert!(!ports.write(SYSTEM_CONTROL_A, 0));
        assert_eq!(ports.read(SYSTEM_CONTROL_A), FAST_A20, "A20 can't be closed");
        assert!(ports.write(SYSTEM_CONTROL_A, 3));
    }
}
