//! A CPU that walks shadow tables.
//!
//! It keeps every translation and every upper entry that it ever saw until it is told to flush, each by the tag under which
//! it was found, and prefers the stalest that it may use. Of an address that it is to forget it forgets the translation and
//! no upper entry. Between two accesses it leaves guest mode, so that flushers elsewhere wait for one access at most.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use nestling::guest::{Controls, Privilege, Request, Width};
use nestling::shadow::tags::{Tag, TagFlush};
use nestling::shadow::vcpu::at_once::{InStep, LoadedAtOnce};
use nestling::shadow::vcpu::{InShadow, ShadowFormat, ShadowOutcome, ShadowVcpu};
use nestling::{Access, FaultError, Hfn};

use super::machine::ShadowMachine;
use super::oracle::{Paging, Question};
use crate::rng::Rng;

/// How an access ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Done {
    /// It reached memory.
    Memory,
    /// The guest got a page fault.
    Fault,
    /// It was for a device, for ROM, or for the embedder to execute.
    Elsewhere,
    /// The library reported an error.
    Failed(FaultError),
    /// It was tried too often.
    Stuck,
}

#[derive(Clone, Copy, Debug)]
struct Cached {
    /// The first page, and how many there are.
    page: u64,
    pages: u64,
    hfn: Hfn,
    user: bool,
    write: bool,
    execute: bool,
}

impl Cached {
    fn maps(&self, page: u64) -> bool {
        page & !(self.pages - 1) == self.page
    }

    fn frame(&self, page: u64) -> Hfn {
        Hfn(self.hfn.0 + (page - self.page))
    }
}

#[derive(Clone, Copy, Debug)]
struct Upper {
    level: u32,
    prefix: u64,
    frame: Hfn,
    life: u32,
}

/// What it has by one tag; oldest first.
#[derive(Debug, Default)]
struct Caches {
    tlb: Vec<Cached>,
    uppers: Vec<Upper>,
}

impl Caches {
    fn forget(&mut self, flush: Option<TagFlush>) {
        match flush {
            Some(TagFlush::All) => *self = Self::default(),
            Some(TagFlush::Address(linear)) => self.tlb.retain(|cached| !cached.maps(linear >> 12)),
            None => {}
        }
    }
}

/// When a guest last asked to forget pages: of each size, those that hold the addresses that it named.
#[derive(Debug, Default)]
struct Pages(HashMap<(u32, u64), u64>);

impl Pages {
    fn forget(&mut self, paging: Paging, linear: u64, now: u64) {
        self.0.extend((1..=3).map(|level| ((level, linear >> paging.page_shift(level)), now)));
    }

    /// Since when what a page of each level says of `linear` must be true.
    fn since(&self, paging: Paging, linear: u64, flushed: u64) -> impl Fn(u32) -> u64 {
        let of = [1, 2, 3].map(|level| self.0.get(&(level, linear >> paging.page_shift(level))).copied());
        move |level| of.get(level as usize - 1).copied().flatten().map_or(flushed, |tick| tick.max(flushed))
    }
}

/// See the module head.
#[derive(Debug)]
pub struct ShadowCpu {
    /// The library's part.
    pub vcpu: ShadowVcpu<ShadowMachine>,
    paging: Paging,
    rng: Rng,
    /// By tag.
    caches: [Caches; Tag::COUNT],
    /// The tag that it ran by last.
    tag: Option<Tag>,
    /// When the guest last asked this CPU to forget everything, and single pages, by level.
    flushed: u64,
    pages: Pages,
    /// The same of the PCIDs that it has left, by their CR3; each has one.
    others: HashMap<u64, (u64, Pages)>,
    /// Turns without a flush under another tag than the turn before.
    pub spared: u64,
    /// Of so many loads of CR3 and INVLPG one is tried in guest mode; 0: none is.
    pub at_once_each: u64,
    asked: u64,
    /// How often that was done.
    pub done_at_once: u64,
    /// Whether nobody else runs, so that the guest's tables are what they are.
    pub alone: bool,
}

/// In an entry of level 2: it is a leaf.
const LARGE: u64 = 1 << 7;
/// Tries of one access.
const PATIENCE: usize = 400;
/// Times that it may be told that something is changing: whoever changes it has to get to run.
const RETRIES: usize = 1_000_000;

impl ShadowCpu {
    /// A CPU that runs with paging on from the start.
    pub fn new(vcpu: ShadowVcpu<ShadowMachine>, paging: Paging, seed: u64) -> Self {
        let mut cpu = Self {
            vcpu,
            paging,
            rng: Rng::new(seed),
            caches: Default::default(),
            tag: None,
            flushed: 0,
            pages: Pages::default(),
            others: HashMap::new(),
            spared: 0,
            at_once_each: 0,
            asked: 0,
            done_at_once: 0,
            alone: false,
        };
        cpu.vcpu.load_cr3(paging.cr3, false);
        cpu.vcpu.set_controls(paging.controls);
        cpu
    }

    /// Its registers.
    pub const fn paging(&self) -> Paging {
        self.paging
    }

    fn now(&self) -> u64 {
        self.vcpu.mmu().host().record().tick()
    }

    /// The guest loads CR3.
    pub fn load_cr3(&mut self, cr3: u64) {
        self.load(cr3, false);
    }

    /// The guest, which has PCIDs, loads CR3 and keeps what this CPU has of that PCID.
    pub fn load_cr3_and_keep(&mut self, cr3: u64) {
        self.load(cr3, true);
    }

    fn load(&mut self, cr3: u64, keeps: bool) {
        let fresh = (self.now(), Pages::default());
        let now = if keeps && cr3 == self.paging.cr3 {
            None
        } else if keeps {
            Some(self.others.remove(&cr3).unwrap_or(fresh))
        } else {
            Some(fresh)
        };
        if let Some((flushed, pages)) = now {
            let old = (std::mem::replace(&mut self.flushed, flushed), std::mem::replace(&mut self.pages, pages));
            self.others.insert(self.paging.cr3, old);
            self.others.remove(&cr3);
        }
        self.paging.cr3 = cr3;
        let at_once = |inside: &mut InShadow<'_, ShadowMachine>, in_step| {
            inside.load_cr3_at_once(in_step, cr3, keeps) != LoadedAtOnce::No
        };
        if !self.at_once(at_once) {
            self.vcpu.load_cr3(cr3, keeps);
        }
    }

    /// What the guest does now is done in guest mode, if it is its turn and nothing is in the way: whether it was.
    fn at_once(&mut self, work: impl FnOnce(&mut InShadow<'_, ShadowMachine>, InStep) -> bool) -> bool {
        self.asked += 1;
        if self.at_once_each == 0 || !self.asked.is_multiple_of(self.at_once_each) {
            return false;
        }
        let Self { vcpu, caches, tag, done_at_once, .. } = self;
        let Ok(mut inside) = vcpu.enter() else { return false };
        caches[inside.tag().number()].forget(inside.take_flush());
        let done = inside.in_step().is_some_and(|in_step| work(&mut inside, in_step));
        // The root may be another one.
        caches[inside.tag().number()].forget(inside.take_flush());
        *tag = Some(inside.tag());
        *done_at_once += u64::from(done);
        done
    }

    /// The guest writes control registers.
    pub fn set_controls(&mut self, controls: Controls) {
        self.flushed = self.now();
        self.pages = Pages::default();
        self.others.clear();
        self.paging.controls = controls;
        self.vcpu.set_controls(controls);
    }

    /// The guest executes INVLPG.
    pub fn invlpg(&mut self, linear: u64) {
        let now = self.now();
        self.pages.forget(self.paging, linear, now);
        let at_once = |inside: &mut InShadow<'_, ShadowMachine>, in_step| {
            inside.invlpg_at_once(in_step, linear);
            true
        };
        if !self.at_once(at_once) {
            self.vcpu.invlpg(linear);
        }
    }

    /// Forgets what was told at an entry that the caller has made by itself.
    pub fn forget(&mut self, tag: Tag, flush: Option<TagFlush>) {
        self.caches[tag.number()].forget(flush);
    }

    /// One access; where it reaches memory, `store` is written there: offset, width, value.
    pub fn access(&mut self, question: Question, store: Option<(u32, Width, u64)>) -> Done {
        let request =
            Request { linear: question.linear, access: question.access, privilege: question.privilege, pkru: 0 };
        let (mut tries, mut retries) = (0, 0);
        while tries < PATIENCE && retries < RETRIES {
            let alone_fails = self.alone && !self.succeeds(question);
            match self.turn(question, store) {
                Ok(true) => return Done::Memory,
                Ok(false) => {}
                Err(error) => return Done::Failed(error),
            }
            match self.vcpu.fault(&request) {
                Ok(ShadowOutcome::Fixed | ShadowOutcome::Spurious) => tries += 1,
                Ok(ShadowOutcome::Retry) => {
                    retries += 1;
                    std::thread::yield_now();
                }
                Ok(ShadowOutcome::Inject(fault)) => {
                    if self.alone && !alone_fails {
                        let text =
                            format!("{question:?} under {:x?} got {fault:?}, and the tables allow it", self.paging);
                        self.violate(text);
                    }
                    // A CPU forgets what it faulted on.
                    if let Some(tag) = self.tag {
                        self.caches[tag.number()].tlb.retain(|cached| !cached.maps(question.linear >> 12));
                    }
                    return Done::Fault;
                }
                Ok(_) => return Done::Elsewhere,
                Err(error) => return Done::Failed(error),
            }
        }
        Done::Stuck
    }

    fn succeeds(&self, question: Question) -> bool {
        self.paging.succeeds_now(&mut self.vcpu.mmu().host().record(), question)
    }

    fn violate(&self, text: String) {
        self.vcpu.mmu().host().record().violate(text);
    }

    /// One turn in guest mode; whether the access reached memory.
    fn turn(&mut self, question: Question, store: Option<(u32, Width, u64)>) -> Result<bool, FaultError> {
        let Self { vcpu, caches, tag, rng, paging, flushed, pages, spared, .. } = self;
        let id = vcpu.id();
        let mmu = std::sync::Arc::clone(vcpu.mmu());
        let machine = mmu.host();
        let mut inside = vcpu.enter()?;
        let (now, flush) = (inside.tag(), inside.take_flush());
        let known = &mut caches[now.number()];
        let before = tag.replace(now);
        known.forget(flush);
        *spared += u64::from(flush.is_none() && before.is_some_and(|before| before != now));
        let Some(hfn) = translate(machine, &inside, known, rng, *paging, question) else { return Ok(false) };
        let since = pages.since(*paging, question.linear, *flushed);
        {
            let mut record = machine.record();
            if !paging.may(&record, &since, question, hfn) {
                let owner = record.owner(hfn);
                let way = paging.describe(&record, since(1), question.linear);
                let from = [1, 2, 3].map(since);
                record.violate(format!(
                    "{id:?} reaches {hfn:?} ({owner:?}) by {question:x?} under {paging:x?}, {now:?}, flushed at {from:?}{way}"
                ));
            }
            if question.access == Access::Write && record.is_tracked(hfn) {
                record.violate(format!("{id:?} writes {hfn:?} by {question:x?}, which is tracked"));
            }
        }
        if let Some((offset, width, value)) = store {
            machine.store(hfn, offset, width, value);
        }
        Ok(true)
    }
}

fn permits(paging: Paging, cached: &Cached, question: Question) -> bool {
    let smep = paging.controls.cr4 >> 20 & 1 != 0;
    let smap = paging.controls.cr4 >> 21 & 1 != 0;
    let right = match question.access {
        Access::Read => true,
        Access::Write => cached.write,
        Access::Execute => cached.execute,
    };
    let level = match question.privilege {
        Privilege::User => cached.user,
        _ if question.access == Access::Execute => !(cached.user && smep),
        privilege => !cached.user || !smap || privilege == Privilege::Supervisor { ac: true },
    };
    right && level
}

fn translate(
    machine: &ShadowMachine,
    inside: &InShadow<'_, ShadowMachine>,
    Caches { tlb, uppers }: &mut Caches,
    rng: &mut Rng,
    paging: Paging,
    question: Question,
) -> Option<Hfn> {
    let page = question.linear >> 12;
    if !rng.once_in(4) {
        if let Some(cached) = tlb.iter().find(|cached| cached.maps(page) && permits(paging, cached, question)) {
            return Some(cached.frame(page));
        }
        if rng.once_in(2) && tlb.iter().any(|cached| cached.maps(page)) {
            tlb.retain(|cached| !cached.maps(page));
            return None;
        }
    }
    let levels = match inside.format() {
        ShadowFormat::Pae => 3,
        ShadowFormat::Long4 => 4,
        ShadowFormat::Long5 => 5,
    };
    let prefix = |level: u32| question.linear >> (12 + 9 * level);
    let known = uppers.iter().filter(|upper| upper.prefix == prefix(upper.level)).min_by_key(|upper| upper.level);
    let root = inside.root().hfn();
    let (mut level, mut frame, mut life) = match known {
        Some(upper) if !rng.once_in(3) => (upper.level, upper.frame, upper.life),
        _ => (levels, root, machine.arena.life(root)?),
    };
    loop {
        let shift = 12 + 9 * (level - 1);
        let entries = if levels == 3 && level == 3 { 4 } else { 512 };
        let index = (question.linear >> shift) as usize & (entries - 1);
        let freed = || {
            machine.record().violate(format!("a page walk met the table {frame:?}, which has been freed"));
        };
        let Some(cell) = machine.arena.entry(frame, life, index) else {
            freed();
            return None;
        };
        let raw = cell.load(Ordering::Acquire);
        if machine.arena.life(frame) != Some(life) {
            freed();
            return None;
        }
        if raw & 1 == 0 {
            return None;
        }
        let next = Hfn((raw & 0xf_ffff_ffff_f000) >> 12);
        if level == 1 || level == 2 && raw & LARGE != 0 {
            let pages = if level == 1 { 1 } else { 512 };
            let cached = Cached {
                page: page & !(pages - 1),
                pages,
                hfn: next,
                user: raw & 4 != 0,
                write: raw & 2 != 0,
                execute: raw >> 63 == 0,
            };
            if !permits(paging, &cached, question) {
                return None;
            }
            tlb.push(cached);
            return Some(cached.frame(page));
        }
        level -= 1;
        (frame, life) = (next, machine.arena.life(next)?);
        uppers.push(Upper { level, prefix: prefix(level), frame, life });
    }
}
