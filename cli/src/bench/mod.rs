//! `nestling bench`: what memory management costs, in executed instructions, here and under KVM.
//!
//! One image measures on both sides ([`nestling_meter`] is what it says to whoever runs it), on the same emulated machine.
//! The emulator counts instructions, so that neither this machine's speed nor its load is in the figures, and they repeat.
//!
//! A Linux guest is run on both sides as well, from one bundle: what all CPUs execute from its first entry to its power-off.
//! Where nobody executes anything, because the guest waits for a timer, the counter goes on; that is taken off.
//! Under KVM the guest's memory is there before, and its console is printed after; here both are in the count.

mod kvm;
mod nestling;
mod plot;
mod profile;
mod rows;
mod seams;
mod stub;

use std::{collections::BTreeMap, fs, path::Path};

use nestling_meter::{END, Figure, LARGE_PAGES, SMALL_PAGES};
use serde::{Deserialize, Serialize};

pub use rows::Row;
pub(crate) use stub::NOTHING;

use crate::{
    args::{BenchArgs, Side, System, Translation},
    error::Error,
    guest::packages,
    progress::Progress,
};

/// What one side's guest has found: by name, how often and how many instructions in all.
type Figures = BTreeMap<String, (u64, u64)>;

/// How a guest's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Paging {
    /// By nested paging.
    Npt,
    /// By shadow paging.
    Shadow,
}

impl From<Translation> for Paging {
    fn from(translation: Translation) -> Self {
        match translation {
            Translation::Npt => Self::Npt,
            Translation::Shadow => Self::Shadow,
        }
    }
}

impl Paging {
    fn words(self) -> &'static str {
        match self {
            Self::Npt => "nested paging",
            Self::Shadow => "shadow paging",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Npt => "npt",
            Self::Shadow => "shadow",
        }
    }
}

/// How the memory that is measured is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    Small,
    Large,
}

/// The figures that are of large pages.
const OF_LARGE: [&str; 3] = ["fault_2m", "split_2m", "collapse_2m"];

/// The end of the guest is one of every run.
fn is_of_large((name, _): &(String, (u64, u64))) -> bool {
    OF_LARGE.contains(&&name[..])
}

impl Pages {
    /// Those that a figure is of.
    fn of(operation: &str) -> Self {
        if OF_LARGE.contains(&operation) { Self::Large } else { Self::Small }
    }

    /// As the measuring guest is told.
    fn word(self) -> &'static str {
        match self {
            Self::Small => SMALL_PAGES,
            Self::Large => LARGE_PAGES,
        }
    }
}

/// A measurement as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// Pages of 4 KiB that the operations worked on.
    pub pages: u32,
    /// The Linux guest's kernel, by the name of its package.
    pub kernel: String,
    /// What they cost.
    pub rows: Vec<Row>,
}

/// Measures, prints, and compares.
///
/// # Errors
/// The first thing that cannot be done, with its reason; or that something costs more than in the baseline.
pub fn run(args: &BenchArgs, progress: Progress) -> Result<(), Error> {
    if let Some(operation) = &args.profile {
        return explain(args, operation, progress);
    }
    // Before minutes are spent.
    let baseline = args.baseline.as_deref().map(read).transpose()?;
    if let Some(earlier) = &baseline
        && earlier.pages != args.pages
    {
        return Err(Error::OtherPages { earlier: earlier.pages, now: args.pages });
    }
    let (mut kvm, mut here) = (Vec::new(), Vec::new());
    if args.only != Some(Side::Nestling) {
        for paging in [Paging::Npt, Paging::Shadow] {
            let mut figures = kvm::measure(args, paging, Pages::Small, progress)?;
            let bundle = nestling::linux(paging)?.guest.load(progress)?.bundle;
            figures.extend(kvm::linux(args, paging, &bundle, progress)?);
            kvm.push((paging, figures));
        }
        kvm[0].1.extend(kvm::measure(args, Paging::Npt, Pages::Large, progress)?.into_iter().filter(is_of_large));
    }
    if args.only != Some(Side::Kvm) {
        for paging in [Paging::Npt, Paging::Shadow] {
            let mut figures = nestling::measure(args, paging, progress)?;
            figures.extend(nestling::run_linux(paging, progress)?);
            here.push((paging, figures));
        }
    }
    let of = |side: &[(Paging, Figures)], wanted| {
        side.iter().find(|(paging, _)| *paging == wanted).map(|(_, figures)| figures.clone()).unwrap_or_default()
    };
    let rows = rows::rows(|paging| of(&kvm, paging), |paging| of(&here, paging));
    let kernel =
        packages::kernel(System::Amd64, progress)?.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let measured = Measurement { pages: args.pages, kernel, rows };
    print(&measured.rows);
    if let Some(path) = &args.json {
        write(path, &measured)?;
    }
    if let Some(path) = &args.svg {
        let instructions: Vec<_> = measured.rows.iter().filter(|row| row.is_of_instructions()).cloned().collect();
        plot::write(path, &instructions)?;
    }
    match baseline {
        Some(earlier) => compare(earlier, &measured, f64::from(args.tolerance) / 100.0),
        None => Ok(()),
    }
}

/// Prints where one operation's instructions go, or a Linux guest's.
fn explain(args: &BenchArgs, operation: &str, progress: Progress) -> Result<(), Error> {
    if operation == rows::LINUX_RUN {
        let shares = nestling::profile_linux(args.mmu.into(), progress)?;
        println!("{operation}: {shares}");
        return Ok(());
    }
    let figure = rows::followed(operation, args.mmu.into())?;
    let (functions, each) = nestling::profile(args, figure, progress)?;
    println!("{figure}: {each:.1} instructions each");
    for (function, instructions) in functions.iter().filter(|(_, instructions)| *instructions >= 0.05) {
        println!("{instructions:10.1}  {function}");
    }
    Ok(())
}

fn print(rows: &[Row]) {
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    println!("{:22} {:6} {:>14} {:>12} {:>8} {:>10}", "operation", "mmu", "KVM", "Nestling", "ratio", "goal");
    for Row { op, mmu, kvm, nestling, ratio, goal } in rows {
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let (kvm, here, goal) = (shown(*kvm), shown(*nestling), shown(*goal));
        println!("{op:22} {:6} {kvm:>14} {here:>12} {ratio:>8} {goal:>10}", mmu.name());
    }
}

/// Says what has become worse.
fn compare(mut earlier: Measurement, now: &Measurement, tolerance: f64) -> Result<(), Error> {
    if earlier.kernel != now.kernel {
        println!("rows of the Linux guest are not compared: it was {} then, and is {} now", earlier.kernel, now.kernel);
        earlier.rows.retain(|row| !row.is_of_linux());
    }
    let worse = rows::worse(&earlier.rows, &now.rows, tolerance);
    if worse.is_empty() {
        println!("nothing costs more than in the baseline by more than {:.0} %", 100.0 * tolerance);
        return Ok(());
    }
    let named = worse.iter().map(|(row, was, is)| {
        let is = is.map_or("not measured".to_owned(), |is| format!("{is:.1} ({:+.1} %)", 100.0 * (is / was - 1.0)));
        format!("{} ({}): {was:.1} before, {is} now", row.op, row.mmu.name())
    });
    Err(Error::Worse { named: named.collect::<Vec<_>>().join("\n  ") })
}

fn read(path: &Path) -> Result<Measurement, Error> {
    let refused = |cause| Error::File { option: "--baseline", path: path.to_owned(), cause };
    let text = fs::read_to_string(path).map_err(refused)?;
    serde_json::from_str(&text).map_err(|cause| refused(cause.into()))
}

fn write(path: &Path, measured: &Measurement) -> Result<(), Error> {
    let refused = |cause| Error::File { option: "--json", path: path.to_owned(), cause };
    let mut text = serde_json::to_string_pretty(measured).map_err(|cause| refused(cause.into()))?;
    text.push('\n');
    fs::write(path, text).map_err(refused)
}

/// The figures on a guest's console.
///
/// # Errors
/// The guest did not get to its end.
fn figures(console: &[u8]) -> Result<Figures, Error> {
    let text = String::from_utf8_lossy(console);
    if !text.lines().any(|line| line.trim() == END) {
        return Err(Error::Measuring { said: text.into_owned() });
    }
    let found = text.lines().filter_map(Figure::parse);
    Ok(found.map(|figure| (figure.name.to_owned(), (figure.count.max(1), figure.ticks))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_another_kernel_are_not_compared_and_all_others_are() {
        let measured = |kernel: &str, linux, age| {
            let row = |op: &str, nestling| Row {
                op: op.into(),
                mmu: Paging::Npt,
                kvm: None,
                nestling: Some(nestling),
                ratio: None,
                goal: None,
            };
            Measurement { pages: 1, kernel: kernel.into(), rows: vec![row("linux", linux), row("age", age)] }
        };
        let compared = |earlier, now| compare(earlier, &now, 0.02).is_ok();
        assert!(compared(measured("a", 100.0, 10.0), measured("b", 200.0, 10.0)));
        assert!(!compared(measured("a", 100.0, 10.0), measured("a", 200.0, 10.0)));
        assert!(!compared(measured("a", 100.0, 10.0), measured("b", 100.0, 11.0)));
    }
}
