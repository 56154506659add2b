//! What differs in a vCPU by the tables that its CPU walks: nested ones beside the guest's, or shadow ones in their stead.
//!
//! A vCPU is of one kind for its life, and the kind is a type: neither pays for the other. Everybody who asks for a
//! control register of the guest's, or sets one, asks here, for with shadow tables the control block holds others
//! ([`super::shadow`]).

use core::fmt::Debug;

use nestling::{Hpa, Vcpu as NestedMemory};

use super::super::vmcb::{Control, NESTED_PAGING};
use super::{Features, Vcpu};
use crate::memory::embedder::Machine;
use crate::vm::exit::Exit;
use crate::vm::guest_cpu::{GuestCpu, NestedCpu};
use crate::vm::translation::VcpuMemory;
use crate::vm::walk::PagingRegisters;

/// A kind of tables.
pub trait Paging: Debug + Send + Sized + 'static {
    /// The library's part of such a vCPU.
    type Memory: VcpuMemory<Vcpu<Self>>;

    /// Page faults exit.
    const WATCHES_FAULTS: bool;

    /// Exceptions that exit for its sake.
    const EXCEPTIONS: u32;

    /// The kind's own state, after reset.
    fn new(features: Features) -> Self;

    /// Forgets what it knows of the TLB, of which nothing that is the guest's is to be used any more.
    fn forget(vcpu: &mut Vcpu<Self>);

    /// Sets the control block up for it.
    fn set_up(control: &mut Control, features: Features);

    /// The registers as the guest has them.
    fn registers(vcpu: &Vcpu<Self>) -> PagingRegisters;

    /// Sets them all.
    fn set_registers(vcpu: &mut Vcpu<Self>, registers: PagingRegisters);

    /// CR4 alone.
    fn cr4(vcpu: &Vcpu<Self>) -> u64;

    /// What fixes an exit in guest mode may leave an entry behind that is not a plain one.
    const FIXES_MORE: bool;

    /// The last exit, if it is one that may be fixed in guest mode.
    fn met(vcpu: &Vcpu<Self>) -> Option<Exit>;

    /// What an exit is, with respect to what the kind keeps in the control block.
    fn exited(vcpu: &Vcpu<Self>, exit: Exit) -> Exit;

    /// Writes to control registers that exit, beside those to CR8.
    fn watched_writes(&self) -> u16;
}

/// The CPU walks the guest's tables, and nested ones for each address in them.
#[derive(Debug)]
pub struct Nested;

impl Paging for Nested {
    type Memory = NestedMemory<Machine>;

    const WATCHES_FAULTS: bool = false;
    const EXCEPTIONS: u32 = 0;
    const FIXES_MORE: bool = false;

    fn new(_features: Features) -> Self {
        Self
    }

    #[inline(always)]
    fn forget(_vcpu: &mut Vcpu<Self>) {}

    fn set_up(control: &mut Control, _features: Features) {
        control.nested = NESTED_PAGING;
    }

    fn registers(vcpu: &Vcpu<Self>) -> PagingRegisters {
        let save = vcpu.save();
        PagingRegisters { cr0: save.cr0, cr3: save.cr3, cr4: save.cr4, efer: vcpu.held_efer() }
    }

    fn set_registers(vcpu: &mut Vcpu<Self>, registers: PagingRegisters) {
        let PagingRegisters { cr0, cr3, cr4, efer } = registers;
        let save = vcpu.save_mut();
        (save.cr0, save.cr3, save.cr4) = (cr0, cr3, cr4);
        vcpu.hold_efer(efer);
    }

    #[inline]
    fn cr4(vcpu: &Vcpu<Self>) -> u64 {
        vcpu.save().cr4
    }

    #[inline(always)]
    fn met(vcpu: &Vcpu<Self>) -> Option<Exit> {
        vcpu.last_fault().map(Exit::Fault)
    }

    #[inline(always)]
    fn exited(_vcpu: &Vcpu<Self>, exit: Exit) -> Exit {
        exit
    }

    #[inline(always)]
    fn watched_writes(&self) -> u16 {
        0
    }
}

impl NestedCpu for Vcpu<Nested> {
    #[inline]
    fn set_root(&mut self, root: Hpa) {
        if self.vmcb().control.nested_root != root.0 {
            self.vmcb_mut().control.nested_root = root.0;
            self.owe_flush();
        }
    }
}
