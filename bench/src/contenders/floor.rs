//! The floor as a contender.

use super::{Contender, Seat, backing};
use crate::arena::Claim;
use crate::floor::Floor;

/// See [`crate::floor`].
#[derive(Debug)]
pub struct BareWalk(Floor);

impl Contender for BareWalk {
    const NAME: &'static str = "floor";
    type Seat<'c> = &'c Floor;

    fn new(claim: Claim) -> Self {
        Self(Floor::new(claim).expect("the arena has just been claimed"))
    }

    fn seat(&self, _number: u16) -> &Floor {
        &self.0
    }

    fn root(&self) -> u64 {
        self.0.root()
    }
}

impl Seat for &Floor {
    #[inline(never)]
    fn fault(&mut self, gpa: u64) -> bool {
        self.map(gpa, backing(gpa))
    }

    #[inline(never)]
    fn look_up(&mut self, gpa: u64) -> Option<u64> {
        Floor::look_up(self, gpa)
    }

    #[inline(never)]
    fn zap(&mut self, gpa: u64) -> bool {
        Floor::zap(self, gpa)
    }

    fn zap_range(&mut self, first: u64, pages: u64) -> u64 {
        Floor::zap_range(self, first, pages)
    }
}
