//! A dead guest, for people: what it was doing, and how its tables looked.

use alloc::{format, vec::Vec};
use core::fmt::{self, Display, Write};

use crate::message::{DeathReason, DeathReport, ExitRecord, Segment, VcpuState, WalkStep};

const GENERAL: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// A report that was received: its lists may be of any length, and are shown up to this.
const MOST_LINES: usize = 64;

/// Shows a [`DeathReport`].
#[derive(Debug)]
pub struct Shown<'a>(pub &'a DeathReport);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let death = self.0;
        write!(f, "the guest died after {:.3} s of its time: ", death.guest_ns as f64 / 1e9)?;
        reason(f, &death.reason)?;
        if let Some(vcpu) = death.vcpu {
            write!(f, " (vCPU {vcpu})")?;
        }
        writeln!(f)?;
        for state in death.vcpus.iter().take(MOST_LINES) {
            vcpu(f, state)?;
        }
        Ok(())
    }
}

fn reason(f: &mut fmt::Formatter<'_>, reason: &DeathReason) -> fmt::Result {
    match reason {
        DeathReason::TripleFault => f.write_str("triple fault"),
        DeathReason::Shutdown => f.write_str("shutdown"),
        DeathReason::UnexpectedExit { code, info1, info2 } => {
            write!(f, "unexpected exit {code:#x} (info1 {info1:#x}, info2 {info2:#x})")
        }
        DeathReason::MmioWithoutDevice { gpa, write } => {
            let access = if *write { "write to" } else { "read of" };
            write!(f, "{access} guest physical {gpa:#x}, where there is neither memory nor a device")
        }
        DeathReason::NotEmulated { instruction } => {
            f.write_str("an instruction on device memory that is not emulated:")?;
            instruction.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
        }
        DeathReason::SilentConsole { silent_ms } => {
            write!(f, "nothing on its console for {:.1} s", *silent_ms as f64 / 1e3)
        }
        DeathReason::Internal { text } => {
            f.write_str("the hypervisor could not go on: ")?;
            text.chars().filter(|character| !character.is_control()).try_for_each(|character| f.write_char(character))
        }
    }
}

fn vcpu(f: &mut fmt::Formatter<'_>, state: &VcpuState) -> fmt::Result {
    let registers = &state.registers;
    writeln!(f, "vCPU {}:", state.vcpu)?;
    writeln!(f, "  rip    {:016x}  rflags {:016x}  cpl {}", registers.rip, registers.rflags, registers.cpl)?;
    for (names, values) in GENERAL.chunks(4).zip(registers.general.chunks(4)) {
        let row: Vec<_> = names.iter().zip(values).map(|(name, value)| format!("{name:<6} {value:016x}")).collect();
        writeln!(f, "  {}", row.join("  "))?;
    }
    writeln!(
        f,
        "  cr0    {:016x}  cr2    {:016x}  cr3    {:016x}  cr4    {:016x}",
        registers.cr0, registers.cr2, registers.cr3, registers.cr4
    )?;
    writeln!(f, "  efer   {:016x}", registers.efer)?;
    for (name, segment) in SEGMENTS.iter().zip(&registers.segments) {
        descriptor(f, name, segment)?;
    }
    descriptor(f, "tr", &registers.tr)?;
    descriptor(f, "ldtr", &registers.ldtr)?;
    for (name, table) in [("gdtr", &registers.gdtr), ("idtr", &registers.idtr)] {
        writeln!(f, "  {name:<6} base {:016x} limit {:08x}", table.base, table.limit)?;
    }
    let bytes: Vec<_> = state.instruction.iter().take(MOST_LINES).map(|byte| format!("{byte:02x}")).collect();
    writeln!(f, "  bytes at rip: {}", if bytes.is_empty() { "not mapped".into() } else { bytes.join(" ") })?;
    walk(f, "guest walk", &state.guest_walk)?;
    walk(f, "nested walk", &state.nested_walk)?;
    exits(f, &state.last_exits)
}

fn descriptor(f: &mut fmt::Formatter<'_>, name: &str, segment: &Segment) -> fmt::Result {
    let Segment { selector, attributes, limit, base } = segment;
    writeln!(f, "  {name:<6} {selector:04x} base {base:016x} limit {limit:08x} attributes {attributes:04x}")
}

fn walk(f: &mut fmt::Formatter<'_>, name: &str, steps: &[WalkStep]) -> fmt::Result {
    writeln!(f, "  {name}:{}", if steps.is_empty() { " none" } else { "" })?;
    for WalkStep { level, address, entry } in steps.iter().take(MOST_LINES) {
        writeln!(f, "    level {level} entry at {address:#014x} = {entry:#018x}")?;
    }
    Ok(())
}

fn exits(f: &mut fmt::Formatter<'_>, exits: &[ExitRecord]) -> fmt::Result {
    writeln!(f, "  last exits, oldest first:{}", if exits.is_empty() { " none" } else { "" })?;
    for ExitRecord { code, rip, info1, count } in &exits[exits.len().saturating_sub(MOST_LINES)..] {
        writeln!(f, "    {code:#06x} at {rip:016x} info1 {info1:#x} ({count} times)")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};

    use super::*;
    use crate::message::Registers;

    #[test]
    fn everything_that_was_found_is_shown_and_nothing_acts_on_the_terminal() {
        let death = DeathReport {
            reason: DeathReason::Internal { text: "out\x1b[2J of frames".into() },
            vcpu: Some(2),
            guest_ns: 1_500_000_000,
            vcpus: vec![VcpuState {
                vcpu: 2,
                registers: Registers { rip: 0xffff_8000_dead_beef, ..Registers::default() },
                instruction: vec![0x0f, 0x0b],
                guest_walk: vec![WalkStep { level: 4, address: 0x1000, entry: 0x2067 }],
                nested_walk: vec![],
                last_exits: (0..100).map(|n| ExitRecord { code: 0x400, rip: n, info1: 4, count: 7 }).collect(),
            }],
        };
        let text = Shown(&death).to_string();
        for expected in [
            "after 1.500 s",
            "out[2J of frames",
            "(vCPU 2)",
            "ffff8000deadbeef",
            "bytes at rip: 0f 0b",
            "level 4 entry at 0x000000001000 = 0x0000000000002067",
            "nested walk: none",
            "0x0400 at 0000000000000063",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
        }
        assert!(!text.contains('\x1b'));
        assert!(!text.contains("at 0000000000000000 info1"), "the oldest exits are cut");
    }
}
