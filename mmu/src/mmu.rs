//! The MMU of one VM: what vCPUs and workers share.

use alloc::collections::TryReserveError;
use alloc::sync::Arc;
use core::fmt;

use crate::addr::Level;
use crate::events::Counters;
use crate::host::{Host, VcpuId};
use crate::leaf_lock::LeafLock;
use crate::lock::MmuLock;
use crate::notify::Notify;
use crate::once::OnceBox;
use crate::reclaim::Reclaim;
use crate::root::{Role, Roots};
use crate::shadow::Shadow;
use crate::slots::{Slots, Updates};
use crate::tlb::Tlb;
use crate::vcpu::Vcpu;
use crate::worker::Worker;

/// There is no memory for what was asked. Nothing was changed, unless the operation says what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of memory for the MMU's own needs")
    }
}

impl core::error::Error for OutOfMemory {}

impl From<TryReserveError> for OutOfMemory {
    fn from(_: TryReserveError) -> Self {
        Self
    }
}

/// What a memslot update removes (KVM_X86_QUIRK_SLOT_ZAP_ALL).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotZap {
    /// The slot's own mappings.
    Slot,
    /// All mappings: constant cost under the exclusive lock, and vCPUs fault everything in again.
    Everything,
}

/// What an MMU is made for. Fixed for its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// vCPUs at most; their numbers are below it. 1 to 4096.
    pub vcpus: u16,
    /// Workers at most at one time. 1 to 256.
    pub workers: u16,
    /// Memslots at most, those of all address spaces together.
    pub slots: usize,
    /// Level of the root tables: [`Level::L4`] (48 guest-physical bits) or [`Level::L5`].
    pub root_level: Level,
    /// The largest leaf: [`Level::K4`], [`Level::M2`] or [`Level::G1`].
    pub largest: Level,
    /// What goes when a slot is deleted, moved or restricted.
    pub slot_zap: SlotZap,
    /// Whether accesses without memory leave MMIO entries. Must be false for NPT on a CPU that has 52 physical address
    /// bits, where no bit is reserved.
    pub mmio_entries: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: 64,
            workers: 4,
            slots: 32 * 1024,
            root_level: Level::L4,
            largest: Level::G1,
            slot_zap: SlotZap::Slot,
            mmio_entries: true,
        }
    }
}

/// What is wrong with a [`Config`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConfigError {
    /// The number of vCPUs is not between 1 and 4096.
    Vcpus,
    /// The number of workers is not between 1 and 256.
    Workers,
    /// The root level is neither 4 nor 5.
    RootLevel,
    /// The largest leaf is above 1 GiB.
    Largest,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpus => "the number of vCPUs must be between 1 and 4096",
            Self::Workers => "the number of workers must be between 1 and 256",
            Self::RootLevel => "the root level must be 4 or 5",
            Self::Largest => "the largest leaf is 1 GiB",
        })
    }
}

impl core::error::Error for ConfigError {}

/// The guest-memory MMU of one VM.
pub struct Mmu<H: Host> {
    pub(crate) host: H,
    pub(crate) config: Config,
    role: Role,
    pub(crate) lock: MmuLock,
    pub(crate) tlb: Tlb,
    pub(crate) slots: Slots,
    pub(crate) updates: LeafLock<Updates>,
    pub(crate) roots: Roots,
    pub(crate) notify: Notify,
    pub(crate) reclaim: Reclaim,
    pub(crate) shadow: OnceBox<Shadow>,
}

impl<H: Host> fmt::Debug for Mmu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mmu").field("config", &self.config).field("counters", &self.counters()).finish_non_exhaustive()
    }
}

impl<H: Host> Mmu<H> {
    /// An MMU without slots, roots or vCPUs.
    pub fn new(host: H, config: Config) -> Result<Arc<Self>, ConfigError> {
        match config {
            Config { vcpus: 0 | 4097.., .. } => return Err(ConfigError::Vcpus),
            Config { workers: 0 | 257.., .. } => return Err(ConfigError::Workers),
            Config { largest, .. } if largest > Level::G1 => return Err(ConfigError::Largest),
            _ => {}
        }
        let role = Role::new(config.root_level).ok_or(ConfigError::RootLevel)?;
        let (slots, updates) = Slots::new(config.slots, config.root_level.root_limit());
        Ok(Arc::new(Self {
            host,
            lock: MmuLock::new(usize::from(config.vcpus) + usize::from(config.workers)),
            tlb: Tlb::new(usize::from(config.vcpus)),
            slots,
            updates: LeafLock::new(updates),
            roots: Roots::new(),
            notify: Notify::new(),
            reclaim: Reclaim::new(),
            shadow: OnceBox::new(),
            config,
            role,
        }))
    }

    /// The embedder.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// What it was made for.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The vCPU of this number; `None` if it exists already or the number is not below [`Config::vcpus`].
    pub fn vcpu(self: &Arc<Self>, id: VcpuId) -> Option<Vcpu<H>> {
        (id.0 < self.config.vcpus).then(|| Vcpu::new(self, id)).flatten()
    }

    /// A worker; fails when there is no memory for it or [`Config::workers`] exist.
    pub fn worker(self: &Arc<Self>) -> Result<Worker<H>, OutOfMemory> {
        Worker::new(self)
    }

    /// The counters now.
    pub fn counters(&self) -> Counters {
        Counters::sum(self.lock.seats().map(|seat| &seat.counters))
    }

    /// Whether the vCPU is in guest mode, for an embedder that wants to kick it only then. The answer may be old when
    /// it arrives: whoever acts on `false` must have made its reason visible to the vCPU before asking.
    pub fn in_guest(&self, id: VcpuId) -> bool {
        id.0 < self.config.vcpus && self.tlb.in_guest(id)
    }

    /// The role of the roots that vCPUs load at first: the main address space, with accessed and dirty bits. Others are
    /// made from it ([`Vcpu::set_role`]).
    pub fn role(&self) -> Role {
        self.role
    }
}

impl<H: Host> Drop for Mmu<H> {
    /// Frees every table. vCPUs and workers hold the MMU, so there are none any more: nobody walks and no guest runs,
    /// which is why neither a grace period nor a flush is needed. (What a CPU's TLB still holds of this VM is flushed
    /// before its next guest runs: a new vCPU always flushes at its first entry.)
    fn drop(&mut self) {
        for table in self.reclaim.drain() {
            self.host.free_table(table);
        }
        if let Some(shadow) = self.shadow.get() {
            shadow.take_frames(|frame| self.host.free_table(frame));
        }
        for (frame, level) in self.roots.take() {
            crate::table::free_tree(self, frame, level);
        }
    }
}
