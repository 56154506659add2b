//! The library's own source under model checkers.
//!
//! `nestling-loom` and `nestling-shuttle` are the same files as `nestling`, compiled with a checker's atomics and with
//! tables of two entries. [`under_loom`] tries every interleaving of small scenarios, [`under_shuttle`] random ones of
//! long scenarios. What loom does not model (sequentially consistent accesses, a load that the same thread follows up
//! with a store) is told where the library gives way to it, in its `sync` module; `canary` shows that it still sees a
//! publication that is too weak. Shuttle knows no weak orderings at all.

mod canary;
pub mod mutants;
pub mod scenarios;
pub mod shadow;
pub mod under_loom;
pub mod under_shuttle;

pub use canary::{Publish, canary};
pub use scenarios::{Actor, SCENARIOS, Scenario, Setup, Work};
pub use shadow::{SHADOW_SCENARIOS, ShadowScenario};
pub use under_loom::{Bounds, Explored, explore, explore_shadow};
