//! Segment registers, far jumps and the status word, by way of device memory.

use super::*;

/// A machine with descriptors: 0x08 and 0x10 flat data and 64-bit code, 0x18 data of level 3, 0x20 not present, 0x28 an LDT
/// and 0x38 a TSS, both of 16 bytes.
fn with_descriptors(machine: &mut Machine) {
    let low = |base: u64, limit: u64, kind: u64| {
        base << 16 & 0xff_ffff_0000 | base << 32 & 0xff << 56 | kind << 40 | limit & 0xffff | (limit & 0xf_0000) << 32
    };
    for (at, value) in [
        (0x08, low(0x1234_5678, 0xf_ffff, 0xc092)),
        (0x10, low(0, 0xf_ffff, 0xa09a)),
        (0x18, low(0, 0xfff, 0x40f3)),
        (0x20, low(0, 0xfff, 0x4013)),
        (0x28, low(0xaaaa_0000, 0x7f, 0x82)),
        (0x30, 0xffff_8000),
        (0x38, low(0xbbbb_0000, 0x67, 0x89)),
        (0x40, 1),
    ] {
        machine.put(GDT + at, 8, value);
    }
}

#[test]
fn segment_registers_are_loaded_from_a_device() {
    use Exception::{GeneralProtection, SegmentNotPresent, Selector, StackSelector};
    let load = |modrm: u8, selector: u64, cpl: u8, wide: bool| {
        let (mut cpu, mut machine) = (cpu(wide), Machine::new());
        machine.long_tables(7);
        with_descriptors(&mut machine);
        cpu.cpl = cpl;
        cpu.registers.general[3] = DEVICE;
        machine.put(DEVICE, 2, selector);
        let outcome = run(&cpu, &mut machine, &[0x8e, modrm]);
        assert_eq!(outcome.registers.loaded.is_some(), outcome.end == End::Done);
        (outcome.end, outcome.registers.loaded.map(|(_, segment)| segment), machine.value(GDT + 8, 8) >> 40 & 1)
    };
    let (ss, ds) = (0x13, 0x1b);
    let flat = Segment { selector: 8, attributes: 0xc93, limit: u32::MAX, base: 0x1234_5678 };
    for wide in [false, true] {
        assert_eq!(load(ds, 8, 0, wide), (End::Done, Some(flat), 1));
        assert_eq!(load(ss, 8, 0, wide).1, Some(flat));
        let cases = [
            (ds, 8, 3, Selector(8)),
            (ds, 11, 0, Selector(8)),
            (ss, 0x18, 0, Selector(0x18)),
            (ds, 0x20, 0, SegmentNotPresent(0x20)),
            (ss, 0x20, 0, StackSelector(0x20)),
            (ds, 0x28, 0, Selector(0x28)),
            (ds, 0x48, 0, Selector(0x48)),
            (ds, 0x0c, 0, Selector(0x0c)),
            (ss, 3, 0, GeneralProtection),
        ];
        for (modrm, selector, cpl, exception) in cases {
            assert_eq!(load(modrm, selector, cpl, wide).0, End::Raise(exception), "{selector:#x} at {cpl}, {wide}");
        }
        assert_eq!(load(ds, 0, 0, wide).1.map(|nothing| nothing.attributes), Some(0));
        assert_eq!(load(ss, 0, 0, wide).0, if wide { End::Done } else { End::Raise(GeneralProtection) });
    }
    assert_eq!(load(0x0b, 8, 0, true).0, End::Raise(Exception::InvalidOpcode), "not CS");
}

#[test]
fn far_jumps_and_system_segments() {
    let (mut cpu, mut machine) = (cpu(true), Machine::new());
    machine.long_tables(7);
    with_descriptors(&mut machine);
    cpu.registers.general[3] = DEVICE;
    machine.put(DEVICE, 8, 0x12_3456);
    machine.put(DEVICE + 8, 2, 0x10);
    let outcome = run(&cpu, &mut machine, &[0x48, 0xff, 0x2b]);
    let code = Segment { selector: 0x10, attributes: 0xa9b, limit: u32::MAX, base: 0 };
    assert_eq!((outcome.end, outcome.registers.rip), (End::Done, 0x12_3456));
    assert_eq!(outcome.registers.loaded, Some((SegmentRegister::Code(segment::CS), code)));
    machine.put(DEVICE, 8, 1 << 60);
    assert_eq!(run(&cpu, &mut machine, &[0x48, 0xff, 0x2b]).end, End::Raise(Exception::GeneralProtection));
    machine.put(DEVICE + 8, 2, 8);
    assert_eq!(run(&cpu, &mut machine, &[0x48, 0xff, 0x2b]).end, End::Raise(Exception::Selector(8)));

    let lldt = [0x0f, 0x00, 0x13];
    let ltr = [0x0f, 0x00, 0x1b];
    machine.put(DEVICE, 2, 0x28);
    let table = Segment { selector: 0x28, attributes: 0x82, limit: 0x7f, base: 0xffff_8000_aaaa_0000 };
    assert_eq!(run(&cpu, &mut machine, &lldt).registers.loaded, Some((SegmentRegister::Ldtr, table)));
    assert_eq!(run(&cpu, &mut machine, &ltr).end, End::Raise(Exception::Selector(0x28)));
    machine.put(DEVICE, 2, 0x38);
    let task = Segment { selector: 0x38, attributes: 0x8b, limit: 0x67, base: 0x1_bbbb_0000 };
    assert_eq!(run(&cpu, &mut machine, &ltr).registers.loaded, Some((SegmentRegister::Tr, task)));
    assert_eq!(run(&cpu, &mut machine, &ltr).end, End::Raise(Exception::Selector(0x38)), "it is busy now");
    cpu.cpl = 3;
    assert_eq!(run(&cpu, &mut machine, &ltr).end, End::Raise(Exception::GeneralProtection));
}

#[test]
fn the_status_word() {
    let (mut cpu, mut machine) = (cpu(true), Machine::new());
    machine.long_tables(7);
    // smsw [rbx]; smsw rax
    cpu.registers.general[3] = DEVICE;
    machine.put(DEVICE, 8, u64::MAX);
    assert_eq!(run(&cpu, &mut machine, &[0x0f, 0x01, 0x23]).end, End::Done);
    assert_eq!(machine.value(DEVICE, 8), !0xffff | cpu.cr0 & 0xffff);
    assert_eq!(run(&cpu, &mut machine, &[0x48, 0x0f, 0x01, 0xe0]).registers.general[0], cpu.cr0);
    (cpu.cr4, cpu.cpl) = (cpu.cr4 | 1 << 11, 3);
    assert_eq!(run(&cpu, &mut machine, &[0x0f, 0x01, 0x23]).end, End::Raise(Exception::GeneralProtection));
}
