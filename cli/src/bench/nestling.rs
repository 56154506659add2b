//! This hypervisor's side.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use clap::Parser;

use super::{Figures, figures};
use crate::{
    args::{BenchArgs, Cli},
    artifacts,
    error::Error,
    guest::plan::Seat,
    plan::Plan,
    progress::Progress,
    run::Prepared,
};

/// Runs the measuring guest here.
pub(super) fn measure(args: &BenchArgs, progress: Progress) -> Result<Figures, Error> {
    let image = artifacts::test_kernel(progress)?;
    let words = format!("meter {}", args.pages);
    let mut run = Cli::parse_from(["nestling", "--vcpus", "1", "--memory", "64M", "--huge-pages", "none"]).run;
    run.accel = crate::args::Accel::Counted;
    run.guest.multiboot = Some(image);
    run.guest.append = words;
    let mut plan = Plan::new(&run, Seat::Pipe)?;
    plan.guest.config.meter_pages = args.pages;
    let console = Kept::default();
    let output = console.clone();
    let outcome = Prepared::new(plan, None, progress)?.run(|_| Ok(Box::new(output)))?;
    let said = console.0.lock().map(|bytes| bytes.clone()).unwrap_or_default();
    let mut figures = figures(&said)?;
    if let Some(report) = &outcome.record.report {
        figures.insert("vm_destroy".into(), (1, report.teardown.ticks));
    }
    Ok(figures)
}

/// A console that is read when all is over.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Ok(mut kept) = self.0.lock() {
            kept.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
