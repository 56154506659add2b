//! What the hypervisor wants to know from ACPI, and no more: the local APICs that can be started (MADT) and the port of
//! the power-management timer (FADT), as ACPI 6.5, 5.2 lays them out.
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
                machine.pm_timer_port = u32_at(table, 76).and_then(|p| u16::try_from(p).ok()).filter(|&p| p != 0)
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
        let mut fadt = vec![0; 80];
        fadt[40..44].copy_from_slice(&0x608u32.to_le_bytes());
        put_table(&mut ram, 0x400, b"FACP", &fadt);
        ram
    }

    #[test]
    fn cpus_and_timer_are_found() {
        let found = read(&Ram(machine()), 0).unwrap();
        assert_eq!(found, Machine { apic_ids: vec![0, 0x1234], pm_timer_port: Some(0x608) });
    }

    #[test]
    fn broken_tables_are_passed_over() {
        let mut ram = machine();
        ram[0x204] = 0xff;
        assert_eq!(read(&Ram(ram.clone()), 0).unwrap().apic_ids, []);
        ram[1] = b'x';
        assert_eq!(read(&Ram(ram), 0), None);
    }

    #[test]
    fn an_entry_of_length_zero_ends_the_walk() {
        let mut madt = vec![0; HEADER + 8];
        madt.extend([0, 0, 1, 1]);
        assert_eq!(apic_ids(&madt), []);
    }
}
