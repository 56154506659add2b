//! What the hypervisor wants to know from ACPI, and no more: the local APICs that can be started (MADT), the port of the
//! power-management timer and the ways to switch off and to reset (FADT, DSDT), as ACPI 6.5, 5.2 and 4.8 lay them out.
//!
//! Tables come from the firmware. They are read through a [`Memory`] that may refuse an address, lengths are checked
//! against what is read, and a table with a wrong checksum is passed over.

use alloc::vec::Vec;

/// How tables are read.
pub trait Memory {
    /// The bytes of a physical range, or `None` when it cannot be read.
    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]>;
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Machine {
    /// APIC ids of the CPUs that are enabled, in the firmware's order.
    pub apic_ids: Vec<u32>,
    /// I/O port of the power-management timer (3.579545 MHz).
    pub pm_timer_port: Option<u16>,
    /// How the machine is switched off and reset.
    pub power: Power,
}

/// How the machine is switched off and reset, where the firmware says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Power {
    /// Switching off.
    pub off: Option<SoftOff>,
    /// The I/O port that resets, and the value for it (4.8.3.6).
    pub reset: Option<(u16, u8)>,
}

/// The soft-off state, S5.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SoftOff {
    /// The port and value that give the registers below to the system, where it does not have them from the start.
    pub enable: Option<(u16, u8)>,
    /// The PM1 control registers (4.8.3.2.1), and SLP_TYP for each.
    pub control: [Option<(u16, u8)>; 2],
}

const HEADER: usize = 36;

/// Reads MADT and FADT by way of the root pointer at `rsdp`.
#[must_use]
pub fn read(memory: &impl Memory, rsdp: u64) -> Option<Machine> {
    let root = memory.bytes(rsdp, 20)?;
    if &root[..8] != b"RSD PTR " || !sums_to_zero(root) {
        return None;
    }
    let extended = (root[15] >= 2).then(|| memory.bytes(rsdp, 36)).flatten().filter(|r| sums_to_zero(r));
    let (list, width) = match extended.map(|r| u64_at(r, 24)) {
        Some(Some(xsdt)) if xsdt != 0 => (xsdt, 8),
        _ => (u64::from(u32_at(root, 16)?), 4),
    };
    let mut machine = Machine::default();
    for entry in table(memory, list)?[HEADER..].chunks_exact(width) {
        let address = if width == 8 { u64_at(entry, 0)? } else { u64::from(u32_at(entry, 0)?) };
        let Some(table) = table(memory, address) else { continue };
        match &table[..4] {
            b"APIC" => machine.apic_ids = apic_ids(table),
            b"FACP" => {
                machine.pm_timer_port = port_at(table, 76);
                machine.power = Power { off: soft_off(memory, table), reset: reset(table) };
            }
            _ => {}
        }
    }
    Some(machine)
}

/// The enabled local APICs and x2APICs of a MADT.
fn apic_ids(madt: &[u8]) -> Vec<u32> {
    const ENABLED: u32 = 1;
    let mut ids = Vec::new();
    let mut rest = madt.get(HEADER + 8..).unwrap_or_default();
    while let [kind, length, ..] = *rest {
        let Some(entry) = rest.get(..usize::from(length)).filter(|e| e.len() >= 2) else { break };
        let found = match kind {
            0 => (entry.get(3).map(|&id| u32::from(id)), u32_at(entry, 4)),
            9 => (u32_at(entry, 4), u32_at(entry, 8)),
            _ => (None, None),
        };
        if let (Some(id), Some(flags)) = found
            && flags & ENABLED != 0
        {
            ids.push(id);
        }
        rest = &rest[entry.len()..];
    }
    ids
}

/// Where and how S5 is asked for: the registers from the FADT, their values from the DSDT.
fn soft_off(memory: &impl Memory, fadt: &[u8]) -> Option<SoftOff> {
    let extended = u64_at(fadt, 140).filter(|&address| address != 0);
    let dsdt = table(memory, extended.or(u32_at(fadt, 40).map(u64::from))?)?;
    let [a, b] = sleep_types(&dsdt[HEADER..])?;
    let enable = port_at(fadt, 48).zip(fadt.get(52).copied().filter(|&value| value != 0));
    let control = [port_at(fadt, 64).map(|port| (port, a)), port_at(fadt, 68).map(|port| (port, b))];
    control[0].map(|_| SoftOff { enable, control })
}

/// The first two values of the package `\_S5` (20.2 for the encoding). The language is not interpreted: a package of
/// constants under that name is what all firmware has.
fn sleep_types(code: &[u8]) -> Option<[u8; 2]> {
    const PACKAGE: u8 = 0x12;
    const BYTE: u8 = 0x0a;
    let at = code.windows(5).position(|window| window == [b'_', b'S', b'5', b'_', PACKAGE])? + 5;
    // The package's length: the upper two bits of its first byte say how many follow. Then the number of its elements.
    let mut rest = code.get(at + 2 + usize::from(code.get(at)? >> 6)..)?;
    let mut element = || {
        let (value, length) = match *rest {
            [BYTE, value, ..] => (value, 2),
            [value @ 0..=1, ..] => (value, 1),
            _ => return None,
        };
        rest = &rest[length..];
        // SLP_TYP has three bits.
        (value < 8).then_some(value)
    };
    Some([element()?, element()?])
}

/// The reset register, where the FADT says that there is one and it is a port.
fn reset(fadt: &[u8]) -> Option<(u16, u8)> {
    const RESET_SUPPORTED: u32 = 1 << 10;
    const IO_SPACE: u8 = 1;
    let supported = u32_at(fadt, 112)? & RESET_SUPPORTED != 0 && *fadt.get(116)? == IO_SPACE;
    let port = u16::try_from(u64_at(fadt, 120)?).ok()?;
    (supported && port != 0).then_some((port, *fadt.get(128)?))
}

/// A port's number in a field of 32 bits; 0 says that there is none.
fn port_at(table: &[u8], offset: usize) -> Option<u16> {
    u16::try_from(u32_at(table, offset)?).ok().filter(|&port| port != 0)
}

fn table(memory: &impl Memory, address: u64) -> Option<&[u8]> {
    let length = u32_at(memory.bytes(address, HEADER)?, 4)? as usize;
    let table = memory.bytes(address, length)?;
    (length >= HEADER && sums_to_zero(table)).then_some(table)
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)) == 0
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..offset + 8)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    struct Ram(Vec<u8>);

    impl Memory for Ram {
        fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
            let start = usize::try_from(address).ok()?;
            self.0.get(start..start.checked_add(length)?)
        }
    }

    fn put_table(ram: &mut [u8], at: usize, signature: &[u8; 4], body: &[u8]) {
        let length = HEADER + body.len();
        ram[at..at + 4].copy_from_slice(signature);
        ram[at + 4..at + 8].copy_from_slice(&(length as u32).to_le_bytes());
        ram[at + HEADER..at + length].copy_from_slice(body);
        let sum = ram[at..at + length].iter().fold(0u8, |s, b| s.wrapping_add(*b));
        ram[at + 9] = 0u8.wrapping_sub(sum);
    }

    fn machine() -> Vec<u8> {
        let mut ram = vec![0; 0x2000];
        ram[..8].copy_from_slice(b"RSD PTR ");
        ram[16..20].copy_from_slice(&0x100u32.to_le_bytes());
        ram[8] = 0u8.wrapping_sub(ram[..20].iter().fold(0u8, |s, b| s.wrapping_add(*b)));
        put_table(&mut ram, 0x100, b"RSDT", &[0x200u32, 0x400, 0xffff_0000].map(u32::to_le_bytes).concat());
        let mut madt = vec![0; 8];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        madt.extend([0, 8, 1, 1, 0, 0, 0, 0]);
        madt.extend([9, 16, 0, 0, 0x34, 0x12, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        put_table(&mut ram, 0x200, b"APIC", &madt);
        let mut fadt = vec![0; 129 - HEADER];
        let mut put = |at: usize, bytes: &[u8]| fadt[at - HEADER..][..bytes.len()].copy_from_slice(bytes);
        put(40, &0x800u32.to_le_bytes());
        put(48, &0xb2u32.to_le_bytes());
        put(52, &[0xf1]);
        put(64, &0x604u32.to_le_bytes());
        put(76, &0x608u32.to_le_bytes());
        put(112, &(1u32 << 10).to_le_bytes());
        put(116, &[1, 8, 0, 0]);
        put(120, &0xcf9u64.to_le_bytes());
        put(128, &[6]);
        put_table(&mut ram, 0x400, b"FACP", &fadt);
        put_table(&mut ram, 0x800, b"DSDT", b"\x08_S4_\x12\x04\x02\x01\x01\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00");
        ram
    }

    #[test]
    fn cpus_and_timer_are_found() {
        let found = read(&Ram(machine()), 0).unwrap();
        let off = SoftOff { enable: Some((0xb2, 0xf1)), control: [Some((0x604, 5)), None] };
        let power = Power { off: Some(off), reset: Some((0xcf9, 6)) };
        assert_eq!(found, Machine { apic_ids: vec![0, 0x1234], pm_timer_port: Some(0x608), power });
    }

    #[test]
    fn broken_tables_are_passed_over() {
        let mut ram = machine();
        ram[0x204] = 0xff;
        assert_eq!(read(&Ram(ram.clone()), 0).unwrap().apic_ids, [0u32; 0]);
        ram[1] = b'x';
        assert_eq!(read(&Ram(ram), 0), None);
    }

    #[test]
    fn soft_off_is_found_or_not_and_never_beyond_the_table() {
        assert_eq!(sleep_types(b"_S5_\x12\x06\x04\x00\x01\x00\x00"), Some([0, 1]));
        assert_eq!(sleep_types(b"_S5_\x12\x40\x0a\x04\x0a\x07\x0a\x07"), Some([7, 7]), "a length of two bytes");
        for whole in [&b"_S5_\x12\x06\x04\x0a\x05\x0a\x05"[..], b"_S5_\x12\xc0\x00\x00\x00\x04\x00\x00"] {
            assert!(sleep_types(whole).is_some());
            for length in 0..whole.len() {
                assert_eq!(sleep_types(&whole[..length]), None, "{length}");
            }
        }
        assert_eq!(sleep_types(b"_S5_\x12\x06\x04\x0a\x08\x00"), None, "eight needs four bits");
        assert_eq!(sleep_types(b"_S5_\x12\x06\x04\x0b\x05\x00"), None, "a word");
    }

    #[test]
    fn an_entry_of_length_zero_ends_the_walk() {
        let mut madt = vec![0; HEADER + 8];
        madt.extend([0, 0, 1, 1]);
        assert_eq!(apic_ids(&madt), [0u32; 0]);
    }
}
