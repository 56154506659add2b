//! The init of a Linux host that runs a measuring guest under KVM, prints what the guest prints, and switches the machine
//! off.
//!
//! Its command line: `nestling.npt=0` for KVM's shadow paging, `nestling.meter=PAGES` for the size of the meter's slot,
//! `nestling.large=1` for large pages behind it.
//! Files: `/image` is the guest, or `/bundle` is, a Linux one; `/modules/` holds KVM. A failure is a line on the console, and the power goes off all the
//! same: whoever started the machine misses the guest's last line.

mod guest;
mod host;
mod linux;
mod memory;
mod meter;

use std::{error::Error, fs, path::Path};

use memory::Pages;

/// A Linux guest, with all that belongs to it.
const BUNDLE: &str = "/bundle";

fn main() {
    if let Err(error) = run() {
        println!("kvmpeer: {error}");
    }
    host::power_off();
}

fn run() -> Result<(), Box<dyn Error>> {
    host::mount()?;
    let words = fs::read_to_string("/proc/cmdline")?;
    let value = |name: &str| words.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let npt = value("nestling.npt") != Some("0");
    host::load_modules(npt)?;
    if Path::new(BUNDLE).exists() {
        return linux::run(&fs::read(BUNDLE)?);
    }
    let pages = value("nestling.meter").ok_or("no nestling.meter= on the command line")?.parse()?;
    let mapped = if value("nestling.large") == Some("1") { Pages::Large } else { Pages::Small };
    guest::run(&fs::read("/image")?, pages, mapped)?;
    Ok(())
}
