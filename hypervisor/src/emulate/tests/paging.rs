//! Accesses through the guest's tables.

use super::*;

#[test]
fn accessed_and_dirty_bits_are_set_as_by_a_cpu() {
    let (mut cpu, mut machine) = wide();
    machine.long_tables(3);
    cpu.registers.general[7] = 0x6000;
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, End::Done);
    assert_eq!((machine.value(0x8_3030, 8), machine.value(0x8_0000, 8)), (0x6023, 0x8_1027));
    assert_eq!(run(&cpu, &mut machine, &[0x89, 0x07]).end, End::Done);
    assert_eq!(machine.value(0x8_3030, 8), 0x6063);
    assert_eq!(machine.value(0x8_3008, 8), 0x1023, "code is not dirtied");
}

/// Runs `mov eax, [rdi]` or `mov [rdi], eax` at a page whose entry is `entry`; the code's page stays accessible.
fn paged(change: impl Fn(&mut Cpu), entry: u64, write: bool) -> End {
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[7] = 0x6000;
    change(&mut cpu);
    let code_entry = if cpu.cpl == 3 { 0x1067 } else { 0x1063 };
    machine.put(0x8_3008, 8, code_entry);
    machine.put(0x8_3030, 8, entry);
    run(&cpu, &mut machine, if write { &[0x89, 0x07] } else { &[0x8b, 0x07] }).end
}

#[test]
fn rights_and_error_codes() {
    let fault = |code| End::Raise(Exception::PageFault { code, address: 0x6000 });
    let kernel = |_: &mut Cpu| {};
    let user = |cpu: &mut Cpu| cpu.cpl = 3;
    let smap = |cpu: &mut Cpu| cpu.cr4 |= 1 << 21;
    let smap_open = |cpu: &mut Cpu| {
        cpu.cr4 |= 1 << 21;
        cpu.registers.rflags |= 1 << 18;
    };
    let no_wp = |cpu: &mut Cpu| cpu.cr0 &= !(1 << 16);
    assert_eq!(paged(kernel, 0x6001, true), fault(3), "WP");
    assert_eq!(paged(no_wp, 0x6001, true), End::Done);
    assert_eq!(paged(user, 0x6001, false), fault(5));
    assert_eq!(paged(user, 0x6005, true), fault(7));
    assert_eq!(paged(user, 0x6004, true), fault(6), "not present");
    assert_eq!(paged(user, 0x6007, true), End::Done);
    assert_eq!(paged(smap, 0x6007, false), fault(1));
    assert_eq!(paged(smap_open, 0x6007, false), End::Done);
    assert_eq!(paged(kernel, 0x6003 | 1 << 45, false), fault(9), "beyond the physical address");
    assert_eq!(paged(kernel, 0x6003 | 1 << 63, false), End::Done, "NX does not concern data");
    let no_nx = |cpu: &mut Cpu| cpu.efer &= !(1 << 11);
    assert_eq!(paged(no_nx, 0x6003 | 1 << 63, false), fault(9));
}

#[test]
fn fetches_obey_nx_and_smep() {
    let (cpu, mut machine) = wide();
    machine.put(0x8_3008, 8, 0x1003 | 1 << 63);
    let fault = End::Raise(Exception::PageFault { code: 0x11, address: CODE });
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, fault);
    machine.put(0x8_3008, 8, 0x1007);
    let smep = Cpu { cr4: cpu.cr4 | 1 << 20, ..cpu };
    assert_eq!(run(&smep, &mut machine, &[0x8b, 0x07]).end, fault);
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, End::Done);
}

#[test]
fn an_instruction_across_pages_needs_the_second_only_if_it_reaches_it() {
    let (mut cpu, mut machine) = wide();
    machine.put(0x8_3010, 8, 0); // page 2 is gone
    cpu.registers.rip = 0x1ffe;
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, End::Done);
    cpu.registers.rip = 0x1fff;
    machine.ram[0x1fff] = 0x8b;
    assert_eq!(step(&cpu, &mut machine).end, End::Raise(Exception::PageFault { code: 0x10, address: 0x2000 }));
}

#[test]
fn older_paging_modes() {
    for pae in [false, true] {
        let (mut cpu, mut machine) = (cpu(false), Machine::new());
        cpu.cr0 |= 1 << 31 | 1 << 16;
        cpu.registers.general[7] = 0x40_6004;
        if pae {
            machine.put(0x8_0000, 8, 0x8_1001);
            machine.put(0x8_1000, 8, 0xe3);
            machine.put(0x8_1010, 8, 0x8_2003);
            machine.put(0x8_2030, 8, DEVICE | 3);
        } else {
            cpu.cr4 = 1 << 4;
            machine.put(0x8_0000, 4, 0xe3);
            machine.put(0x8_0004, 4, 0x8_2003);
            machine.put(0x8_2018, 4, DEVICE | 3);
        }
        assert_eq!(run(&cpu, &mut machine, &[0x89, 0x07]).end, End::Done, "pae {pae}");
        assert_eq!(machine.events, [Event::Write(DEVICE + 4, 4, 0)]);
        cpu.registers.general[7] = 0x80_0000;
        let fault = End::Raise(Exception::PageFault { code: 2, address: 0x80_0000 });
        assert_eq!(run(&cpu, &mut machine, &[0x89, 0x07]).end, fault);
    }
}

#[test]
fn five_levels() {
    let (mut cpu, mut machine) = wide();
    machine.put(0x8_5000, 8, 0x8_0007);
    (cpu.cr3, cpu.cr4) = (0x8_5000, cpu.cr4 | 1 << 12);
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, End::Done);
    cpu.registers.general[7] = 1 << 56;
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, End::Raise(Exception::GeneralProtection));
}

#[test]
fn protection_keys_forbid_data_and_not_code() {
    // mov [rbx], eax, and mov eax, [rbx]; all pages are the user's and have key 3.
    let (write, read) = ([0x89, 0x03], [0x8b, 0x03]);
    let fault = |code| End::Raise(Exception::PageFault { code, address: 0x2000 });
    for (pkru, wp, cpl, code, end) in [
        (0, true, 3, write, End::Done),
        (1 << 6, true, 3, read, fault(0x25)),
        (2 << 6, true, 3, read, End::Done),
        (2 << 6, true, 3, write, fault(0x27)),
        (2 << 6, true, 0, write, fault(0x23)),
        (2 << 6, false, 0, write, End::Done),
        (1 << 6, false, 0, read, fault(0x21)),
        (!(3 << 6), true, 3, write, End::Done),
    ] {
        let (mut cpu, mut machine) = (cpu(true), Machine::new());
        machine.long_tables(3 << 59 | 7);
        (cpu.pkru, cpu.cpl, cpu.registers.general[3]) = (pkru, cpl, 0x2000);
        cpu.cr0 = 0x8000_0001 | u64::from(wp) << 16;
        assert_eq!(run(&cpu, &mut machine, &code).end, End::Done, "keys are off");
        cpu.cr4 |= 1 << 22;
        assert_eq!(run(&cpu, &mut machine, &code).end, end, "{pkru:#x} {wp} {cpl}");
    }
}
