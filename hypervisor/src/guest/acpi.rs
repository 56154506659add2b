//! The guest's ACPI tables (ACPI 6.5): RSDP, XSDT (and RSDT for old software), FADT, FACS, MADT and a DSDT that knows
//! sleep types only: `\_S5`, and `\_S3` on a machine with an I/O APIC, which is one for test kernels.
//!
//! The machine is described as what it is: PC hardware without PCI devices, without a keyboard controller and with an I/O
//! APIC or without one ([`Controllers`]). MADT says PCAT_COMPAT, so a kernel knows about the pair of 8259s. FADT names the reset register, the ACPI registers of [`crate::devices::pm`], and no SMI command port,
//! which means that the machine is in ACPI mode for good.

use alloc::vec::Vec;

use super::GuestMemory;
use crate::devices::platform::{IRQ_SCI, TIMER_INPUT};
use crate::devices::{cmos, ioapic, lapic, pm, reset};

const OEM_ID: [u8; 6] = *b"NESTLG";
const OEM_TABLE_ID: [u8; 8] = *b"NESTLING";
const CREATOR_ID: [u8; 4] = *b"NSTL";
const REVISION: u32 = 1;

/// Length of the header that all tables but RSDP and FACS share.
const HEADER: usize = 36;
const CHECKSUM_AT: usize = 9;
const RSDP_BYTES: u64 = 36;
/// Tables start at multiples of this; FACS asks for it.
const ALIGN: usize = 64;
/// Where FACS is, from the RSDP on.
const FACS_AT: u64 = RSDP_BYTES.next_multiple_of(ALIGN as u64);
/// The waking vector in it: a physical address that real mode reaches.
const WAKING_VECTOR_AT: u64 = 12;

/// `WBINVD` works; there is no sleep button; PM_TMR has 32 bits; RESET_REG exists.
const FADT_FLAGS: u32 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 10;
/// IAPC_BOOT_ARCH: legacy devices are there; there is neither VGA nor MSI.
const FADT_BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 3;
const MADT_PCAT_COMPAT: u32 = 1 << 0;

/// The most processors that the tables can describe.
pub const MAX_PROCESSORS: u32 = lapic::MAX_VCPUS as u32;

/// The interrupt controllers of a machine, beside the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controllers {
    /// A pair of 8259s.
    Pic,
    /// In addition an I/O APIC.
    IoApic,
}

/// The tables for a machine with `processors` (1..=[`MAX_PROCESSORS`]) processors, laid out to be written at guest
/// address `base` (a multiple of 64, the result below 4 GiB). The RSDP comes first, at `base` itself.
pub fn build(base: u64, processors: u32, controllers: Controllers) -> Vec<u8> {
    let mut image = Image { base, bytes: Vec::new() };
    image.place(&[0; RSDP_BYTES as usize]);
    let facs = image.place(&facs());
    let dsdt = image.place(&dsdt(controllers));
    let fadt = image.place(&fadt(facs, dsdt));
    let madt = image.place(&madt(processors, controllers));
    let (mut narrow, mut wide) = (Vec::new(), Vec::new());
    for table in [fadt, madt] {
        narrow.extend_from_slice(&(table as u32).to_le_bytes());
        wide.extend_from_slice(&table.to_le_bytes());
    }
    let rsdt = image.place(&table(*b"RSDT", 1, &narrow));
    let xsdt = image.place(&table(*b"XSDT", 1, &wide));
    image.bytes[..RSDP_BYTES as usize].copy_from_slice(&rsdp(rsdt, xsdt));
    image.bytes
}

/// Where the guest whose tables are at `base` wants to go on after a sleep; `None` if it has not said, or nowhere that real
/// mode reaches.
pub fn waking_vector(memory: &impl GuestMemory, base: u64) -> Option<u32> {
    let mut vector = [0; 4];
    memory.read(base + FACS_AT + WAKING_VECTOR_AT, &mut vector).ok()?;
    Some(u32::from_le_bytes(vector)).filter(|vector| (1..1 << 20).contains(vector))
}

struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and returns its guest address.
    fn place(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

/// What must be added to make all bytes sum to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEADER + body.len());
    table.extend_from_slice(&signature);
    table.extend_from_slice(&((HEADER + body.len()) as u32).to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(&OEM_ID);
    table.extend_from_slice(&OEM_TABLE_ID);
    table.extend_from_slice(&REVISION.to_le_bytes());
    table.extend_from_slice(&CREATOR_ID);
    table.extend_from_slice(&REVISION.to_le_bytes());
    table.extend_from_slice(body);
    table[CHECKSUM_AT] = checksum(&table);
    table
}

/// ACPI 5.2.5.3.
fn rsdp(rsdt: u64, xsdt: u64) -> [u8; RSDP_BYTES as usize] {
    let mut rsdp = [0; RSDP_BYTES as usize];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(&OEM_ID);
    rsdp[15] = 2;
    rsdp[16..20].copy_from_slice(&(rsdt as u32).to_le_bytes());
    rsdp[20..24].copy_from_slice(&(RSDP_BYTES as u32).to_le_bytes());
    rsdp[24..32].copy_from_slice(&xsdt.to_le_bytes());
    // The first checksum covers what version 1 had, the second everything.
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// ACPI 5.2.10. A kernel expects it where the hardware is not "reduced", and puts its waking vector there.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&64u32.to_le_bytes());
    facs[32] = 2;
    facs
}

/// ACPI 5.2.9, revision 6.5; offsets from the start of the table.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let mut body = [0; 276 - HEADER];
    let mut put = |at: usize, bytes: &[u8]| body[at - HEADER..at - HEADER + bytes.len()].copy_from_slice(bytes);
    let port = |offset: u16| u32::from(pm::PM_BASE + offset).to_le_bytes();
    put(36, &(facs as u32).to_le_bytes());
    put(40, &(dsdt as u32).to_le_bytes());
    put(46, &u16::from(IRQ_SCI).to_le_bytes());
    put(56, &port(pm::PM_EVENT));
    put(64, &port(pm::PM_CONTROL));
    put(76, &port(pm::PM_TIMER));
    // Lengths of the event, control and timer blocks.
    put(88, &[4, 2, 0, 4]);
    // C2 and C3 latencies beyond which those states are not supported.
    put(96, &101u16.to_le_bytes());
    put(98, &1001u16.to_le_bytes());
    put(108, &[cmos::CENTURY]);
    put(109, &FADT_BOOT_ARCH.to_le_bytes());
    put(112, &FADT_FLAGS.to_le_bytes());
    put(116, &io_address(reset::RESET_CONTROL, 8, Access::Byte));
    put(128, &[reset::RESET_VALUE]);
    put(131, &[5]);
    // The 64-bit fields must agree with the 32-bit ones or be 0; X_FIRMWARE_CTRL must be 0 when the other is used.
    put(140, &dsdt.to_le_bytes());
    // The event block is two registers of 16 bits, to be accessed as such.
    put(148, &io_address(pm::PM_BASE + pm::PM_EVENT, 32, Access::Word));
    put(172, &io_address(pm::PM_BASE + pm::PM_CONTROL, 16, Access::Word));
    put(208, &io_address(pm::PM_BASE + pm::PM_TIMER, 32, Access::Dword));
    table(*b"FACP", 6, &body)
}

/// Access size of a generic address.
#[derive(Clone, Copy)]
enum Access {
    Byte = 1,
    Word = 2,
    Dword = 3,
}

/// A generic address (ACPI 5.2.3.2) in I/O space.
fn io_address(port: u16, bits: u8, access: Access) -> [u8; 12] {
    let mut address = [0; 12];
    address[..4].copy_from_slice(&[1, bits, 0, access as u8]);
    address[4..12].copy_from_slice(&u64::from(port).to_le_bytes());
    address
}

/// ACPI 5.2.12.
fn madt(processors: u32, controllers: Controllers) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&(lapic::APIC_DEFAULT_BASE as u32).to_le_bytes());
    body.extend_from_slice(&MADT_PCAT_COMPAT.to_le_bytes());
    for id in 0..processors.min(MAX_PROCESSORS) as u8 {
        // Processor local APIC: UID, APIC ID, enabled.
        body.extend_from_slice(&[0, 8, id, id]);
        body.extend_from_slice(&1u32.to_le_bytes());
    }
    if controllers == Controllers::IoApic {
        // I/O APIC: ID, reserved, address, first input. Source override: the timer's line of bus 0 (ISA) is at another
        // input, with the bus's polarity and trigger mode.
        body.extend_from_slice(&[1, 12, 0, 0]);
        body.extend_from_slice(&(ioapic::IOAPIC_BASE as u32).to_le_bytes());
        body.extend_from_slice(&0u32.to_le_bytes());
        body.extend_from_slice(&[2, 10, 0, 0]);
        body.extend_from_slice(&u32::from(TIMER_INPUT).to_le_bytes());
        body.extend_from_slice(&[0, 0]);
    }
    // Local APIC NMI: LINT1 of all processors.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 5, &body)
}

/// `Name (\_S5, Package () { 5, 5, 0, 0 })` and its like, ACPI 7.4.2.6 and 20.2.
fn dsdt(controllers: Controllers) -> Vec<u8> {
    let mut aml = Vec::new();
    sleep_type(&mut aml, b"\\_S5_", pm::SLEEP_TYPE_S5);
    if controllers == Controllers::IoApic {
        sleep_type(&mut aml, b"\\_S3_", pm::SLEEP_TYPE_S3);
    }
    table(*b"DSDT", 2, &aml)
}

fn sleep_type(aml: &mut Vec<u8>, name: &[u8; 5], value: u8) {
    const NAME_OP: u8 = 0x08;
    const PACKAGE_OP: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0a;
    let elements = [BYTE_PREFIX, value, BYTE_PREFIX, value, 0, 0];
    aml.push(NAME_OP);
    aml.extend_from_slice(name);
    aml.push(PACKAGE_OP);
    // The package's length counts itself, the number of elements, and the elements.
    aml.push(2 + elements.len() as u8);
    aml.push(4);
    aml.extend_from_slice(&elements);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x9_0000;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    /// The table at guest address `gpa`, whose checksum is verified.
    fn table_at(image: &[u8], gpa: u64) -> &[u8] {
        let bytes = &image[(gpa - BASE) as usize..];
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {:?}", core::str::from_utf8(&table[..4]));
        table
    }

    /// The table with this signature that the XSDT lists.
    fn listed(image: &[u8], signature: &[u8; 4]) -> std::vec::Vec<u8> {
        let xsdt = table_at(image, u64_at(image, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let entries = xsdt[HEADER..].chunks(8).map(|entry| table_at(image, u64_at(entry, 0)));
        entries.filter(|table| &table[..4] == signature).map(<[u8]>::to_vec).next().expect("listed")
    }

    #[test]
    fn root_pointer_has_both_checksums() {
        let image = build(BASE, 1, Controllers::Pic);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        assert_eq!((image[15], u32_at(&image, 20)), (2, 36));
    }

    #[test]
    fn fixed_description_names_the_registers_that_exist() {
        let image = build(BASE, 1, Controllers::Pic);
        let fadt = listed(&image, b"FACP");
        assert_eq!(fadt.len(), 276);
        assert_eq!((u32_at(&fadt, 56), u32_at(&fadt, 64), u32_at(&fadt, 76)), (0x600, 0x604, 0x608));
        assert_eq!(u32_at(&fadt, 48), 0, "no SMI command port");
        assert_eq!(&fadt[116..129], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6]);
        assert_eq!(u64::from(u32_at(&fadt, 40)), u64_at(&fadt, 140));
        assert_eq!((fadt[46], fadt[108]), (9, 0x32));
        let facs = &image[(u64::from(u32_at(&fadt, 36)) - BASE) as usize..];
        assert_eq!((&facs[..4], u32_at(facs, 4)), (b"FACS".as_slice(), 64));
        assert_eq!(u64::from(u32_at(&fadt, 36)) % 64, 0);
    }

    #[test]
    fn soft_off_is_described() {
        let image = build(BASE, 1, Controllers::Pic);
        let fadt = listed(&image, b"FACP");
        let dsdt = table_at(&image, u64_at(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!(&dsdt[HEADER..], b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00");
        let image = build(BASE, 1, Controllers::IoApic);
        let dsdt = table_at(&image, u64_at(&listed(&image, b"FACP"), 140));
        assert_eq!(&dsdt[HEADER + 15..], b"\x08\\_S3_\x12\x08\x04\x0a\x01\x0a\x01\x00\x00");
    }

    #[test]
    fn a_waking_vector_is_found_where_the_tables_say() {
        let memory = crate::guest::testing::TestMemory::new(16 << 20);
        memory.write(BASE, &build(BASE, 1, Controllers::IoApic)).expect("RAM");
        assert_eq!(waking_vector(&memory, BASE), None);
        let fadt = listed(&build(BASE, 1, Controllers::IoApic), b"FACP");
        let field = u64::from(u32_at(&fadt, 36)) + 12;
        for (value, found) in
            [(0x1000u32, Some(0x1000)), (0xf_ffff, Some(0xf_ffff)), (0x10_0000, None), (u32::MAX, None)]
        {
            memory.write(field, &value.to_le_bytes()).expect("RAM");
            assert_eq!(waking_vector(&memory, BASE), found);
        }
    }

    #[test]
    fn every_processor_is_listed_once() {
        for processors in [1, 4, 64, MAX_PROCESSORS] {
            let image = build(BASE, processors, Controllers::IoApic);
            assert!(image.len() as u64 <= crate::guest::layout::ACPI_ROOM);
            let madt = listed(&image, b"APIC");
            assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
            let mut at = HEADER + 8;
            let mut ids = std::vec::Vec::new();
            while at < madt.len() {
                if madt[at] == 0 {
                    assert_eq!((madt[at + 2], u32_at(&madt, at + 4)), (madt[at + 3], 1));
                    ids.push(u32::from(madt[at + 3]));
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            assert_eq!(ids, (0..processors).collect::<std::vec::Vec<_>>());
        }
    }
}
