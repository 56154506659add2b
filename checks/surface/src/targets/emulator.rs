//! One instruction after the other on a CPU in any state, over memory that is RAM, tables and a device.

use nestling::Gpa;
use nestling_hypervisor::emulate::{
    self, Asked, Bus, Cpu, End, Floating, HostFailure, Kept, MAX_INSTRUCTION, Registers, Wide, WideRegisters,
};
use nestling_hypervisor::guest::entry::Segment;

use crate::source::{Bytes, Source};

const RAM: usize = 1 << 20;
const DEVICE: u64 = 0xfee0_0000;
const CODE: u64 = 0x1000;
const TABLES: u64 = 0x8_0000;
const DESCRIPTORS: u64 = 0x9_0000;
/// Steps for one input.
const STEPS: usize = 24;
/// Accesses of one step: a repeated string instruction stops after 1024 elements, each of which reads and writes in no more
/// than four pieces each, and walks.
const MOST_ACCESSES: usize = 1 << 16;

struct Memory {
    ram: Vec<u8>,
    accesses: usize,
    wide: WideRegisters,
    kept: Kept,
}

impl Memory {
    fn slice(&mut self, gpa: u64, bytes: usize) -> Option<&mut [u8]> {
        let at = usize::try_from(gpa).ok()?;
        self.ram.get_mut(at..at.checked_add(bytes)?)
    }

    fn count(&mut self, gpa: u64, bytes: usize) {
        assert!(gpa % 4096 + bytes as u64 <= 4096, "an access crosses a page");
        self.accesses += 1;
        assert!(self.accesses < MOST_ACCESSES, "an instruction without end");
    }
}

impl Bus for Memory {
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> bool {
        self.count(gpa, into.len());
        self.slice(gpa, into.len()).map(|from| into.copy_from_slice(from)).is_some()
    }

    fn read_code(&mut self, gpa: u64) -> Option<[u8; MAX_INSTRUCTION]> {
        let mut code = [0; MAX_INSTRUCTION];
        self.read_ram(gpa, &mut code).then_some(code)
    }

    fn wide(&mut self) -> &mut dyn Wide {
        &mut self.wide
    }

    fn kept(&mut self) -> &mut Kept {
        &mut self.kept
    }

    fn page_again(&mut self, asked: &Asked, bytes: usize) -> Option<u64> {
        self.accesses += 1;
        let entry = |Gpa(at): Gpa| {
            let at = usize::try_from(at).ok()?;
            let mut entry = [0; 8];
            entry[..bytes].copy_from_slice(self.ram.get(at..at.checked_add(bytes)?)?);
            Some(u64::from_le_bytes(entry))
        };
        self.kept.page(asked, entry)
    }

    fn read_entry(&mut self, gpa: u64, bytes: usize) -> Option<u64> {
        let mut entry = [0; 8];
        self.read_ram(gpa, &mut entry[..bytes]).then(|| u64::from_le_bytes(entry))
    }

    fn read(&mut self, gpa: u64, bytes: usize) -> Result<u64, HostFailure> {
        self.count(gpa, bytes);
        assert!(matches!(bytes, 1 | 2 | 4 | 8));
        let mut raw = [0xff; 8];
        if let Some(from) = self.slice(gpa, bytes) {
            raw[..bytes].copy_from_slice(from);
        }
        Ok(u64::from_le_bytes(raw) & u64::MAX >> (64 - 8 * bytes))
    }

    fn write(&mut self, gpa: u64, bytes: usize, value: u64) -> Result<(), HostFailure> {
        self.count(gpa, bytes);
        assert!(matches!(bytes, 1 | 2 | 4 | 8) && value & !(u64::MAX >> (64 - 8 * bytes)) == 0);
        if let Some(to) = self.slice(gpa, bytes) {
            to.copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
        Ok(())
    }

    fn compare_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure> {
        let same = self.read(gpa, bytes)? == old;
        if same {
            self.write(gpa, bytes, new)?;
        }
        Ok(same)
    }

    fn input(&mut self, port: u16, bytes: usize) -> u32 {
        self.count(0, bytes);
        u32::from(port) * 0x10001
    }

    fn output(&mut self, _: u16, bytes: usize, _: u32) {
        self.count(0, bytes);
    }
}

/// An address, or something else.
fn place(source: &mut Bytes<'_>) -> u64 {
    match source.below(8) {
        0 | 1 => DEVICE + source.below(0x1000),
        2 | 3 => source.below(RAM as u64),
        4 => TABLES + source.below(0x5000),
        5 => source.below(64),
        6 => u64::MAX << source.below(64),
        _ => source.next(),
    }
}

/// Four levels: the first 2 MiB by pages, 3 GiB to 4 GiB by large ones; entries may be changed by the input.
fn write_tables(memory: &mut Memory, source: &mut Bytes<'_>) {
    let mut put = |at: u64, value: u64| {
        if let Some(to) = memory.slice(at, 8) {
            to.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(TABLES, TABLES + 0x1007);
    put(TABLES + 0x1000, TABLES + 0x2007);
    put(TABLES + 0x1018, TABLES + 0x4007);
    put(TABLES + 0x2000, TABLES + 0x3007);
    (0..256).for_each(|page| put(TABLES + 0x3000 + page * 8, page << 12 | 0x67));
    (0..512).for_each(|page| put(TABLES + 0x4000 + page * 8, (3 << 30) + (page << 21) + 0xe7));
    for _ in 0..source.below(4) {
        let (at, value) = (TABLES + (source.below(0x5000) & !7), source.value());
        put(at, value);
    }
}

fn cpu(source: &mut Bytes<'_>) -> Cpu {
    let mode = source.below(4);
    let code = [0xa9b, 0xc9b, 0x9b, 0x9b][mode as usize];
    let flat = |attributes| Segment { selector: 8, attributes, limit: u32::MAX, base: 0 };
    let mut segments = [flat(0xc93); 6];
    segments[1] = flat(code);
    let (cr0, efer) = [(0x8001_0001, 0xd00), (1, 0), (0x8000_0001, 0), (0, 0)][mode as usize];
    let mut general = [0; 16];
    general.iter_mut().for_each(|register| *register = place(source));
    // A long count is a slow input, not a better one.
    general[1] %= 64;
    let rflags = 2 | source.below(1 << 19) & 0x4_0cd5;
    let mut cpu = Cpu {
        registers: Registers { general, rip: CODE, rflags, loaded: None },
        cr0,
        cr3: TABLES,
        cr4: 0x220,
        efer,
        cpl: source.of(&[0, 3]),
        segments,
        // Somewhere in RAM, with whatever the input leaves there.
        gdtr: (DESCRIPTORS, 0x7f),
        ldtr: Segment { selector: 0, attributes: 0x82, limit: 0xffff, base: DESCRIPTORS + 0x100 },
        physical_bits: 40,
        pkru: 0,
    };
    for _ in 0..source.below(4) {
        match source.below(8) {
            0 => cpu.cr0 ^= 1 << source.below(32),
            1 => cpu.cr4 ^= 1 << source.below(24),
            2 => cpu.efer ^= 1 << source.below(16),
            3 => cpu.cr3 = source.value(),
            4 => cpu.physical_bits = source.below(64) as u32,
            5 => cpu.pkru = source.value() as u32,
            6 => cpu.segments[source.below(6) as usize].attributes = source.below(0x1000) as u16,
            _ => {
                let which = source.below(6) as usize;
                cpu.segments[which].limit = source.value() as u32;
                cpu.segments[which].base = source.value();
            }
        }
    }
    cpu
}

/// A CPU and tables from the first bytes, code from the rest.
pub fn emulator(bytes: &[u8]) {
    let mut source = Bytes::new(bytes);
    let mut memory = Memory {
        ram: vec![0; RAM],
        accesses: 0,
        wide: WideRegisters { vectors: [[7; 2]; 16], floating: Floating::default() },
        kept: Kept::default(),
    };
    write_tables(&mut memory, &mut source);
    let mut cpu = cpu(&mut source);
    for descriptor in 0..source.below(16) {
        let value = source.next();
        let at = (DESCRIPTORS + 8 * descriptor) as usize;
        memory.ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let code = &source.rest()[..source.rest().len().min(0x800)];
    memory.ram[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
    for _ in 0..STEPS {
        memory.accesses = 0;
        let wide = memory.wide.clone();
        let outcome = emulate::step(&cpu, &mut memory);
        let _ = emulate::task_priority_write(&cpu, &mut memory);
        match outcome.end {
            End::Done => {}
            End::Unsupported => {
                // A repeated string instruction may have come some elements far, and have changed the tables itself.
                assert_eq!((outcome.registers.rip, &memory.wide), (cpu.registers.rip, &wide), "done by halves");
                return;
            }
            End::Raise(_) | End::Host(_) => return,
        }
        cpu.registers = outcome.registers;
    }
}

/// The beginnings of states in each mode, and instructions of all kinds behind them.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let code: [&[u8]; 12] = [
        &[0x88, 0x07, 0x8b, 0x07, 0x0f, 0xb6, 0x07],
        &[0xf3, 0xa4, 0xf3, 0xab, 0xf2, 0xae],
        &[0xf0, 0x0f, 0xb1, 0x0f, 0x87, 0x07, 0x0f, 0xc1, 0x07],
        &[0xc1, 0x27, 4, 0xd3, 0x17, 0x0f, 0xa4, 0x07, 8],
        &[0xf7, 0x27, 0xf7, 0x37, 0x0f, 0xaf, 0x07, 0x6b, 0x07, 0xfe],
        &[0x0f, 0xab, 0x0f, 0x0f, 0xba, 0x2f, 5, 0x0f, 0xbc, 0x07],
        &[0xf3, 0x0f, 0x6f, 0x07, 0x66, 0x0f, 0x7f, 0x07, 0x0f, 0x16, 0x07],
        &[0xff, 0x37, 0x8f, 0x07, 0xe8, 0, 0, 0, 0, 0xc3],
        &[0x0f, 0xc7, 0x0f, 0x0f, 0x38, 0xf0, 0x07, 0x0f, 0xc3, 0x07],
        &[0x6c, 0xf3, 0x6d, 0x66, 0x6f],
        &[0x44, 0x0f, 0x22, 0xc0, 0xf0, 0x0f, 0x22, 0xc0],
        &[0x67, 0x66, 0xf3, 0x48, 0xa5, 0x64, 0x8b, 0x07, 0xff, 0x27],
    ];
    let mut all = Vec::new();
    for (number, code) in code.into_iter().enumerate() {
        for mode in 0..4 {
            // No changed entries; the mode; sixteen registers on the device or in RAM; flags, ring 0, nothing changed.
            let mut input = vec![0, mode];
            (0..16).for_each(|register| input.extend([register % 4, number as u8, 4]));
            input.extend([0, 0, 0, 0, 0]);
            // Three descriptors: flat code, flat data, the same for users.
            input.push(3);
            [0x00cf_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff]
                .iter()
                .for_each(|descriptor| input.extend(descriptor.to_le_bytes()));
            input.extend(code);
            all.push(input);
        }
    }
    all
}
