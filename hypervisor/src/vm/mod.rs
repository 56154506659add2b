//! A VM and its vCPUs.
//!
//! vCPU *i* runs on CPU *i* + 1 and nowhere else. **CPU 0 never enters a guest**: it keeps house (console, control
//! channel, time limits, reports). That is not only tidy. QEMU's multi-threaded emulation (7.2 and 10.0 were looked at)
//! has a bug: an x87 or SSE state load on *any* CPU clears a flag in the *first* CPU's `hflags2` by a plain
//! read-modify-write. When that races with a #VMEXIT there, the bit that says "nested paging is on" comes back, and the
//! host's next fetch on CPU 0 is translated by the guest's nested table: about one boot in fifteen ended in a VMCB with the
//! hypervisor's own state in it. A CPU 0 that executes no VMRUN has no such bit to bring back. Real hardware has no such
//! bug, but also does not mind.
//!
//! Nor does CPU 0 enter the library while vCPUs run: it is left out of the MMU lock's fence ([`crate::cpu::barrier`]). Whatever
//! manages memory beside the vCPUs has a CPU of its own, as [`storm`] has, or is done by a vCPU between two turns.
//!
//! The rooms: [`shared`] (what vCPUs and housekeeper share, and how they reach each other), [`vcpu`] (the loop),
//! [`guest_cpu`] and [`exit`] (what it asks of the CPU, and what comes back), `handle` (exits), [`translation`] and [`shadow`]
//! (the library's part of a vCPU, and the exits that are about it), `bus` (what an instruction that is executed in software
//! reaches), `house` (CPU 0), `leave` (kicks that must arrive), `sleep` (ACPI S3), `refused` (states that are not), `series` (guest after guest), `state`,
//! [`pause`] (holding all vCPUs), [`saved`] and `copy` (a VM as it is kept, or goes to another machine),
//! [`storm`] (what is fired at a guest on purpose), [`meter`] (what a measuring guest asks for), [`walk`] and [`ring`] (what a death's report is made of), [`time`], [`marker`], and [`policy`] (what the guest sees of
//! CPUID and MSRs).

mod bus;
mod copy;
pub mod exit;
pub mod guest_cpu;
mod handle;
mod house;
mod hypercall;
mod leave;
pub mod marker;
pub mod meter;
pub mod pause;
pub mod policy;
mod refused;
pub mod ring;
pub mod saved;
mod series;
pub mod shadow;
pub mod shared;
mod sleep;
mod state;
pub mod storm;
pub mod time;
pub mod translation;
pub mod vcpu;
pub mod walk;

pub use house::run;
