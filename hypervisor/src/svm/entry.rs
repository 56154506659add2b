//! The world switch: from the host to the guest and back.
//!
//! What VMRUN does not switch is switched here: the general registers, x87 and SSE state (FXSAVE image), and by VMLOAD
//! and VMSAVE the hidden parts of FS, GS, TR, LDTR and the system-call MSRs. The order:
//!
//! 1. The guest's x87/SSE state and general registers are loaded with interrupts off.
//! 2. CLGI: from here no interrupt or NMI comes, so it does not matter that TR and GS are the guest's soon.
//! 3. STI: with V_INTR_MASKING the host's IF at VMRUN says whether physical interrupts leave the guest (15.21.1). One that
//!    is pending already leaves it at once: a kick sent after the vCPU said that it is in guest mode is never lost.
//! 4. VMLOAD, VMRUN, VMSAVE, VMLOAD of the host's. #VMEXIT clears GIF, and restores IF = 1.
//! 5. CLI, then STGI: a pending NMI is taken now, an interrupt waits for a window.
//!
//! The host's registers need no saving but for two: the compiler is told that all the others are lost, and knows best which
//! of them it needs. MXCSR is set to what Rust code expects, and #VMEXIT restores the flags. The x87 unit is not used by the
//! host.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr;

use crate::seams;

/// What [`enter`] switches, by address.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Switch {
    /// FXSAVE image of the guest.
    pub fx: [u8; 512],
    /// rcx, rdx, rbx, rsp (unused: in the VMCB), rbp, rsi, rdi, r8 … r15, by encoding; rax (also in the VMCB) comes first.
    pub registers: [u64; 16],
    /// Physical address of the guest's VMCB.
    pub guest: u64,
    /// Physical address of the page with the host's VMSAVE state.
    pub host: u64,
}

const REGISTERS: usize = offset_of!(Switch, registers);
const GUEST: usize = offset_of!(Switch, guest);
const HOST: usize = offset_of!(Switch, host);
const _: () = assert!(offset_of!(Switch, fx) == 0);

/// MXCSR as Rust code expects it: all exceptions masked, round to nearest.
static HOST_MXCSR: u32 = 0x1f80;

/// Runs the guest until its next exit.
///
/// # Safety
/// SVM is on for this CPU, interrupts are off, `switch` and both pages it names are valid and used by nobody else, and
/// the VMCB's controls keep the guest to its own memory and ports.
#[inline(always)]
pub unsafe fn enter(switch: &mut Switch) {
    seams::entering();
    // SAFETY: what VMRUN may do the caller vouches for. All general registers are the guest's in between: those that can be
    // declared as lost are, the others are pushed. The stack is back where it was, and #VMEXIT has restored the flags.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rdi",
            "fxrstor64 [rdi]",
            "mov rax, [rdi + {guest}]",
            "mov rcx, [rdi + {r} + 8]",
            "mov rdx, [rdi + {r} + 16]",
            "mov rbx, [rdi + {r} + 24]",
            "mov rbp, [rdi + {r} + 40]",
            "mov rsi, [rdi + {r} + 48]",
            "mov r8, [rdi + {r} + 64]",
            "mov r9, [rdi + {r} + 72]",
            "mov r10, [rdi + {r} + 80]",
            "mov r11, [rdi + {r} + 88]",
            "mov r12, [rdi + {r} + 96]",
            "mov r13, [rdi + {r} + 104]",
            "mov r14, [rdi + {r} + 112]",
            "mov r15, [rdi + {r} + 120]",
            "mov rdi, [rdi + {r} + 56]",
            "clgi",
            "sti",
            "vmload rax",
            "vmrun rax",
            "vmsave rax",
            "xchg rdi, [rsp]",
            "mov [rdi + {r} + 8], rcx",
            "mov [rdi + {r} + 16], rdx",
            "mov [rdi + {r} + 24], rbx",
            "mov [rdi + {r} + 40], rbp",
            "mov [rdi + {r} + 48], rsi",
            "mov [rdi + {r} + 64], r8",
            "mov [rdi + {r} + 72], r9",
            "mov [rdi + {r} + 80], r10",
            "mov [rdi + {r} + 88], r11",
            "mov [rdi + {r} + 96], r12",
            "mov [rdi + {r} + 104], r13",
            "mov [rdi + {r} + 112], r14",
            "mov [rdi + {r} + 120], r15",
            "pop qword ptr [rdi + {r} + 56]",
            "mov rax, [rdi + {host}]",
            "vmload rax",
            "cli",
            "stgi",
            "fxsave64 [rdi]",
            "ldmxcsr [rip + {mxcsr}]",
            "pop rbp",
            "pop rbx",
            r = const REGISTERS,
            guest = const GUEST,
            host = const HOST,
            mxcsr = sym HOST_MXCSR,
            inout("rdi") ptr::from_mut(switch) => _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
            clobber_abi("C"),
        );
    }
    seams::left();
}

/// Stores this CPU's VMLOAD state in the page at `host`, for [`Switch::host`].
///
/// # Safety
/// SVM is on for this CPU; the page is a frame of the caller's.
pub unsafe fn save_host(host: u64) {
    // SAFETY: VMSAVE writes the page at that physical address only.
    unsafe { asm!("vmsave rax", in("rax") host, options(nostack, preserves_flags)) };
}
