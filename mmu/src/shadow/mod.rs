//! Shadow paging: the tables that a CPU without nested paging walks, made of the guest's own page tables and the
//! memslots; any number of vCPUs fault in them at once.
//!
//! # What there is
//! A *shadow page* is one table of ours. It stands for one table of the guest's (or a part of one, or a run of frames)
//! read in one way: its identity is `(gfn, role)`, and nothing else ([`role`]). Pages live in an arena and are named by
//! handles that say which life of the page is meant ([`page`]). Each guest frame has a *bucket*, shared with its
//! neighbours: it knows which shadow pages stand for the frame as a table, and which entries map it as a page
//! ([`bucket`], [`rmap`]).
//!
//! # Locks
//! Everything runs inside the shared side of the MMU lock. Below it, in this order and carried by types ([`order`]):
//! 1. a page's lock: its life, its parents, and what its entries lead to;
//! 2. the lock of one of its children (each page is of a lower level than its parents, so there is no cycle);
//! 3. one bucket's lock: which shadow pages a frame has, whether they are in step with it, and its reverse map;
//! 4. the list of pages that are out of step.
//!
//! A fault goes down through upper levels without a lock: it follows an entry and compares the identity of the page
//! behind it with the one that it wants. Only where a link is missing, or at the leaf, it locks one page.
//!
//! # Who may change an entry
//! An entry that leads to a table: who holds the page's lock. A leaf: made by who holds the page's lock *and* the bucket
//! lock of the frame that it maps; removed, or deprived of rights, by who holds that bucket lock. Each page remembers
//! for each leaf the frame that it was made for, so that its removal finds the reverse map that it was entered in,
//! whatever the guest has done to its tables since. The CPU sets marks at any time: changes are compare-and-swaps.
//!
//! Leaves are of 4 KiB or, in pages of level 2, of 2 MiB ([`large`]). All frames of a block of 2 MiB are one bucket's, so
//! that both are made and go under the same lock.
//!
//! # When a table is in step
//! A shadow page is *in step* with the guest's table if each of its entries is what would be made of the guest's now. It
//! stays so because no leaf maps the table writable. The guest's first write faults, and then, under the table's bucket
//! lock, its pages are marked out of step *first* and the leaf becomes writable *second*. From then on they are on the
//! list, and are brought back in step ([`sync`]) whenever the guest does what would make a CPU forget old translations.
//!
//! Two decisions are made under the bucket lock of a frame G, and so exclude each other:
//! - a shadow page for the table G becomes visible, and all leaves of G lose their right to write;
//! - a leaf of G becomes writable, if no shadow page of G is in step; one of 2 MiB, if no frame of its block has a shadow
//!   page at all.
//!
//! After the first, vCPUs flush; only then the page counts as in step, after a look at the guest's entries. Every entry
//! is made of what the guest's entry says *under the page's lock*: bringing in step takes the same lock, so an entry made
//! of an old value is either found by it, or made after it and of the new one.
//!
//! # TLBs
//! An absent entry may still be in some TLB; nobody concludes from an entry that it is not. What the guest may see of its
//! own changes is its own business: it flushes, and each of its flushes ends in one of ours on that CPU, unless there is
//! nothing in its TLB that the guest's tables do not say ([`tags`], [`withdrawn`]). Whoever needs to
//! know that *no CPU writes to a frame* asks the frame's bucket, which remembers when a right to write was last taken
//! away there, and flushes if no flush has begun and ended since. Whoever gives memory back to the host, or a table back
//! to the embedder, always flushes.
//!
//! # Roots
//! A root is a shadow page: identity (CR3's frame, role). A vCPU holds handles of its current and its previous roots. A
//! page that is zapped loses its life at once, its frame after a flush that carries the request to drop obsolete roots
//! and a grace period: so no CPU stands on it, and none comes back to it. Zapping everything begins a new *epoch* under
//! the exclusive lock; pages of older epochs are found by nobody and are zapped beside running vCPUs.
//!
//! # Limits
//! Guest frames below 2^32 (16 TiB), no leaves of 1 GiB, the main address space, guests' tables as CR3 names them (not yet
//! those of a nested hypervisor).

pub(crate) mod age;
mod bucket;
mod code;
mod fault;
pub(crate) mod hold;
mod invlpg;
pub(crate) mod large;
mod leaves;
mod listed;
mod memory;
mod near;
pub(crate) mod order;
pub(crate) mod page;
mod quota;
mod rmap;
mod role;
mod sync;
pub(crate) mod table;
pub mod tags;
pub mod vcpu;
pub(crate) mod withdrawn;
pub(crate) mod zap;

use alloc::boxed::Box;

use crate::addr::Gfn;
use crate::guest::CpuFeatures;
use crate::host::Host;
use crate::sync::{AtomicU32, Ordering};
use crate::{Mmu, OutOfMemory};
use bucket::Buckets;
use listed::OutOfStep;
use page::Arena;
use quota::Hand;
use withdrawn::Withdrawals;

/// What shadow paging is made for. Fixed for its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShadowConfig {
    /// Shadow pages at most, 64 to 4194304 (nearest taken). Each page of guest memory in use costs a 512th of one; a page
    /// costs its table, and about 2.2 KiB of books.
    pub pages: u32,
    /// What the guest's CPU is.
    pub cpu: CpuFeatures,
}

/// What all vCPUs of a shadowed guest share.
#[derive(Debug)]
pub(crate) struct Shadow {
    arena: Arena,
    buckets: Buckets,
    out_of_step: OutOfStep,
    pub(crate) withdrawals: Withdrawals,
    hand: Hand,
    /// Pages of another epoch are obsolete. Advanced under the exclusive lock.
    epoch: AtomicU32,
    cpu: CpuFeatures,
}

/// Shadow pages at least.
const LEAST_PAGES: u32 = if cfg!(any(feature = "loom", feature = "shuttle")) { 12 } else { 64 };
/// Guest frames that can be shadowed lie below.
pub(crate) const GFN_LIMIT: Gfn = Gfn(1 << 32);

impl Shadow {
    fn new(config: ShadowConfig) -> Self {
        let pages = config.pages.clamp(LEAST_PAGES, 1 << 22);
        Self {
            arena: Arena::new(pages),
            buckets: Buckets::new(pages),
            out_of_step: OutOfStep::new(),
            withdrawals: Withdrawals::new(),
            hand: Hand::new(),
            epoch: AtomicU32::new(0),
            cpu: config.cpu,
        }
    }

    /// Makes every page obsolete. Under the exclusive lock, and with the request to drop obsolete roots made before that
    /// is left: see `Exclusive::invalidate_all_roots`.
    pub(crate) fn begin_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    #[inline]
    fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The frames of all tables, at the end of the MMU.
    pub(crate) fn take_frames(&self, free: impl FnMut(crate::Hfn)) {
        self.arena.take_frames(free);
    }
}

/// What the books of a shadowed guest cost now, in bytes; the tables themselves are not among it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Metadata {
    /// Shadow pages in use.
    pub pages: u64,
    /// Books of shadow pages, in use or not.
    pub page_books: u64,
    /// Reverse maps.
    pub reverse_maps: u64,
    /// Buckets.
    pub buckets: u64,
    /// Entries in the reverse maps now.
    pub mappings: u64,
    /// Handles of roots that vCPUs keep, of pages in use or not.
    pub handles: u64,
}

impl Metadata {
    /// All of it.
    pub const fn bytes(&self) -> u64 {
        self.page_books + self.reverse_maps + self.buckets
    }
}

impl<H: Host> Mmu<H> {
    /// Gets the MMU ready for shadow paging. What is asked for first counts; until this is called nothing of it exists.
    pub fn enable_shadow(&self, config: ShadowConfig) -> Result<(), OutOfMemory> {
        if self.shadow.get().is_none() {
            self.tlb.will_be_asked();
            self.shadow.set(Box::new(Shadow::new(config)));
        }
        Ok(())
    }

    /// What shadow paging's books cost now; `None` while it is not enabled.
    pub fn shadow_metadata(&self) -> Option<Metadata> {
        let shadow = self.shadow.get()?;
        let (pages, page_books) = shadow.arena.usage(|| self.host.relax());
        let (buckets, reverse_maps) = shadow.buckets.usage(|| self.host.relax());
        let mappings = shadow.buckets.mappings(|| self.host.relax());
        let handles = shadow.arena.pages().map(|(_, page)| u64::from(page.loads())).sum();
        Some(Metadata { pages, page_books, reverse_maps, buckets, mappings, handles })
    }
}
