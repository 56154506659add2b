//! What the loader tests share: a guest memory that is a map of pages, and a kernel image made of nothing.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::ops::Range;

use super::layout::RamLayout;
use super::{GuestMemory, GuestMemoryError};

const PAGE: u64 = 4096;

/// Pages appear when they are written, within the RAM of a layout.
pub(crate) struct TestMemory {
    ram: RamLayout,
    /// What is between the first two pieces is RAM too, as in a VM.
    whole: bool,
    pages: RefCell<BTreeMap<u64, Box<[u8; PAGE as usize]>>>,
}

impl TestMemory {
    pub(crate) fn new(bytes: u64) -> Self {
        let ram = RamLayout::new(bytes).expect("a legal size");
        Self { ram, whole: false, pages: RefCell::new(BTreeMap::new()) }
    }

    /// Memory with RAM from 0 on without a hole.
    pub(crate) fn whole(bytes: u64) -> Self {
        Self { whole: true, ..Self::new(bytes) }
    }

    pub(crate) fn bytes(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(gpa, &mut bytes).expect("RAM");
        bytes
    }

    pub(crate) fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa, 4).try_into().expect("4 bytes"))
    }

    pub(crate) fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().expect("8 bytes"))
    }

    fn check(&self, gpa: u64, bytes: usize) -> Result<(), GuestMemoryError> {
        let bytes = bytes as u64;
        let inside = |range: &super::layout::RamRange| {
            gpa >= range.gpa && gpa.checked_add(bytes).is_some_and(|end| end <= range.gpa + range.bytes)
        };
        let low = self.whole && gpa.checked_add(bytes).is_some_and(|end| end <= self.ram.low_end());
        if low || self.ram.ranges().iter().any(inside) { Ok(()) } else { Err(GuestMemoryError::NotRam { gpa, bytes }) }
    }
}

impl GuestMemory for TestMemory {
    fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.check(gpa, into.len())?;
        let pages = self.pages.borrow();
        for (page, inside, part) in pieces(gpa, into.len()) {
            match pages.get(&page) {
                Some(bytes) => into[part].copy_from_slice(&bytes[inside]),
                None => into[part].fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        self.check(gpa, bytes.len())?;
        let mut pages = self.pages.borrow_mut();
        for (page, inside, part) in pieces(gpa, bytes.len()) {
            let page = pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[inside].copy_from_slice(&bytes[part]);
        }
        Ok(())
    }
}

/// Cuts an access at page boundaries: the page, where in the page, and where in the access.
fn pieces(gpa: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = gpa + done as u64;
        let inside = (at % PAGE) as usize;
        let bytes = (length - done).min(PAGE as usize - inside);
        let piece = (at / PAGE, inside..inside + bytes, done..done + bytes);
        done += bytes;
        (bytes != 0).then_some(piece)
    })
}

/// A bzImage with a setup header of protocol 2.15 as Debian's kernels have, four setup sectors and `payload` bytes of
/// 0xcc in place of a kernel.
pub(crate) fn kernel(payload: usize) -> Vec<u8> {
    let setup_bytes = 5 * 512;
    let mut image = vec![0u8; setup_bytes];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1f4, &(payload.div_ceil(16) as u32).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x003fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x0200_0000u32.to_le_bytes());
    image.resize(setup_bytes + payload, 0xcc);
    image
}
