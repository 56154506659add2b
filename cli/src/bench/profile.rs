//! Where the instructions go: the emulator tells of each instruction that it executes between two marks (the guest's,
//! [`nestling_meter::Operation::Mark`], or the hypervisor's own around the end of a VM), and they are counted by function.
//!
//! A function that was inlined counts by itself: the hypervisor's debugging information says which one an instruction
//! came from. The guest's own instructions are left out. [`super::stub`] switches the emulator's log.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
};

use addr2line::Loader;
use elf::{ElfBytes, abi::STT_FUNC, endian::LittleEndian, symbol::Symbol};

use super::nestling::VM_DESTROY;
use crate::error::Error;

/// The hypervisor's function that stands for a guest's mark.
const MARK: &str = "nestling_hypervisor::vm::meter::mark";
/// The one around the end of a VM.
const MARK_END: &str = "nestling_hypervisor::vm::meter::mark_end";
/// Begins the names of functions that wait for CPUs and clocks at the start: the emulator would tell of nothing else.
const BOOT: &str = "nestling_hypervisor::boot::";
/// The emulator's flag for a CPU that runs a guest, whose addresses may be the hypervisor's too.
const IN_GUEST: u64 = 1 << 21;
/// What has no name.
const NAMELESS: &str = "(no function)";

/// Instructions by function, most first.
pub(super) type Profile = Vec<(String, u64)>;

/// How often each address was executed between the marks.
#[derive(Debug, Default)]
pub(super) struct Counts {
    executed: HashMap<u64, u64>,
}

impl Counts {
    /// Reads what QEMU writes for `-d exec,nochain` with one instruction a block, to its end: a line an instruction, which
    /// begins with the CPU's number; the address is behind the first slash in brackets, the CPU's flags behind the second.
    ///
    /// Only what the CPU does that was at the mark counts: the housekeeping of another has nothing to do with it.
    pub(super) fn read(log: &Path, mark: u64) -> std::io::Result<Self> {
        let mut log = BufReader::with_capacity(1 << 20, File::open(log)?);
        let (mut line, mut marked, mut trace) = (Vec::new(), None, Self::default());
        while log.read_until(b'\n', &mut line)? > 0 {
            if let Some((cpu, address)) = executed(&line) {
                if address == mark {
                    marked = if marked.is_none() { Some(cpu) } else { None };
                }
                if marked == Some(cpu) {
                    *trace.executed.entry(address).or_default() += 1;
                }
            }
            line.clear();
        }
        Ok(trace)
    }

    /// Sums up by function.
    pub(super) fn by_function(&self, hypervisor: &Path) -> Result<Profile, Error> {
        let symbols = load(hypervisor)?;
        let mut functions: BTreeMap<String, u64> = BTreeMap::new();
        for (&address, &count) in &self.executed {
            *functions.entry(function(&symbols, address)).or_default() += count;
        }
        let mut profile: Profile = functions.into_iter().collect();
        profile.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Ok(profile)
    }
}

/// The CPU and the address in a line of the log, unless it is a guest's.
fn executed(line: &[u8]) -> Option<(u32, u64)> {
    let text = std::str::from_utf8(line).ok()?.strip_prefix("Trace ")?;
    let (cpu, text) = text.split_once(':')?;
    let (_, inside) = text.split_once('[')?;
    let mut fields = inside.split('/').skip(1).map(|field| u64::from_str_radix(field, 16));
    let address = fields.next()?.ok()?;
    (fields.next()?.ok()? & IN_GUEST == 0).then_some((cpu.parse().ok()?, address))
}

fn failed(hypervisor: &Path, cause: impl std::fmt::Display) -> Error {
    Error::File { option: "--profile", path: hypervisor.to_owned(), cause: std::io::Error::other(cause.to_string()) }
}

fn load(hypervisor: &Path) -> Result<Loader, Error> {
    Loader::new(hypervisor).map_err(|cause| failed(hypervisor, cause))
}

/// The innermost function at an address, inlined ones included.
fn function(symbols: &Loader, address: u64) -> String {
    let frame = symbols.find_frames(address).ok().and_then(|mut frames| frames.next().ok().flatten());
    let inlined = frame.and_then(|frame| Some(frame.function?.demangle().ok()?.into_owned()));
    let name = inlined.or_else(|| symbols.find_symbol(address).map(demangled));
    name.unwrap_or_else(|| NAMELESS.to_owned())
}

/// Without the hash that tells versions of a crate apart.
fn demangled(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

/// What has to be known of the hypervisor before it runs.
#[derive(Debug)]
pub(super) struct Places {
    /// The address of its mark.
    pub(super) mark: u64,
    /// The addresses that the emulator is to tell of, as its `-dfilter` wants them.
    pub(super) filter: String,
}

/// Finds the places for a figure.
pub(super) fn places(hypervisor: &Path, figure: &str) -> Result<Places, Error> {
    let file = fs::read(hypervisor).map_err(|cause| failed(hypervisor, cause))?;
    let file = ElfBytes::<LittleEndian>::minimal_parse(&file).map_err(|cause| failed(hypervisor, cause))?;
    let symbols = file.symbol_table().map_err(|cause| failed(hypervisor, cause))?;
    let (symbols, names) = symbols.ok_or_else(|| failed(hypervisor, "it has no symbols"))?;
    let name = |symbol: &Symbol| names.get(symbol.st_name as usize).map(demangled).unwrap_or_default();
    let mut functions: Vec<_> =
        symbols.iter().filter(|symbol| symbol.st_symtype() == STT_FUNC && symbol.st_size > 0).collect();
    functions.sort_by_key(|symbol| symbol.st_value);
    let wanted = if figure == VM_DESTROY { MARK_END } else { MARK };
    let mark = functions.iter().find(|symbol| name(symbol) == wanted);
    let mark = mark.ok_or_else(|| failed(hypervisor, "it has no mark"))?.st_value;
    // Neighbours are joined: there are hundreds of functions.
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut joins = false;
    for symbol in &functions {
        let (start, end) = (symbol.st_value, symbol.st_value + symbol.st_size);
        match ranges.last_mut() {
            _ if name(symbol).starts_with(BOOT) => joins = false,
            Some(last) if joins => last.1 = end.max(last.1),
            _ => (ranges.push((start, end)), joins = true).1,
        }
    }
    let filter: Vec<_> = ranges.iter().map(|(start, end)| format!("{start:#x}+{:#x}", end - start)).collect();
    Ok(Places { mark, filter: filter.join(",") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_marks_counts() {
        let line = |address: u64| format!("Trace 0: 0x7f00 [00000000/{address:016x}/0040c0b0/00000001] name\n");
        let guest = "Trace 0: 0x7f00 [00000000/0000000000000020/0060c0b0/00000001] name\n";
        let other = "Trace 1: 0x7f00 [00000000/0000000000000020/0040c0b0/00000001] name\n";
        let log = [0x10, 0x99, 0x10, 0x20].map(line).concat() + guest + other + &[0x10, 0x99, 0x20].map(line).concat();
        let log = log + "something else [a/b]\n";
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), log).expect("written");
        let trace = Counts::read(file.path(), 0x99).expect("read");
        let mut executed: Vec<_> = trace.executed.into_iter().collect();
        executed.sort_unstable();
        assert_eq!(executed, [(0x10, 2), (0x20, 1), (0x99, 1)]);
    }
}
