//! A vCPU's events and state, without a CPU.

use nestling::Hpa;

use super::super::vmcb::TlbControl;
use super::*;
use crate::memory::frames::testing;
use crate::vm::guest_cpu::NestedCpu;

const WINDOW: u32 = Intercepts1::VINTR.bits();

pub(super) fn vcpu() -> Vcpu {
    vcpu_of(Features::NONE)
}

pub(super) fn vcpu_of(features: Features) -> Vcpu {
    testing::machine();
    let mut vcpu = Vcpu::new(features, &Maps::new().unwrap()).unwrap();
    vcpu.save_mut().rflags |= RFLAGS_IF;
    vcpu
}

/// What the CPU does at an exit with the words that tell of events.
pub(super) fn exit(vcpu: &mut Vcpu, still_requested: bool, interrupted: u64) {
    vcpu.event = 0;
    let control = &mut vcpu.vmcb_mut().control;
    if !still_requested {
        control.virtual_interrupt &= !virtual_interrupt::REQUEST;
    }
    control.exit_event = interrupted;
    vcpu.settle_events();
}

fn requested(vcpu: &Vcpu) -> Option<u8> {
    let word = vcpu.vmcb().control.virtual_interrupt;
    (word & virtual_interrupt::REQUEST != 0).then_some((word >> virtual_interrupt::VECTOR_SHIFT) as u8)
}

#[test]
fn an_interrupt_is_offered_until_it_is_taken() {
    let mut vcpu = vcpu();
    vcpu.interrupt(0xec);
    assert_eq!((requested(&vcpu), vcpu.can_take_interrupt()), (Some(0xec), false));
    exit(&mut vcpu, true, 0);
    assert_eq!((requested(&vcpu), vcpu.has_event()), (Some(0xec), true), "a physical interrupt came first");
    exit(&mut vcpu, false, 0);
    assert_eq!((requested(&vcpu), vcpu.has_event(), vcpu.can_take_interrupt()), (None, false, true));
}

#[test]
fn a_fault_during_delivery_makes_one_interrupt_of_it_on_both_kinds_of_machine() {
    // By the manual: V_IRQ is gone, EXITINTINFO has the interrupt. In QEMU: V_IRQ is still set, and EXITINTINFO calls
    // the vector an exception. In either case it is offered once, and nothing is injected beside it.
    let manual = event::VALID | event::INTERRUPT | 0xec;
    let emulated = event::VALID | event::EXCEPTION | 0xec;
    for (still_requested, interrupted) in [(false, manual), (true, emulated), (false, emulated)] {
        let mut vcpu = vcpu();
        vcpu.interrupt(0xec);
        exit(&mut vcpu, still_requested, interrupted);
        assert_eq!((requested(&vcpu), vcpu.event), (Some(0xec), 0));
        exit(&mut vcpu, false, 0);
        assert_eq!((requested(&vcpu), vcpu.has_event()), (None, false), "and then it is over");
    }
}

#[test]
fn interrupted_exceptions_go_in_again_and_software_ones_run_again() {
    let mut vcpu = vcpu();
    let page_fault = event::VALID | event::EXCEPTION | event::HAS_CODE | 14 | 2 << 32;
    exit(&mut vcpu, false, page_fault);
    assert_eq!((vcpu.event, vcpu.can_take_interrupt()), (page_fault, false));
    for software in [event::SOFTWARE | 0x80, event::EXCEPTION | 3, event::EXCEPTION | 4] {
        exit(&mut vcpu, false, event::VALID | software);
        assert_eq!(vcpu.event, 0);
    }
    exit(&mut vcpu, false, event::INTERRUPT | 0xec);
    assert!(!vcpu.has_event(), "not valid: what the low bits say is old");
}

#[test]
fn an_exception_beside_an_offered_interrupt_keeps_both() {
    let mut vcpu = vcpu();
    vcpu.interrupt(0x30);
    let page_fault = event::VALID | event::EXCEPTION | event::HAS_CODE | 14;
    exit(&mut vcpu, true, page_fault);
    assert_eq!((requested(&vcpu), vcpu.event), (Some(0x30), page_fault));
}

#[test]
fn windows_open_and_close_without_losing_an_interrupt() {
    let mut vcpu = vcpu();
    vcpu.save_mut().rflags &= !RFLAGS_IF;
    assert!(!vcpu.can_take_interrupt());
    vcpu.open_interrupt_window();
    assert!(vcpu.vmcb().control.intercepts_1 & WINDOW != 0 && requested(&vcpu).is_some());
    assert!(!vcpu.has_event(), "a window is no event");
    vcpu.save_mut().rflags |= RFLAGS_IF;
    exit(&mut vcpu, true, 0);
    vcpu.interrupt(0x40);
    assert_eq!((vcpu.vmcb().control.intercepts_1 & WINDOW, requested(&vcpu)), (0, Some(0x40)));
    vcpu.open_interrupt_window();
    vcpu.close_interrupt_window();
    assert_eq!(requested(&vcpu), Some(0x40));
}

#[test]
fn a_shadow_holds_events_back() {
    let mut vcpu = vcpu();
    vcpu.vmcb_mut().control.shadow = 1;
    assert!(!vcpu.can_take_interrupt() && !vcpu.can_take_nmi());
    vcpu.advance(2);
    assert!(vcpu.can_take_interrupt() && vcpu.can_take_nmi());
}

#[test]
fn the_resume_flag_is_as_the_cpu_leaves_it() {
    let mut vcpu = vcpu();
    vcpu.raise(Raised::GeneralProtection);
    assert!(vcpu.save().rflags & RFLAGS_RF != 0, "in the frame of a fault");
    vcpu.advance(2);
    assert!(vcpu.save().rflags & RFLAGS_RF == 0, "not behind an instruction");
    vcpu.save_mut().dr7 |= DR7_GD;
    vcpu.raise(Raised::Again(Intercepted::Debug));
    assert_eq!((vcpu.save().rflags & RFLAGS_RF, vcpu.save().dr7), (0, 0x400));
}

/// A state with something in every field.
fn busy() -> Vcpu {
    let mut vcpu = vcpu();
    for index in 0..16 {
        vcpu.set_register(index, 0x1111_1111_1111_1111 * index as u64);
    }
    for (number, field) in MSRS.into_iter().enumerate() {
        vcpu.set(field, 0x100 + number as u64);
    }
    let save = vcpu.save_mut();
    for (number, segment) in [
        &mut save.es,
        &mut save.cs,
        &mut save.ss,
        &mut save.ds,
        &mut save.fs,
        &mut save.gs,
        &mut save.tr,
        &mut save.ldtr,
        &mut save.gdtr,
        &mut save.idtr,
    ]
    .into_iter()
    .enumerate()
    {
        let number = number as u64;
        *segment = Segment { selector: 8 + number as u16, attributes: 0x93, limit: 77, base: 0x1000 + number };
    }
    (save.cr0, save.cr2, save.cr3, save.cr4) = (0x8000_0011, 0xdead, 0x5000, 0x20);
    (save.efer, save.rip, save.cpl) = (EFER_SVME | 0xd01, 0x40_0000, 3);
    (save.dr6, save.dr7) = (0xffff_4ff0, 0x455);
    vcpu.switch.fx[40] = 9;
    vcpu.vmcb_mut().control.shadow = 1;
    vcpu.interrupt(0x55);
    vcpu.nmi();
    vcpu
}

#[test]
fn a_saved_vcpu_is_restored_whole() {
    let saved = busy().export();
    let bytes = postcard::to_allocvec(&saved).unwrap();
    let again: CpuState = postcard::from_bytes(&bytes).unwrap();
    let mut other = vcpu();
    other.raise(Raised::Stack);
    other.import(&again).unwrap();
    assert_eq!(other.export(), saved);
    assert_eq!((requested(&other), other.has_event()), (Some(0x55), true));
    assert!(!other.can_take_nmi() && !other.can_take_interrupt());
    assert_eq!(other.vmcb().control.intercepts_1, busy().vmcb().control.intercepts_1, "IRET ends the NMI here too");
    assert_eq!(other.export().registers.efer | EFER_SVME, other.vmcb().save.efer);
}

#[test]
fn what_would_harm_the_host_is_refused() {
    let mut vcpu = vcpu();
    let good = busy().export();
    let mut refused = |change: &dyn Fn(&mut CpuState)| {
        let mut state = good.clone();
        change(&mut state);
        vcpu.import(&state).expect_err("refused").what
    };
    assert_eq!(refused(&|state| state.fx[27] = 0x80), "MXCSR");
    assert_eq!(refused(&|state| state.registers.efer |= EFER_SVME), "EFER");
    assert_eq!(refused(&|state| state.registers.cr0 |= 1 << 32), "control registers");
    assert_eq!(refused(&|state| state.dr7 |= 1 << 63), "control registers");
    assert_eq!(refused(&|state| state.registers.cpl = 4), "privilege level");
    for event in [1, event::VALID | event::INTERRUPT | 3, event::VALID | event::EXCEPTION | 32] {
        assert_eq!(refused(&move |state| state.event = event), "event");
    }
}

#[test]
fn loading_a_state_forgets_events() {
    let mut vcpu = vcpu();
    vcpu.interrupt(0x40);
    vcpu.raise(Raised::InvalidOpcode);
    vcpu.load(&VcpuInit::startup(0x9a));
    assert!(!vcpu.has_event() && requested(&vcpu).is_none());
    let registers = vcpu.registers();
    assert_eq!((registers.segments[1].base, registers.rip, registers.efer), (0x9_a000, 0, 0));
    assert_eq!(vcpu.save().efer, EFER_SVME);
}

#[test]
fn whatever_makes_an_entry_another_one_marks_it() {
    let ways: [fn(&mut Vcpu); 6] = [
        |vcpu| vcpu.interrupt(0x40),
        |vcpu| vcpu.nmi(),
        |vcpu| vcpu.raise(Raised::InvalidOpcode),
        |vcpu| vcpu.raise(Raised::Again(Intercepted::Debug)),
        |vcpu| vcpu.open_interrupt_window(),
        |vcpu| vcpu.watch_task_priority(true),
    ];
    for (index, way) in ways.into_iter().enumerate() {
        let mut vcpu = vcpu();
        vcpu.settle_control();
        assert_eq!(vcpu.next, Entry::Flushing, "the first entry flushes, and nothing waits");
        way(&mut vcpu);
        assert_eq!(vcpu.next, Entry::Unusual, "way {index}");
        vcpu.settle_control();
        assert_eq!(vcpu.next, Entry::Unusual, "way {index}: it is still to come");
    }
}

/// A flush makes an entry one that asks for it, and nothing else.
#[test]
fn a_flush_is_owed_until_an_entry_asks_for_it() {
    let ways: [fn(&mut Vcpu); 3] = [|vcpu| vcpu.flush(), |vcpu| vcpu.set_root(Hpa(0x5000)), |vcpu| vcpu.set_status(1)];
    for way in ways {
        let mut vcpu = vcpu();
        vcpu.take_flush();
        vcpu.settle_control();
        assert_eq!(vcpu.next, Entry::Plain);
        way(&mut vcpu);
        assert_eq!((vcpu.next, vcpu.flush), (Entry::Flushing, TlbControl::FlushAll));
        vcpu.settle_control();
        assert_eq!(vcpu.next, Entry::Flushing, "it is still to come");
        assert_eq!((vcpu.take_flush(), vcpu.flush), (TlbControl::FlushAll, TlbControl::Keep));
        assert_eq!(vcpu.take_flush(), TlbControl::Keep);
    }
}

#[test]
fn a_plain_entry_finds_nothing_of_the_one_before() {
    let mut vcpu = vcpu();
    let control = &mut vcpu.vmcb_mut().control;
    (control.event, control.tlb_control, control.cr_writes) = (event::VALID, TlbControl::FlushAll as u32, CR8);
    vcpu.flush = TlbControl::Keep;
    vcpu.settle_control();
    let control = &vcpu.vmcb().control;
    assert_eq!((control.event, control.tlb_control, control.cr_writes), (0, TlbControl::Keep as u32, 0));
    assert_eq!(vcpu.next, Entry::Plain);
}
