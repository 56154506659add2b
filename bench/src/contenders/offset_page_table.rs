//! `x86_64`'s `OffsetPageTable` behind a spin lock, taken for each page.

#![expect(unsafe_code, reason = "the peer's interface: its callers promise that they know what they map")]

use spin::Mutex;
use x86_64::structures::paging::mapper::{Mapper, OffsetPageTable};
use x86_64::structures::paging::{FrameAllocator, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

use super::{Contender, Seat, backing, pages_from};
use crate::arena::{self, Claim};

/// Frames from the arena.
#[derive(Debug)]
struct Frames;

// SAFETY: the arena gives each frame once.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    #[inline]
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        arena::take().map(|address| PhysFrame::containing_address(PhysAddr::new(address)))
    }
}

/// See the module head.
#[derive(Debug)]
pub struct X86_64 {
    table: Mutex<OffsetPageTable<'static>>,
    root: u64,
    _claim: Claim,
}

impl Contender for X86_64 {
    const NAME: &'static str = "x86_64";
    type Seat<'c> = &'c Mutex<OffsetPageTable<'static>>;

    fn new(claim: Claim) -> Self {
        let root = arena::alloc().expect("the arena has just been claimed");
        // SAFETY: the arena gave the frame just now, zeroed, which is a valid empty table; it is not 0. It stays for as
        // long as the claim, which is dropped after the table that borrows it.
        let level_4 = unsafe { arena::entries(root).cast::<PageTable>().as_mut() };
        // SAFETY: physical addresses are virtual addresses in the arena, and the hierarchy is empty.
        let table = unsafe { OffsetPageTable::new(level_4, VirtAddr::zero()) };
        Self { table: Mutex::new(table), root, _claim: claim }
    }

    fn seat(&self, _number: u16) -> &Mutex<OffsetPageTable<'static>> {
        &self.table
    }

    fn root(&self) -> u64 {
        self.root
    }
}

#[inline]
fn page(gpa: u64) -> Page {
    Page::containing_address(VirtAddr::new(gpa))
}

impl Seat for &Mutex<OffsetPageTable<'static>> {
    #[inline(never)]
    fn fault(&mut self, gpa: u64) -> bool {
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
        let frame = PhysFrame::containing_address(PhysAddr::new(backing(gpa)));
        // SAFETY: no CPU ever uses this table, so what it maps harms nobody.
        match unsafe { self.lock().map_to(page(gpa), frame, flags, &mut Frames) } {
            Ok(flush) => {
                flush.ignore();
                true
            }
            Err(_) => false,
        }
    }

    #[inline(never)]
    fn look_up(&mut self, gpa: u64) -> Option<u64> {
        self.lock().translate_page(page(gpa)).ok().map(|frame| frame.start_address().as_u64())
    }

    #[inline(never)]
    fn zap(&mut self, gpa: u64) -> bool {
        match self.lock().unmap(page(gpa)) {
            Ok((_, flush)) => {
                flush.ignore();
                true
            }
            Err(_) => false,
        }
    }

    /// Page by page, which is all that there is.
    fn zap_range(&mut self, first: u64, pages: u64) -> u64 {
        pages_from(first, pages).filter(|&gpa| self.zap(gpa)).count() as u64
    }
}
