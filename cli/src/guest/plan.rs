//! A guest, checked: everything about it that can be refused is refused here, before anything is installed or built.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nestling_control::config::{GuestKind, HugePages, MmuKind, Origin, RunConfig, STORM_KINDS, Storm};

use crate::{
    args::{GuestArgs, Mode, System},
    copy::stream::Header,
    error::Error,
    guest::{
        BASE_COMMAND_LINE, READY_MARKER,
        kernel::{KernelImage, Width},
    },
};

/// In check mode the guest prints all the time: a minute of silence is a dead guest, also on a loaded emulator.
const SILENCE: Duration = Duration::from_secs(60);

/// What the hypervisor itself needs beside the guest's memory, in bytes: its image, heap, stacks, and page tables for
/// huge-page-less guests (1/512 of the guest's memory, which [`GuestPlan::machine_memory_bytes`] adds).
const HYPERVISOR_BYTES: u64 = 160 << 20;
/// A shadow page: its table and its books, in bytes.
const SHADOW_PAGE_BYTES: u64 = 7 << 10;

/// Who sits at the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// A person at a terminal of this size (rows, columns).
    Terminal(u16, u16),
    /// A pipe or a test.
    Pipe,
}

/// How long a guest that checks itself may be silent: with the ghost everything takes its time, and in a storm it faults its
/// memory in again and again between two lines.
fn silence_ms(args: &GuestArgs) -> u64 {
    let times = if args.ghost {
        10
    } else if args.storm.is_empty() {
        1
    } else {
        5
    };
    SILENCE.as_millis() as u64 * times
}

/// A guest that may be put together.
#[derive(Clone, Debug)]
pub struct GuestPlan {
    /// For the hypervisor.
    pub config: RunConfig,
    /// What the guest is to do.
    pub mode: Mode,
    /// What the kernel and the initrd are that were not given.
    pub system: System,
    /// The kernel or Multiboot image that was given.
    pub kernel: Option<GivenFile>,
    /// The initrd that was given.
    pub initrd: Option<Vec<u8>>,
    /// The hypervisor that was given.
    pub hypervisor: Option<PathBuf>,
    /// One that is built here has the ghost in it.
    pub ghost: bool,
}

/// A file that was named and read.
#[derive(Clone, Debug)]
pub struct GivenFile {
    /// Its name.
    pub path: PathBuf,
    /// What it holds.
    pub content: Vec<u8>,
}

impl GuestPlan {
    /// Checks what was asked for.
    ///
    /// # Errors
    /// The first thing that cannot be done, by the option that asked for it.
    pub fn new(args: &GuestArgs, seat: Seat) -> Result<Self, Error> {
        let kind = if args.multiboot.is_some() { GuestKind::Multiboot } else { GuestKind::Linux };
        let mode = args.mode.unwrap_or(match (seat, &args.initrd) {
            (Seat::Pipe, None) if kind == GuestKind::Linux => Mode::Check,
            _ => Mode::Shell,
        });
        let config = RunConfig {
            kind,
            vcpus: args.vcpus,
            memory_bytes: args.memory,
            huge_pages: args.huge_pages.into(),
            mmu: args.mmu.into(),
            silence_timeout_ms: (mode == Mode::Check).then_some(silence_ms(args)),
            command_line: match &args.multiboot {
                Some(path) => multiboot_command_line(path, &args.append),
                None => command_line(args, mode, seat),
            },
            ready_marker: if kind == GuestKind::Linux { READY_MARKER.into() } else { String::new() },
            origin: Origin::Boot,
            storm: storm(args),
            series: None,
            meter_pages: 0,
        };
        config.validate()?;

        let given =
            |option, path: &PathBuf| read(option, path).map(|content| GivenFile { path: path.clone(), content });
        let image = args.multiboot.as_ref().map(|path| given("--multiboot", path)).transpose()?;
        if let Some(image) = &image
            && !has_multiboot_header(&image.content)
        {
            return Err(Error::Multiboot { path: image.path.clone() });
        }
        let kernel = args.kernel.as_ref().map(|path| given("--kernel", path)).transpose()?;
        if let Some(GivenFile { path, content }) = &kernel {
            let image = KernelImage::parse(content).map_err(|cause| Error::Kernel { path: path.clone(), cause })?;
            // The other way round it may do: many 64-bit kernels run 32-bit programs.
            if image.width == Width::Bits32 && args.guest == System::Amd64 && args.initrd.is_none() {
                return Err(Error::InitrdForKernel { path: path.clone() });
            }
        }
        let initrd = args.initrd.as_deref().map(|path| read("--initrd", path)).transpose()?;
        let hypervisor = args.hypervisor.as_deref().map(checked_hypervisor).transpose()?;
        let kernel = image.or(kernel);
        Ok(Self { config, mode, system: args.guest, kernel, initrd, hypervisor, ghost: args.ghost })
    }

    /// The guest of a copy, which goes on. What was fired at it and what it measured is not passed on.
    ///
    /// # Errors
    /// As [`GuestPlan::new`].
    pub fn resumed(args: &GuestArgs, header: &Header) -> Result<Self, Error> {
        let mode = args.mode.unwrap_or(if header.check { Mode::Check } else { Mode::Shell });
        let config = RunConfig {
            huge_pages: args.huge_pages.into(),
            mmu: args.mmu.into(),
            silence_timeout_ms: (mode == Mode::Check).then_some(silence_ms(args)),
            origin: Origin::Window,
            storm: storm(args),
            series: None,
            meter_pages: 0,
            ..header.config.clone()
        };
        config.validate()?;
        let hypervisor = args.hypervisor.as_deref().map(checked_hypervisor).transpose()?;
        Ok(Self { config, mode, system: args.guest, kernel: None, initrd: None, hypervisor, ghost: args.ghost })
    }

    /// The least memory of a machine for this guest, in bytes: the guest's, what maps it, the hypervisor's own, and the
    /// bundle.
    ///
    /// A 1 GiB mapping needs a host gibibyte that is whole and aligned; one more is added, as the hypervisor's own use
    /// breaks the first.
    #[must_use]
    pub fn machine_memory_bytes(&self, bundle_bytes: u64) -> u64 {
        let guest = self.config.memory_bytes;
        let guest = match self.config.huge_pages {
            HugePages::G1 => guest.next_multiple_of(1 << 30) + (1 << 30),
            HugePages::None | HugePages::M2 => guest,
        };
        let tables = match self.config.mmu {
            MmuKind::Nested => self.config.memory_bytes / 256,
            MmuKind::Shadow => u64::from(self.config.shadow_pages()) * SHADOW_PAGE_BYTES,
        };
        guest + tables + HYPERVISOR_BYTES + bundle_bytes.next_multiple_of(1 << 20)
    }
}

/// A file given as hypervisor.
///
/// # Errors
/// If it cannot be one.
pub fn checked_hypervisor(path: &Path) -> Result<PathBuf, Error> {
    // Class 2 is 64-bit, data 1 is little-endian, machine 0x3e is x86-64.
    let file = read("--hypervisor", path)?;
    if !file.starts_with(b"\x7fELF\x02\x01") || file.get(18..20) != Some(&[0x3e, 0]) {
        return Err(Error::Hypervisor { path: path.to_owned() });
    }
    Ok(path.to_owned())
}

/// The storm that was asked for; where a kind is named twice, the later rate counts.
fn storm(args: &GuestArgs) -> Option<Storm> {
    let mut rates = [0; STORM_KINDS];
    for &(kind, rate) in &args.storm {
        rates[kind as usize] = rate;
    }
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    (!args.storm.is_empty()).then(|| Storm { rates, seed: args.storm_seed.unwrap_or_else(now) })
}

fn command_line(args: &GuestArgs, mode: Mode, seat: Seat) -> String {
    let mut words = vec![BASE_COMMAND_LINE.to_owned(), "quiet".to_owned()];
    if args.initrd.is_none() {
        words.push(match mode {
            Mode::Check => "nestling.mode=check".into(),
            Mode::Shell => "nestling.mode=shell".into(),
        });
        if let Seat::Terminal(rows, columns) = seat {
            words.push(format!("nestling.tty={rows}x{columns}"));
        }
    }
    if !args.append.is_empty() {
        words.push(args.append.clone());
    }
    words.join(" ")
}

/// The image's name, which test kernels take for their own, and the words for it.
fn multiboot_command_line(image: &Path, words: &str) -> String {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    [&name, words].join(" ").trim_end().to_owned()
}

/// Whether the header is where it must be (Multiboot 0.6.96, 3.1); what it says, the hypervisor judges.
fn has_multiboot_header(file: &[u8]) -> bool {
    let header = &file[..file.len().min(8192)];
    header.chunks_exact(4).any(|word| word == 0x1bad_b002_u32.to_le_bytes())
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    let refused = |cause| Error::File { option, path: path.to_owned(), cause };
    // A directory, a device or a pipe may be endless.
    let metadata = fs::metadata(path).map_err(refused)?;
    if !metadata.is_file() {
        return Err(refused(io::Error::other("not a regular file")));
    }
    let file = fs::read(path).map_err(refused)?;
    if file.is_empty() { Err(Error::EmptyFile { option, path: path.to_owned() }) } else { Ok(file) }
}
