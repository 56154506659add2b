//! Writes to CR0.

use super::*;

#[test]
fn pointers_of_a_root_are_judged_but_for_a_mark() {
    let (mut cpu, mut machine) = wide();
    (cpu.cr0, cpu.efer, cpu.cr4, cpu.cr3) = (1, 0, 1 << 5, 0x5000);
    cpu.segments[segment::CS] = flat(FLAT_32);
    cpu.registers.general[0] = 1 << 31 | 1;
    machine.ram[CODE as usize..CODE as usize + 3].copy_from_slice(&[0x0f, 0x22, 0xc0]);
    for (bits, fits) in [(0x1, true), (0x21, true), (0x9, true), (0x3, false), (0x81, false), (0x80, true)] {
        machine.put(0x5008, 8, 0x6000 | bits);
        assert_eq!(status_write(&cpu, &mut machine).is_ok(), fits, "{bits:#x}");
    }
}

#[test]
fn writes_to_cr0_are_checked_and_made_whole() {
    const PE: u64 = 1;
    const TS: u64 = 1 << 3;
    const WP: u64 = 1 << 16;
    const PG: u64 = 1 << 31;
    let (mut cpu, mut machine) = wide();
    let mut write = |cpu: &Cpu, code: &[u8]| {
        machine.ram[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
        status_write(cpu, &mut machine)
    };
    let done = |cr0, length| Ok(StatusWrite { cr0: cr0 | 1 << 4, next_rip: CODE + length });
    let refused = Err(End::Raise(Exception::GeneralProtection));
    let from_rax: &[u8] = &[0x0f, 0x22, 0xc0];
    let mut put = |cpu: &mut Cpu, value: u64| {
        cpu.registers.general[0] = value;
        write(cpu, from_rax)
    };
    assert_eq!(put(&mut cpu, PG | WP | PE | 1 << 7), done(PG | WP | PE, 3), "a bit that does not exist");
    for bad in [PG | PE | 1 << 32, PG | WP, PG | PE | 1 << 29, PE] {
        assert_eq!(put(&mut cpu, bad), refused, "{bad:#x}: the last one leaves 64-bit code without paging");
    }
    cpu.cpl = 3;
    assert_eq!(put(&mut cpu, PG | PE), refused);
    // Into long mode, from 32-bit code: with PAE only.
    let wide_code = cpu.segments[segment::CS];
    (cpu.cpl, cpu.cr0, cpu.efer) = (0, PE, 1 << 8);
    cpu.segments[segment::CS] = Segment { attributes: FLAT_32, ..wide_code };
    cpu.cr4 &= !(1 << 5);
    assert_eq!(put(&mut cpu, PG | PE), refused);
    cpu.cr4 |= 1 << 5;
    assert_eq!(put(&mut cpu, PG | PE), done(PG | PE, 3));
    cpu.segments[segment::CS] = wide_code;
    assert_eq!(put(&mut cpu, PG | PE), refused, "the next instruction would be 64-bit code");
    cpu.segments[segment::CS] = Segment { attributes: FLAT_32, ..wide_code };
    // LMSW sets PE to TS, and cannot clear PE.
    cpu.cr0 = PE | WP | TS;
    cpu.registers.general[1] = 0xffff_fff4;
    assert_eq!(write(&cpu, &[0x0f, 0x01, 0xf1]), done(PE | WP | 4, 3));
    assert_eq!(write(&cpu, &[0x0f, 0x22, 0xd8]), Err(End::Done), "CR3: somebody has changed the code");
}
