//! The ghost: a specification of what the guest may reach, kept beside the library while a real guest runs, and held
//! against what is done. Built in with the feature `ghost` (`nestling run --ghost`); otherwise every function here is empty.
//!
//! It sees every change of a table's entry (the library's `watch`), every entry and exit of a guest, and every frame that
//! is taken from the guest or freed as a table. What it finds ends the machine at once, with what it knows: the run fails.
//!
//! # Protocol
//! One lock around all of it, taken for the length of a call, under the library's own for changes. Calls come
//! - when a vCPU is in guest mode for the library and its flush is decided, and when it has left, before the library is
//!   told;
//! - when an invalidation or a slot's deletion has returned, before the memory is somebody else's;
//! - when a table frame is freed, before the allocator has it.

pub mod spec;

#[cfg(feature = "ghost")]
mod seam {
    use nestling::watch::{Change, Watcher, install};
    use nestling::{GfnRange, Hfn, Hpa};
    use spin::Mutex;

    use super::spec::{Ghost, Violation};
    use crate::control::log;

    static GHOST: Mutex<Ghost> = Mutex::new(Ghost::new());

    struct Seam;

    impl Watcher for Seam {
        fn changed(&self, change: Change) {
            // Tables are where their frames are: memory is mapped one to one.
            GHOST.lock().changed(change.cell as u64, change.level, change.old, change.new);
        }
    }

    fn hold<T>(result: Result<T, Violation>) {
        if let Err(violation) = result {
            panic!("the ghost: {violation}");
        }
    }

    /// A VM is about to be made.
    pub fn begin() {
        *GHOST.lock() = Ghost::new();
        install(&Seam);
        log::info!("the ghost watches: this run is slow");
    }

    /// A VM has ended.
    pub fn end() {
        let (changes, checks) = GHOST.lock().counts();
        log::info!("the ghost saw {changes} changes of entries, checked {checks} times, and found nothing wrong");
    }

    /// A vCPU is about to run guest code.
    pub fn entering(vcpu: usize, tag: usize, root: Hpa, flushes: bool) {
        hold(GHOST.lock().entering(vcpu, tag, root.hfn().0, flushes));
    }

    /// A vCPU has stopped running guest code.
    pub fn left(vcpu: usize) {
        GHOST.lock().left(vcpu);
    }

    /// Host memory, `frames` frames at address `block`, was taken from the guest.
    pub fn gave_away(block: u64, frames: u64) {
        hold(GHOST.lock().gave_away(Hpa(block).hfn().0, frames));
    }

    /// A slot was deleted.
    pub fn gone(range: GfnRange) {
        hold(GHOST.lock().gone(range));
    }

    /// A table frame goes back.
    pub fn table_freed(frame: Hfn) {
        hold(GHOST.lock().table_freed(frame.0));
    }
}

#[cfg(not(feature = "ghost"))]
mod seam {
    use nestling::{GfnRange, Hfn, Hpa};

    /// A VM is about to be made.
    #[inline(always)]
    pub fn begin() {}

    /// A VM has ended.
    #[inline(always)]
    pub fn end() {}

    /// A vCPU is about to run guest code.
    #[inline(always)]
    pub fn entering(_vcpu: usize, _tag: usize, _root: Hpa, _flushes: bool) {}

    /// A vCPU has stopped running guest code.
    #[inline(always)]
    pub fn left(_vcpu: usize) {}

    /// Host memory, `frames` frames at address `block`, was taken from the guest.
    #[inline(always)]
    pub fn gave_away(_block: u64, _frames: u64) {}

    /// A slot was deleted.
    #[inline(always)]
    pub fn gone(_range: GfnRange) {}

    /// A table frame goes back.
    #[inline(always)]
    pub fn table_freed(_frame: Hfn) {}
}

pub use seam::{begin, end, entering, gave_away, gone, left, table_freed};
