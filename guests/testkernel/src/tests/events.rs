//! Exceptions, NMIs, shadows, single steps, double and triple faults.

use core::arch::asm;

use super::memory::{self, PRESENT};
use super::{provoke, windows};
use crate::apic::{self, ASSERT, SELF};
use crate::check;
use crate::cpu::{cli, sti};
use crate::smp;
use crate::traps::{
    self, BREAKPOINT, DEBUG, DOUBLE_FAULT, GENERAL_PROTECTION, INVALID_OPCODE, NMI, OnNmi, PAGE_FAULT,
    SEGMENT_NOT_PRESENT, count,
};

const VECTOR: u8 = 0xa1;

pub(super) fn run() {
    smp::everywhere(|number| {
        exceptions(number);
        non_maskable();
        shadows();
        single_steps();
        windows::run();
    });
    windows::from_others();
    double_fault();
    restart();
}

fn exceptions(number: usize) {
    let before = [0, BREAKPOINT, INVALID_OPCODE, GENERAL_PROTECTION, PAGE_FAULT].map(count);
    // SAFETY: each of these faults is expected.
    unsafe {
        provoke!(["div {zero:e}"] zero = in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _,);
        asm!("int3");
        provoke!(["ud2"]);
        // An MSR that nobody has; reached by an exit, and injected.
        provoke!(["rdmsr"] in("ecx") 0x1234_5678, out("eax") _, out("edx") _,);
        // A selector beyond the table; raised by the processor itself.
        provoke!(["mov fs, {s:e}"] s = in(reg) 0x1ff8,);
    }
    let (code, ..) = traps::last();
    check!(code == 0x1ff8, "#GP with the selector: {code:#x}");
    let linear = memory::map(100 + number, 0, 0);
    // SAFETY: the fault is expected.
    unsafe { provoke!(["mov [{a}], {a}"] a = in(reg) linear + 0x123,) };
    let (code, cr2, _) = traps::last();
    check!((code, cr2) == (2, linear + 0x123), "#PF: code {code:#x}, CR2 {cr2:#x}");
    memory::map(100 + number, 0x40_0000, PRESENT);
    // SAFETY: the fault is expected.
    unsafe { provoke!(["mov [{a}], {a}"] a = in(reg) linear,) };
    check!(traps::last().0 == 3, "#PF of a read-only page: code {:#x}", traps::last().0);
    let after = [0, BREAKPOINT, INVALID_OPCODE, GENERAL_PROTECTION, PAGE_FAULT].map(count);
    let times: [u32; 5] = core::array::from_fn(|index| after[index] - before[index]);
    check!(times == [1, 1, 1, 2, 2], "exceptions: {times:?}");
}

fn non_maskable() {
    let before = count(NMI);
    traps::on_nmi(OnNmi::Again);
    apic::send(0, apic::NMI | SELF | ASSERT);
    while count(NMI) < before + 2 {
        core::hint::spin_loop();
    }
    // A halted processor wakes by one, also without interrupts.
    apic::send(0, apic::NMI | SELF | ASSERT);
    while count(NMI) < before + 3 {
        core::hint::spin_loop();
    }
    check!(count(NMI) == before + 3, "{} NMIs", count(NMI) - before);
}

/// Interrupts that are pending when they become possible: not behind STI, and not behind MOV SS.
fn shadows() {
    let before = count(VECTOR);
    cli();
    apic::send(0, SELF | ASSERT | u32::from(VECTOR));
    // SAFETY: flags are put back.
    unsafe { asm!("sti", "cli") };
    check!(count(VECTOR) == before, "an interrupt in the shadow of STI");
    // The instruction in the shadow is one that leaves the guest.
    // SAFETY: CPUID changes registers only.
    unsafe { asm!("push rbx", "sti", "cpuid", "cli", "pop rbx", inout("eax") 0 => _, out("ecx") _, out("edx") _) };
    check!(count(VECTOR) == before + 1, "no interrupt behind the shadow of STI");
    // HLT in the shadow: the interrupt ends it.
    apic::send(0, SELF | ASSERT | u32::from(VECTOR));
    // SAFETY: handlers keep all registers.
    unsafe { asm!("sti", "hlt", "cli") };
    check!(count(VECTOR) == before + 2, "HLT slept over a pending interrupt");
    sti();
    cli();
}

/// A trap behind each instruction, also behind one that the hypervisor executes.
fn single_steps() {
    for emulated in [false, true] {
        let before = count(DEBUG);
        let (start, end): (u64, u64);
        // SAFETY: the trap flag is taken back by the handler; CPUID changes registers only.
        unsafe {
            if emulated {
                asm!(
                    "push rbx", "lea rsi, [rip + 56f]", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "cpuid", "56:", "nop", "pop rbx",
                    inout("eax") 0 => _, out("ecx") _, out("edx") _, out("rsi") end,
                );
            } else {
                asm!(
                    "lea {e}, [rip + 56f]", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "56:", "nop",
                    e = out(reg) end,
                );
            }
        }
        start = traps::last().2;
        check!(count(DEBUG) == before + 1, "{} single steps, emulated {emulated}", count(DEBUG) - before);
        check!(start == end, "a single step at {start:#x} instead of {end:#x}, emulated {emulated}");
    }
}

/// #GP cannot be delivered, so #DF comes.
fn double_fault() {
    let faults = || [count(DOUBLE_FAULT), count(SEGMENT_NOT_PRESENT)];
    traps::set_gate(GENERAL_PROTECTION, false);
    // Once before it counts, so that the stack of #DF is mapped. On shadow tables a page that is not interrupts the delivery,
    // and what QEMU's emulation then says was on its way is the #GP, not the #DF that it had become.
    // SAFETY: as below.
    unsafe {
        provoke!(["mov fs, {s:e}"] s = in(reg) 0x1ff8,);
    }
    let before = faults();
    // One that the processor raises, and one that is injected.
    // SAFETY: the faults are expected, and #DF has a stack of its own.
    unsafe {
        provoke!(["mov fs, {s:e}"] s = in(reg) 0x1ff8,);
        check!(faults() == [before[0] + 1, before[1]], "no double fault");
        provoke!(["rdmsr"] in("ecx") 0x1234_5678, out("eax") _, out("edx") _,);
    }
    traps::set_gate(GENERAL_PROTECTION, true);
    // QEMU's emulation does not know an injected exception for a cause of the next: it delivers the second as it is.
    let after = faults();
    check!(
        after[0] + after[1] == before[0] + before[1] + 2,
        "an injected exception that can't be delivered: {after:?}"
    );
}

/// INIT takes a processor from whatever it does; a start-up IPI starts it anew.
fn restart() {
    for number in 1..smp::count() {
        smp::forget_one();
        smp::start(number);
    }
    smp::everywhere(|number| check!(traps::processor() == number, "a processor that was started anew"));
}

/// Nothing can be delivered.
pub(super) fn triple_fault() {
    for vector in [DOUBLE_FAULT, SEGMENT_NOT_PRESENT, INVALID_OPCODE] {
        traps::set_gate(vector, false);
    }
    // SAFETY: this is the machine's end.
    unsafe { asm!("ud2") };
}
