//! A vCPU's state in and out: from what a loader says, and into the report of a death.

use alloc::vec::Vec;

use nestling::Gpa;
use nestling_control::message::{MAX_INSTRUCTION_BYTES, Registers, Segment, VcpuState, WalkStep};

use super::ring::Ring;
use super::vcpu::Vcpu;
use super::walk::{self, Paging, Walk};
use crate::guest::VcpuInit;
use crate::guest::entry;
use crate::svm::exit::{self, Exit};
use crate::svm::{self, EFER_SVME, vmcb};

const RSI: usize = 6;
const CR0_PG: u64 = 1 << 31;

/// Puts a vCPU into a starting state; everything that `init` does not name is as after reset.
pub(super) fn load(cpu: &mut svm::Vcpu, init: &VcpuInit) {
    cpu.reset();
    cpu.set_register(RSI, init.rsi);
    let save = cpu.save_mut();
    let data = segment(&init.data);
    (save.ds, save.es, save.fs, save.gs, save.ss) = (data, data, data, data, data);
    (save.cs, save.tr, save.ldtr) = (segment(&init.cs), segment(&init.tr), segment(&init.ldtr));
    (save.gdtr.limit, save.gdtr.base) = (u32::from(init.gdtr.limit), init.gdtr.base);
    (save.idtr.limit, save.idtr.base) = (u32::from(init.idtr.limit), init.idtr.base);
    (save.rip, save.rsp, save.rflags) = (init.rip, init.rsp, init.rflags);
    (save.cr0, save.cr3, save.cr4) = (init.cr0, init.cr3, init.cr4);
    save.efer = init.efer | EFER_SVME;
    (save.dr6, save.dr7, save.pat) = (init.dr6, init.dr7, init.pat);
    save.cpl = 0;
}

fn segment(from: &entry::Segment) -> vmcb::Segment {
    vmcb::Segment { selector: from.selector, attributes: from.attributes, limit: from.limit, base: from.base }
}

/// Everything about a vCPU that helps to see why its guest died. Reads guest memory and both kinds of tables; the vCPU
/// has stopped, and others change nothing but their own registers from here on.
pub(super) fn report(vcpu: &Vcpu, root: u64, ring: &Ring) -> VcpuState {
    let registers = registers(&vcpu.cpu);
    let paging = Paging { cr0: registers.cr0, cr3: registers.cr3, cr4: registers.cr4, efer: registers.efer };
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
    let (exit_code, info1, info2) = vcpu.cpu.raw_exit();
    let fault = match exit::decode_raw(exit_code, info1, info2) {
        Exit::NestedFault(fault) => Some(fault.gpa),
        _ => None,
    };
    // CR2 matters when the guest has met a page fault; a guest without paging has none.
    let at_cr2 = (registers.cr2 != 0 && registers.cr0 & CR0_PG != 0).then(|| walk::guest(paging, registers.cr2, read));
    let gpa = fault.or(at_rip.address);
    let guest_walk = at_cr2.unwrap_or(at_rip).steps;
    VcpuState {
        vcpu: vcpu.number as u32,
        registers,
        instruction,
        guest_walk,
        nested_walk: gpa.map_or_else(Vec::new, |gpa| nested_steps(root, gpa)),
        last_exits: ring.to_vec(),
    }
}

fn nested_steps(root: u64, gpa: u64) -> Vec<WalkStep> {
    let walked = if root == 0 {
        Walk::default()
    } else {
        // SAFETY: the vCPU holds a reference to this root, and nobody zaps while the VM is being taken down.
        unsafe { walk::nested(root, gpa) }
    };
    walked.steps
}

fn registers(cpu: &svm::Vcpu) -> Registers {
    let save = cpu.save();
    let out =
        |s: &vmcb::Segment| Segment { selector: s.selector, attributes: s.attributes, limit: s.limit, base: s.base };
    let mut general = [0; 16];
    for (index, register) in general.iter_mut().enumerate() {
        *register = cpu.register(index);
    }
    Registers {
        rip: save.rip,
        rflags: save.rflags,
        general,
        cr0: save.cr0,
        cr2: save.cr2,
        cr3: save.cr3,
        cr4: save.cr4,
        efer: save.efer & !EFER_SVME,
        cpl: save.cpl,
        segments: [&save.es, &save.cs, &save.ss, &save.ds, &save.fs, &save.gs].map(out),
        tr: out(&save.tr),
        ldtr: out(&save.ldtr),
        gdtr: out(&save.gdtr),
        idtr: out(&save.idtr),
    }
}
