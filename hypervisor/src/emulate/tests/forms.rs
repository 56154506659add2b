//! Forms of instructions beyond moves and simple arithmetic.

use super::*;

#[test]
fn arithmetic_on_device_memory() {
    let at = DEVICE + 0x80;
    // (code, device before, device after, rax after, rdx after); rax is 0x0305 and rdx 0 before.
    let cases: [(&[u8], u64, u64, u64, u64); 11] = [
        (&[0xc1, 0x27, 4], 0x1234_5678, 0x2345_6780, 0x305, 0), // shl dword [rdi], 4
        (&[0xd1, 0x3f], 0x8000_0001, 0xc000_0000, 0x305, 0),    // sar dword [rdi], 1
        (&[0xc0, 0x07, 4], 0x12, 0x21, 0x305, 0),               // rol byte [rdi], 4
        (&[0xf6, 0x27], 3, 3, 0xf, 0),                          // mul byte [rdi]
        (&[0xf7, 0x27], 0x1000_0000, 0x1000_0000, 0x5000_0000, 0x30), // mul dword [rdi]
        (&[0xf6, 0x37], 4, 4, 0x01c1, 0),                       // div byte [rdi]: 0x305 / 4
        (&[0x0f, 0xaf, 0x07], 0xffff_ffff, 0xffff_ffff, 0xffff_fcfb, 0), // imul eax, [rdi]
        (&[0x6b, 0x07, 0xfe], 5, 5, 0xffff_fff6, 0),            // imul eax, [rdi], -2
        (&[0x0f, 0xbc, 0x07], 0x50, 0x50, 4, 0),                // bsf eax, [rdi]
        (&[0xf3, 0x0f, 0xb8, 0x07], 0x77, 0x77, 6, 0),          // popcnt eax, [rdi]
        (&[0x0f, 0xa4, 0x07, 8], 0x1122_3344, 0x2233_4400, 0x305, 0), // shld [rdi], eax, 8
    ];
    for (code, before, after, rax, rdx) in cases {
        let (mut cpu, mut machine) = wide();
        cpu.registers.general[0] = 0x305;
        machine.put(at, 8, before);
        let outcome = run(&cpu, &mut machine, code);
        let general = outcome.registers.general;
        assert_eq!((outcome.end, general[0], general[2]), (End::Done, rax, rdx), "{code:x?}");
        assert_eq!(machine.value(at, 8), after, "{code:x?}");
        assert_eq!(outcome.registers.rip, CODE + code.len() as u64);
    }
    let (cpu, mut machine) = wide();
    assert_eq!(run(&cpu, &mut machine, &[0xf7, 0x37]).end, End::Raise(Exception::Divide));
}

#[test]
fn eight_bytes_are_compared_and_exchanged_at_once() {
    let (mut cpu, mut machine) = wide();
    let at = DEVICE + 0x80;
    machine.put(at, 8, 0x0000_0002_0000_0001);
    (cpu.registers.general[0], cpu.registers.general[2]) = (1, 2);
    (cpu.registers.general[3], cpu.registers.general[1]) = (3, 4);
    let outcome = run(&cpu, &mut machine, &[0xf0, 0x0f, 0xc7, 0x0f]); // lock cmpxchg8b [rdi]
    assert_eq!((machine.value(at, 8), outcome.registers.rflags & alu::ZF), (0x0000_0004_0000_0003, alu::ZF));
    let outcome = run(&cpu, &mut machine, &[0x0f, 0xc7, 0x0f]);
    assert_eq!((outcome.registers.general[0], outcome.registers.general[2]), (3, 4));
    assert_eq!(outcome.registers.rflags & alu::ZF, 0);
}

#[test]
fn vectors_move_whole_and_in_parts() {
    const VALUE: u128 = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;
    let at = DEVICE + 0x80;
    let (mut cpu, mut machine) = wide();
    cpu.cr4 |= 1 << 9;
    let halves = [VALUE as u64, (VALUE >> 64) as u64];
    machine.wide.vectors[1] = halves;
    assert_eq!(run(&cpu, &mut machine, &[0xf3, 0x0f, 0x7f, 0x0f]).end, End::Done); // movdqu [rdi], xmm1
    assert_eq!((machine.value(at, 8), machine.value(at + 8, 8)), (VALUE as u64, (VALUE >> 64) as u64));
    assert_eq!(machine.events.len(), 2);
    let load = |machine: &mut Machine, code: &[u8]| {
        machine.wide.vectors[1] = halves;
        assert_eq!(run(&cpu, machine, code).end, End::Done);
        let [low, high] = machine.wide.vectors[1];
        u128::from(high) << 64 | u128::from(low)
    };
    assert_eq!(load(&mut machine, &[0x66, 0x0f, 0x6f, 0x4f, 0]), VALUE); // movdqa xmm1, [rdi]
    assert_eq!(load(&mut machine, &[0x66, 0x0f, 0x6e, 0x0f]), 0x0302_0100); // movd
    assert_eq!(load(&mut machine, &[0xf2, 0x0f, 0x10, 0x0f]), 0x0706_0504_0302_0100); // movsd
    machine.put(at, 8, u64::MAX);
    assert_eq!(load(&mut machine, &[0x0f, 0x12, 0x0f]), VALUE | u128::from(u64::MAX)); // movlps
    assert_eq!(load(&mut machine, &[0x0f, 0x16, 0x0f]), VALUE | u128::from(u64::MAX) << 64); // movhps
    let end = |cpu: &Cpu, code: &[u8]| run(cpu, &mut Machine::new(), code).end;
    let flat = Cpu { cr0: 1, efer: 0, segments: [self::flat(DATA); 6], ..cpu };
    let flat = Cpu {
        segments: {
            let mut all = flat.segments;
            all[segment::CS] = self::flat(FLAT_32);
            all
        },
        ..flat
    };
    let odd = Cpu { registers: Registers { general: [DEVICE + 4; 16], ..flat.registers }, ..flat };
    assert_eq!(end(&odd, &[0x66, 0x0f, 0x6f, 0x0f]), End::Raise(Exception::GeneralProtection), "not aligned");
    assert_eq!(end(&odd, &[0xf3, 0x0f, 0x6f, 0x0f]), End::Done);
    assert_eq!(
        end(&Cpu { cr0: flat.cr0 | 8, ..flat }, &[0xf3, 0x0f, 0x6f, 0x0f]),
        End::Raise(Exception::DeviceNotAvailable)
    );
    assert_eq!(end(&Cpu { cr4: 0x20, ..flat }, &[0xf3, 0x0f, 0x6f, 0x0f]), End::Raise(Exception::InvalidOpcode));
}

#[test]
fn calls_and_returns_by_a_stack_in_device_memory() {
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[4] = DEVICE + 0x88;
    let outcome = run(&cpu, &mut machine, &[0xe8, 0x10, 0, 0, 0]); // call
    assert_eq!((outcome.registers.rip, outcome.registers.general[4]), (CODE + 0x15, DEVICE + 0x80));
    assert_eq!(machine.value(DEVICE + 0x80, 8), CODE + 5);
    cpu.registers = Registers { rip: CODE, ..outcome.registers };
    let outcome = run(&cpu, &mut machine, &[0xc2, 0x10, 0]); // ret 16
    assert_eq!((outcome.registers.rip, outcome.registers.general[4]), (CODE + 5, DEVICE + 0x98));
    machine.put(DEVICE + 0x80, 8, 0x4321);
    assert_eq!(run(&cpu, &mut machine, &[0xff, 0x27]).registers.rip, 0x4321); // jmp [rdi]
    let outcome = run(&cpu, &mut machine, &[0xff, 0x17]); // call [rdi]
    assert_eq!((outcome.registers.rip, machine.value(DEVICE + 0x78, 8)), (0x4321, CODE + 2));
    cpu.registers.general[5] = DEVICE + 0x80;
    let outcome = run(&cpu, &mut machine, &[0xc9]); // leave
    assert_eq!((outcome.registers.general[5], outcome.registers.general[4]), (0x4321, DEVICE + 0x88));
    cpu.registers.general[4] = DEVICE + 0x40;
    let outcome = run(&cpu, &mut machine, &[0xc8, 0x20, 0, 0]); // enter 32, 0
    assert_eq!((outcome.registers.general[5], outcome.registers.general[4]), (DEVICE + 0x38, DEVICE + 0x18));
    assert_eq!(machine.value(DEVICE + 0x38, 8), DEVICE + 0x80);
    machine.put(DEVICE + 0x80, 8, 1 << 63);
    let outcome = run(&cpu, &mut machine, &[0xff, 0x27]);
    assert_eq!((outcome.end, outcome.registers), (End::Raise(Exception::GeneralProtection), cpu.registers));
}

#[test]
fn a_byte_is_looked_up() {
    let (mut cpu, mut machine) = wide();
    (cpu.registers.general[3], cpu.registers.general[0]) = (DEVICE, 0xff83);
    machine.put(DEVICE + 0x83, 1, 0x5a);
    let outcome = run(&cpu, &mut machine, &[0xd7]); // xlat
    assert_eq!((outcome.end, outcome.registers.general[0], outcome.registers.rip), (End::Done, 0xff5a, CODE + 1));
}

#[test]
fn mmx_registers_move_and_the_words_of_the_x87_unit() {
    const TS: u64 = 1 << 3;
    let at = DEVICE + 0x80;
    let (cpu, mut machine) = wide();
    machine.wide.floating.mmx[1] = 0x0102_0304_0506_0708;
    let outcome = run(&cpu, &mut machine, &[0x0f, 0x7f, 0x0f]); // movq [rdi], mm1
    assert_eq!((outcome.end, machine.value(at, 8)), (End::Done, 0x0102_0304_0506_0708));
    assert_eq!(machine.wide.floating.used, MmxUse::Read);
    machine.put(at, 8, 0x8070_6050_4030_2010);
    for (code, value) in [(&[0x0f, 0x6f, 0x17], 0x8070_6050_4030_2010u64), (&[0x0f, 0x6e, 0x17], 0x4030_2010)] {
        assert_eq!(run(&cpu, &mut machine, code).end, End::Done); // movq, movd mm2, [rdi]
        let floating = machine.wide.floating;
        assert_eq!((floating.mmx[2], floating.used), (value, MmxUse::Written(2)), "{code:x?}");
    }
    let outcome = run(&cpu, &mut machine, &[0x0f, 0xe7, 0x0f]); // movntq [rdi], mm1
    assert_eq!((outcome.end, machine.value(at, 8)), (End::Done, 0x0102_0304_0506_0708));
    (machine.wide.floating.control, machine.wide.floating.status) = (0x37f, 0x3804);
    assert_eq!(run(&cpu, &mut machine, &[0xd9, 0x3f]).end, End::Done); // fnstcw [rdi]
    assert_eq!(machine.value(at, 4), 0x0506_037f);
    assert_eq!(run(&cpu, &mut machine, &[0xdd, 0x3f]).end, End::Done); // fnstsw [rdi]
    assert_eq!(machine.value(at, 2), 0x3804);
    // Division by zero is flagged: masked no longer, it is raised by what waits.
    machine.put(at, 2, 0x0300);
    assert_eq!(run(&cpu, &mut machine, &[0xd9, 0x2f]).end, End::Done); // fldcw [rdi]
    let after = machine.wide.floating;
    assert_eq!((after.control, after.status), (0x0340, 0xb884));
    let end = |cpu: &Cpu, code: &[u8]| {
        let mut machine = wide().1;
        machine.wide.floating = after;
        run(cpu, &mut machine, code).end
    };
    for waits in [&[0x0f, 0x7f, 0x0f][..], &[0xd9, 0x2f]] {
        assert_eq!(end(&cpu, waits), End::Raise(Exception::FloatingPoint), "{waits:x?}");
    }
    assert_eq!(end(&cpu, &[0xdd, 0x3f]), End::Done, "this one does not");
    let without = Cpu { cr0: cpu.cr0 | 1 << 2, ..cpu };
    assert_eq!(end(&without, &[0x0f, 0x7f, 0x0f]), End::Raise(Exception::InvalidOpcode));
    for (cr0, code) in [(TS, &[0x0f, 0x7f, 0x0f][..]), (TS, &[0xd9, 0x2f]), (1 << 2, &[0xd9, 0x3f])] {
        assert_eq!(
            end(&Cpu { cr0: cpu.cr0 | cr0, ..cpu }, code),
            End::Raise(Exception::DeviceNotAvailable),
            "{code:x?}"
        );
    }
}
