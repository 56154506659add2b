//! `page_table_multiarch`'s four-level table of x86 entries behind a spin lock, taken for each page.

use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{MappingFlags, PageSize, PageTable64, PagingHandler, PagingMetaData};
use spin::Mutex;

use super::{Contender, Seat, backing, pages_from};
use crate::arena::{self, Claim};

/// A guest's address space: nothing of it is in the TLB of the CPU that this runs on, so nothing is flushed.
#[derive(Debug)]
pub struct Guest;

impl PagingMetaData for Guest {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = VirtAddr;

    #[inline]
    fn flush_tlb(_address: Option<VirtAddr>) {}
}

/// Frames from the arena.
#[derive(Debug)]
pub struct Frames;

impl PagingHandler for Frames {
    #[inline]
    fn alloc_frames(num: usize, _align: usize) -> Option<PhysAddr> {
        // Tables are one frame each, and frames are aligned to their size.
        if num != 1 {
            return None;
        }
        arena::take().map(|address| PhysAddr::from_usize(address as usize))
    }

    fn dealloc_frames(_address: PhysAddr, _num: usize) {}

    #[inline]
    fn phys_to_virt(address: PhysAddr) -> VirtAddr {
        VirtAddr::from_usize(address.as_usize())
    }
}

type Table = PageTable64<Guest, X64PTE, Frames>;

/// See the module head.
#[allow(missing_debug_implementations, reason = "the peer's table has none")]
pub struct PageTableMultiarch {
    table: Mutex<Table>,
    _claim: Claim,
}

impl Contender for PageTableMultiarch {
    const NAME: &'static str = "page_table_multiarch";
    type Seat<'c> = &'c Mutex<Table>;

    fn new(claim: Claim) -> Self {
        Self { table: Mutex::new(Table::try_new().expect("the arena has just been claimed")), _claim: claim }
    }

    fn seat(&self, _number: u16) -> &Mutex<Table> {
        &self.table
    }

    fn root(&self) -> u64 {
        self.table.lock().root_paddr().as_usize() as u64
    }
}

#[inline]
fn virt(gpa: u64) -> VirtAddr {
    VirtAddr::from_usize(gpa as usize)
}

impl Seat for &Mutex<Table> {
    #[inline(never)]
    fn fault(&mut self, gpa: u64) -> bool {
        let flags = MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER;
        let frame = PhysAddr::from_usize(backing(gpa) as usize);
        self.lock().cursor().map(virt(gpa), frame, PageSize::Size4K, flags).is_ok()
    }

    #[inline(never)]
    fn look_up(&mut self, gpa: u64) -> Option<u64> {
        self.lock().query(virt(gpa)).ok().map(|(address, ..)| address.as_usize() as u64)
    }

    #[inline(never)]
    fn zap(&mut self, gpa: u64) -> bool {
        self.lock().cursor().unmap(virt(gpa)).is_ok()
    }

    /// Page by page: the peer's own `unmap_region` walks from the root for each page as well, and would hold the lock
    /// for the whole range.
    fn zap_range(&mut self, first: u64, pages: u64) -> u64 {
        pages_from(first, pages).filter(|&gpa| self.zap(gpa)).count() as u64
    }
}
