//! The library's part of a vCPU, of either kind: nested tables, or shadow tables ([`super::shadow`]).
//!
//! The kind follows from the type of the CPU ([`GuestCpu::Memory`]), so the loop that runs a vCPU is compiled once for
//! each, and neither has a branch for the other. What an exit means that only one kind has is decided here.

use alloc::sync::Arc;
use core::fmt::Debug;

use nestling::{FaultError, Hpa, InGuest, Mmu, VcpuId};

use super::exit::{Exit, Met};
use super::guest_cpu::{GuestCpu, NestedCpu};
use super::handle::Next;
use super::vcpu::Vcpu;
use crate::memory::embedder::Machine;

/// A vCPU, as the library knows it.
pub trait VcpuMemory<C: GuestCpu>: Debug + Send + Sized + 'static {
    /// The vCPU in guest mode.
    type Inside<'a>: Inside<C>
    where
        Self: 'a;

    /// The vCPU of this number; `None` without memory, or if the number is taken.
    fn new(mmu: &Arc<Mmu<Machine>>, id: VcpuId) -> Option<Self>;

    /// Gets it ready to run guest code on `cpu`, whose registers count.
    ///
    /// # Errors
    /// The library's.
    fn enter(&mut self, cpu: &mut C) -> Result<Self::Inside<'_>, FaultError>;

    /// Handles an exit that is about translation.
    ///
    /// # Errors
    /// The library's.
    fn translate(vcpu: &mut Vcpu<C>, exit: Exit) -> Result<Next, FaultError>;
}

/// What became of an exit in guest mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AtOnce {
    /// Nothing.
    No,
    /// The guest may run on.
    Fixed,
    /// It may; the root or its tag may be others than before.
    Turned,
    /// The same, and all of the tag was flushed.
    Flushed,
}

/// A vCPU in guest mode.
pub trait Inside<C> {
    /// The root that it runs on.
    fn root(&self) -> Hpa;

    /// Gives it to the CPU.
    fn load(&self, cpu: &mut C);

    /// What the TLB knows the root by.
    fn tag(&self) -> usize;

    /// Has the CPU, which was given the root, forget what it must before the guest runs. Whether that is all of the tag.
    fn flush(&mut self, cpu: &mut C) -> bool;

    /// Does what an exit is about without leaving guest mode, if it is one of those for which that is enough; if not, nothing
    /// was done. `physical_bits`: of an address of the guest's.
    fn fix_at_once(&mut self, cpu: &mut C, met: &Met, physical_bits: u32) -> AtOnce;
}

/// Nested tables.
impl<C: NestedCpu<Memory = Self>> VcpuMemory<C> for nestling::Vcpu<Machine> {
    type Inside<'a> = InGuest<'a, Machine>;

    fn new(mmu: &Arc<Mmu<Machine>>, id: VcpuId) -> Option<Self> {
        mmu.vcpu(id)
    }

    #[inline(always)]
    fn enter(&mut self, _cpu: &mut C) -> Result<InGuest<'_, Machine>, FaultError> {
        self.enter()
    }

    #[inline(always)]
    fn translate(vcpu: &mut Vcpu<C>, exit: Exit) -> Result<Next, FaultError> {
        match exit {
            Exit::Fault(fault) => vcpu.second_stage_fault(fault),
            _ => Ok(vcpu.unexpected()),
        }
    }
}

impl<C: NestedCpu> Inside<C> for InGuest<'_, Machine> {
    #[inline(always)]
    fn root(&self) -> Hpa {
        InGuest::root(self)
    }

    #[inline(always)]
    fn load(&self, cpu: &mut C) {
        cpu.set_root(InGuest::root(self));
    }

    #[inline(always)]
    fn tag(&self) -> usize {
        0
    }

    // One ASID serves all roots of the guest: whichever flush it is, it is this one.
    #[inline(always)]
    fn flush(&mut self, cpu: &mut C) -> bool {
        let flushes = self.take_flush().is_some();
        if flushes {
            cpu.flush();
        }
        flushes
    }

    #[inline(always)]
    fn fix_at_once(&mut self, _cpu: &mut C, met: &Met, _physical_bits: u32) -> AtOnce {
        match met.exit {
            Exit::Fault(fault) if InGuest::fix_at_once(self, fault) => AtOnce::Fixed,
            _ => AtOnce::No,
        }
    }
}
