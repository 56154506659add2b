//! PCI configuration space by mechanism 1, with nothing on the bus: the address register at 0xcf8 holds what is written,
//! and every function's configuration at 0xcfc reads all ones, which says that there is none.

/// The address register, 32 bits.
pub const PCI_ADDRESS: u16 = 0xcf8;
/// First of the four data ports.
pub const PCI_DATA: u16 = 0xcfc;

/// Enable, bus, device, function and register.
const WRITABLE: u32 = 0x80ff_fffc;

/// The configuration ports.
#[derive(Clone, Debug, Default)]
pub struct PciPorts {
    address: u32,
}

impl PciPorts {
    /// After reset.
    pub const fn new() -> Self {
        Self { address: 0 }
    }

    /// Reads the address register.
    pub const fn address(&self) -> u32 {
        self.address
    }

    /// Writes the address register.
    pub const fn set_address(&mut self, value: u32) {
        self.address = value & WRITABLE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_kept_without_its_reserved_bits() {
        let mut ports = PciPorts::new();
        ports.set_address(0x8000_0000);
        assert_eq!(ports.address(), 0x8000_0000, "how software finds mechanism 1");
        ports.set_address(u32::MAX);
        assert_eq!(ports.address(), 0x80ff_fffc);
    }
}
