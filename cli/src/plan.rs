//! A run, checked: everything that can be refused is refused here, before anything is installed, built or started.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nestling_control::config::{GuestKind, RunConfig, STORM_KINDS, Storm};

use crate::{
    accel::{self, Acceleration},
    args::{Accel, Mode, RunArgs},
    error::Error,
    guest::{BASE_COMMAND_LINE, READY_MARKER, kernel::KernelImage},
    setup,
};

/// In check mode the guest prints all the time: a minute of silence is a dead guest, also on a loaded emulator.
const SILENCE: Duration = Duration::from_secs(60);
/// The default of `--timeout` in check mode and for Multiboot images.
const CHECK_TIMEOUT: Duration = Duration::from_secs(300);

/// What the hypervisor itself needs beside the guest's memory, in bytes: its image, heap, stacks, and page tables for
/// huge-page-less guests (1/512 of the guest's memory, which [`Plan::host_memory_bytes`] adds).
const HYPERVISOR_BYTES: u64 = 160 << 20;

/// Who sits at the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// A person at a terminal of this size (rows, columns).
    Terminal(u16, u16),
    /// A pipe or a test.
    Pipe,
}

/// A run that may be prepared.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For the hypervisor.
    pub config: RunConfig,
    /// What the guest is to do.
    pub mode: Mode,
    /// How QEMU runs.
    pub acceleration: Acceleration,
    /// When to give up.
    pub timeout: Option<Duration>,
    /// The kernel or Multiboot image that was given.
    pub kernel: Option<Vec<u8>>,
    /// The initrd that was given.
    pub initrd: Option<Vec<u8>>,
    /// The hypervisor that was given.
    pub hypervisor: Option<PathBuf>,
    /// Show all that the hypervisor says.
    pub verbose: bool,
}

impl Plan {
    /// Checks what was asked for.
    ///
    /// # Errors
    /// The first thing that cannot be done, by the option that asked for it.
    pub fn new(args: &RunArgs, seat: Seat) -> Result<Self, Error> {
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
            silence_timeout_ms: (mode == Mode::Check).then_some(SILENCE.as_millis() as u64),
            command_line: match &args.multiboot {
                Some(path) => multiboot_command_line(path, &args.append),
                None => command_line(args, mode, seat),
            },
            ready_marker: if kind == GuestKind::Linux { READY_MARKER.into() } else { String::new() },
            storm: storm(args),
        };
        config.validate()?;

        let image = args.multiboot.as_deref().map(|path| read("--multiboot", path)).transpose()?;
        if let (Some(file), Some(path)) = (&image, &args.multiboot)
            && !has_multiboot_header(file)
        {
            return Err(Error::Multiboot { path: path.clone() });
        }
        let kernel = args.kernel.as_deref().map(|path| read("--kernel", path)).transpose()?;
        if let (Some(file), Some(path)) = (&kernel, &args.kernel) {
            KernelImage::parse(file).map_err(|cause| Error::Kernel { path: path.clone(), cause })?;
        }
        let initrd = args.initrd.as_deref().map(|path| read("--initrd", path)).transpose()?;
        if let Some(path) = &args.hypervisor {
            // Class 2 is 64-bit, data 1 is little-endian, machine 0x3e is x86-64.
            let file = read("--hypervisor", path)?;
            if !file.starts_with(b"\x7fELF\x02\x01") || file.get(18..20) != Some(&[0x3e, 0]) {
                return Err(Error::Hypervisor { path: path.clone() });
            }
        }
        let acceleration = match (args.accel, accel::nested_svm()) {
            (Accel::Tcg, _) | (Accel::Auto, Err(_)) => Acceleration::Tcg,
            (Accel::Counted, _) => Acceleration::Counted,
            (Accel::Kvm, Err(reason)) => return Err(Error::NoKvm(reason)),
            (Accel::Kvm | Accel::Auto, Ok(())) => Acceleration::Kvm,
        };
        let plan = Self {
            config,
            mode,
            acceleration,
            timeout: args.timeout.or((mode == Mode::Check || kind == GuestKind::Multiboot).then_some(CHECK_TIMEOUT)),
            kernel: image.or(kernel),
            initrd,
            hypervisor: args.hypervisor.clone(),
            verbose: args.verbose,
        };
        let needed = plan.host_memory_bytes(0);
        match setup::available_memory_bytes() {
            Some(available) if available < needed => Err(Error::HostMemory { needed, available }),
            _ => Ok(plan),
        }
    }

    /// Memory of QEMU's machine, in bytes: the guest's, what maps it, the hypervisor's own, and the bundle.
    ///
    /// A 1 GiB mapping needs a host gibibyte that is whole and aligned; one more is added, as the hypervisor's own use
    /// breaks the first.
    #[must_use]
    pub fn host_memory_bytes(&self, bundle_bytes: u64) -> u64 {
        use nestling_control::config::HugePages;
        let guest = self.config.memory_bytes;
        let guest = match self.config.huge_pages {
            HugePages::G1 => guest.next_multiple_of(1 << 30) + (1 << 30),
            HugePages::None | HugePages::M2 => guest,
        };
        guest + guest / 256 + HYPERVISOR_BYTES + bundle_bytes.next_multiple_of(1 << 20)
    }
}

/// The storm that was asked for; where a kind is named twice, the later rate counts.
fn storm(args: &RunArgs) -> Option<Storm> {
    let mut rates = [0; STORM_KINDS];
    for &(kind, rate) in &args.storm {
        rates[kind as usize] = rate;
    }
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    (!args.storm.is_empty()).then(|| Storm { rates, seed: args.storm_seed.unwrap_or_else(now) })
}

fn command_line(args: &RunArgs, mode: Mode, seat: Seat) -> String {
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
