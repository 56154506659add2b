//! One address is to be translated anew (INVLPG, INVPCID of one address).
//!
//! The entries on the way to it are compared with the guest's, in pages that are out of step; in the others they are what
//! they should be. Each of the guest's tables that is read in several ways has several pages: those of other roots are
//! brought in step when they are loaded. The embedder's CPU forgets the address itself.

use super::order::Order;
use super::page::{Handle, STALE};
use super::sync::compare;
use super::table::Inside;
use crate::format::long_mode;
use crate::host::{GuestMemory, Host};
use crate::sync::load_for_update;

/// Compares what leads to `linear` under `root`.
pub(super) fn invlpg<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>, root: Handle, linear: u64) {
    let mut at = root;
    loop {
        let Some(mut guard) = order.alive(inside, at) else { return };
        let (page, role) = (guard.page, guard.page.role());
        let entry = role.index(linear);
        if page.has(STALE) {
            let mode = role.mode(inside.shadow.cpu);
            compare(inside, &mut guard, &mode, entry);
            // The guest's page may have been larger than what our entry maps of it, and is forgotten as a whole.
            if let Some(twin) = role.twin(entry) {
                compare(inside, &mut guard, &mode, twin);
            }
        }
        let Some(entries) = inside.entries(page) else { return };
        if role.level() == 1 || long_mode::next_table(load_for_update(&entries[entry])).is_none() {
            return;
        }
        let index = page.target(entry);
        at = Handle { index, life: inside.page(index).life() };
    }
}
