//! What a vCPU's state from elsewhere must be before it is put in a control block.

use super::event;
use crate::devices::saved::{BadState, require};
use crate::vm::guest_cpu::CpuState;

/// Refuses a state that would harm the host, or that VMRUN would refuse (15.5.1) by an exit that tells nobody why. What is
/// merely strange is the guest's own.
pub(super) fn check(state: &CpuState) -> Result<(), BadState> {
    const EFER: u64 = 1 << 0 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 14;
    let mxcsr = u32::from_le_bytes([state.fx[24], state.fx[25], state.fx[26], state.fx[27]]);
    // FXRSTOR refuses reserved bits, in the hypervisor.
    require("vCPU", "MXCSR", mxcsr & !mxcsr_mask() == 0)?;
    require("vCPU", "EFER", state.registers.efer & !EFER == 0)?;
    let low = [state.registers.cr0, state.dr6, state.dr7].iter().all(|value| value >> 32 == 0);
    require("vCPU", "control registers", low)?;
    require("vCPU", "privilege level", state.registers.cpl < 4)?;
    let legal = match (state.event & event::VALID != 0, state.event & event::KIND) {
        (false, _) => state.event == 0,
        (true, event::NMI) => state.event as u8 == 2,
        (true, event::EXCEPTION) => (state.event as u8) < 32 && state.event as u8 != 2,
        _ => false,
    };
    require("vCPU", "event", legal)
}

/// The bits of MXCSR that this CPU has (11.5.10).
fn mxcsr_mask() -> u32 {
    #[repr(align(16))]
    struct Image([u8; 512]);
    let mut image = Image([0; 512]);
    // SAFETY: FXSAVE exists on every 64-bit CPU and writes the image only.
    unsafe { core::arch::x86_64::_fxsave64(image.0.as_mut_ptr()) };
    match u32::from_le_bytes([image.0[28], image.0[29], image.0[30], image.0[31]]) {
        0 => 0xffbf,
        mask => mask,
    }
}
