//! The meter under KVM: what an operation is in the terms of KVM's interface, and what the call costs.

use std::{error::Error, io};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use nestling_meter::{BASE, COUNT, DONE, NOT_HERE, Operation, PORT, STATE, TICKS_HIGH};

use crate::memory::Memory;

/// The meter's slot; the guest's RAM is slot 0.
const SLOT: u32 = 1;

/// The time stamp counter, which counts instructions here.
pub(crate) fn ticks() -> u64 {
    // SAFETY: it only reads.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Makes a slot what these say; without a size, it is deleted.
///
/// # Errors
/// KVM's.
pub(crate) fn set_slot(vm: &VmFd, slot: u32, gpa: u64, memory: &Memory, bytes: u64, flags: u32) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: bytes,
        userspace_addr: memory.address(),
    };
    // SAFETY: the memory is mapped for as long as the VM lives, and nobody has references into it.
    unsafe { Ok(vm.set_user_memory_region(region)?) }
}

/// A line of the kernel's own account of its memory, in KiB.
fn kib(of: &str) -> io::Result<u32> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(of)?.strip_prefix(':')?.trim().strip_suffix(" kB"));
    line.and_then(|kib| kib.trim().parse().ok()).ok_or(io::ErrorKind::NotFound.into())
}

/// Pages of the tables that map guests' memory.
fn table_pages() -> io::Result<u32> {
    Ok(kib("SecPageTables")? / 4)
}

/// Bytes of all that the kernel keeps for itself but cached files and tables.
fn book_bytes() -> io::Result<u32> {
    Ok((kib("SUnreclaim")? + kib("VmallocUsed")?) << 10)
}

/// One of the counters that KVM keeps since it was loaded, if it tells.
pub(crate) fn counter(name: &str) -> Option<u64> {
    std::fs::read_to_string(format!("/sys/kernel/debug/kvm/{name}")).ok()?.trim().parse().ok()
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    vm: &'a VmFd,
    memory: Memory,
    ticks: u64,
    count: u32,
    state: u32,
}

impl<'a> Meter<'a> {
    /// A meter whose slot is there.
    pub(crate) fn new(vm: &'a VmFd, memory: Memory) -> Result<Self, Box<dyn Error>> {
        let meter = Self { vm, memory, ticks: 0, count: 0, state: NOT_HERE };
        meter.slot(true, 0)?;
        Ok(meter)
    }

    /// The slot's memory, when the VM is to go first.
    pub(crate) fn into_memory(self) -> Memory {
        self.memory
    }

    fn slot(&self, there: bool, flags: u32) -> io::Result<()> {
        let bytes = if there { self.memory.bytes() as u64 } else { 0 };
        set_slot(self.vm, SLOT, BASE, &self.memory, bytes, flags)
    }

    /// A register; what is none reads as the bus floats.
    pub(crate) fn read(&self, port: u16) -> u32 {
        match port {
            PORT => self.ticks as u32,
            TICKS_HIGH => (self.ticks >> 32) as u32,
            COUNT => self.count,
            STATE => self.state,
            _ => u32::MAX,
        }
    }

    /// Carries an operation out.
    pub(crate) fn write(&mut self, port: u16, value: u32) -> io::Result<()> {
        if port == PORT {
            let start = ticks();
            let count = match Operation::from_number(value) {
                Some(operation) => self.carry_out(operation)?,
                None => None,
            };
            self.ticks = ticks() - start;
            (self.state, self.count) = count.map_or((NOT_HERE, 0), |count| (DONE, count));
        }
        Ok(())
    }

    /// How many pages it met; `None` for what KVM has no call for.
    fn carry_out(&self, operation: Operation) -> io::Result<Option<u32>> {
        let mut count = 0;
        match operation {
            Operation::Nothing => {}
            // Where a log begins, KVM splits what is large (`eager_page_split`). Where it ends, it throws away the tables that
            // could be one page, for the guest to fault that in again: the fault is not in the cost.
            Operation::Add | Operation::LogStop | Operation::Collapse => self.slot(true, 0)?,
            Operation::Delete => self.slot(false, 0)?,
            Operation::Populate => self.memory.populate(),
            Operation::Invalidate => self.memory.drop_pages()?,
            Operation::LogStart | Operation::Split => self.slot(true, KVM_MEM_LOG_DIRTY_PAGES)?,
            Operation::LogStartAllSet => {
                let bits = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
                let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
                let args = [u64::from(bits), 0, 0, 0];
                self.vm.enable_cap(&kvm_enable_cap { cap, args, ..Default::default() })?;
                self.slot(true, KVM_MEM_LOG_DIRTY_PAGES)?;
            }
            Operation::Harvest => {
                let bitmap = self.vm.get_dirty_log(SLOT, self.memory.bytes())?;
                count = bitmap.iter().map(|word| word.count_ones()).sum();
            }
            Operation::Tables => count = table_pages()?,
            Operation::Exits => return Ok(counter("exits").map(|exits| exits as u32)),
            Operation::Books => count = book_bytes()?,
            // It has no call for ages; its zap of everything is what a slot's end is; its other address space belongs to a mode
            // that only firmware enters.
            Operation::Age | Operation::ZapAll | Operation::ZapAllFront | Operation::SwitchRoot | Operation::Mark => {
                return Ok(None);
            }
        }
        Ok(Some(count))
    }
}
