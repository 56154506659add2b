//! A machine of two arrays: RAM from 0, and a device window that notes what was done to it.

use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::devices::testing::Random;

mod control;
mod descriptors;
mod forms;
mod keeping;
mod paging;
mod status;

const RAM: usize = 1 << 20;
const DEVICE: u64 = 0xfee0_0000;
const CODE: u64 = 0x1000;
const FLAT_64: u16 = 0xa9b;
const FLAT_32: u16 = 0xc9b;
const DATA: u16 = 0xc93;
const GDT: u64 = 0x9_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Read(u64, usize),
    Write(u64, usize, u64),
    In(u16, usize),
    Out(u16, usize, u32),
}

struct Machine {
    ram: Vec<u8>,
    device: Vec<u8>,
    events: Vec<Event>,
    wide: WideRegisters,
    kept: Kept,
}

impl Machine {
    fn new() -> Self {
        let (ram, device) = (vec![0; RAM], vec![0; 4096]);
        Self { ram, device, events: Vec::new(), wide: WideRegisters::default(), kept: Kept::default() }
    }

    fn slice(&mut self, gpa: u64, bytes: usize) -> Option<&mut [u8]> {
        let (store, at) = if gpa >= DEVICE { (&mut self.device, gpa - DEVICE) } else { (&mut self.ram, gpa) };
        store.get_mut(at as usize..(at as usize).checked_add(bytes)?)
    }

    fn value(&mut self, gpa: u64, bytes: usize) -> u64 {
        let mut raw = [0; 8];
        match self.slice(gpa, bytes) {
            Some(from) => raw[..bytes].copy_from_slice(from),
            None => raw[..bytes].fill(0xff),
        }
        u64::from_le_bytes(raw)
    }

    fn put(&mut self, gpa: u64, bytes: usize, value: u64) {
        if let Some(to) = self.slice(gpa, bytes) {
            to.copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
    }

    /// Four levels that map the first 2 MiB by small pages and, at 3 GiB to 4 GiB, everything to itself by large ones.
    fn long_tables(&mut self, flags: u64) {
        self.put(0x8_0000, 8, 0x8_1000 | 7);
        self.put(0x8_1000, 8, 0x8_2000 | 7);
        self.put(0x8_1018, 8, 0x8_4000 | 7);
        self.put(0x8_2000, 8, 0x8_3000 | 7);
        for page in 0..256 {
            self.put(0x8_3000 + page * 8, 8, page << 12 | flags);
        }
        for page in 0..512 {
            self.put(0x8_4000 + page * 8, 8, (3 << 30) + (page << 21) + (flags | 0x80));
        }
    }
}

impl Bus for Machine {
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> bool {
        assert!(gpa % 4096 + into.len() as u64 <= 4096, "no access crosses a page");
        match self.slice(gpa, into.len()).filter(|_| gpa < DEVICE) {
            Some(from) => {
                into.copy_from_slice(from);
                true
            }
            None => false,
        }
    }

    fn read_code(&mut self, gpa: u64) -> Option<[u8; MAX_INSTRUCTION]> {
        let mut code = [0; MAX_INSTRUCTION];
        self.read_ram(gpa, &mut code).then_some(code)
    }

    fn read_entry(&mut self, gpa: u64, bytes: usize) -> Option<u64> {
        let mut entry = [0; 8];
        self.read_ram(gpa, &mut entry[..bytes]).then(|| u64::from_le_bytes(entry))
    }

    fn read(&mut self, gpa: u64, bytes: usize) -> Result<u64, HostFailure> {
        assert!(gpa % 4096 + bytes as u64 <= 4096 && [1, 2, 4, 8].contains(&bytes));
        if gpa >= DEVICE {
            self.events.push(Event::Read(gpa, bytes));
        }
        Ok(self.value(gpa, bytes))
    }

    fn write(&mut self, gpa: u64, bytes: usize, value: u64) -> Result<(), HostFailure> {
        assert!(gpa % 4096 + bytes as u64 <= 4096 && [1, 2, 4, 8].contains(&bytes));
        assert_eq!(value & !operand::mask(bytes), 0);
        if gpa >= DEVICE {
            self.events.push(Event::Write(gpa, bytes, value));
        }
        self.put(gpa, bytes, value);
        Ok(())
    }

    fn compare_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure> {
        let same = self.value(gpa, bytes) == old;
        if same {
            self.write(gpa, bytes, new)?;
        }
        Ok(same)
    }

    fn wide(&mut self) -> &mut dyn Wide {
        &mut self.wide
    }

    fn kept(&mut self) -> &mut Kept {
        &mut self.kept
    }

    fn page_again(&mut self, asked: &Asked, bytes: usize) -> Option<u64> {
        let entry = |at: nestling::Gpa| {
            let mut entry = [0; 8];
            entry[..bytes].copy_from_slice(self.ram.get(at.0 as usize..at.0 as usize + bytes)?);
            Some(u64::from_le_bytes(entry))
        };
        self.kept.page(asked, entry)
    }

    fn input(&mut self, port: u16, bytes: usize) -> u32 {
        self.events.push(Event::In(port, bytes));
        0x4433_2211
    }

    fn output(&mut self, port: u16, bytes: usize, value: u32) {
        self.events.push(Event::Out(port, bytes, value));
    }
}

fn flat(attributes: u16) -> Segment {
    Segment { selector: 8, attributes, limit: u32::MAX, base: 0 }
}

/// A flat CPU without paging in 32-bit mode, or with the tables of [`Machine::long_tables`] in 64-bit mode.
fn cpu(wide: bool) -> Cpu {
    let mut segments = [flat(DATA); 6];
    segments[segment::CS] = flat(if wide { FLAT_64 } else { FLAT_32 });
    Cpu {
        registers: Registers { general: [0; 16], rip: CODE, rflags: 2, loaded: None },
        cr0: if wide { 0x8001_0001 } else { 1 },
        cr3: 0x8_0000,
        cr4: 0x20,
        efer: if wide { 0xd00 } else { 0 },
        cpl: 0,
        segments,
        physical_bits: 40,
        pkru: 0,
        gdtr: (GDT, 0x47),
        ldtr: Segment { selector: 0, attributes: 0, limit: 0, base: 0 },
    }
}

fn run(cpu: &Cpu, machine: &mut Machine, code: &[u8]) -> Outcome {
    let at = cpu.segments[segment::CS].base + cpu.registers.rip;
    machine.ram[at as usize..at as usize + code.len()].copy_from_slice(code);
    step(cpu, machine)
}

/// 64-bit mode with RDI at the device and RSI in RAM.
fn wide() -> (Cpu, Machine) {
    let (mut cpu, mut machine) = (cpu(true), Machine::new());
    machine.long_tables(0x67);
    cpu.registers.general[7] = DEVICE + 0x80;
    cpu.registers.general[6] = 0x5000;
    (cpu, machine)
}

#[test]
fn moves_of_every_size_and_form() {
    // (code, device before at rdi, rax after, device accesses)
    let at = DEVICE + 0x80;
    let cases: [(&[u8], u64, Event); 13] = [
        (&[0x8a, 0x07], 0x1111_1111_1111_11f8, Event::Read(at, 1)), // mov al, [rdi]
        (&[0x8a, 0x27], 0x1111_1111_1111_f811, Event::Read(at, 1)), // mov ah, [rdi]
        (&[0x66, 0x8b, 0x07], 0x1111_1111_1111_e7f8, Event::Read(at, 2)), // mov ax, [rdi]
        (&[0x8b, 0x07], 0xc5d6_e7f8, Event::Read(at, 4)),           // mov eax, [rdi]
        (&[0x48, 0x8b, 0x07], 0x8192_a3b4_c5d6_e7f8, Event::Read(at, 8)), // mov rax, [rdi]
        (&[0x0f, 0xb6, 0x07], 0xf8, Event::Read(at, 1)),            // movzx eax, byte
        (&[0x48, 0x0f, 0xb7, 0x07], 0xe7f8, Event::Read(at, 2)),    // movzx rax, word
        (&[0x0f, 0xbe, 0x07], 0xffff_fff8, Event::Read(at, 1)),     // movsx eax, byte
        (&[0x66, 0x0f, 0xbe, 0x07], 0x1111_1111_1111_fff8, Event::Read(at, 1)), // movsx ax, byte
        (&[0x48, 0x63, 0x07], 0xffff_ffff_c5d6_e7f8, Event::Read(at, 4)), // movsxd rax, dword
        (&[0x88, 0x07], 0x1111_1111_1111_1111, Event::Write(at, 1, 0x11)), // mov [rdi], al
        (&[0x48, 0xc7, 0x07, 0xfe, 0xff, 0xff, 0xff], 0x1111_1111_1111_1111, Event::Write(at, 8, u64::MAX - 1)),
        (&[0x66, 0xc7, 0x07, 0x34, 0x12], 0x1111_1111_1111_1111, Event::Write(at, 2, 0x1234)),
    ];
    for (code, rax, event) in cases {
        let (mut cpu, mut machine) = wide();
        cpu.registers.general[0] = 0x1111_1111_1111_1111;
        machine.put(at, 8, 0x8192_a3b4_c5d6_e7f8);
        let outcome = run(&cpu, &mut machine, code);
        assert_eq!(outcome.end, End::Done, "{code:x?}");
        assert_eq!(outcome.registers.general[0], rax, "{code:x?}");
        assert_eq!(outcome.registers.rip, CODE + code.len() as u64);
        assert_eq!(machine.events, [event], "{code:x?}");
    }
}

#[test]
fn addresses_in_every_form() {
    let (mut cpu, mut machine) = wide();
    machine.put(DEVICE + 0x20, 4, 0xabcd);
    // mov eax, moffs64; mov eax, [rip + x] is out of reach, so [rbx + rcx * 4 - 0x10], and fs:[rdi].
    let moffs = [0xa1, 0x20, 0, 0xe0, 0xfe, 0, 0, 0, 0];
    assert_eq!(run(&cpu, &mut machine, &moffs).registers.general[0], 0xabcd);
    cpu.registers.general[3] = DEVICE;
    cpu.registers.general[1] = 0xc;
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x44, 0x8b, 0xf0]).registers.general[0], 0xabcd);
    cpu.registers.general[7] = 0x20;
    cpu.segments[segment::FS].base = DEVICE;
    assert_eq!(run(&cpu, &mut machine, &[0x64, 0x8b, 0x07]).registers.general[0], 0xabcd);
}

#[test]
fn arithmetic_on_a_device_reads_and_writes_once() {
    let at = DEVICE + 0x80;
    let cases: [(&[u8], u64, u64); 10] = [
        (&[0x09, 0x07], 0xf0f0, 0xf1f1),       // or [rdi], eax
        (&[0x21, 0x07], 0xf1f1, 0x0101),       // and
        (&[0x31, 0x07], 0x0101, 0),            // xor
        (&[0xf0, 0x01, 0x07], 1, 0x102),       // lock add
        (&[0x29, 0x07], 0x101, 0),             // sub
        (&[0xff, 0x07], 0xffff_ffff, 0),       // inc dword
        (&[0xf7, 0x17], 0, 0xffff_ffff),       // not
        (&[0x0f, 0xba, 0x2f, 0x03], 0, 8),     // bts dword, 3
        (&[0x0f, 0xba, 0x37, 0x03], 0xf, 7),   // btr
        (&[0xf0, 0x0f, 0xc1, 0x07], 5, 0x106), // lock xadd
    ];
    for (code, before, after) in cases {
        let (mut cpu, mut machine) = wide();
        cpu.registers.general[0] = 0x101;
        machine.put(at, 4, before);
        assert_eq!(run(&cpu, &mut machine, code).end, End::Done, "{code:x?}");
        assert_eq!(machine.events, [Event::Read(at, 4), Event::Write(at, 4, after)], "{code:x?}");
    }
}

#[test]
fn comparing_only_reads_and_sets_flags() {
    let at = DEVICE + 0x80;
    for (code, flags) in [
        (&[0x39, 0x07][..], alu::ZF),             // cmp [rdi], eax
        (&[0xf7, 0x07, 0, 0, 0, 1][..], alu::ZF), // test dword [rdi], 0x1000000
        (&[0x0f, 0xba, 0x27, 0x02][..], alu::CF), // bt dword [rdi], 2
        (&[0x83, 0x3f, 0x06][..], alu::CF),       // cmp dword [rdi], 6
    ] {
        let (mut cpu, mut machine) = wide();
        cpu.registers.general[0] = 5;
        machine.put(at, 4, 5);
        let outcome = run(&cpu, &mut machine, code);
        assert_eq!(outcome.registers.rflags & (alu::ZF | alu::CF), flags, "{code:x?}");
        assert_eq!(machine.events, [Event::Read(at, 4)]);
    }
}

#[test]
fn exchanges_swap() {
    let at = DEVICE + 0x80;
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[0] = 7;
    machine.put(at, 4, 9);
    let outcome = run(&cpu, &mut machine, &[0x87, 0x07]);
    assert_eq!((outcome.registers.general[0], machine.value(at, 4)), (9, 7));
    // cmpxchg [rdi], ecx: equal, then not.
    cpu.registers.general[1] = 3;
    let outcome = run(&cpu, &mut machine, &[0xf0, 0x0f, 0xb1, 0x0f]);
    assert_eq!((machine.value(at, 4), outcome.registers.rflags & alu::ZF), (3, alu::ZF));
    let outcome = run(&cpu, &mut machine, &[0xf0, 0x0f, 0xb1, 0x0f]);
    assert_eq!((machine.value(at, 4), outcome.registers.general[0], outcome.registers.rflags & alu::ZF), (3, 3, 0));
}

#[test]
fn strings_repeat_and_stop_for_interrupts() {
    let (mut cpu, mut machine) = wide();
    machine.ram[0x5000..0x5010].copy_from_slice(b"sixteen letters!");
    cpu.registers.general[1] = 16;
    let outcome = run(&cpu, &mut machine, &[0xf3, 0xa4]); // rep movsb to the device
    let Registers { general, rip, .. } = outcome.registers;
    assert_eq!((general[1], general[6], general[7], rip), (0, 0x5010, DEVICE + 0x90, CODE + 2));
    assert_eq!(&machine.device[0x80..0x90], b"sixteen letters!");
    // Backwards, and longer than one turn takes.
    cpu.registers.general[1] = string::MOST_ELEMENTS as u64 + 3;
    cpu.registers.general[0] = 0x55;
    cpu.registers.general[7] = 0x7000;
    cpu.registers.rflags |= 1 << 10;
    let outcome = run(&cpu, &mut machine, &[0xf3, 0xaa]); // rep stosb
    assert_eq!((outcome.end, outcome.registers.rip, outcome.registers.general[1]), (End::Done, CODE, 3));
    cpu.registers = outcome.registers;
    let outcome = step(&cpu, &mut machine);
    assert_eq!((outcome.registers.rip, outcome.registers.general[1]), (CODE + 2, 0));
    assert_eq!(machine.ram[0x7000 - string::MOST_ELEMENTS - 2..=0x7000], vec![0x55; string::MOST_ELEMENTS + 3]);
    assert_eq!(machine.ram[0x7000 - string::MOST_ELEMENTS - 3], 0);
}

#[test]
fn strings_are_compared_as_far_as_they_agree() {
    let (mut cpu, mut machine) = wide();
    machine.ram[0x5000..0x5008].copy_from_slice(b"abcdefgh");
    machine.device[0x80..0x88].copy_from_slice(b"abcdEfgh");
    cpu.registers.general[1] = 8;
    let outcome = run(&cpu, &mut machine, &[0xf3, 0xa6]); // repe cmpsb
    let Registers { general, rip, rflags, .. } = outcome.registers;
    assert_eq!((general[1], general[6], general[7], rip), (3, 0x5005, DEVICE + 0x85, CODE + 2));
    assert_eq!(rflags & (alu::ZF | alu::CF), 0, "e is above E");
    cpu.registers.general[0] = u64::from(b'g');
    let outcome = run(&cpu, &mut machine, &[0xf2, 0xae]); // repne scasb
    assert_eq!((outcome.registers.general[1], outcome.registers.general[7]), (1, DEVICE + 0x87));
    assert_eq!(outcome.registers.rflags & alu::ZF, alu::ZF);
}

#[test]
fn stack_and_conditions() {
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[4] = 0x6008;
    machine.put(DEVICE + 0x80, 8, 0x1122_3344_5566_7788);
    let outcome = run(&cpu, &mut machine, &[0xff, 0x37]); // push qword [rdi]
    assert_eq!((outcome.registers.general[4], machine.value(0x6000, 8)), (0x6000, 0x1122_3344_5566_7788));
    machine.put(0x6008, 8, 0x55);
    let outcome = run(&cpu, &mut machine, &[0x8f, 0x07]); // pop qword [rdi]
    assert_eq!((outcome.registers.general[4], machine.value(DEVICE + 0x80, 8)), (0x6010, 0x55));
    cpu.registers.rflags |= alu::ZF;
    assert_eq!(run(&cpu, &mut machine, &[0x0f, 0x94, 0x07]).end, End::Done); // sete
    assert_eq!(machine.value(DEVICE + 0x80, 1), 1);
    cpu.registers.general[0] = u64::MAX;
    assert_eq!(run(&cpu, &mut machine, &[0x0f, 0x44, 0x07]).registers.general[0], 1); // cmove eax
    assert_eq!(run(&cpu, &mut machine, &[0x0f, 0x45, 0x07]).registers.general[0], 0xffff_ffff); // cmovne eax
    machine.put(0x8_3000 + 6 * 8, 8, 0);
    let outcome = run(&cpu, &mut machine, &[0x8f, 0x07]);
    assert!(matches!(outcome.end, End::Raise(Exception::PageFault { code: 0, .. })));
    assert_eq!(outcome.registers, cpu.registers);
}

#[test]
fn ports_by_the_string() {
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[2] = 0x3f8;
    cpu.registers.general[1] = 2;
    cpu.registers.general[7] = 0x6000;
    assert_eq!(run(&cpu, &mut machine, &[0xf3, 0x6d]).registers.general[7], 0x6008); // rep insd
    assert_eq!((machine.value(0x6000, 8), machine.events.len()), (0x4433_2211_4433_2211, 2));
    machine.events.clear();
    machine.put(0x5000, 4, 0xbeef_cafe);
    assert_eq!(run(&cpu, &mut machine, &[0x66, 0xf3, 0x6f]).registers.general[6], 0x5004); // rep outsw
    assert_eq!(machine.events, [Event::Out(0x3f8, 2, 0xcafe), Event::Out(0x3f8, 2, 0xbeef)]);
}

#[test]
fn an_ins_that_faults_leaves_the_port_alone() {
    let (mut cpu, mut machine) = wide();
    cpu.registers.general[7] = 0x40_0000;
    let outcome = run(&cpu, &mut machine, &[0x6c]);
    assert_eq!(outcome.end, End::Raise(Exception::PageFault { code: 2, address: 0x40_0000 }));
    assert_eq!((outcome.registers, machine.events.len()), (cpu.registers, 0));
}

#[test]
fn a_fault_in_the_middle_keeps_what_was_done() {
    let (mut cpu, mut machine) = wide();
    machine.put(0x8_3000 + 8 * 8, 8, 0); // page 8 is gone
    cpu.registers.general[7] = 0x7ffc;
    cpu.registers.general[1] = 100;
    let outcome = run(&cpu, &mut machine, &[0xf3, 0xab]); // rep stosd
    assert_eq!(outcome.end, End::Raise(Exception::PageFault { code: 2, address: 0x8000 }));
    let Registers { general, rip, .. } = outcome.registers;
    assert_eq!((general[7], general[1], rip), (0x8000, 99, CODE));
}

#[test]
fn an_operand_across_pages_moves_whole_or_not_at_all() {
    let (mut cpu, mut machine) = wide();
    machine.put(0x8_3000 + 7 * 8, 8, 0x9000 | 0x67); // page 7 is frame 9
    cpu.registers.general[7] = 0x6ffd;
    cpu.registers.general[0] = 0x8877_6655_4433_2211;
    assert_eq!(run(&cpu, &mut machine, &[0x48, 0x89, 0x07]).end, End::Done);
    assert_eq!(
        (&machine.ram[0x6ffd..0x7000], &machine.ram[0x9000..0x9005]),
        (&[0x11, 0x22, 0x33][..], &[0x44, 0x55, 0x66, 0x77, 0x88][..])
    );
    machine.put(0x8_3000 + 7 * 8, 8, 0);
    machine.put(0x6ff8, 8, 0);
    let outcome = run(&cpu, &mut machine, &[0x48, 0x89, 0x07]);
    assert_eq!(outcome.end, End::Raise(Exception::PageFault { code: 2, address: 0x7000 }));
    assert_eq!(machine.value(0x6ff8, 8), 0);
}

#[test]
fn real_mode_addresses_and_limits() {
    let (mut cpu, mut machine) = (cpu(false), Machine::new());
    cpu.cr0 = 0;
    cpu.segments = [Segment { selector: 0x100, attributes: 0x93, limit: 0xffff, base: 0x1000 }; 6];
    cpu.registers.rip = 0x10;
    cpu.registers.general[3] = 0x123;
    machine.put(0x1123, 2, 0xbeef);
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).registers.general[0], 0xbeef); // mov ax, [bx]
    cpu.registers.general[3] = 0xffff;
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x07]).end, End::Raise(Exception::GeneralProtection));
}

#[test]
fn protected_segments_are_checked() {
    let (mut cpu, mut machine) = (cpu(false), Machine::new());
    let gp = End::Raise(Exception::GeneralProtection);
    cpu.registers.general[7] = 0x3000;
    for (segment, write, end) in [
        (Segment { attributes: 0xc91, ..flat(0) }, true, gp), // read-only
        (Segment { attributes: 0xc91, ..flat(0) }, false, End::Done),
        (Segment { attributes: 0xc13, ..flat(0) }, false, gp), // not present
        (Segment { limit: 0x3002, ..flat(DATA) }, false, gp),
        (Segment { limit: 0x3003, ..flat(DATA) }, false, End::Done),
        (Segment { attributes: 0xc97, limit: 0x2fff, ..flat(0) }, true, End::Done), // expand down
        (Segment { attributes: 0xc97, limit: 0x3000, ..flat(0) }, true, gp),
    ] {
        cpu.segments[segment::DS] = segment;
        let code: &[u8] = if write { &[0x89, 0x07] } else { &[0x8b, 0x07] };
        assert_eq!(run(&cpu, &mut machine, code).end, end, "{segment:x?}");
    }
    cpu.segments[segment::SS] = Segment { limit: 0xff, ..flat(DATA) };
    cpu.registers.general[5] = 0x100;
    assert_eq!(run(&cpu, &mut machine, &[0x8b, 0x45, 0]).end, End::Raise(Exception::Stack)); // mov eax, [ebp]
}

#[test]
fn what_cannot_be_executed_says_so() {
    let (cpu, mut machine) = wide();
    assert_eq!(run(&cpu, &mut machine, &[0x0f, 0x0b]).end, End::Unsupported); // ud2 itself never gets here
    assert_eq!(run(&cpu, &mut machine, &[0xf0, 0x8b, 0x07]).end, End::Raise(Exception::InvalidOpcode)); // lock mov
    assert!(matches!(run(&cpu, &mut machine, &[0x66; 15]).end, End::Raise(_)), "prefixes without an end");
    let away = Cpu { registers: Registers { rip: DEVICE, ..cpu.registers }, ..cpu };
    assert_eq!(step(&away, &mut machine).end, End::Unsupported);
}

#[test]
fn writes_to_the_task_priority_are_read() {
    let (mut cpu, mut machine) = wide();
    let mut write = |cpu: &Cpu, code: &[u8]| {
        machine.ram[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
        task_priority_write(cpu, &mut machine)
    };
    cpu.registers.general[0] = 7;
    cpu.registers.general[9] = 16;
    let done = |class, length| Ok(TaskPriorityWrite { class, next_rip: CODE + length });
    assert_eq!(write(&cpu, &[0x44, 0x0f, 0x22, 0xc0]), done(7, 4)); // mov cr8, rax
    assert_eq!(write(&cpu, &[0x45, 0x0f, 0x22, 0xc1]), Err(End::Raise(Exception::GeneralProtection))); // mov cr8, r9
    assert_eq!(write(&cpu, &[0x0f, 0x22, 0xd8]), Err(End::Done), "CR3: somebody has changed the code");
    let code = Segment { attributes: FLAT_32, ..cpu.segments[segment::CS] };
    cpu.segments[segment::CS] = code;
    cpu.registers.general[0] = 0xffff_ffff_0000_0003;
    assert_eq!(write(&cpu, &[0xf0, 0x0f, 0x22, 0xc0]), done(3, 4)); // lock mov cr0, eax is mov cr8, eax
}

#[test]
fn any_bytes_in_any_mode_end_well() {
    let mut random = Random::new(77);
    let mut machine = Machine::new();
    for round in 0..300_000u32 {
        if round % 10_000 == 0 {
            machine.long_tables(0x67);
        }
        let mut cpu = cpu(random.below(2) == 0);
        for register in &mut cpu.registers.general {
            *register = match random.below(4) {
                0 => DEVICE + random.below(4096),
                1 => random.below(RAM as u64),
                _ => random.of_any_length(64),
            };
        }
        // A count that is long makes a slow test, not a better one.
        cpu.registers.general[1] = random.below(20);
        cpu.registers.rflags = 2 | random.next() & 0x4_0cd5;
        cpu.cpl = if random.below(2) == 0 { 0 } else { 3 };
        cpu.registers.rip = random.below(0x8000);
        if random.below(8) == 0 {
            cpu.cr0 ^= random.of_any_length(32);
            cpu.cr4 ^= random.of_any_length(24);
            cpu.efer ^= random.of_any_length(13);
            cpu.physical_bits = random.next() as u32;
            cpu.segments[random.below(6) as usize].attributes = random.next() as u16 & 0xfff;
            cpu.segments[random.below(6) as usize].limit = random.next() as u32;
            cpu.segments[random.below(6) as usize].base = random.next();
        }
        let mut code = [0; MAX_INSTRUCTION];
        code.iter_mut().for_each(|byte| *byte = random.byte());
        if random.below(2) == 0 {
            code[0] = [0x88, 0x89, 0x8a, 0x8b, 0xa4, 0xa5, 0xf3, 0x0f, 0x48, 0x66, 0x67, 0x80, 0x83]
                [random.below(13) as usize];
        }
        let at = cpu.registers.rip as usize;
        machine.ram[at..at + MAX_INSTRUCTION].copy_from_slice(&code);
        machine.events.clear();
        let outcome = step(&cpu, &mut machine);
        if outcome.end == End::Unsupported {
            assert_eq!(outcome.registers, cpu.registers, "{code:x?}");
        }
        assert!(machine.events.len() <= 64, "{code:x?}");
    }
}

#[test]
fn what_is_seen_of_an_instruction_that_others_execute() {
    let seen = |code: &[u8]| {
        let (cpu, mut machine) = (cpu(false), Machine::new());
        machine.ram[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
        see(&cpu, &mut machine).map(|seen| (seen.what, seen.next_rip - CODE))
    };
    assert_eq!(seen(&[0x0f, 0x01, 0xc1]), Some((Kind::Vmcall, 3)));
    assert_eq!(seen(&[0x2e, 0xf1]), Some((Kind::Int1, 2)));
    assert_eq!(seen(&[0x0f, 0x22, 0xd8]), Some((Kind::WriteControl, 3)));
    assert_eq!(seen(&[0x0f, 0x22, 0xe7]), Some((Kind::WriteControl, 3)));
    assert_eq!(seen(&[0x0f, 0x20, 0xd8]), Some((Kind::Other, 3)), "a read");
    assert_eq!(seen(&[0x0f, 0x0b]), Some((Kind::Other, 2)));
    assert_eq!(seen(&[0x0f, 0x04]), None);
}
