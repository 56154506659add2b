//! What tries to break `nestling`.
//!
//! - [`machine`] is an embedder on the host: table frames that remember being freed, vCPUs that walk the real tables
//!   with their own knowledge of the bits, and an **adversarial TLB** that keeps every translation it ever saw until
//!   it is told to flush, and prefers the stalest.
//! - [`ghost`] is what must be true, kept beside the library in plain maps: which host frame stands behind a guest
//!   frame, who may write, what was taken away and when. Every guest access and every table is held against it.
//! - [`program`] makes both do things: random sequences in one thread, storms in many.
//! - [`shadow`] does the same to shadow paging: CPUs that walk shadow tables, guests that edit their own page tables, and an
//!   oracle that knows every value each entry ever had.
//! - [`model`] runs the library's own source under a model checker, in tiny scenarios and in every order.
//!
//! [`scene`] has what tests begin with. Set `NESTLING_DEEP=n` for runs that are much longer than those of every day.
//!
//! A check that finds something does not stop the library in the middle of a call: it is written down as a
//! [`ghost::Violation`] with the history of the frame, and the test asks for the list at its end.

#![deny(unsafe_code)]

pub mod ghost;
pub mod machine;
pub mod model;
pub mod program;
pub mod rng;
pub mod rules;
pub mod scene;
pub mod shadow;
