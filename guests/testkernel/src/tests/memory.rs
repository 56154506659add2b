//! A few pages whose mapping a check may change: linear addresses from 512 GiB on.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::invlpg;

/// Linear address of the first of these pages.
pub(crate) const PAGES: u64 = 1 << 39;
pub(crate) const PAGE: u64 = 4096;
pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;

#[repr(align(4096))]
struct Table([AtomicU64; 512]);

static POINTERS: Table = Table([const { AtomicU64::new(0) }; 512]);
static DIRECTORY: Table = Table([const { AtomicU64::new(0) }; 512]);
static LEAVES: Table = Table([const { AtomicU64::new(0) }; 512]);

unsafe extern "C" {
    static long_root: [AtomicU64; 512];
}

fn address(table: &'static Table) -> u64 {
    core::ptr::from_ref(table).expose_provenance() as u64
}

/// Maps page `index` (below 512) to a physical address, and returns its linear address. Processors other than this one may
/// have seen it mapped otherwise.
pub(crate) fn map(index: usize, physical: u64, flags: u64) -> u64 {
    let linear = PAGES + index as u64 * PAGE;
    LEAVES.0[index].store(physical | flags, Ordering::SeqCst);
    DIRECTORY.0[0].store(address(&LEAVES) | 7, Ordering::SeqCst);
    POINTERS.0[0].store(address(&DIRECTORY) | 7, Ordering::SeqCst);
    // SAFETY: the boot code's root is a table of 512 entries; entry 1 is this module's.
    unsafe { long_root[1].store(address(&POINTERS) | 7, Ordering::SeqCst) };
    invlpg(linear);
    linear
}

/// The entry of page `index`, with what the processor has marked in it.
pub(crate) fn entry(index: usize) -> u64 {
    LEAVES.0[index].load(Ordering::SeqCst)
}
