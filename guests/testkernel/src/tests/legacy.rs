//! Older modes, on every processor: 32-bit mode without paging, with 4 MiB and 4 KiB pages of two levels, and with PAE;
//! real mode; and back. In each: device memory, instructions that exit, exceptions of the processor's own and of the
//! hypervisor's making, and page faults inside instructions that are executed in software.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::boot::table_address;
use crate::cpu::rdmsr;
use crate::machine::{TEST_RAM, set_word, word};
use crate::visit::{
    CODE, COUNT, CR2, Mode, OWN, REAL, REAL_RESULTS, VECTOR, VISIT, left, visit, visit_checks, visit_real,
};
use crate::{apic, check, machine, tasks};

const FX: u64 = 0x600;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;

/// Linear address of the window; there is nothing else.
const WINDOW: u32 = 0xa000_0000;
const PRESENT: u32 = 1;
const WRITABLE: u32 = 2;
const USER: u32 = 1 << 2;
const LARGE: u32 = 1 << 7;

#[repr(align(4096))]
struct Legacy([AtomicU32; 1024]);
#[repr(align(4096))]
struct Wide([AtomicU64; 512]);

static ROOT: Legacy = Legacy([const { AtomicU32::new(0) }; 1024]);
static LEAVES: Legacy = Legacy([const { AtomicU32::new(0) }; 1024]);
static POINTERS: Wide = Wide([const { AtomicU64::new(0) }; 512]);
static DIRECTORY: Wide = Wide([const { AtomicU64::new(0) }; 512]);
static WIDE_LEAVES: Wide = Wide([const { AtomicU64::new(0) }; 512]);
static RAM: [Legacy; 2] = [const { Legacy([const { AtomicU32::new(0) }; 1024]) }; 2];

fn address<T>(thing: &'static T) -> u32 {
    core::ptr::from_ref(thing).expose_provenance() as u32
}

/// Entries of the window: RAM, nothing, the device's page, RAM that can't be written.
fn window(device: u32) -> [u32; 4] {
    [address(&RAM[0]) | PRESENT | WRITABLE, 0, device | PRESENT | WRITABLE, address(&RAM[1]) | PRESENT]
}

fn legacy_root(device: u32) -> u64 {
    for (index, entry) in (0u32..).zip(&ROOT.0) {
        // The user's too: virtual-8086 mode is.
        entry.store(index << 22 | PRESENT | WRITABLE | USER | LARGE, Ordering::SeqCst);
    }
    ROOT.0[(WINDOW >> 22) as usize].store(address(&LEAVES) | PRESENT | WRITABLE, Ordering::SeqCst);
    for (entry, value) in LEAVES.0.iter().zip(window(device)) {
        entry.store(value, Ordering::SeqCst);
    }
    address(&ROOT).into()
}

fn pae_root(device: u32) -> u64 {
    for index in 0..4 {
        POINTERS.0[index].store(u64::from(table_address(2 + index as u64) | PRESENT), Ordering::SeqCst);
    }
    // The window is in the third GiB, whose directory is this module's.
    let (gib, within) = (WINDOW >> 30, (WINDOW >> 21 & 0x1ff) as usize);
    let flags = u64::from(PRESENT | WRITABLE | LARGE);
    for (index, entry) in (0u64..).zip(&DIRECTORY.0) {
        entry.store((u64::from(gib) << 30) + (index << 21) | flags, Ordering::SeqCst);
    }
    DIRECTORY.0[within].store(u64::from(address(&WIDE_LEAVES) | PRESENT | WRITABLE), Ordering::SeqCst);
    for (entry, value) in WIDE_LEAVES.0.iter().zip(window(device)) {
        entry.store(value.into(), Ordering::SeqCst);
    }
    POINTERS.0[gib as usize].store(u64::from(address(&DIRECTORY) | PRESENT), Ordering::SeqCst);
    address(&POINTERS).into()
}

/// On each processor.
pub(super) fn run(number: usize) {
    let device = TEST_RAM as u32 + 0x1000 * number as u32;
    protected("32-bit mode", device, 0, FX);
    protected("4 MiB pages", device, legacy_root(device), FX | PSE);
    protected("PAE", device, pae_root(device), FX | PAE);
    // A guest on shadow tables has no tasks, and is told so.
    let without = machine::command_line().split(' ').any(|word| word == "no-tasks");
    if !without && !apic::is_x2apic() {
        // The tasks send to themselves through the window.
        switch("32-bit mode", number, 0, FX);
        switch("4 MiB pages", number, legacy_root(device), FX | PSE);
        switch("PAE", number, pae_root(device), FX | PAE);
    }
    real(device + 0x40);
}

/// Tasks, with everything in place, and with nothing.
fn switch(name: &str, number: usize, root: u64, cr4: u64) {
    for forget in [false, true] {
        let visit = visit();
        tasks::run(&visit, number, root, cr4, forget);
        let own: [u32; 10] = core::array::from_fn(tasks::left);
        // Called twice and by INT once; each time but the first it went on behind its IRET.
        check!(own[..3] == [3, 2, 1], "{name}: tasks called and jumped to, forgotten {forget}: {:?}", &own[..3]);
        check!(own[3..6] == [2, 0x1ff8, 0], "{name}: a task for #GP, forgotten {forget}: {:x?}", &own[3..6]);
        check!(own[6..9] == [2, 1, 1], "{name}: NMI, interrupt, #UD, forgotten {forget}: {:?}", &own[6..9]);
        check!(left(COUNT) == 0, "{name}: exception {} instead of a task", left(VECTOR));
        let flags = [tasks::NMI, tasks::INTERRUPT, tasks::FAULT].map(|task| tasks::state(task, tasks::EFLAGS));
        check!(flags == [2; 3], "{name}: flags in tasks' states: {flags:x?}");
        let seen = tasks::state(tasks::VIRTUAL, tasks::EBX);
        check!(seen == core::arch::x86_64::__cpuid(0).ebx, "{name}: CPUID in virtual-8086 mode: {seen:#x}");
        check!(tasks::left(15) & 8 != 0, "{name}: a task switch without CR0.TS: {:#x}", tasks::left(15));
        check!(tasks::left(12) == 1 && tasks::left(13) != 0, "{name}: SYSENTER");
    }
}

fn protected(name: &str, device: u32, root: u64, cr4: u64) {
    let paged = root != 0;
    let visit = visit();
    VISIT[5].store(device, Ordering::SeqCst);
    VISIT[6].store(if paged { WINDOW } else { 0 }, Ordering::SeqCst);
    set_word(u64::from(device), 0);
    let mode = if paged { Mode::Paged } else { Mode::Flat };
    // SAFETY: that code is made for these modes.
    let exceptions = unsafe { visit.call(mode, root, cr4, (&raw const visit_checks).expose_provenance() as u64) };
    let own: [u32; 12] = core::array::from_fn(|index| left(OWN + index));
    check!(word(device.into()) == 0x5aa5_c33c, "{name}: REP STOS: {:#x}", word(device.into()));
    check!((own[0], own[1]) == (0x5aa5_c33c, 0x5aa5_c343), "{name}: LOCK XADD: {:#x}, {:#x}", own[0], own[1]);
    check!(own[2] == core::arch::x86_64::__cpuid(0).ebx, "{name}: CPUID: {:#x}", own[2]);
    check!((own[3], own[4]) == (0x30, 13), "{name}: INT 0x30 gave {:#x}, RDMSR {}", own[3], own[4]);
    let expected = if paged { 5 } else { 2 };
    check!(
        exceptions == expected,
        "{name}: {exceptions} exceptions, the last {} {:#x} {:#x}",
        left(VECTOR),
        left(CODE),
        left(CR2)
    );
    check!(left(COUNT) == expected, "{name}: {} exceptions", left(COUNT));
    if paged {
        check!((own[5], own[6]) == (0, WINDOW + 0x1234), "{name}: #PF {:#x} at {:#x}", own[5], own[6]);
        let [_, _, _, _, _, _, _, rest, code, cr2, rights, through] = own;
        check!((rest, code, cr2) == (8, 2, WINDOW + 0x1000), "{name}: REP MOVS: {rest} left, {code:#x} at {cr2:#x}");
        check!(rights == 3, "{name}: a page that can't be written: {rights:#x}");
        check!(through == 0x5aa5_c33c, "{name}: the device through the window: {through:#x}");
        check!(RAM[0].0[1022].load(Ordering::SeqCst) == 0x5aa5_c33c, "{name}: what REP MOVS brought");
    }
}

fn real(device: u32) {
    let visit = visit();
    let window = if apic::is_x2apic() { 0 } else { apic::WINDOW as u32 };
    visit.prepare_real(device, window);
    // SAFETY: that code is made for this mode.
    unsafe { visit.call(Mode::Flat, 0, FX, (&raw const visit_real).expose_provenance() as u64) };
    let result = |offset: usize| word((REAL + REAL_RESULTS + offset) as u64);
    check!(result(0) == 1, "real mode: INT came {} times", result(0));
    check!((result(4), result(8)) == (1, 1), "real mode: #DE {}, #UD {}", result(4), result(8));
    check!(
        (result(0x24), result(0x28)) == (1, u32::from(window != 0)),
        "real mode: INT1 {}, HLT {}",
        result(0x24),
        result(0x28)
    );
    check!(u64::from(result(0x2c)) == rdmsr(apic::APIC_BASE), "real mode: RDMSR {:#x}", result(0x2c));
    check!(result(0x10) == core::arch::x86_64::__cpuid(0).ebx, "real mode: CPUID {:#x}", result(0x10));
    check!(result(0x14) == 0x5aa5_0001, "real mode: device memory above 1 MiB: {:#x}", result(0x14));
    check!(result(0x1c) == 0x7856_7856, "real mode: strings of a port: {:#x}", result(0x1c));
}
