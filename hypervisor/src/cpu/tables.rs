//! GDT, TSS and IDT of one CPU.
//!
//! One block of frames a CPU holds its TSS, its GDT and the stacks of its gates. The IDT is the same for all.

use core::arch::{asm, naked_asm};
use core::mem::size_of;
use core::ptr;

use super::traps;
use crate::memory::frames;

const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const TASK: u16 = 0x18;

/// Order of the block: 128 KiB.
const BLOCK_ORDER: u32 = 5;
/// Bytes of each gate stack.
const STACK: u64 = 16 << 10;

/// Which stack a gate uses (IST index, 1-based). An NMI may come while an exception's handler runs and the other way
/// round, a double fault in either: each has its own.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Stack {
    Nmi = 1,
    DoubleFault = 2,
    MachineCheck = 3,
    Exception = 4,
    Interrupt = 5,
}

/// 64-bit task-state segment (AMD APM vol. 2, 12.2.5).
#[repr(C, packed(4))]
struct TaskState {
    reserved_0: u32,
    rsp: [u64; 3],
    reserved_1: u64,
    ist: [u64; 7],
    reserved_2: u64,
    reserved_3: u16,
    io_map: u16,
}

const _: () = assert!(size_of::<TaskState>() == 104);

/// A gate of the IDT (AMD APM vol. 2, 4.8.4).
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

impl Gate {
    pub(super) fn interrupt(handler: unsafe extern "C" fn(), stack: Stack) -> Self {
        const PRESENT_INTERRUPT_GATE: u8 = 0x8e;
        let address = handler as usize as u64;
        Self {
            offset_low: address as u16,
            selector: CODE,
            stack: stack as u8,
            kind: PRESENT_INTERRUPT_GATE,
            offset_middle: (address >> 16) as u16,
            offset_high: (address >> 32) as u32,
            reserved: 0,
        }
    }
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Loads this CPU's GDT, TSS and IDT.
///
/// # Safety
/// Ring 0, interrupts off, once a CPU, with the frame allocator set up.
pub unsafe fn load() {
    let block = frames::alloc(BLOCK_ORDER).expect("128 KiB for a CPU's tables and stacks");
    let gdt: *mut u64 = ptr::with_exposed_provenance_mut(block as usize);
    let task = block + 64;
    let stack_top = |stack: Stack| block + 4096 + STACK * stack as u64;
    let mut ist = [0; 7];
    for stack in [Stack::Nmi, Stack::DoubleFault, Stack::MachineCheck, Stack::Exception, Stack::Interrupt] {
        ist[stack as usize - 1] = stack_top(stack);
    }
    const _: () = assert!(4096 + STACK * 5 <= 4096 << BLOCK_ORDER);
    let state = TaskState {
        reserved_0: 0,
        rsp: [0; 3],
        reserved_1: 0,
        ist,
        reserved_2: 0,
        reserved_3: 0,
        io_map: size_of::<TaskState>() as u16,
    };
    let limit = size_of::<TaskState>() as u64 - 1;
    let task_low = limit | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56;
    let entries = [0, 0x0020_9a00_0000_0000, 0x0000_9200_0000_0000, task_low, task >> 32];
    // SAFETY: the block is ours: the GDT's 40 bytes at its start, the TSS 64 bytes in.
    unsafe {
        gdt.cast::<[u64; 5]>().write(entries);
        ptr::with_exposed_provenance_mut::<TaskState>(task as usize).write(state);
    }
    let idt = traps::idt();
    let idt_pointer =
        Pointer { limit: (size_of_val(idt) - 1) as u16, base: ptr::from_ref(idt).expose_provenance() as u64 };
    let gdt_pointer = Pointer { limit: size_of_val(&entries) as u16 - 1, base: block };
    // SAFETY: the descriptors above are complete; code and data selectors mean what they meant before.
    unsafe {
        asm!("lgdt [{}]", in(reg) &gdt_pointer, options(readonly, nostack, preserves_flags));
        reload_segments();
        asm!("ltr {:x}", in(reg) TASK, options(nostack, preserves_flags));
        asm!("lidt [{}]", in(reg) &idt_pointer, options(readonly, nostack, preserves_flags));
    }
}

/// Loads CS and the data segments from the new GDT. FS and GS stay null: their bases live in MSRs.
#[unsafe(naked)]
unsafe extern "C" fn reload_segments() {
    naked_asm!(
        "pop rax",
        "push {code}",
        "push rax",
        "mov eax, {data}",
        "mov ds, eax",
        "mov es, eax",
        "mov ss, eax",
        "retfq",
        code = const CODE,
        data = const DATA,
    )
}
