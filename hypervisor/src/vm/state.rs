//! A vCPU's state in the report of a death.

use alloc::vec::Vec;

use nestling::{Gpa, Hpa};
use nestling_control::config::MmuKind;
use nestling_control::message::{MAX_INSTRUCTION_BYTES, VcpuState, WalkStep};

use super::guest_cpu::GuestCpu;
use super::ring::Ring;
use super::vcpu::Vcpu;
use super::walk::{self, PagingRegisters, Walk};

const CR0_PG: u64 = 1 << 31;

/// Everything about a vCPU that helps to see why its guest died. Reads guest memory and both kinds of tables; the vCPU
/// has stopped, and others change nothing but their own registers from here on.
pub(super) fn report<C: GuestCpu>(vcpu: &Vcpu<C>, root: Hpa, ring: &Ring) -> VcpuState {
    let registers = vcpu.cpu.registers();
    let paging = PagingRegisters { cr0: registers.cr0, cr3: registers.cr3, cr4: registers.cr4, efer: registers.efer };
    let ram = vcpu.vm.mmu.host().ram();
    let read = |at: u64| {
        let mut bytes = [0; 8];
        ram.peek(Gpa(at), &mut bytes).then(|| u64::from_le_bytes(bytes))
    };
    let code = registers.segments[1].base.wrapping_add(registers.rip);
    let at_rip = walk::guest(paging, code, read);
    let instruction = at_rip.address.map_or_else(Vec::new, |gpa| {
        // Up to the end of the page: the next one may be anywhere.
        let room = (4096 - (gpa & 0xfff)).min(MAX_INSTRUCTION_BYTES as u64);
        let mut bytes = alloc::vec![0; room as usize];
        if ram.peek(Gpa(gpa), &mut bytes) { bytes } else { Vec::new() }
    });
    let fault = vcpu.cpu.last_fault().map(|fault| fault.gpa.0);
    // CR2 matters when the guest has met a page fault; a guest without paging has none.
    let at_cr2 = (registers.cr2 != 0 && registers.cr0 & CR0_PG != 0).then(|| walk::guest(paging, registers.cr2, read));
    let gpa = fault.or(at_rip.address);
    let guest_walk = at_cr2.unwrap_or(at_rip).steps;
    VcpuState {
        vcpu: vcpu.number as u32,
        registers,
        instruction,
        guest_walk,
        nested_walk: gpa
            .filter(|_| vcpu.vm.mmu_kind == MmuKind::Nested)
            .map_or_else(Vec::new, |gpa| nested_steps(root, gpa)),
        last_exits: ring.to_vec(),
    }
}

fn nested_steps(root: Hpa, gpa: u64) -> Vec<WalkStep> {
    let walked = if root == Hpa(0) {
        Walk::default()
    } else {
        // SAFETY: the vCPU holds a reference to this root, and nobody zaps while the VM is being taken down.
        unsafe { walk::nested(root.0, gpa) }
    };
    walked.steps
}
