//! Events at the moments at which a hypervisor has to wait with them, or to hand them on: NMIs in shadows and behind IRETs
//! that fault, two at once, breakpoints and traps around instructions that the hypervisor executes, #UD and #DB that it
//! sees first.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::provoke;
use crate::apic::{self, ASSERT, SELF};
use crate::cpu::{cli, inb, sti};
use crate::traps::{self, DEBUG, DR6_CLEAN, INVALID_OPCODE, NMI, OnNmi, count};
use crate::{check, smp};

const DR6_BS: u64 = 1 << 14;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_TF: u64 = 1 << 8;
const NO_SUCH_CALL: i64 = -1000;

/// On each processor.
pub(super) fn run() {
    iret_that_faults();
    shadow_of_mov_ss();
    hypercalls();
    trap_instruction();
    breakpoints();
    steps_over_ports();
    step_over_halt();
    trap_in_shadow();
    resume_flag();
}

fn nmi_to_self() {
    apic::send(0, apic::NMI | SELF | ASSERT);
}

/// The second NMI waits for the handler of the fault that the first one's IRET raised, and then comes.
fn iret_that_faults() {
    let before = count(NMI);
    traps::on_nmi(OnNmi::Fault);
    nmi_to_self();
    while count(NMI) < before + 2 {
        core::hint::spin_loop();
    }
    let flags: u64;
    // SAFETY: it only reads.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
    check!(flags & RFLAGS_TF == 0, "a step of the hypervisor's shows in the flags: {flags:#x}");
    check!(dr6() == DR6_CLEAN, "a step of the hypervisor's shows in DR6: {:#x}", dr6());
}

/// An NMI that is sent by the instruction in a shadow comes right behind it, also with interrupts off.
fn shadow_of_mov_ss() {
    if apic::is_x2apic() {
        return;
    }
    let before = count(NMI);
    let behind: u64;
    // SAFETY: SS keeps its value.
    unsafe {
        asm!(
            "mov {ss:e}, ss", "lea {b}, [rip + 57f]", "mov ss, {ss:e}", "mov dword ptr [{icr}], {command:e}", "57:", "nop",
            ss = out(reg) _, b = out(reg) behind, icr = in(reg) apic::WINDOW + u64::from(apic::ICR),
            command = in(reg) apic::NMI | SELF | ASSERT,
        );
    }
    while count(NMI) == before {
        core::hint::spin_loop();
    }
    check!(traps::last_nmi() == behind, "an NMI at {:#x} instead of {behind:#x}", traps::last_nmi());
}

fn dr6() -> u64 {
    let value;
    // SAFETY: it only reads.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack)) };
    value
}

/// VMMCALL and VMCALL reach the hypervisor, whichever this processor has.
fn hypercalls() {
    let before = count(INVALID_OPCODE);
    let (first, second, third): (i64, i64, i64);
    // SAFETY: calls that do not exist, and one that sends to nobody.
    unsafe {
        asm!("push rbx", "vmmcall", "pop rbx", inout("rax") 0x7fff_i64 => first, out("rcx") _, out("rdx") _);
        asm!("push rbx", "vmcall", "pop rbx", inout("rax") 0x7fff_i64 => second, out("rcx") _, out("rdx") _);
        // To the processors from 0xffff_ffff on that the set in RBX names, which are none.
        asm!(
            "push rbx", "mov ebx, -1", "vmcall", "pop rbx",
            inout("rax") 10_i64 => third, in("rcx") 0, in("rdx") 0xffff_ffff_u64, in("rsi") 0,
        );
    }
    check!((first, second, third) == (NO_SUCH_CALL, NO_SUCH_CALL, 0), "calls: {first}, {second}, {third}");
    check!(count(INVALID_OPCODE) == before, "#UD for a hypercall");
    // SAFETY: the fault is expected.
    unsafe { provoke!(["ud2"]) };
    check!(count(INVALID_OPCODE) == before + 1, "UD2");
}

/// INT1 raises #DB behind itself, and DR6 does not say why.
fn trap_instruction() {
    let before = count(DEBUG);
    let behind: u64;
    // SAFETY: the trap is counted.
    unsafe { asm!("lea {}, [rip + 58f]", ".byte 0xf1", "58:", out(reg) behind) };
    let (_, _, rip) = traps::last();
    check!((count(DEBUG), rip) == (before + 1, behind), "INT1: {} at {rip:#x}", count(DEBUG) - before);
    check!(traps::last_debug().0 == DR6_CLEAN, "INT1: DR6 {:#x}", traps::last_debug().0);
}

fn set_breakpoint(address: u64, control: u64) {
    // SAFETY: a breakpoint only raises #DB, which is counted.
    unsafe {
        asm!("mov dr0, {}", "mov dr6, {}", "mov dr7, {}", in(reg) address, in(reg) DR6_CLEAN, in(reg) 0x400 | control)
    };
}

/// Debug registers are this processor's own, and survive what leaves the guest.
fn breakpoints() {
    static WATCHED: AtomicU32 = AtomicU32::new(0);
    let before = count(DEBUG);
    let value = core::ptr::from_ref(&WATCHED).expose_provenance() as u64;
    // Four bytes, writes, global.
    set_breakpoint(value, 0xd_0002);
    __cpuid(0);
    inb(0x80);
    let (kept, control): (u64, u64);
    // SAFETY: it only reads.
    unsafe { asm!("mov {}, dr0", "mov {}, dr7", out(reg) kept, out(reg) control) };
    check!((kept, control) == (value, 0xd_0402), "DR0 {kept:#x}, DR7 {control:#x} behind an exit");
    WATCHED.store(1, Ordering::SeqCst);
    set_breakpoint(0, 0);
    check!(count(DEBUG) == before + 1, "a watchpoint: {}", count(DEBUG) - before);
    check!(traps::last_debug().0 == DR6_CLEAN | 1, "a watchpoint: DR6 {:#x}", traps::last_debug().0);
    let rflags = traps::last_debug().1;
    check!(rflags & RFLAGS_TF == 0, "flags {rflags:#x}");
}

/// A trap behind each of several instructions that exit, and none more.
fn steps_over_ports() {
    let before = count(DEBUG);
    let end: u64;
    // SAFETY: the trap flag is taken back by the handler.
    unsafe {
        asm!(
            "lea {e}, [rip + 59f]", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "in al, 0x80", "59:", "nop",
            e = out(reg) end, out("al") _,
        );
    }
    check!(count(DEBUG) == before + 1 && traps::last().2 == end, "a step over IN: {:#x}", traps::last().2);
    check!(traps::last_debug().0 == DR6_CLEAN | DR6_BS, "a step over IN: DR6 {:#x}", traps::last_debug().0);
}

/// The trap behind HLT ends it at once, and what handles the trap runs.
fn step_over_halt() {
    let before = count(DEBUG);
    let end: u64;
    // SAFETY: the trap flag is taken back by the handler.
    unsafe {
        asm!("lea {e}, [rip + 60f]", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "hlt", "60:", "nop", e = out(reg) end);
    }
    check!(count(DEBUG) == before + 1 && traps::last().2 == end, "a step over HLT: {:#x}", traps::last().2);
}

/// INT1 in the shadow of MOV SS, with the trap flag set: one trap, behind it, and the flag's own behind the next.
fn trap_in_shadow() {
    let before = count(DEBUG);
    let behind: u64;
    // SAFETY: SS keeps its value; the trap flag is taken back by the handler.
    unsafe {
        asm!(
            "lea {b}, [rip + 61f]", "mov {s:e}, ss", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "mov ss, {s:e}",
            ".byte 0xf1", "61:", "nop", b = out(reg) behind, s = out(reg) _,
        );
    }
    let (at, dr6) = (traps::last().2, traps::last_debug().0);
    check!(count(DEBUG) == before + 1 && at == behind, "INT1 behind MOV SS: {} at {at:#x}", count(DEBUG) - before);
    check!(dr6 & DR6_BS == 0, "INT1 behind MOV SS: DR6 {dr6:#x}");
}

/// A fault's frame says that its instruction was met; behind an instruction that the hypervisor executes, nothing is left of
/// it.
fn resume_flag() {
    // SAFETY: the fault is expected.
    unsafe { provoke!(["rdmsr"] in("ecx") 0x1234_5678, out("eax") _, out("edx") _,) };
    let (_, flags) = traps::last_debug();
    check!(flags & RFLAGS_RF != 0, "#GP that was injected: flags {flags:#x}");
}

static SHADOWS: AtomicBool = AtomicBool::new(false);
static MET: AtomicU32 = AtomicU32::new(0);

/// NMIs from another processor, at any moment.
pub(super) fn from_others() {
    if smp::count() == 1 {
        return;
    }
    two_at_once();
    SHADOWS.store(true, Ordering::SeqCst);
    MET.store(0, Ordering::SeqCst);
    smp::begin(|number| {
        if number == 1 {
            shadows_all_the_time();
        }
    });
    for _ in 0..60 {
        let seen = traps::count_on(1, NMI);
        apic::send(1, apic::NMI | ASSERT);
        while traps::count_on(1, NMI) == seen {
            core::hint::spin_loop();
        }
    }
    SHADOWS.store(false, Ordering::SeqCst);
    smp::finish();
    check!(MET.load(Ordering::SeqCst) == 0, "{} NMIs in a shadow", MET.load(Ordering::SeqCst));
}

/// STI and MOV SS, one after the other, each with an instruction behind it that exits before it is executed: the page that
/// it reads is forgotten by the host each time.
fn shadows_all_the_time() {
    static PAGE: [AtomicU32; 1024] = [const { AtomicU32::new(0) }; 1024];
    let page = core::ptr::from_ref(&PAGE).expose_provenance() as u64;
    while SHADOWS.load(Ordering::SeqCst) {
        let (first, second): (u64, u64);
        // SAFETY: SS keeps its value, and interrupts are off before and after.
        unsafe {
            asm!(
                "out 0xe4, eax", "lea {a}, [rip + 51f]", "sti", "51:", "mov {s:e}, [{page}]", "cli",
                "out 0xe4, eax", "mov {s:e}, ss", "lea {b}, [rip + 52f]", "mov ss, {s:e}", "52:", "mov {s:e}, [{page}]",
                a = out(reg) first, b = out(reg) second, s = out(reg) _, page = in(reg) page, in("eax") page as u32,
            );
        }
        if [first, second].contains(&traps::last_nmi()) {
            MET.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Two NMIs that arrive while none is being handled are two.
fn two_at_once() {
    static ROUND: AtomicU32 = AtomicU32::new(0);
    const ROUNDS: u32 = 20;
    const AFTER: u8 = 0xb1;
    ROUND.store(0, Ordering::SeqCst);
    smp::begin(|number| {
        if number != 1 {
            return;
        }
        for round in 1..=ROUNDS {
            while ROUND.load(Ordering::SeqCst) < round {
                core::hint::spin_loop();
            }
            apic::send(0, apic::NMI | ASSERT);
            apic::send(0, apic::NMI | ASSERT);
            // It arrives behind the NMIs.
            apic::send(0, ASSERT | u32::from(AFTER));
        }
    });
    sti();
    for round in 1..=ROUNDS {
        let (nmis, after) = (count(NMI), count(AFTER));
        ROUND.store(round, Ordering::SeqCst);
        // Long in the hypervisor, so that both arrive there.
        // SAFETY: the kernel's image is longer than that, and the port is a latch.
        unsafe { asm!("rep outsb", inout("rcx") 4000u64 => _, inout("rsi") 0x40_0000u64 => _, in("dx") 0xe0u16) };
        while count(AFTER) == after {
            core::hint::spin_loop();
        }
        check!(count(NMI) == nmis + 2, "{} of two NMIs in round {round}", count(NMI) - nmis);
    }
    cli();
    smp::finish();
}
