//! An embedder of the library on the host.
//!
//! One [`Machine`] a VM: a bounded [`arena`] of table frames, memory that the [`crate::ghost`] keeps the books of,
//! vCPUs ([`guest`]) that are kicked by a flag which they look at between two guest instructions, and both pairs of
//! [`fence`]s.

pub mod arena;
pub mod cpu;
pub mod fence;
pub mod guest;
mod host;

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nestling::events::Event;
use nestling::host::{BackingError, Extent};
use nestling::{AdBits, AddressSpace, Config, Gfn, GfnRange, Hfn, Level, Mmu, Role, Slot, VcpuId, Worker};

use crate::ghost::tree::Tree;
use crate::ghost::{Ghost, Violation};
use arena::Arena;
use cpu::Cpu;
use fence::Fences;

/// What runs once, in the place of the next answer of the backing: outside the MMU lock, between a fault's look at
/// the slots and its entry into the lock. It may use workers, and gives the answer.
pub type OnResolve = Box<dyn FnOnce(&Slot, Gfn) -> Result<Extent, BackingError> + Send>;
/// What runs once in the middle of an operation: when it frees a table (outside the MMU lock), or when it follows an
/// entry to one (inside).
pub type OnStep = Box<dyn FnOnce() + Send>;
/// What sees trace events.
pub type OnTrace = Box<dyn FnMut(Event) + Send>;

/// See the module head.
pub struct Machine<F> {
    /// The table frames; shared, so that they can be counted when the MMU is gone.
    pub arena: Arc<Arena>,
    ghost: Mutex<Ghost>,
    kicks: Box<[AtomicBool]>,
    /// Ranges that each vCPU's TLB is to forget before it translates anything more; locked while it does.
    forget: Box<[Mutex<Vec<GfnRange>>]>,
    by_range: bool,
    fences: Fences,
    /// Long operations yield each time this many questions were asked; 0 for never.
    restless: u64,
    /// A thread loses its CPU inside the library once in so many calls; 0 for never.
    rough: u64,
    questions: AtomicU64,
    looks: AtomicU64,
    on_resolve: Mutex<Option<OnResolve>>,
    on_free: Mutex<Option<OnStep>>,
    on_table: Mutex<Option<(Hfn, OnStep)>>,
    /// Whether `on_table` holds anything.
    watched: AtomicBool,
    on_trace: Mutex<Option<OnTrace>>,
    traced: AtomicBool,
    format: PhantomData<F>,
}

impl<F: Cpu> fmt::Debug for Machine<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("format", &F::NAME).field("ghost", &self.ghost).finish_non_exhaustive()
    }
}

/// What a machine is made with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Build {
    /// Frames of the arena.
    pub tables: usize,
    /// The pair of fences.
    pub fences: Fences,
    /// Long operations yield each time this many questions were asked; 0 for never.
    pub restless: u64,
    /// A thread loses its CPU inside the library, between two steps of a walk or halfway into the lock, once in so
    /// many calls; 0 for never.
    pub rough: u64,
    /// Its CPUs can be told by any of them to forget a range.
    pub by_range: bool,
}

impl Default for Build {
    fn default() -> Self {
        Self { tables: 512, fences: Fences::Full, restless: 0, rough: 0, by_range: false }
    }
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // A check that panicked in one thread must not hide what the others find.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<F: Cpu> Machine<F> {
    /// A machine without an MMU.
    pub fn new(build: Build, vcpus: u16) -> Self {
        Self {
            arena: Arc::new(Arena::new(build.tables)),
            ghost: Mutex::new(Ghost::new()),
            kicks: (0..vcpus).map(|_| AtomicBool::new(false)).collect(),
            forget: (0..vcpus).map(|_| Mutex::default()).collect(),
            by_range: build.by_range,
            fences: build.fences,
            restless: build.restless,
            rough: build.rough,
            questions: AtomicU64::new(0),
            looks: AtomicU64::new(0),
            on_resolve: Mutex::default(),
            on_free: Mutex::default(),
            on_table: Mutex::default(),
            watched: AtomicBool::new(false),
            on_trace: Mutex::default(),
            traced: AtomicBool::new(false),
            format: PhantomData,
        }
    }

    /// A machine and its MMU.
    pub fn build(build: Build, config: Config) -> Arc<Mmu<Self>> {
        let machine = Self::new(build, config.vcpus);
        machine.ghost().set_largest(config.largest);
        Mmu::new(machine, config).expect("the test's configuration is right")
    }

    /// The ghost. Not to be held while the library is called.
    pub fn ghost(&self) -> MutexGuard<'_, Ghost> {
        held(&self.ghost)
    }

    /// Runs `what` in place of the backing's next answer.
    pub fn on_next_resolve(&self, what: OnResolve) {
        *held(&self.on_resolve) = Some(what);
    }

    /// Runs `what` before the next table frame is freed.
    pub fn on_next_free(&self, what: OnStep) {
        *held(&self.on_free) = Some(what);
    }

    /// Runs `what` when the library next follows an entry to the table `frame`.
    pub fn on_next_look_at(&self, frame: Hfn, what: OnStep) {
        *held(&self.on_table) = Some((frame, what));
        self.watched.store(true, Ordering::Release);
    }

    fn followed(&self, frame: Hfn) {
        if self.watched.load(Ordering::Acquire) {
            let hook = held(&self.on_table).take_if(|(watched, _)| *watched == frame);
            if let Some((_, hook)) = hook {
                self.watched.store(false, Ordering::Release);
                hook();
            }
        }
    }

    /// Shows trace events to `what` from now on.
    pub fn on_trace(&self, what: OnTrace) {
        *held(&self.on_trace) = Some(what);
        self.traced.store(true, Ordering::Relaxed);
    }

    /// How often the library followed a frame number to a table.
    pub fn looks(&self) -> u64 {
        self.looks.load(Ordering::Relaxed)
    }

    /// Takes the kick that was sent to a vCPU. Cleared outside guest mode only: see [`guest`].
    fn clear_kick(&self, vcpu: VcpuId) {
        self.kicks[usize::from(vcpu.0)].store(false, Ordering::SeqCst);
    }

    /// Whether a kick was sent that the vCPU has not answered yet.
    pub fn is_kicked(&self, vcpu: VcpuId) -> bool {
        self.kicks[usize::from(vcpu.0)].load(Ordering::SeqCst)
    }

    /// Gives the CPU away now and then, where the library would be interrupted at the worst moment.
    fn stumble(&self) {
        if self.rough > 0 && self.questions.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.rough) {
            std::thread::yield_now();
        }
    }

    /// What was found so far, the arena's findings among it.
    pub fn violations(&self) -> Vec<Violation> {
        let mut ghost = self.ghost();
        for misuse in self.arena.take_misuse() {
            ghost.violation(None, format!("table frames: {misuse:?}"));
        }
        ghost.violations().to_vec()
    }
}

/// All roles that a root may have.
pub fn roles() -> impl Iterator<Item = Role> {
    let levels = [Level::L4, Level::L5].into_iter().filter_map(Role::new);
    let spaces = levels.flat_map(|role| AddressSpace::ALL.map(|space| role.in_space(space)));
    spaces.flat_map(|role| [AdBits::On, AdBits::Off].map(|bits| role.with_ad_bits(bits)))
}

/// The root that vCPUs of this role load now.
pub fn current_root<F: Cpu>(worker: &mut Worker<Machine<F>>, role: Role) -> Option<Hfn> {
    Some(worker.walk(role, Gfn(0))?.steps().next()?.address.hfn())
}

/// Reads the tables of the valid roots and holds them against the ghost and the counters. Nobody works on them
/// meanwhile, and no root is defunct but empty ones that a vCPU has not let go of yet.
pub fn check_tables<F: Cpu>(mmu: &Arc<Mmu<Machine<F>>>) -> Vec<Tree> {
    let machine = mmu.host();
    let mut worker = mmu.worker().expect("a worker is free");
    let roots = roles().filter_map(|role| Some((current_root(&mut worker, role)?, role)));
    let trees: Vec<_> = roots.map(|(root, role)| Tree::read::<F>(&machine.arena, root, role)).collect();
    drop(worker);
    machine.ghost().check_trees(&trees, mmu.config().largest, &mmu.counters(), &machine.arena);
    trees
}
