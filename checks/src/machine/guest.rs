//! A vCPU and the guest that runs on it.
//!
//! # Protocol
//! A turn: clear the kick (nobody who saw this vCPU in guest mode earlier still needs it), `enter`, flush if told to,
//! run instructions until one faults or a kick is seen between two of them; leave; then the fault is handed in. A
//! kick is answered **late**: some more instructions run after it was seen, and they prefer the stalest translations,
//! as a CPU's may until it takes the interrupt.
//!
//! Half of the faults are handed in within the turn first, if they can be handled there.
//!
//! While in guest mode the CPU may also translate addresses that the guest does not use yet; it does, at random, and
//! the TLB remembers them like all others.

use std::sync::Arc;

use nestling::{Access, Cause, Fault, FaultError, Flush, Gfn, Hpa, InGuest, Level, Mmu, Outcome, Role, Vcpu, VcpuId};

use super::cpu::Cpu;
use super::cpu::tlb::{Found, Tlb};
use super::cpu::walk::{Walked, root, walk};
use super::{Machine, held};
use crate::rng::Rng;

/// One guest instruction: an access to a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instruction {
    /// Where.
    pub gfn: Gfn,
    /// What.
    pub access: Access,
}

/// How an instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Done {
    /// It reached memory.
    Memory,
    /// It was a device's.
    Mmio,
    /// It was a write to read-only memory.
    ReadOnly,
    /// It was a write to a page that is tracked.
    Tracked,
    /// The fault could not be handled.
    Failed(FaultError),
    /// It was tried too often.
    Stuck,
}

/// What an embedder might do wrong; the checks must notice each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manners {
    /// Nothing.
    Right,
    /// Does not flush its TLB when `enter` says so.
    IgnoresFlush,
    /// Says that it has left guest mode when it is kicked, and lets the guest run on.
    LiesAboutLeaving,
}

/// See the module head.
#[derive(Debug)]
pub struct GuestCpu<F: Cpu> {
    /// The library's part.
    pub vcpu: Vcpu<Machine<F>>,
    /// Its TLB.
    pub tlb: Tlb,
    mmu: Arc<Mmu<Machine<F>>>,
    rng: Rng,
    manners: Manners,
    patience: u64,
}

/// Instructions that run at most after a kick was seen.
const LATE: u64 = 4;

/// What the borrowed parts of a CPU in guest mode do.
struct Running<'a, F: Cpu> {
    id: VcpuId,
    mmu: &'a Mmu<Machine<F>>,
    tlb: &'a mut Tlb,
    rng: &'a mut Rng,
    root: Hpa,
    role: Role,
}

impl<F: Cpu> Running<'_, F> {
    /// Carries out one instruction.
    fn step(&mut self, instruction: Instruction) -> Result<(), Cause> {
        if self.rng.once_in(8) {
            let near = Gfn(instruction.gfn.0 ^ self.rng.below(1024));
            // What a speculative walk finds out is kept, that it faults is nobody's business.
            let _ = self.translate(near, Access::Read, false);
        }
        self.translate(instruction.gfn, instruction.access, true)
    }

    fn translate(&mut self, gfn: Gfn, access: Access, carried_out: bool) -> Result<(), Cause> {
        // Whoever flushes a range waits for the instruction that is under way.
        let mut ranges = held(&self.mmu.host().forget[usize::from(self.id.0)]);
        ranges.drain(..).for_each(|range| self.tlb.forget(range));
        let done = self.translate_with(gfn, access, carried_out);
        drop(ranges);
        done
    }

    fn translate_with(&mut self, gfn: Gfn, access: Access, carried_out: bool) -> Result<(), Cause> {
        match self.tlb.find(gfn, access) {
            Found::Leaf(leaf) => {
                if carried_out {
                    self.mmu.host().ghost().access(self.id, self.role.space(), gfn, access, &leaf);
                }
                return Ok(());
            }
            // A CPU may fault on what it has cached, or look first.
            Found::Denied if self.rng.once_in(2) => return Err(self.fault(gfn, Cause::Translation)),
            Found::Denied | Found::Nothing => {}
        }
        let machine = self.mmu.host();
        let cached = if self.rng.once_in(4) { None } else { self.tlb.find_table(gfn) };
        let Some(start) = cached.or_else(|| root(&machine.arena, self.root.hfn(), self.role.level())) else {
            machine.ghost().violation(Some(gfn), format!("{:?}: the root {:?} has been freed", self.id, self.root));
            return Err(Cause::Translation);
        };
        if carried_out && access == Access::Write {
            machine.ghost().writes(self.id, self.role.space(), gfn);
        }
        let tlb = &mut *self.tlb;
        match walk::<F>(&machine.arena, start, gfn, access, self.role.ad_bits(), |table| tlb.learn_table(table)) {
            Walked::Leaf(mut leaf) => {
                let mut ghost = machine.ghost();
                leaf.born = ghost.tick();
                if carried_out {
                    ghost.access(self.id, self.role.space(), gfn, access, &leaf);
                }
                drop(ghost);
                self.tlb.learn(leaf);
                Ok(())
            }
            Walked::Fault(cause) => Err(self.fault(gfn, cause)),
            Walked::Freed(frame) => {
                let text = format!("{:?}: the page walk of {gfn:?} met {frame:?}, which is freed", self.id);
                machine.ghost().violation(Some(gfn), text);
                Err(self.fault(gfn, Cause::Translation))
            }
        }
    }

    fn fault(&mut self, gfn: Gfn, cause: Cause) -> Cause {
        self.tlb.faulted(gfn);
        cause
    }

    /// Hands the fault of an instruction in without leaving guest mode, unless the CPU has said that it left.
    fn fix_at_once(
        &self,
        turn: &mut Option<InGuest<'_, Machine<F>>>,
        Instruction { gfn, access }: Instruction,
        cause: Cause,
    ) -> bool {
        let Some(turn) = turn else { return false };
        let (ghost, space) = (|| self.mmu.host().ghost(), self.role.space());
        let began = ghost().fault_begins(self.id, space, gfn, access);
        let fixed = turn.fix_at_once(Fault { gpa: gfn.gpa(), access, cause });
        let outcome = if fixed { Outcome::Fixed { level: Level::K4 } } else { Outcome::Retry };
        ghost().fault_ended(self.id, space, gfn, access, began, &Ok(outcome));
        fixed
    }
}

impl<F: Cpu> GuestCpu<F> {
    /// The vCPU `id` of `mmu`.
    pub fn new(mmu: &Arc<Mmu<Machine<F>>>, id: VcpuId, seed: u64, manners: Manners) -> Self {
        let vcpu = mmu.vcpu(id).expect("the test makes each vCPU once");
        let (tlb, rng) = (Tlb::default(), Rng::new(seed));
        Self { vcpu, tlb, mmu: Arc::clone(mmu), rng, manners, patience: u64::MAX }
    }

    /// Gives up an instruction after it has faulted this often.
    pub const fn with_patience(mut self, patience: u64) -> Self {
        self.patience = patience;
        self
    }

    /// Turns to the root of another role, as a vCPU that enters system-management mode does.
    pub fn set_role(&mut self, role: Role) {
        self.vcpu.set_role(role);
    }

    /// Its role.
    pub fn role(&self) -> Role {
        self.vcpu.role()
    }

    /// Runs one instruction to its end.
    pub fn run_one(&mut self, gfn: Gfn, access: Access) -> Done {
        let mut how = Done::Stuck;
        self.run([Instruction { gfn, access }].into_iter(), |_, done| how = done);
        how
    }

    /// Runs instructions until there are no more; `each` learns how each ended.
    pub fn run(&mut self, mut code: impl Iterator<Item = Instruction>, mut each: impl FnMut(Instruction, Done)) {
        let mut next = code.next();
        let mut tries = 0;
        while let Some(instruction) = next {
            let done = match self.turn(instruction, &mut code, &mut each) {
                Ok((_, None)) => return,
                Ok((current, Some(cause))) => {
                    tries = if current == instruction { tries + 1 } else { 1 };
                    next = Some(current);
                    self.handle(current, cause, tries)
                }
                Err(error) => {
                    next = Some(instruction);
                    Some(Done::Failed(error))
                }
            };
            if let (Some(done), Some(current)) = (done, next) {
                each(current, done);
                next = code.next();
                tries = 0;
            }
        }
    }

    /// One turn in guest mode, beginning with `current`. Returns the instruction that faulted, or at which the turn
    /// ended, and why; no cause when the code has ended.
    fn turn(
        &mut self,
        mut current: Instruction,
        code: &mut impl Iterator<Item = Instruction>,
        each: &mut impl FnMut(Instruction, Done),
    ) -> Result<(Instruction, Option<Stopped>), FaultError> {
        let id = self.vcpu.id();
        let machine = self.mmu.host();
        machine.clear_kick(id);
        let mut in_guest = Some(self.vcpu.enter()?);
        let turn = in_guest.as_mut().expect("it was just made");
        let (root, role, flush) = (turn.root(), turn.role(), turn.take_flush());
        if F::TAGGED_BY_ROOT {
            self.tlb.switch(root.hfn());
        }
        match flush {
            Some(_) if self.manners == Manners::IgnoresFlush => {}
            Some(Flush::Current) if F::TAGGED_BY_ROOT => self.tlb.flush_current(),
            Some(_) => self.tlb.flush(),
            None => {}
        }
        let mut running = Running { id, mmu: &self.mmu, tlb: &mut self.tlb, rng: &mut self.rng, root, role };
        let (mut late, mut stayed) = (None, false);
        loop {
            match running.step(current) {
                Ok(()) => {
                    each(current, Done::Memory);
                    stayed = false;
                    match code.next() {
                        Some(next) => current = next,
                        None => return Ok((current, None)),
                    }
                }
                // Once: whether it makes progress is for whoever counts the turns.
                Err(cause)
                    if !stayed && running.rng.once_in(2) && running.fix_at_once(&mut in_guest, current, cause) =>
                {
                    stayed = true;
                }
                Err(cause) => return Ok((current, Some(Stopped::Fault(cause)))),
            }
            if machine.is_kicked(id) {
                if self.manners == Manners::LiesAboutLeaving {
                    drop(in_guest.take());
                    std::thread::yield_now();
                    continue;
                }
                let left = late.get_or_insert_with(|| running.rng.below(LATE));
                if *left == 0 {
                    return Ok((current, Some(Stopped::Kick)));
                }
                *left -= 1;
                std::thread::yield_now();
            }
        }
    }

    /// After a turn. Says how the instruction ended, if it did.
    fn handle(&mut self, Instruction { gfn, access }: Instruction, stopped: Stopped, tries: u64) -> Option<Done> {
        let Stopped::Fault(cause) = stopped else { return None };
        let id = self.vcpu.id();
        let began = self.mmu.host().ghost().fault_begins(id, self.role().space(), gfn, access);
        let result = self.vcpu.fault(Fault { gpa: gfn.gpa(), access, cause });
        self.mmu.host().ghost().fault_ended(id, self.role().space(), gfn, access, began, &result);
        match result {
            Ok(Outcome::Mmio) => Some(Done::Mmio),
            Ok(Outcome::ReadOnly) => Some(Done::ReadOnly),
            Ok(Outcome::Tracked) => Some(Done::Tracked),
            Err(error) => Some(Done::Failed(error)),
            Ok(_) if tries > self.patience => Some(Done::Stuck),
            Ok(Outcome::Retry) => {
                std::thread::yield_now();
                None
            }
            Ok(_) => None,
        }
    }
}

/// Why a turn ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stopped {
    Kick,
    Fault(Cause),
}
