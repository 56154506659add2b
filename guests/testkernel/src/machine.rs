//! The machine: what Multiboot and fw_cfg tell of it, and its end.

use core::sync::atomic::Ordering;

use crate::boot::{BOOT_INFO, BOOT_MAGIC};
use crate::cpu::{inb, outl, outw};

const EXIT: u16 = 0xf4;
const FW_CFG_SELECT: u16 = 0x510;
const FW_CFG_DATA: u16 = 0x511;

/// The test device's memory: every access to it is emulated.
pub(crate) const TEST_RAM: u64 = 0xff00_0000;
/// Writing a page's address here makes the host forget its mapping of it.
pub(crate) const FLUSH: u16 = 0xe4;
/// Port of the test device's first interrupt line.
pub(crate) const LINES: u16 = 0x2000;

/// Ends the machine.
pub(crate) fn exit(value: u32) -> ! {
    loop {
        outl(EXIT, value);
    }
}

/// Reads a 32-bit word of memory that the loader or a device has filled.
pub(crate) fn word(address: u64) -> u32 {
    // SAFETY: all of the first 4 GiB is mapped, and reading has no effect on this kernel.
    unsafe { core::ptr::with_exposed_provenance::<u32>(address as usize).read_volatile() }
}

/// Writes a word of device memory.
pub(crate) fn set_word(address: u64, value: u32) {
    // SAFETY: callers pass addresses of devices, which are nobody's memory.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address as usize).write_volatile(value) };
}

/// The ACPI table of that signature.
pub(crate) fn acpi_table(signature: &[u8; 4]) -> Option<u64> {
    let root = (0xe_0000..0x10_0000).step_by(16).find(|at| (word(*at), word(at + 4)) == (0x2044_5352, 0x2052_5450))?;
    let tables = u64::from(word(root + 16));
    let count = (u64::from(word(tables + 4)) - 36) / 4;
    let mut all = (0..count).map(|index| u64::from(word(tables + 36 + 4 * index)));
    let listed = all.find(|table| word(*table) == u32::from_le_bytes(*signature));
    if word(tables) == u32::from_le_bytes(*b"RSDT") { listed } else { None }
}

/// A word of the Multiboot information.
pub(crate) fn information(offset: u64) -> u32 {
    word(u64::from(BOOT_INFO.load(Ordering::Relaxed)) + offset)
}

/// What the loader left in EAX.
pub(crate) fn boot_magic() -> u32 {
    BOOT_MAGIC.load(Ordering::Relaxed)
}

/// Bytes that the loader has left.
pub(crate) fn bytes(address: u32, length: usize) -> &'static [u8] {
    // SAFETY: below 4 GiB everything is mapped; the loader's memory is not written by anybody.
    unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(address as usize), length) }
}

/// The command line.
pub(crate) fn command_line() -> &'static str {
    let all = bytes(information(16), 2048);
    let length = all.iter().position(|byte| *byte == 0).unwrap_or(0);
    core::str::from_utf8(&all[..length]).unwrap_or("")
}

/// The first `N` bytes of an item of fw_cfg.
pub(crate) fn fw_cfg<const N: usize>(key: u16) -> [u8; N] {
    outw(FW_CFG_SELECT, key);
    core::array::from_fn(|_| inb(FW_CFG_DATA))
}
