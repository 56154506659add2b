//! What is kept of an instruction does not outlive what it was made of.

use super::*;

/// mov eax, [rdi]
const LOAD: [u8; 2] = [0x8b, 0x07];
/// The entry that maps what it loads ([`Machine::long_tables`]).
const OPERAND: u64 = 0x8_4000 + ((DEVICE - (3 << 30)) >> 21) * 8;

#[test]
fn another_instruction_at_the_same_place_is_another_one() {
    let (mut cpu, mut machine) = wide();
    machine.put(DEVICE + 0x80, 4, 0x1234);
    cpu.registers.general[2] = 0x5678;
    assert_eq!(run(&cpu, &mut machine, &LOAD).registers.general[0], 0x1234);
    assert_eq!(run(&cpu, &mut machine, &LOAD).registers.general[0], 0x1234, "again");
    let stored = run(&cpu, &mut machine, &[0x89, 0x17]); // mov [rdi], edx
    assert_eq!((stored.end, machine.value(DEVICE + 0x80, 4)), (End::Done, 0x5678));
    assert_eq!(run(&cpu, &mut machine, &LOAD).registers.general[0], 0x5678);
}

#[test]
fn a_change_of_any_entry_is_met() {
    // Entries of the walks for the code (first four) and for the operand, which is mapped by a large page.
    for (at, present) in [(0x8_0000, true), (0x8_1000, true), (0x8_2000, true), (0x8_1018, false), (OPERAND, false)] {
        let (cpu, mut machine) = wide();
        assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done);
        assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done, "again");
        let entry = machine.value(at, 8);
        machine.put(at, 8, entry & !1);
        let address = if present { CODE } else { cpu.registers.general[7] };
        let end = run(&cpu, &mut machine, &LOAD).end;
        assert!(matches!(end, End::Raise(Exception::PageFault { address: a, .. }) if a == address), "{at:#x}: {end:?}");
        machine.put(at, 8, entry);
        assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done);
    }
}

#[test]
fn rights_and_registers_are_part_of_what_was_asked() {
    let (cpu, mut machine) = wide();
    assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done);
    let user = Cpu { cpl: 3, ..cpu };
    assert_eq!(run(&user, &mut machine, &LOAD).end, End::Done, "its pages are open to users");
    for at in [OPERAND, 0x8_3000 + (CODE >> 12) * 8] {
        let entry = machine.value(at, 8);
        machine.put(at, 8, entry & !4);
        assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done, "the kernel's now");
        assert!(matches!(run(&user, &mut machine, &LOAD).end, End::Raise(Exception::PageFault { .. })), "{at:#x}");
        machine.put(at, 8, entry);
    }
    // SMEP closes the code to the kernel; another CR3 leads to nothing.
    let closed = Cpu { cr4: cpu.cr4 | 1 << 20, ..cpu };
    assert!(matches!(run(&closed, &mut machine, &LOAD).end, End::Raise(Exception::PageFault { code: 0x11, .. })));
    let elsewhere = Cpu { cr3: 0x9_0000, ..cpu };
    assert!(matches!(run(&elsewhere, &mut machine, &LOAD).end, End::Raise(Exception::PageFault { .. })));
    assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done);
}

#[test]
fn a_write_after_a_read_leaves_its_dirty_bit() {
    let (cpu, mut machine) = wide();
    let unmarked = machine.value(OPERAND, 8) & !0x60;
    machine.put(OPERAND, 8, unmarked);
    assert_eq!(run(&cpu, &mut machine, &LOAD).end, End::Done);
    assert_eq!(machine.value(OPERAND, 8) & 0x60, 0x20, "accessed");
    assert_eq!(run(&cpu, &mut machine, &[0x89, 0x07]).end, End::Done);
    assert_eq!(machine.value(OPERAND, 8) & 0x60, 0x60, "and dirty");
    machine.put(OPERAND, 8, unmarked);
    assert_eq!(run(&cpu, &mut machine, &[0x89, 0x07]).end, End::Done);
    assert_eq!(machine.value(OPERAND, 8) & 0x60, 0x60, "again, as somebody has taken them back");
}

/// A move that is taken apart does what the same move does whole.
#[test]
fn plain_moves_are_moves() {
    let forms: [&[u8]; 10] = [
        &[0x8b, 0x47, 0x10],                         // mov eax, [rdi + 16]
        &[0x48, 0x8b, 0x4f, 0xf8],                   // mov rcx, [rdi - 8]
        &[0x66, 0x8b, 0x17],                         // mov dx, [rdi]
        &[0x8a, 0x1f],                               // mov bl, [rdi]
        &[0x44, 0x8a, 0x07],                         // mov r8b, [rdi]
        &[0x89, 0x77, 0x04],                         // mov [rdi + 4], esi
        &[0x4c, 0x89, 0x3f],                         // mov [rdi], r15
        &[0x66, 0x89, 0x07],                         // mov [rdi], ax
        &[0x40, 0x88, 0x37],                         // mov [rdi], sil
        &[0x64, 0x8b, 0x87, 0x00, 0x00, 0x00, 0x00], // mov eax, fs:[rdi]
    ];
    for code in forms {
        let (mut cpu, mut machine) = wide();
        cpu.registers.general.iter_mut().zip(1..).for_each(|(register, n)| {
            if *register == 0 {
                *register = 0x0123_4567_89ab_cdef_u64.rotate_left(n);
            }
        });
        (0..64).for_each(|n| machine.put(DEVICE + 0x60 + n, 1, 0xa0 + n));
        let mut other = Machine { ram: machine.ram.clone(), device: machine.device.clone(), ..Machine::new() };
        let outcome = run(&cpu, &mut machine, code);
        let decoded = decode(CodeSize::Bits64, CODE, code, None).expect("an instruction");
        assert!(execute::Plain::of(&decoded, CodeSize::Bits64).is_some(), "{code:x?}");
        let mut registers = cpu.registers;
        let space = Space::new(&cpu, &mut other);
        execute::Machine { space, registers: &mut registers }.execute(&decoded).expect("it moves");
        assert_eq!((outcome.registers, outcome.end), (registers, End::Done), "{code:x?}");
        assert_eq!((machine.device, machine.events), (other.device, other.events), "{code:x?}");
    }
    // mov ah, [rdi]; mov [rdi + rcx], eax; mov eax, [rip]; 32-bit addresses; another mode.
    for code in [&[0x8a, 0x27][..], &[0x89, 0x04, 0x0f], &[0x8b, 0x05, 0, 0, 0, 0], &[0x67, 0x8b, 0x07]] {
        let decoded = decode(CodeSize::Bits64, CODE, code, None).expect("an instruction");
        assert_eq!(execute::Plain::of(&decoded, CodeSize::Bits64), None, "{code:x?}");
    }
    let decoded = decode(CodeSize::Bits32, CODE, &LOAD, None).expect("an instruction");
    assert_eq!(execute::Plain::of(&decoded, CodeSize::Bits32), None);
}
