//! The window's place in this machine: the second BAR of QEMU's `ivshmem-plain` device.
//!
//! The device is looked for on bus 0 by configuration mechanism 1. Firmware has assigned its addresses and turned its
//! memory on; where that has not been done, or there is no such device, there is no window, and guests cannot be copied.
//!
//! The memory is another program's as well, at any time. It is read and written as bytes, by copies; what is looked at
//! twice was copied out before ([`nestling_control::window`]).

use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicU32, Ordering};

use nestling_control::window::{Shared, WINDOW_BYTES};

use crate::cpu::instructions::{inl, outl};
use crate::memory::map::BOOT_LIMIT;

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;
/// Red Hat's inter-VM shared memory: device 0x1110, vendor 0x1af4.
const IVSHMEM: u32 = 0x1110_1af4;
const REGISTER_ID: u8 = 0x00;
const REGISTER_COMMAND: u8 = 0x04;
const REGISTER_BAR_2: u8 = 0x18;
const MEMORY_ON: u32 = 1 << 1;
const BAR_64_BIT: u32 = 1 << 2;
const BAR_FLAGS: u32 = 0xf;

/// The window's memory.
#[derive(Debug)]
pub struct Window {
    base: u64,
}

fn read(device: u8, register: u8) -> u32 {
    // SAFETY: configuration space by mechanism 1; reading has no effect. Only CPU 0 uses these ports.
    unsafe {
        outl(ADDRESS_PORT, ENABLE | u32::from(device) << 11 | u32::from(register));
        inl(DATA_PORT)
    }
}

fn write(device: u8, register: u8, value: u32) {
    // SAFETY: as in `read`; what is written is decided by the callers.
    unsafe {
        outl(ADDRESS_PORT, ENABLE | u32::from(device) << 11 | u32::from(register));
        outl(DATA_PORT, value);
    }
}

impl Window {
    /// Looks for it. CPU 0 only, while nobody uses the window: its size is found out by moving it.
    #[must_use]
    pub fn find() -> Option<Self> {
        let device = (0..32).find(|&device| read(device, REGISTER_ID) == IVSHMEM)?;
        let command = read(device, REGISTER_COMMAND);
        let low = read(device, REGISTER_BAR_2);
        let high = if low & BAR_64_BIT != 0 { read(device, REGISTER_BAR_2 + 4) } else { 0 };
        let base = u64::from(high) << 32 | u64::from(low & !BAR_FLAGS);
        write(device, REGISTER_COMMAND, command & !MEMORY_ON);
        write(device, REGISTER_BAR_2, u32::MAX);
        let size = u64::from((read(device, REGISTER_BAR_2) & !BAR_FLAGS).wrapping_neg());
        write(device, REGISTER_BAR_2, low);
        write(device, REGISTER_COMMAND, command);
        let usable = command & MEMORY_ON != 0 && base != 0 && size >= WINDOW_BYTES as u64;
        (usable && base + WINDOW_BYTES as u64 <= BOOT_LIMIT).then_some(Self { base })
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(offset.checked_add(length).is_some_and(|end| end <= WINDOW_BYTES), "an access beyond the window");
        ptr::with_exposed_provenance_mut(self.base as usize + offset)
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: the window is mapped as long as the machine runs; the word is aligned and within it; whoever else uses it
        // does so by whole words.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// Data in the window.
    #[must_use]
    pub fn data(&self, offset: usize, length: usize) -> &[u8] {
        // SAFETY: the window is mapped as long as the machine runs. The other side leaves a slot alone that is this
        // side's; if it does not, bytes change under a reader that takes them as they are and looks at none twice.
        unsafe { slice::from_raw_parts(self.at(offset, length), length) }
    }
}

impl Shared for Window {
    fn load(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    fn store(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: both are as long as that, and nobody has a reference to the window's bytes.
        unsafe { ptr::copy_nonoverlapping(self.at(offset, into.len()), into.as_mut_ptr(), into.len()) };
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len()) };
    }

    fn fill(&self, offset: usize, length: usize, fill: &mut dyn FnMut(&mut [u8])) {
        // SAFETY: the slot is this side's until its message is published, and nobody else here has it: there is one
        // producer. What the other side does to it all the same is its own loss.
        fill(unsafe { slice::from_raw_parts_mut(self.at(offset, length), length) });
    }
}
