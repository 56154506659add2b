//! A Multiboot guest under KVM, with a serial port, the meter, and a way out.

use std::{
    error::Error,
    io::{self, Write},
};

use elf::{ElfBytes, abi::PT_LOAD, endian::LittleEndian};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nestling_hypervisor::guest::GuestMemory;
use nestling_meter::{LARGE_PAGES, LINE, PORTS, SMALL_PAGES};

use crate::{
    memory::{Memory, PAGE, Pages},
    meter::{Meter, set_slot, ticks},
};

const RAM_BYTES: usize = 64 << 20;
/// Where the Multiboot information and the command line behind it are.
const INFORMATION: u64 = 0x1000;
const COMMAND_LINE: u64 = 0x1100;
/// What a Multiboot loader leaves in EAX.
const MAGIC: u64 = 0x2bad_b002;
/// The information has a command line (Multiboot 0.6.96, 3.3).
const HAS_COMMAND_LINE: u32 = 1 << 2;

const SERIAL_DATA: u16 = 0x3f8;
const SERIAL_LINE_STATUS: u16 = 0x3fd;
/// The transmitter is always empty.
const TRANSMITTER_EMPTY: u8 = 0x60;
const EXIT: u16 = 0xf4;

/// Runs the image until it ends itself.
pub(crate) fn run(image: &[u8], pages: usize, mapped: Pages) -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let ram = Memory::new(RAM_BYTES, Pages::Small)?;
    let entry = load(&ram, image)?;
    let size = if mapped == Pages::Large { LARGE_PAGES } else { SMALL_PAGES };
    let mut words = format!("image meter {pages} {size}").into_bytes();
    words.push(0);
    ram.write(COMMAND_LINE, &words)?;
    let mut information = [0u8; 0x60];
    information[..4].copy_from_slice(&HAS_COMMAND_LINE.to_le_bytes());
    information[16..20].copy_from_slice(&(COMMAND_LINE as u32).to_le_bytes());
    ram.write(INFORMATION, &information)?;
    set_slot(&vm, 0, 0, &ram, RAM_BYTES as u64, 0)?;
    let mut meter = Meter::new(&vm, Memory::new(pages * PAGE, mapped)?)?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_protected_mode(&vcpu, entry)?;
    serve(&mut vcpu, &mut meter)?;
    let start = ticks();
    drop(vcpu);
    let memory = meter.into_memory();
    drop(vm);
    let cost = ticks() - start;
    println!("{LINE} vm_destroy 1 {cost}");
    drop(memory);
    Ok(())
}

/// Copies the image's segments; where it begins.
fn load(ram: &Memory, image: &[u8]) -> Result<u64, Box<dyn Error>> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(image)?;
    for segment in file.segments().ok_or("the image has no segments")?.iter().filter(|s| s.p_type == PT_LOAD) {
        ram.write(segment.p_paddr, file.segment_data(&segment)?)?;
    }
    Ok(file.ehdr.e_entry)
}

/// 32 bits, flat segments, no paging: what a Multiboot loader leaves (Multiboot 0.6.96, 3.2).
fn enter_protected_mode(vcpu: &VcpuFd, entry: u64) -> Result<(), Box<dyn Error>> {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let code = kvm_segment { selector: 8, type_: 11, ..data };
    let mut system = vcpu.get_sregs()?;
    system.cs = code;
    (system.ds, system.es, system.ss, system.fs, system.gs) = (data, data, data, data, data);
    system.cr0 |= 1;
    vcpu.set_sregs(&system)?;
    let mut general = vcpu.get_regs()?;
    (general.rax, general.rbx, general.rip, general.rflags) = (MAGIC, INFORMATION, entry, 2);
    vcpu.set_regs(&general)?;
    Ok(())
}

/// Runs the guest and answers it until it writes to the exit port.
fn serve(vcpu: &mut VcpuFd, meter: &mut Meter<'_>) -> Result<(), Box<dyn Error>> {
    let mut console = io::stdout().lock();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(port, data) if PORTS.contains(&port) => {
                meter.write(port, data.try_into().map_or(u32::MAX, u32::from_le_bytes))?;
            }
            VcpuExit::IoIn(port, data) if PORTS.contains(&port) => {
                let value = meter.read(port).to_le_bytes();
                data.iter_mut().zip(value).for_each(|(byte, value)| *byte = value);
            }
            VcpuExit::IoOut(SERIAL_DATA, data) => {
                console.write_all(data)?;
                if data == b"\n" {
                    console.flush()?;
                }
            }
            VcpuExit::IoOut(EXIT, _) => return Ok(()),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::IoIn(SERIAL_LINE_STATUS, data) => data.fill(TRANSMITTER_EMPTY),
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0),
            other => return Err(format!("the guest ended by {other:?}").into()),
        }
    }
}
