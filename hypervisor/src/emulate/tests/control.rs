//! What is read of instructions on control registers, and what may be written there.

use super::*;

const PG: u64 = 1 << 31;
const PE: u64 = 1;
const PAE: u64 = 1 << 5;
const PCIDE: u64 = 1 << 17;
const LA57: u64 = 1 << 12;
const REFUSED: End = End::Raise(Exception::GeneralProtection);

fn moved(cpu: &Cpu, machine: &mut Machine, code: &[u8]) -> Result<Option<ControlMove>, End> {
    machine.ram[CODE as usize..][..code.len()].copy_from_slice(code);
    control_move(cpu, machine)
}

fn forgotten(cpu: &Cpu, machine: &mut Machine, code: &[u8]) -> Result<(Invalidated, u64), End> {
    machine.ram[CODE as usize..][..code.len()].copy_from_slice(code);
    invalidation(cpu, machine)
}

#[test]
fn moves_are_read_as_they_stand() {
    let (mut cpu, mut machine) = wide();
    (cpu.registers.general[1], cpu.registers.general[8]) = (0x1111_2222_3333_4444, 0x8888);
    let done = |control, general, write, value, length| {
        Ok(Some(ControlMove { control, general, write, value, next_rip: CODE + length }))
    };
    assert_eq!(moved(&cpu, &mut machine, &[0x0f, 0x22, 0xd9]), done(3, 1, true, 0x1111_2222_3333_4444, 3));
    assert_eq!(moved(&cpu, &mut machine, &[0x41, 0x0f, 0x20, 0xe0]), done(4, 8, false, 0x8888, 4));
    assert_eq!(moved(&cpu, &mut machine, &[0x0f, 0x01, 0xe1]), Ok(None), "SMSW");
    assert_eq!(moved(&cpu, &mut machine, &[0x90]), Err(End::Done), "somebody has changed the code");
    cpu.cpl = 3;
    assert_eq!(moved(&cpu, &mut machine, &[0x0f, 0x22, 0xd9]), Err(REFUSED));
}

#[test]
fn invlpg_and_invpcid_name_what_is_forgotten() {
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[0] = 0x12_3456;
    let invlpg = [0x0f, 0x01, 0x38];
    assert_eq!(forgotten(&cpu, &mut machine, &invlpg), Ok((Invalidated::Address(0x12_3456), CODE + 3)));
    // invpcid rcx, [rax]
    let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x08];
    cpu.registers.general[0] = 0x2000;
    let mut put = |cpu: &mut Cpu, kind: u64, pcid: u64, linear: u64| {
        cpu.registers.general[1] = kind;
        machine.put(0x2000, 8, pcid);
        machine.put(0x2008, 8, linear);
        forgotten(cpu, &mut machine, &invpcid).map(|(what, _)| what)
    };
    assert_eq!(put(&mut cpu, 0, 0, 0x7000), Ok(Invalidated::Address(0x7000)));
    assert_eq!(put(&mut cpu, 0, 1, 0x7000), Err(REFUSED), "there are no PCIDs");
    assert_eq!(put(&mut cpu, 0, 0, 1 << 50), Err(REFUSED));
    assert_eq!(put(&mut cpu, 4, 0, 0), Err(REFUSED));
    for kind in 1..4 {
        assert_eq!(put(&mut cpu, kind, 0, 1 << 50), Ok(Invalidated::Everything));
    }
    (cpu.cr4, cpu.cr3) = (cpu.cr4 | PCIDE, cpu.cr3 | 5);
    assert_eq!(put(&mut cpu, 0, 5, 0x7000), Ok(Invalidated::Address(0x7000)));
    assert_eq!(put(&mut cpu, 0, 6, 0x7000), Ok(Invalidated::Everything), "of another address space");
    assert_eq!(put(&mut cpu, 0, 0x1000, 0x7000), Err(REFUSED));
    cpu.cpl = 3;
    assert_eq!(put(&mut cpu, 2, 0, 0), Err(REFUSED));
}

#[test]
fn cr3_is_an_address_and_may_keep_translations() {
    let (mut cpu, mut machine) = wide();
    let mut put = |cpu: &Cpu, value: u64| cr3_write(cpu, &mut machine, value);
    assert_eq!(put(&cpu, 0x1018), Some((0x1018, false)));
    assert_eq!(put(&cpu, 1 << cpu.physical_bits), None);
    assert_eq!(put(&cpu, 1 << 63 | 0x1000), None);
    cpu.cr4 |= PCIDE;
    assert_eq!(put(&cpu, 1 << 63 | 0x1007), Some((0x1007, true)));
    cpu.efer = 0;
    cpu.cr4 &= !PAE;
    assert_eq!(put(&cpu, 0x5_0000_1000), Some((0x1000, false)), "32 bits");
}

#[test]
fn the_pointers_of_a_pae_root_are_judged_when_they_would_be_loaded() {
    let (mut cpu, mut machine) = wide();
    (cpu.efer, cpu.cr0, cpu.cr4, cpu.cr3) = (0, PG | PE, PAE, 0x3000);
    machine.put(0x3020, 8, 0x5001);
    machine.put(0x3028, 8, 0xffff_ffff_ffff_fffe);
    assert_eq!(cr3_write(&cpu, &mut machine, 0x3020), Some((0x3020, false)), "what is not present has no bits");
    for bad in [1 << 1, 1 << 6, 1 << 63, 1 << 40] {
        machine.put(0x3038, 8, 0x6001 | bad);
        assert_eq!(cr3_write(&cpu, &mut machine, 0x3020), None, "{bad:#x}");
        cpu.cr3 = 0x3020;
        assert_eq!(cr4_write(&cpu, &mut machine, PAE | 1 << 7, u64::MAX), None, "{bad:#x}");
        assert_eq!(cr4_write(&cpu, &mut machine, PAE | 1 << 9, u64::MAX), Some(PAE | 1 << 9), "loads nothing");
    }
}

#[test]
fn cr4_takes_what_is_offered_and_what_the_mode_allows() {
    let (mut cpu, mut machine) = wide();
    cpu.cr3 &= !0xfff;
    let offered = PAE | LA57 | PCIDE | 1 << 7;
    let mut put = |cpu: &Cpu, value: u64| cr4_write(cpu, &mut machine, value, offered);
    (cpu.efer, cpu.cr4) = (1 << 8 | 1 << 10, PAE);
    assert_eq!(put(&cpu, PAE | 1 << 7 | PCIDE), Some(PAE | 1 << 7 | PCIDE));
    assert_eq!(put(&cpu, PAE | 1 << 8), None, "not offered");
    assert_eq!(put(&cpu, 0), None, "long mode needs it");
    assert_eq!(put(&cpu, PAE | LA57), None, "not while paging");
    cpu.cr3 |= 3;
    assert_eq!(put(&cpu, PAE | PCIDE), None, "the present PCID must be 0");
    (cpu.efer, cpu.cr0) = (0, PE);
    assert_eq!(put(&cpu, PAE | LA57), Some(PAE | LA57));
    assert_eq!(put(&cpu, PAE | PCIDE), None);
}
