//! A Linux guest under KVM: the same bundle that this project's hypervisor is given, put into memory by the same loader, on
//! the same devices where they are not KVM's own.
//!
//! KVM has the interrupt controllers and the timers. The serial port, the clock and power management are the hypervisor's:
//! a guest that finds the same registers behaves the same, so that the two sides differ in what is to be compared.
//!
//! What is counted begins before the first entry and ends when the guest has switched itself off. The guest's memory is
//! there by then, and what it prints is kept until after: neither costs KVM anything.

use std::{
    error::Error,
    io::{self, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_pit_config, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nestling_control::{
    bundle::Bundle,
    config::{GuestKind, HugePages},
};
use nestling_hypervisor::{
    devices::{
        Width,
        cmos::Cmos,
        platform::IRQ_SCI,
        pm::{Pm, PmRequest},
        ports::{Claim, decode},
        reset::ResetPorts,
        uart::Uart,
    },
    guest::{
        LinuxConfig, VcpuInit,
        entry::{Segment, TableRegister},
        load_linux,
    },
};
use nestling_meter::{LINE, PORTS};

use crate::{
    memory::{Memory, PAGE, Pages},
    meter::{Meter, counter, set_slot, ticks},
};

const IRQ_SERIAL: u8 = 4;
const IRQ_CLOCK: u8 = 8;
/// Bytes of output that the serial port keeps; they are taken as they come.
const OUTPUT_BYTES: usize = 4096;

/// CPUID 1, ECX: TSC deadline, which a client of KVM has to offer by itself, and the presence of a hypervisor.
const DEADLINE_AND_HYPERVISOR: u32 = 1 << 24 | 1 << 31;

/// Registers of the local APIC (APM vol. 2, 16.3), and what is in them.
const SPURIOUS: usize = 0xf0;
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const APIC_ENABLED: u32 = 1 << 8;
const EXTERNAL: u32 = 7 << 8;
const NMI: u32 = 4 << 8;

/// Runs the guest of a bundle to its end.
pub(crate) fn run(bundle: &[u8]) -> Result<(), Box<dyn Error>> {
    let bundle = Bundle::parse(bundle).map_err(|cause| cause.to_string())?;
    let config = &bundle.config;
    if config.kind != GuestKind::Linux || config.vcpus != 1 {
        return Err("the bundle's guest is not a Linux with one vCPU".into());
    }
    let pages = if config.huge_pages == HugePages::None { Pages::Small } else { Pages::Large };
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let ram = Memory::new(usize::try_from(config.memory_bytes)?, pages)?;
    ram.populate();
    let machine = LinuxConfig { memory_bytes: config.memory_bytes, vcpus: config.vcpus };
    let initrd = bundle.initrd.unwrap_or_default();
    let init =
        load_linux(&ram, bundle.kernel, initrd, &config.command_line, &machine).map_err(|cause| cause.to_string())?;
    set_slot(&vm, 0, 0, &ram, config.memory_bytes, 0)?;
    let meter = Meter::new(&vm, Memory::new(config.meter_pages.max(1) as usize * PAGE, Pages::Small)?)?;

    let mut vcpu = vm.create_vcpu(0)?;
    introduce(&kvm, &vcpu)?;
    enable_apic(&vcpu)?;
    start(&vcpu, &init)?;
    let mut devices = Devices::new(&vm, meter);
    let start = ticks();
    let end = serve(&mut vcpu, &mut devices);
    let cost = ticks() - start;
    io::stdout().write_all(&devices.console)?;
    end?;
    // While its vCPU slept, so did the host's CPU. What KVM spent waiting for it to wake up at once is work.
    let idle = counter("halt_wait_ns").ok_or("KVM does not tell how long its vCPU slept")?;
    println!("{LINE} linux 1 {}", cost.saturating_sub(idle));
    Ok(())
}

/// Tells the vCPU what CPU it is: all that KVM has.
fn introduce(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), Box<dyn Error>> {
    let mut leaves = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for leaf in leaves.as_mut_slice() {
        match leaf.function {
            1 => {
                // One processor, and its APIC's ID is 0.
                leaf.ebx = leaf.ebx & 0xffff | 1 << 16;
                leaf.ecx |= DEADLINE_AND_HYPERVISOR;
            }
            0xb | 0x1f => leaf.edx = 0,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&leaves)?;
    Ok(())
}

/// Leaves the local APIC as firmware does: enabled, and the line to it from the pair of 8259s open.
fn enable_apic(vcpu: &VcpuFd) -> Result<(), Box<dyn Error>> {
    let mut apic = vcpu.get_lapic()?;
    for (register, value) in [(SPURIOUS, APIC_ENABLED | 0xff), (LINT0, EXTERNAL), (LINT1, NMI)] {
        for (to, from) in apic.regs[register..].iter_mut().zip(u32::to_le_bytes(value)) {
            *to = from.cast_signed();
        }
    }
    vcpu.set_lapic(&apic)?;
    Ok(())
}

/// Puts the vCPU into the state that the loader left.
fn start(vcpu: &VcpuFd, init: &VcpuInit) -> Result<(), Box<dyn Error>> {
    let mut system = vcpu.get_sregs()?;
    (system.cr0, system.cr3, system.cr4, system.efer) = (init.cr0, init.cr3, init.cr4, init.efer);
    let data = segment(init.data);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    (system.cs, system.tr, system.ldt) = (segment(init.cs), segment(init.tr), segment(init.ldtr));
    (system.gdt, system.idt) = (table(init.gdtr), table(init.idtr));
    vcpu.set_sregs(&system)?;
    let (rip, rsp, rsi, rflags) = (init.rip, init.rsp, init.rsi, init.rflags);
    vcpu.set_regs(&kvm_regs { rip, rsp, rsi, rflags, ..kvm_regs::default() })?;
    Ok(())
}

/// A segment register as KVM has it: the packed attributes one by one.
fn segment(of: Segment) -> kvm_segment {
    let bits = |from: u32, mask: u16| (of.attributes >> from & mask) as u8;
    kvm_segment {
        base: of.base,
        limit: of.limit,
        selector: of.selector,
        type_: bits(0, 0xf),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(8, 1),
        l: bits(9, 1),
        db: bits(10, 1),
        g: bits(11, 1),
        ..kvm_segment::default()
    }
}

fn table(of: TableRegister) -> kvm_dtable {
    kvm_dtable { base: of.base, limit: of.limit, ..kvm_dtable::default() }
}

/// Runs the guest and answers it until it switches itself off.
fn serve(vcpu: &mut VcpuFd, devices: &mut Devices<'_>) -> Result<(), Box<dyn Error>> {
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(port, data) => {
                if devices.output(port, data)? {
                    return Ok(());
                }
            }
            VcpuExit::IoIn(port, data) => devices.input(port, data)?,
            VcpuExit::MmioWrite(..) => {}
            // As an empty bus.
            VcpuExit::MmioRead(_, data) => data.fill(u8::MAX),
            other => return Err(format!("the guest ended by {other:?}").into()),
        }
    }
}

/// What is not in KVM.
struct Devices<'a> {
    vm: &'a VmFd,
    meter: Meter<'a>,
    uart: Uart,
    cmos: Cmos,
    pm: Pm,
    reset: ResetPorts,
    /// What KVM was told of the lines of the serial port, the clock and power management.
    lines: [bool; 3],
    /// What the guest has printed.
    console: Vec<u8>,
    start: u64,
}

impl<'a> Devices<'a> {
    fn new(vm: &'a VmFd, meter: Meter<'a>) -> Self {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self {
            vm,
            meter,
            uart: Uart::new(OUTPUT_BYTES, 1),
            cmos: Cmos::new(now_s),
            pm: Pm::new(),
            reset: ResetPorts::new(),
            lines: [false; 3],
            console: Vec::new(),
            start: ticks(),
        }
    }

    /// Nanoseconds since the start: a tick is one, with an emulator that counts instructions.
    fn now_ns(&self) -> u64 {
        ticks() - self.start
    }

    /// OUT. Whether it was the guest's end.
    fn output(&mut self, port: u16, data: &[u8]) -> io::Result<bool> {
        let now = self.now_ns();
        let end = match (decode(port), data) {
            (Some(Claim::Pm(offset)), _) => {
                let width = Width::from_bytes(data.len());
                width.is_some_and(|width| self.pm.write(now, offset, width, word(data)) == PmRequest::PowerOff)
            }
            (Some(Claim::Reset), &[byte]) => self.reset.write(port, byte),
            (Some(Claim::Uart(register)), &[byte]) => {
                self.uart.write(register, byte);
                self.uart.take_output(&mut self.console);
                false
            }
            (Some(Claim::CmosIndex), &[byte]) => {
                self.cmos.select(byte);
                false
            }
            (Some(Claim::CmosData), &[byte]) => {
                self.cmos.write(now, byte);
                false
            }
            (None, _) if PORTS.contains(&port) => {
                self.meter.write(port, word(data))?;
                false
            }
            _ => false,
        };
        self.settle()?;
        Ok(end)
    }

    /// IN.
    fn input(&mut self, port: u16, data: &mut [u8]) -> io::Result<()> {
        let now = self.now_ns();
        let value = match (decode(port), Width::from_bytes(data.len())) {
            (Some(Claim::Pm(offset)), Some(width)) => self.pm.read(now, offset, width),
            (Some(Claim::Reset), Some(Width::Byte)) => self.reset.read(port).into(),
            (Some(Claim::Uart(register)), Some(Width::Byte)) => self.uart.read(register).into(),
            (Some(Claim::CmosData), Some(Width::Byte)) => self.cmos.read(now).into(),
            (Some(Claim::Quiet), _) => 0,
            (None, _) if PORTS.contains(&port) => self.meter.read(port),
            _ => u32::MAX,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
        self.settle()
    }

    /// Carries levels along their lines.
    fn settle(&mut self) -> io::Result<()> {
        let levels =
            [(IRQ_SERIAL, self.uart.interrupt()), (IRQ_CLOCK, self.cmos.interrupt()), (IRQ_SCI, self.pm.sci())];
        for (line, (number, high)) in self.lines.iter_mut().zip(levels) {
            if std::mem::replace(line, high) != high {
                self.vm.set_irq_line(number.into(), high)?;
            }
        }
        Ok(())
    }
}

/// The bytes of an access, of which there are four at most.
fn word(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_bundle_of_a_linux_is_refused_before_kvm_is_asked() {
        for bundle in [&b""[..], b"NESTLING", &[0xff; 5000]] {
            let refused = run(bundle).expect_err("no bundle").to_string();
            assert!(refused.contains("bundle"), "{refused}");
        }
    }

    #[test]
    fn segments_keep_their_attributes() {
        let code = segment(VcpuInit::linux_64(0, 0).cs);
        assert_eq!((code.type_, code.s, code.dpl, code.present), (0xb, 1, 0, 1));
        assert_eq!((code.l, code.db, code.g, code.avl, code.limit), (1, 0, 1, 0, u32::MAX));
        let task = segment(VcpuInit::linux_64(0, 0).tr);
        assert_eq!((task.type_, task.s, task.present, task.g, task.limit), (0xb, 0, 1, 0, 0xffff));
    }

    #[test]
    fn accesses_are_words_of_their_width() {
        assert_eq!((word(&[]), word(&[0x12]), word(&[1, 2, 3, 4, 5])), (0, 0x12, 0x0403_0201));
    }
}
