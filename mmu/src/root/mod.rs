//! Roots: the top tables that vCPUs load, one a role, reference-counted.
//!
//! # Protocol
//! A root is found by its [`Role`], or made, under the list's leaf lock: two vCPUs that want the same role get the
//! same root. Each root is born with one reference that the MMU itself owns (it is in the list); a vCPU that has it
//! loaded holds another, so does an operation that walks it. Loading needs no exclusive lock.
//!
//! Roots stay in the list until the MMU goes, so an operation that walks all roots may go by their number and take a
//! reference to one after the other.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{Hfn, Level};
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::{Mmu, OutOfMemory};

/// What makes two roots different: vCPUs whose roles are equal share one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Role {
    /// The root table's level: [`Level::L4`] or [`Level::L5`].
    pub level: Level,
}

/// One root.
#[derive(Debug)]
struct Root {
    frame: Hfn,
    role: Role,
}

/// A counted reference to a root.
#[derive(Clone, Debug)]
pub(crate) struct RootRef(Arc<Root>);

impl RootRef {
    #[inline]
    pub(crate) fn frame(&self) -> Hfn {
        self.0.frame
    }

    #[inline]
    pub(crate) fn role(&self) -> Role {
        self.0.role
    }
}

/// The MMU's roots, each by its first reference.
#[derive(Debug)]
pub(crate) struct Roots {
    list: LeafLock<Vec<RootRef>>,
}

impl Roots {
    pub(crate) const fn new() -> Self {
        Self { list: LeafLock::new(Vec::new()) }
    }

    /// The root of `role`; made if there is none. `frame` is a table frame to make it of, taken if it is used.
    pub(crate) fn get_or_make<H: Host>(
        &self,
        mmu: &Mmu<H>,
        role: Role,
        frame: &mut Option<Hfn>,
    ) -> Result<RootRef, OutOfMemory> {
        let mut list = self.list.lock(|| mmu.host.relax());
        if let Some(root) = list.iter().find(|root| root.role() == role) {
            return Ok(root.clone());
        }
        list.try_reserve(1)?;
        let frame = frame.take().ok_or(OutOfMemory)?;
        let root = RootRef(Arc::new(Root { frame, role }));
        list.push(root.clone());
        Ok(root)
    }

    /// The root of `role`, if there is one.
    pub(crate) fn get<H: Host>(&self, mmu: &Mmu<H>, role: Role) -> Option<RootRef> {
        self.list.lock(|| mmu.host.relax()).iter().find(|root| root.role() == role).cloned()
    }

    /// The root of this number, for walks over all of them.
    pub(crate) fn nth<H: Host>(&self, mmu: &Mmu<H>, number: usize) -> Option<RootRef> {
        self.list.lock(|| mmu.host.relax()).get(number).cloned()
    }

    /// All roots, for the end of the MMU.
    pub(crate) fn take(&mut self) -> Vec<RootRef> {
        core::mem::take(self.list.get_mut())
    }
}

/// A frame taken for a table that turned out not to be needed goes back at once: no entry ever led to it.
pub(crate) fn give_back<H: Host>(host: &H, frame: Option<Hfn>) {
    if let Some(frame) = frame {
        host.free_table(frame);
    }
}
