//! Trying cases of paging, for whoever compares what came of them: the guest's half of `nestling-conformance`.
//!
//! The words of the command line: `sample` with `seed=N`, or `all`; `from=N` and `to=N`, the cases; `paging=NAME,…` if not
//! all; `cpu=N` for the cases of another CPU, which must not have more than this one; `trace=NAME:N..N` to have these cases'
//! outcomes printed as well. Runs on one processor, with interrupts off. Judges nothing: it ends with 0 when it has tried
//! all, and with 2 if it was asked for something that it does not understand or cannot try.

mod shooter;
mod tables;

use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::ops::Range;

use nestling_conformance::model::{code_mark, data, fresh_descriptor, used_descriptor};
use nestling_conformance::{
    BLOCK, CODE, Case, Controls, Cpu, DATA, Digest, FRAMES, FRESH_DESCRIPTOR, Features, Flush, LEVELS, Line, NO_FAULT,
    Outcome, Paging, Seen, USED_DESCRIPTOR, every, frame_mark, sample, written,
};

use crate::cpu::rdmsr;
use crate::{machine, serial};
use shooter::Shot;

/// Cases that are tried in one go.
const BATCH: usize = 64;

const EFER: u32 = 0xc000_0080;
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
const EFER_NXE: u64 = 1 << 11;
/// PG, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8001_0033;
const CR0_WP: u64 = 1 << 16;
/// OSFXSR, OSXMMEXCPT.
const CR4: u64 = 0x600;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
/// CR4's bits that a shot chooses.
const CHOSEN: [(Controls, u64); 4] =
    [(Controls::PSE, CR4_PSE), (Controls::SMEP, CR4_SMEP), (Controls::SMAP, CR4_SMAP), (Controls::PKE, CR4_PKE)];

static mut SHOTS: [Shot; 2 * BATCH + 1] = [Shot::NONE; 2 * BATCH + 1];

/// What is asked for.
struct Task {
    /// `None`: all cases.
    seed: Option<u64>,
    range: Range<u64>,
    pagings: [bool; Paging::ALL.len()],
    cpu: Option<u32>,
    trace: Option<(Paging, Range<u64>)>,
}

impl Task {
    fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut task = Self { seed: Some(0), range: 0..BLOCK, pagings: [true; 4], cpu: None, trace: None };
        for word in words.filter(|word| !word.is_empty()) {
            match word.split_once('=').unwrap_or((word, "")) {
                ("sample", "") => {}
                ("all", "") => task.seed = None,
                ("seed", number) => task.seed = Some(number.parse().ok()?),
                ("from", number) => task.range.start = number.parse().ok()?,
                ("to", number) => task.range.end = number.parse().ok()?,
                ("cpu", number) => task.cpu = Some(number.parse().ok()?),
                ("paging", names) => {
                    task.pagings = [false; 4];
                    for name in names.split(',') {
                        task.pagings[Paging::named(name)? as usize] = true;
                    }
                }
                ("trace", which) => {
                    let (name, range) = which.split_once(':')?;
                    let (start, end) = range.split_once("..")?;
                    task.trace = Some((Paging::named(name)?, start.parse().ok()?..end.parse().ok()?));
                }
                _ => return None,
            }
        }
        Some(task)
    }
}

fn tell(line: Line) {
    serial::print(format_args!("{line}\n"));
}

/// The CPU, as CPUID tells of it.
fn cpu() -> Cpu {
    let extended = __cpuid(0x8000_0001).edx;
    let seven = if __cpuid(0).eax < 7 { (0, 0) } else { (__cpuid_count(7, 0).ebx, __cpuid_count(7, 0).ecx) };
    let mut features = Features::empty();
    features.set(Features::GIGANTIC, extended & 1 << 26 != 0);
    features.set(Features::NX, extended & 1 << 20 != 0);
    features.set(Features::SMEP, seven.0 & 1 << 7 != 0);
    features.set(Features::SMAP, seven.0 & 1 << 20 != 0);
    features.set(Features::PKU, seven.1 & 1 << 3 != 0);
    features.set(Features::LA57, seven.1 & 1 << 16 != 0);
    Cpu { features, physical_bits: __cpuid(0x8000_0008).eax as u8 }
}

/// Tries all that the words ask for.
pub(crate) fn run<'a>(words: impl Iterator<Item = &'a str>) {
    let Some(task) = Task::parse(words) else { machine::exit(2) };
    let own = cpu();
    // With fewer address bits other bits are reserved; all else can be left alone.
    let cpu = match task.cpu.map(Cpu::of_number) {
        None => own,
        Some(Some(cpu)) if own.features.contains(cpu.features) && own.physical_bits == cpu.physical_bits => cpu,
        Some(_) => machine::exit(2),
    };
    tell(Line::Cpu(cpu.number()));
    shooter::set_up();
    fill_frames();
    let shots = &raw mut SHOTS;
    // SAFETY: this is the only reference, and this function runs once.
    let shots = unsafe { &mut *shots };
    for paging in Paging::ALL.into_iter().filter(|paging| task.pagings[*paging as usize]) {
        if !cpu.has(paging) {
            tell(Line::Absent(paging));
            continue;
        }
        tables::set_up(paging);
        for start in task.range.clone().step_by(BLOCK as usize) {
            block(&task, paging, cpu, start..task.range.end.min(start + BLOCK), shots);
        }
    }
    tell(Line::End);
}

/// Gives each page that a leaf may lead to what it holds.
fn fill_frames() {
    for frame in FRAMES {
        let mark = frame_mark(frame);
        let put = |offset: u64, word: u64| {
            // SAFETY: these pages are nobody's but the cases'.
            unsafe { core::ptr::with_exposed_provenance_mut::<u64>((frame + offset) as usize).write_volatile(word) };
        };
        put(USED_DESCRIPTOR, used_descriptor(mark));
        put(FRESH_DESCRIPTOR, fresh_descriptor(mark));
        put(DATA, data(mark).into());
        // MOV EAX, imm32; INT 0x40.
        put(CODE, 0x40cd << 40 | u64::from(code_mark(mark)) << 8 | 0xb8);
    }
}

/// Tries a block's cases and tells what came of them.
fn block(task: &Task, paging: Paging, cpu: Cpu, cases: Range<u64>, shots: &mut [Shot]) {
    let mut digest = Digest::default();
    for start in cases.clone().step_by(BATCH) {
        let numbers = start..cases.end.min(start + BATCH as u64);
        let case = |number| match task.seed {
            Some(seed) => sample(paging, cpu, seed, number),
            None => every(paging, cpu, number),
        };
        let mut gun = Gun::new(paging, cpu);
        let count = 2 * (numbers.end - numbers.start) as usize;
        for (number, pair) in numbers.clone().zip(shots[..count].chunks_exact_mut(2)) {
            gun.load(&case(number), pair);
        }
        shots[count] = gun.last();
        // SAFETY: the tables are ready for this mode; shots write to cases' tables and frames only.
        unsafe { shooter::fire(paging, tables::table(0, paging.levels()), gun.cr4, &mut shots[..=count]) };
        for (number, pair) in numbers.zip(shots[..count].chunks_exact(2)) {
            let outcome = outcome(&case(number), cpu, pair);
            digest.add(&outcome);
            if task.trace.as_ref().is_some_and(|(traced, range)| *traced == paging && range.contains(&number)) {
                tell(Line::Case(paging, number, outcome));
            }
        }
    }
    tell(Line::Block(paging, cases.start, digest));
}

/// Turns cases into shots, and knows what the registers hold between them.
struct Gun {
    paging: Paging,
    cpu: Cpu,
    /// CR4 and EFER without what shots choose.
    cr4: u64,
    efer: u64,
    /// CR0, CR4, EFER, PKRU as the last shot leaves them.
    known: Option<[u64; 4]>,
}

impl Gun {
    fn new(paging: Paging, cpu: Cpu) -> Self {
        let cr4 = match paging {
            Paging::Legacy => CR4,
            Paging::Pae | Paging::Long4 => CR4 | CR4_PAE,
            Paging::Long5 => CR4 | CR4_PAE | CR4_LA57,
        };
        let own = rdmsr(EFER) & !EFER_NXE;
        let efer = if paging.is_long() { own } else { own & !EFER_LONG };
        Self { paging, cpu, cr4, efer, known: None }
    }

    /// Has a shot load what the registers do not hold yet.
    fn control(&mut self, shot: &mut Shot, controls: Controls, pkru: u32) {
        let bit = |control, value: u64| if controls.contains(control) { value } else { 0 };
        shot.cr0 = CR0 & !CR0_WP | bit(Controls::WP, CR0_WP);
        shot.cr4 = CHOSEN.iter().fold(self.cr4, |cr4, (control, value)| cr4 | bit(*control, *value));
        shot.efer = self.efer | bit(Controls::NXE, EFER_NXE);
        shot.pkru = pkru.into();
        // PKRU cannot be reached without CR4.PKE, and stays as it is.
        let reachable = controls.contains(Controls::PKE);
        let wanted = [shot.cr0, shot.cr4, shot.efer, shot.pkru];
        let loads = [shooter::LOAD_CR0, shooter::LOAD_CR4, shooter::LOAD_EFER, shooter::LOAD_PKRU];
        for (index, load) in loads.into_iter().enumerate() {
            let same = self.known.is_some_and(|known| known[index] == wanted[index]);
            if !same && (load != shooter::LOAD_PKRU || reachable) {
                shot.load |= load;
            }
        }
        let pkru = match self.known {
            Some(known) if !reachable => known[3],
            // No shot wants this value: the next that can will load its own.
            None if !reachable => u64::MAX,
            _ => wanted[3],
        };
        self.known = Some([wanted[0], wanted[1], wanted[2], pkru]);
    }

    fn load(&mut self, case: &Case, pair: &mut [Shot]) {
        let (paging, cpu) = (self.paging, self.cpu);
        let frames = [case.frame(0, cpu), case.frame(1, cpu)];
        let entry_at = |level: u8| tables::table(case.tables, level) + paging.offset(level);
        let raw = |shot: usize, level: u8| raw(case, cpu, shot, level);
        for (number, (shot, what)) in pair.iter_mut().zip(&case.shots).enumerate() {
            *shot = Shot::NONE;
            match what.change {
                None if number == 0 => {
                    (1..=paging.levels()).for_each(|level| shot.store(entry_at(level), raw(0, level)));
                    for frame in frames {
                        let mark = frame_mark(frame);
                        shot.store(frame + FRESH_DESCRIPTOR, fresh_descriptor(mark));
                        shot.store(frame + DATA, data(mark).into());
                    }
                }
                None => {}
                Some(change) => shot.store(entry_at(change.level), raw(number, change.level)),
            }
            (1..=paging.levels()).for_each(|level| shot.look(entry_at(level)));
            for frame in frames {
                shot.look(frame + FRESH_DESCRIPTOR);
                shot.look(frame + DATA);
            }
            self.control(shot, what.controls, what.pkru());
            let linear = what.linear(paging);
            (shot.cr3, shot.invalidate) = (tables::table(case.tables, paging.levels()), linear);
            shot.load |= match what.flush {
                Flush::None => 0,
                Flush::Page => shooter::INVALIDATE,
                Flush::All => shooter::LOAD_CR3,
            };
            shot.aim(paging, Some(what.access), linear, written(number));
        }
    }

    /// The shot that leaves the control registers as this kernel has them.
    fn last(&mut self) -> Shot {
        let mut shot = Shot::NONE;
        self.control(&mut shot, Controls::WP | Controls::NXE, 0);
        shot.aim(self.paging, None, 0, 0);
        shot
    }
}

/// An entry as written for a shot.
fn raw(case: &Case, cpu: Cpu, shot: usize, level: u8) -> u64 {
    let entry = case.entries(shot)[usize::from(level) - 1];
    let table = if level > 1 { tables::table(case.tables, level - 1) } else { 0 };
    case.raw(level, entry, table, cpu, case.shots[shot].controls)
}

/// What came of a case's shots.
fn outcome(case: &Case, cpu: Cpu, pair: &[Shot]) -> Outcome {
    let levels = case.paging.levels();
    let mask = if case.paging == Paging::Legacy { 0xffff_ffff } else { u64::MAX };
    let seen = |number: usize| {
        let shot = &pair[number];
        let mut changed = [0; LEVELS];
        for level in 1..=levels {
            let at = usize::from(level) - 1;
            changed[at] = (shot.seen[at] ^ raw(case, cpu, number, level)) & mask;
        }
        let [a, b, c, d] = core::array::from_fn(|index| shot.seen[usize::from(levels) + index]);
        Seen {
            vector: shot.vector as u8,
            // What INT pushes for one is this kernel's own.
            error: if shot.vector == NO_FAULT.into() { 0 } else { shot.error as u32 },
            cr2: shot.cr2,
            value: shot.value as u32,
            changed,
            memory: [[a, b], [c, d]],
        }
    };
    Outcome([seen(0), seen(1)]).without_flaws(case, cpu)
}
