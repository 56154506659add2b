//! The boot CPU's way from the loader to the guest, and to the end.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;
use core::{ptr, slice};

use nestling_control::PROTOCOL_VERSION;
use nestling_control::config::MmuKind;
use nestling_control::message::{GuestExit, Hello, ToCommand};

use super::{Handover, HandoverError, Loader, acpi, ap, multiboot2, pvh};
use crate::control::{self, Listener, log};
use crate::cpu::{self, apic, clock, local, power};
use crate::memory::{frames, map};
use crate::{svm, vm};

const MIB: u64 = 1 << 20;

/// Where the linked image lies, and the start code of the other CPUs in it.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    /// The start code of the other CPUs.
    pub trampoline_start: u64,
    /// Its end.
    pub trampoline_end: u64,
}

/// Physical memory under the identity map.
struct Identity;

impl acpi::Memory for Identity {
    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
        let end = address.checked_add(length as u64)?;
        // SAFETY: below 4 GiB everything is mapped and readable; nobody writes the firmware's tables.
        (address != 0 && end <= map::BOOT_LIMIT).then(|| unsafe { bytes(address..end) })
    }
}

/// # Safety
/// The range must be mapped, and not be written while the result lives.
unsafe fn bytes(range: Range<u64>) -> &'static [u8] {
    // SAFETY: the caller vouches for it.
    unsafe {
        slice::from_raw_parts(ptr::with_exposed_provenance(range.start as usize), (range.end - range.start) as usize)
    }
}

/// The loader, by the magic number of its protocol, and what it has left.
///
/// # Safety
/// As [`start`].
unsafe fn take_over(information: u64, magic: u32) -> (Loader, Result<Handover, HandoverError>) {
    match magic {
        // SAFETY: the loader put its structures there.
        pvh::MAGIC => (Loader::Pvh, unsafe { pvh::read(information) }.map_err(HandoverError::Pvh)),
        multiboot2::MAGIC => {
            // SAFETY: as above; what it refers to is kept from the frame allocator.
            let read = unsafe { multiboot2::read(information) };
            (Loader::Multiboot2, read.map_err(HandoverError::Multiboot2))
        }
        // Only the entry for Multiboot2 passes on what it found.
        other => (Loader::Multiboot2, Err(HandoverError::UnknownLoader(other))),
    }
}

/// Everything, from the loader's call to the end of the machine.
///
/// # Safety
/// Once, on the boot CPU, on its boot stack, with the entry code's identity map and the loader's information at that
/// address, in the format of that magic number.
pub unsafe fn start(information: u64, magic: u32, image: Image) -> ! {
    // SAFETY: the caller passes on what the loader left.
    let (loader, handover) = unsafe { take_over(information, magic) };
    let has_words =
        handover.as_ref().is_ok_and(|handover| handover.command_line.as_ref().is_some_and(|w| !w.is_empty()));
    // Words for the hypervisor itself are a person's: the command has the bundle for what it wants.
    control::init(if loader == Loader::Multiboot2 || has_words { Listener::Person } else { Listener::Command });
    let handover = handover.unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: the boot CPU, once, and the hand-over describes this machine.
    unsafe { set_up_memory(&handover, &image) };
    if let Some(words) = handover.command_line.clone() {
        // SAFETY: the words were kept out of the frame allocator.
        control::obey(&String::from_utf8_lossy(unsafe { bytes(words) }));
    }
    // SAFETY: as above; memory is there.
    unsafe {
        local::install(0, apic::id());
        cpu::load();
        apic::mask_legacy_controllers();
        apic::enable();
    }
    local::set_online();
    let machine = handover.rsdp.and_then(|rsdp| acpi::read(&Identity, rsdp)).unwrap_or_default();
    power::set(machine.power);
    clock::calibrate(machine.pm_timer_port);
    let me = local::this().apic_id();
    // Whatever tables a guest will ask for.
    let started = match handover.start_page().filter(|_| svm::check(MmuKind::Shadow).is_ok()) {
        // SAFETY: the start code is position independent up to its jump to the image, and nothing else is on the page.
        Some(page) => unsafe {
            let code = bytes(image.trampoline_start..image.trampoline_end);
            ptr::copy_nonoverlapping(code.as_ptr(), ptr::with_exposed_provenance_mut(page as usize), code.len());
            ap::start(page, machine.apic_ids.iter().copied().filter(|&id| id != me))
        },
        None => 0,
    };
    let (free, total) = frames::counts();
    control::send(&ToCommand::Hello(Hello {
        protocol: PROTOCOL_VERSION,
        cpus: started as u32 + 1,
        memory_bytes: total * frames::FRAME,
        cpu_name: cpu_name(),
        svm_features: svm::feature_names(),
    }));
    log::info!(
        "{} CPUs, {} of {} MiB free, TSC {} kHz, APIC timer {} kHz",
        started + 1,
        free * frames::FRAME / MIB,
        total * frames::FRAME / MIB,
        clock::tsc_khz(),
        clock::apic_khz()
    );
    let exit = match handover.module {
        // SAFETY: the module's memory was kept out of the frame allocator.
        Some(module) => unsafe { vm::run(bytes(module), started) },
        None => GuestExit::Error { text: "no bundle was loaded (QEMU: -initrd FILE; GRUB: module2 FILE)".to_string() },
    };
    control::finish(exit)
}

/// Sorts the machine's memory into what is used already and what the frame allocator gets.
///
/// # Safety
/// As [`start`].
unsafe fn set_up_memory(handover: &Handover, image: &Image) {
    let mut usable = handover.ram.clone();
    // The first MiB has the loader's structures, the firmware's data and our start code; it is not worth the sorting.
    usable.exclude(0..MIB);
    usable.exclude(image.start..image.end);
    handover.kept.as_slice().iter().for_each(|range| usable.exclude(range.clone()));
    usable.exclude(map::LIMIT..u64::MAX);
    let end = usable.as_slice().iter().map(|r| r.end).max().unwrap_or(0);
    let mut low = usable.clone();
    low.exclude(map::BOOT_LIMIT..u64::MAX);
    usable.exclude(0..map::BOOT_LIMIT);
    // SAFETY: nobody uses this memory: it is RAM by the firmware's map, without what was cut out above.
    unsafe {
        assert!(frames::init(low.as_slice(), end / frames::FRAME), "no room for the frame allocator's map");
        map::extend(end);
        for range in usable.as_slice() {
            frames::add(range.clone());
        }
    }
}

/// The processor's brand string (CPUID 0x8000_0002 to 4).
fn cpu_name() -> String {
    let leaves = (0x8000_0002..=0x8000_0004u32).map(core::arch::x86_64::__cpuid);
    let text: Vec<u8> = leaves.flat_map(|l| [l.eax, l.ebx, l.ecx, l.edx]).flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&text).trim_matches(['\0', ' ']).to_string()
}
