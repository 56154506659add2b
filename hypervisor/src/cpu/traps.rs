//! The interrupt descriptor table and its handlers.

use core::arch::naked_asm;
use core::fmt;

use spin::Once;

use super::tables::{Gate, Stack};
use super::{instructions, local, panic, vector};

/// What an exception's stub leaves on its stack.
#[repr(C)]
pub(super) struct Frame {
    /// r15 … rax, in the order of the pushes below, last first.
    registers: [u64; 15],
    vector: u64,
    code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 15] =
            ["r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rdi", "rsi", "rbp", "rbx", "rdx", "rcx", "rax"];
        // SAFETY: ring 0.
        let cr2 = unsafe { instructions::read_cr2() };
        write!(f, "exception {} (code {:#x}) at {:#x} in the hypervisor, ", self.vector, self.code, self.rip)?;
        write!(f, "rsp={:#x} rflags={:#x} cs={:#x} ss={:#x} cr2={cr2:#x}", self.rsp, self.rflags, self.cs, self.ss)?;
        NAMES.iter().zip(self.registers).try_for_each(|(name, value)| write!(f, " {name}={value:#x}"))
    }
}

/// Ends the hypervisor with a report.
extern "C" fn exception(frame: &Frame) -> ! {
    panic::stop(frame)
}

/// The common end of all exception stubs: vector and code are on the stack.
#[unsafe(naked)]
unsafe extern "C" fn exception_tail() {
    naked_asm!(
        "push rax", "push rcx", "push rdx", "push rbx", "push rbp", "push rsi", "push rdi", "push r8",
        "push r9", "push r10", "push r11", "push r12", "push r13", "push r14", "push r15",
        "mov rdi, rsp",
        "and rsp, -16",
        "cld",
        "call {exception}",
        "ud2",
        exception = sym exception,
    )
}

/// An exception for which the CPU pushes no code.
#[unsafe(naked)]
unsafe extern "C" fn plain<const VECTOR: u8>() {
    naked_asm!("push 0", "push {vector}", "jmp {tail}", vector = const VECTOR, tail = sym exception_tail)
}

/// An exception with a code.
#[unsafe(naked)]
unsafe extern "C" fn coded<const VECTOR: u8>() {
    naked_asm!("push {vector}", "jmp {tail}", vector = const VECTOR, tail = sym exception_tail)
}

/// Counts, with a full fence (a locked instruction), and nothing else: see [`super::barrier`].
#[unsafe(naked)]
unsafe extern "C" fn nmi() {
    naked_asm!("lock inc qword ptr gs:[{nmis}]", "iretq", nmis = const local::NMIS)
}

/// Notes that the timer fired. Interrupts come only where caller-saved registers are free for the handler.
#[unsafe(naked)]
unsafe extern "C" fn timer() {
    naked_asm!(
        "mov byte ptr gs:[{fired}], 1",
        "mov eax, {eoi}",
        "mov dword ptr [rax], 0",
        "iretq",
        fired = const local::TIMER_FIRED,
        eoi = const super::apic::EOI,
    )
}

/// A kick has no work of its own: leaving guest mode or HLT was all it is for.
#[unsafe(naked)]
unsafe extern "C" fn kick() {
    naked_asm!("mov eax, {eoi}", "mov dword ptr [rax], 0", "iretq", eoi = const super::apic::EOI)
}

/// Spurious interrupts get no EOI (AMD APM vol. 2, 16.4.7).
#[unsafe(naked)]
unsafe extern "C" fn spurious() {
    naked_asm!("iretq")
}

/// Anything else that arrives was not asked for by anyone.
#[unsafe(naked)]
unsafe extern "C" fn stray() {
    naked_asm!("push 0", "push 0x100", "jmp {tail}", tail = sym exception_tail)
}

/// The table, built at its first use.
pub(super) fn idt() -> &'static [Gate; 256] {
    static IDT: Once<[Gate; 256]> = Once::new();
    IDT.call_once(|| {
        let mut gates = [Gate::interrupt(stray, Stack::Interrupt); 256];
        macro_rules! exceptions {
            ($($stub:ident $vector:literal $stack:ident),* $(,)?) => {
                $( gates[$vector] = Gate::interrupt($stub::<$vector>, Stack::$stack); )*
            };
        }
        exceptions!(
            plain 0 Exception, plain 1 Exception, plain 3 Exception, plain 4 Exception, plain 5 Exception,
            plain 6 Exception, plain 7 Exception, coded 8 DoubleFault, plain 9 Exception, coded 10 Exception,
            coded 11 Exception, coded 12 Exception, coded 13 Exception, coded 14 Exception, plain 15 Exception,
            plain 16 Exception, coded 17 Exception, plain 18 MachineCheck, plain 19 Exception, plain 20 Exception,
            coded 21 Exception, plain 22 Exception, plain 23 Exception, plain 24 Exception, plain 25 Exception,
            plain 26 Exception, plain 27 Exception, plain 28 Exception, coded 29 Exception, coded 30 Exception,
            plain 31 Exception,
        );
        gates[2] = Gate::interrupt(nmi, Stack::Nmi);
        gates[usize::from(vector::TIMER)] = Gate::interrupt(timer, Stack::Interrupt);
        gates[usize::from(vector::KICK)] = Gate::interrupt(kick, Stack::Interrupt);
        gates[usize::from(vector::SPURIOUS)] = Gate::interrupt(spurious, Stack::Interrupt);
        gates
    })
}
