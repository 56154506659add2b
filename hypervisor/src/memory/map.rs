//! The hypervisor's own page tables: an identity map of everything up to the end of RAM, and at least of 4 GiB for the
//! devices there.
//!
//! The entry code maps the first 4 GiB from 2 MiB pages. What lies above is added here in the same tables, by 1 GiB
//! pages where the CPU has them. No mapping is ever taken away or changed, so no TLB ever needs a flush for it: an
//! entry that was absent is not cached (AMD APM vol. 2, 7.3.1).

use core::ptr;

use super::frames;
use crate::cpu::instructions;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const GIB: u64 = 1 << 30;
/// What the entry code maps.
pub const BOOT_LIMIT: u64 = 4 * GIB;
/// One page-directory-pointer table's worth: what this module can map.
pub const LIMIT: u64 = 512 * GIB;

/// Maps RAM up to `end` (bytes). Memory at or above [`LIMIT`] stays unmapped and must not be used.
///
/// # Safety
/// On the boot CPU, before other CPUs run, with the entry code's tables in CR3 and the frame allocator set up with
/// memory below [`BOOT_LIMIT`].
pub unsafe fn extend(end: u64) {
    let large = core::arch::x86_64::__cpuid(0x8000_0001).edx & 1 << 26 != 0;
    // SAFETY: ring 0; the tables are those of the entry code, mapped where they are.
    let pdpt = unsafe {
        let pml4: *const u64 = ptr::with_exposed_provenance((instructions::read_cr3() & !0xfff) as usize);
        ptr::with_exposed_provenance_mut::<u64>((*pml4 & !0xfff) as usize)
    };
    for gib in BOOT_LIMIT / GIB..end.min(LIMIT).div_ceil(GIB) {
        let entry = if large {
            gib * GIB | LARGE | PRESENT_WRITABLE
        } else {
            let table = frames::alloc(0).expect("a page directory during start-up");
            for index in 0..512 {
                let directory: *mut u64 = ptr::with_exposed_provenance_mut(table as usize);
                // SAFETY: a fresh frame of 512 entries.
                unsafe {
                    directory.add(index).write(gib * GIB + (index as u64) * (2 << 20) | LARGE | PRESENT_WRITABLE)
                };
            }
            table | PRESENT_WRITABLE
        };
        // SAFETY: entries 4..512 of the entry code's table are unused.
        unsafe { pdpt.add(gib as usize).write_volatile(entry) };
    }
}
