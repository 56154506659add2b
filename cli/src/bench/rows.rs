//! The rows: what is compared, from which figures, and how far the project means to get.

use serde::{Deserialize, Serialize};

use super::{Figures, Pages, Paging};
use crate::error::Error;

/// How a row's value comes from a figure.
#[derive(Clone, Copy, Debug)]
enum Value {
    /// Instructions for one page, or one exit.
    Each,
    /// Instructions for so many of them.
    Each8,
    /// Instructions for all of it.
    All,
    /// Bytes for each GiB of pages.
    PerGib,
}

/// The rows that are not of instructions.
const TABLE_BYTES: &str = "table_bytes_per_gib";
const BOOK_BYTES: &str = "book_bytes_per_gib";
const FORK_EXITS: &str = "fork_exits";
/// A Linux guest's run as a whole.
pub(super) const LINUX_RUN: &str = "linux";
/// The rows of a Linux guest.
const LINUX: [&str; 3] = [LINUX_RUN, "fork", FORK_EXITS];
/// A quarter of a percent.
const MOST_BOOK_BYTES: f64 = (1u64 << 30) as f64 / 400.0;
/// Pages of 4 KiB in a GiB.
const GIB_PAGES: f64 = 262_144.0;

/// A row before anything is measured.
#[derive(Clone, Copy, Debug)]
struct Definition {
    op: &'static str,
    mmu: Paging,
    figure: &'static str,
    value: Value,
    goal: Goal,
}

/// How far the project means to get.
#[derive(Clone, Copy, Debug)]
enum Goal {
    /// Nobody has said.
    None,
    /// At most this, for this hypervisor.
    Most(f64),
    /// At most this of what KVM takes.
    Share(f64),
}

const fn goal(most: Option<f64>) -> Goal {
    match most {
        Some(most) => Goal::Most(most),
        None => Goal::None,
    }
}

const fn npt(op: &'static str, value: Value, most: Option<f64>) -> Definition {
    Definition { op, mmu: Paging::Npt, figure: op, value, goal: goal(most) }
}

const fn shadow(op: &'static str, figure: &'static str, value: Value, most: Option<f64>) -> Definition {
    Definition { op, mmu: Paging::Shadow, figure, value, goal: goal(most) }
}

/// Of what memory takes that maps a guest's.
const fn memory(op: &'static str, mmu: Paging, figure: &'static str, goal: Goal) -> Definition {
    Definition { op, mmu, figure, value: Value::PerGib, goal }
}

/// Of a Linux guest, whose goals are shares of what it takes under KVM.
const fn linux(op: &'static str, mmu: Paging, value: Value, goal: Goal) -> Definition {
    Definition { op, mmu, figure: op, value, goal }
}

/// The guest's figures have the rows' names, but for those of shadow paging that stand for something else there.
const DEFINITIONS: [Definition; 41] = [
    npt("write_fault", Value::Each, Some(400.0)),
    npt("dirty_write_fault", Value::Each, Some(250.0)),
    npt("dirty_enable", Value::Each, Some(25.0)),
    npt("dirty_enable_all_set", Value::All, None),
    npt("dirty_harvest", Value::Each, Some(25.0)),
    npt("dirty_harvest_clean", Value::Each, None),
    npt("dirty_disable", Value::Each, None),
    npt("age", Value::Each, None),
    npt("slot_delete", Value::Each, Some(40.0)),
    npt("slot_delete_empty", Value::All, None),
    npt("host_invalidate", Value::Each, Some(100.0)),
    npt("zap_all", Value::Each, None),
    npt("zap_all_front", Value::All, None),
    npt("zap_all_back", Value::Each, None),
    npt("fault_2m", Value::Each, None),
    npt("split_2m", Value::Each, None),
    npt("collapse_2m", Value::Each, None),
    npt(ROOT_SWITCH, Value::Each, None),
    memory(TABLE_BYTES, Paging::Npt, "table_bytes", Goal::None),
    memory(BOOK_BYTES, Paging::Npt, "book_bytes", Goal::None),
    npt("cpuid_exit", Value::Each, Some(300.0)),
    npt("port_write", Value::Each, Some(400.0)),
    npt("mmio_read", Value::Each, Some(1500.0)),
    npt("vm_destroy", Value::All, Some(500_000.0)),
    shadow("shadow_fault_8", "write_fault", Value::Each8, Some(3000.0)),
    shadow("invlpg", "invlpg", Value::Each, Some(600.0)),
    shadow("cr3_reload", "cr3_reload", Value::Each, Some(500.0)),
    shadow("cr3_reload_unsync", "cr3_reload_unsync", Value::All, Some(80_000.0)),
    shadow("dirty_enable", "dirty_enable", Value::Each, None),
    shadow("dirty_harvest", "dirty_harvest", Value::Each, None),
    shadow("slot_delete", "slot_delete", Value::Each, None),
    shadow("host_invalidate", "host_invalidate", Value::Each, None),
    memory(TABLE_BYTES, Paging::Shadow, "table_bytes", Goal::None),
    memory(BOOK_BYTES, Paging::Shadow, "book_bytes", Goal::Most(MOST_BOOK_BYTES)),
    shadow("vm_destroy", "vm_destroy", Value::All, None),
    linux(LINUX_RUN, Paging::Npt, Value::All, Goal::Share(0.9)),
    linux("fork", Paging::Npt, Value::Each, Goal::None),
    linux(FORK_EXITS, Paging::Npt, Value::Each, Goal::None),
    linux(LINUX_RUN, Paging::Shadow, Value::All, Goal::Share(0.75)),
    linux("fork", Paging::Shadow, Value::Each, Goal::Share(1.0)),
    linux(FORK_EXITS, Paging::Shadow, Value::Each, Goal::Share(1.0)),
];

/// A row of the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was done.
    pub op: String,
    /// `npt` or `shadow`.
    pub mmu: Paging,
    /// Instructions under KVM; `null` where it was not measured.
    pub kvm: Option<f64>,
    /// Instructions here; `null` where this hypervisor was not measured or can't do it.
    pub nestling: Option<f64>,
    /// KVM's over this one's.
    pub ratio: Option<f64>,
    /// The most that the project allows itself; `null` too where that is a share of KVM's, which was not measured.
    pub goal: Option<f64>,
}

impl Row {
    /// Whether it is instructions that the row counts.
    pub(super) fn is_of_instructions(&self) -> bool {
        ![TABLE_BYTES, BOOK_BYTES, FORK_EXITS].contains(&&self.op[..])
    }

    /// Whether it is of a Linux guest, and so of its kernel too.
    pub(super) fn is_of_linux(&self) -> bool {
        LINUX.contains(&&self.op[..])
    }
}

/// The rows of which at least one side is known.
pub(super) fn rows(kvm: impl Fn(Paging) -> Figures, nestling: impl Fn(Paging) -> Figures) -> Vec<Row> {
    let sides = [Paging::Npt, Paging::Shadow].map(|paging| (paging, kvm(paging), nestling(paging)));
    let row = |definition: &Definition| {
        let (_, kvm, nestling) = sides.iter().find(|(paging, ..)| *paging == definition.mmu)?;
        let value = |figures: &Figures| {
            let &(count, ticks) = figures.get(definition.figure)?;
            let (count, ticks) = (count as f64, ticks as f64);
            let value = match definition.value {
                Value::Each => ticks / count,
                Value::Each8 => 8.0 * ticks / count,
                Value::All => ticks,
                Value::PerGib => GIB_PAGES * ticks / count,
            };
            Some((value * 10.0).round() / 10.0)
        };
        let (kvm, nestling) = (value(kvm), value(nestling));
        let ratio = kvm.zip(nestling).map(|(kvm, nestling)| (100.0 * kvm / nestling).round() / 100.0);
        let Definition { op, mmu, goal, .. } = *definition;
        let goal = match goal {
            Goal::None => None,
            Goal::Most(most) => Some(most),
            Goal::Share(share) => kvm.map(|kvm| (kvm * share * 10.0).round() / 10.0),
        };
        (kvm.is_some() || nestling.is_some()).then(|| Row { op: op.into(), mmu, kvm, nestling, ratio, goal })
    };
    DEFINITIONS.iter().filter_map(row).collect()
}

/// What no instructions can be followed of: bytes, exits, parts of another row's work by what the library says of itself, and
/// a part of the Linux guest's run.
const NOT_FOLLOWED: [&str; 6] = [TABLE_BYTES, BOOK_BYTES, FORK_EXITS, "zap_all_front", "zap_all_back", "fork"];
/// Only nested paging has roots to switch between and back.
const ROOT_SWITCH: &str = "root_switch";

/// The figure of which a row says something, by the row's name or its own, if its instructions can be followed: those of
/// small pages with either paging.
///
/// # Errors
/// There is none.
pub(super) fn followed(operation: &str, paging: Paging) -> Result<&'static str, Error> {
    let rows = || {
        let either = |row: &Definition| Pages::of(row.figure) == Pages::Small && row.op != ROOT_SWITCH;
        let fits = move |row: &&Definition| row.mmu == paging || either(row);
        DEFINITIONS.iter().filter(fits).filter(|row| !NOT_FOLLOWED.contains(&row.op))
    };
    match rows().find(|row| (row.mmu == paging && row.op == operation) || row.figure == operation) {
        Some(row) => Ok(row.figure),
        None => {
            let mut known: Vec<_> = rows().map(|row| row.figure.to_owned()).collect();
            known.sort_unstable();
            known.dedup();
            Err(Error::NoSuchOperation { known })
        }
    }
}

/// This hypervisor's rows that cost more than in `earlier` by more than `tolerance` (0.02: 2 %): each with the values
/// before and now. A row that has no value any more is one of them.
pub(super) fn worse<'a>(earlier: &'a [Row], now: &[Row], tolerance: f64) -> Vec<(&'a Row, f64, Option<f64>)> {
    let judge = |before: &'a Row| {
        let was = before.nestling?;
        let is = now.iter().find(|row| row.op == before.op && row.mmu == before.mmu).and_then(|row| row.nestling);
        let fits = is.is_some_and(|is| is <= was * (1.0 + tolerance));
        (!fits).then_some((before, was, is))
    };
    earlier.iter().filter_map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(of: &[(&str, u64, u64)]) -> Figures {
        of.iter().map(|&(name, count, ticks)| (name.to_owned(), (count, ticks))).collect()
    }

    #[test]
    fn a_row_needs_one_side_and_a_ratio_both() {
        let kvm = |paging| match paging {
            Paging::Npt => figures(&[("write_fault", 4, 12_000), ("cpuid_exit", 10, 27_000)]),
            Paging::Shadow => figures(&[("write_fault", 8, 14_000)]),
        };
        let here = |paging| if paging == Paging::Npt { figures(&[("write_fault", 4, 2_000)]) } else { Figures::new() };
        let rows = rows(kvm, here);
        let shown: Vec<_> = rows.iter().map(|row| (&row.op[..], row.mmu, row.kvm, row.nestling, row.ratio)).collect();
        assert_eq!(
            shown,
            [
                ("write_fault", Paging::Npt, Some(3000.0), Some(500.0), Some(6.0)),
                ("cpuid_exit", Paging::Npt, Some(2700.0), None, None),
                ("shadow_fault_8", Paging::Shadow, Some(14_000.0), None, None),
            ]
        );
    }

    #[test]
    fn a_goal_that_is_a_share_of_kvms_needs_kvms() {
        let linux = |ticks| move |_| figures(&[("linux", 1, ticks)]);
        let goals = |rows: Vec<Row>| rows.into_iter().map(|row| row.goal).collect::<Vec<_>>();
        assert_eq!(goals(rows(linux(1000), linux(800))), [Some(900.0), Some(750.0)]);
        assert_eq!(goals(rows(|_| Figures::new(), linux(800))), [None, None]);
    }

    #[test]
    fn rows_of_instructions_are_followed_by_their_figure() {
        let figure = |row, paging| followed(row, paging).ok();
        assert_eq!(figure("shadow_fault_8", Paging::Shadow), Some("write_fault"));
        assert_eq!(figure("write_fault", Paging::Shadow), Some("write_fault"));
        assert_eq!(figure("age", Paging::Shadow), Some("age"));
        for (row, paging) in [
            ("shadow_fault_8", Paging::Npt),
            (ROOT_SWITCH, Paging::Shadow),
            ("split_2m", Paging::Shadow),
            ("zap_all_back", Paging::Npt),
            (BOOK_BYTES, Paging::Npt),
        ] {
            assert_eq!(figure(row, paging), None, "{row}");
        }
    }

    #[test]
    fn worse_is_more_than_the_tolerance_or_gone() {
        let row =
            |op: &str, nestling| Row { op: op.into(), mmu: Paging::Npt, kvm: None, nestling, ratio: None, goal: None };
        let before = [row("a", Some(100.0)), row("b", Some(100.0)), row("c", Some(100.0)), row("d", None)];
        let now = [row("a", Some(102.0)), row("b", Some(102.1)), row("d", Some(9.0))];
        let worse: Vec<_> =
            worse(&before, &now, 0.02).into_iter().map(|(row, was, is)| (&row.op[..], was, is)).collect();
        assert_eq!(worse, [("b", 100.0, Some(102.1)), ("c", 100.0, None)]);
    }
}
