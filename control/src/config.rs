//! What the operator asked for: the configuration of one run of one guest.
//!
//! The command checks a [`RunConfig`] with [`RunConfig::validate`] before it starts anything, so that the operator reads
//! the reason at once; the hypervisor checks it again, because a bundle can come from anywhere.

use alloc::string::String;
use core::fmt;

use serde::{Deserialize, Serialize};

/// The most vCPUs a guest may have. The hypervisor runs each on a CPU of its own, and one CPU more does the housekeeping.
pub const MAX_VCPUS: u32 = 32;
/// The least guest memory, in bytes. Below this a Linux kernel cannot even unpack itself.
pub const MIN_MEMORY_BYTES: u64 = 64 << 20;
/// The most guest memory, in bytes: what 40 bits of guest physical address leave beside the hole below 4 GiB.
pub const MAX_MEMORY_BYTES: u64 = 512 << 30;
/// Guest memory is given in whole units of this many bytes.
pub const MEMORY_GRANULE_BYTES: u64 = 2 << 20;
/// The longest guest command line, in bytes, without the terminating zero. Linux on x86 cuts at 2048 with the zero.
pub const MAX_COMMAND_LINE_BYTES: usize = 2047;

/// Bounds of [`RunConfig::shadow_pages`].
const LEAST_SHADOW_PAGES: u32 = 2048;
const MOST_SHADOW_PAGES: u32 = 1 << 22;

/// The largest page with which the hypervisor may map guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB pages only.
    None,
    /// Up to 2 MiB.
    #[default]
    M2,
    /// Up to 1 GiB.
    G1,
}

/// How a guest's addresses reach memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MmuKind {
    /// The CPU walks the guest's own tables and, for each address that they lead to, tables of the hypervisor's.
    #[default]
    Nested,
    /// The CPU walks one kind of tables, which the hypervisor makes of the guest's.
    Shadow,
}

impl MmuKind {
    /// Its name, for operators and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nested => "npt",
            Self::Shadow => "shadow",
        }
    }
}

/// How a guest is loaded, and on which machine it finds itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GuestKind {
    /// A Linux kernel, by the 64-bit boot protocol, or by the 32-bit one if that is all that it has.
    #[default]
    Linux,
    /// A Multiboot version 1 image, on a machine as test kernels expect it: with an I/O APIC, fw_cfg and a test device.
    Multiboot,
}

/// What a storm fires at the MMU while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum StormKind {
    /// Everything is zapped at once: all roots become obsolete.
    ZapAll,
    /// A memslot with a part of the guest's RAM is deleted and added again.
    SlotDelete,
    /// Such a slot moves to another place in the guest's address space, and back.
    SlotMove,
    /// A page of the guest, or the 2 MiB around it, moves to another host frame.
    MovePage,
    /// A page is taken away, its content kept compressed, until the guest uses it again.
    TakePage,
    /// The dirty log of such a slot is started, taken and held against the guest's memory, or stopped; or its pages age.
    DirtyLog,
    /// The slot's huge pages are split, and made whole again.
    Split,
}

/// How many kinds there are.
pub const STORM_KINDS: usize = 7;

impl StormKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; STORM_KINDS] =
        [Self::ZapAll, Self::SlotDelete, Self::SlotMove, Self::MovePage, Self::TakePage, Self::DirtyLog, Self::Split];

    /// Its name, for operators and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ZapAll => "zap-all",
            Self::SlotDelete => "slot-delete",
            Self::SlotMove => "slot-move",
            Self::MovePage => "move-page",
            Self::TakePage => "take-page",
            Self::DirtyLog => "dirty-log",
            Self::Split => "split",
        }
    }

    /// Operations a second, when nothing is said of it: often enough to meet everything that a guest does, seldom enough
    /// to let it go on, also under emulation.
    #[must_use]
    pub const fn default_rate(self) -> u32 {
        match self {
            Self::ZapAll | Self::SlotDelete | Self::SlotMove | Self::DirtyLog | Self::Split => 20,
            Self::MovePage | Self::TakePage => 50,
        }
    }
}

/// The most operations of one kind a second.
pub const MAX_STORM_RATE: u32 = 10_000;

/// Operations on the MMU that are fired at a running guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storm {
    /// Operations a second by [`StormKind`]; 0: none.
    pub rates: [u32; STORM_KINDS],
    /// Where the random choice of places begins.
    pub seed: u64,
}

/// Guest after guest from the same image, each with a seed of its own.
///
/// A guest's command line gets the word `seed=N`. Seeds count upwards; every fourth guest's memory is mapped by 4 KiB pages
/// only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// The first guest's seed.
    pub seed: u64,
    /// No guest is begun after this long, in milliseconds.
    pub duration_ms: u64,
    /// No more guests than this.
    pub guests: u64,
    /// A guest is ended from outside after this long, in milliseconds.
    pub slice_ms: u64,
}

/// Where a guest's memory and state come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Origin {
    /// A kernel is loaded and started.
    #[default]
    Boot,
    /// A guest that ran before comes in through the [`window`](crate::window).
    Window,
}

/// One run of one guest, or of a series of guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// What the guest is.
    pub kind: GuestKind,
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest RAM in bytes: [`MIN_MEMORY_BYTES`] to [`MAX_MEMORY_BYTES`], a multiple of [`MEMORY_GRANULE_BYTES`].
    pub memory_bytes: u64,
    /// The largest mapping.
    pub huge_pages: HugePages,
    /// What translates.
    pub mmu: MmuKind,
    /// A guest whose console prints nothing for this long, in milliseconds of host time, counts as dead. `None`: never,
    /// as for a shell that waits for its user.
    pub silence_timeout_ms: Option<u64>,
    /// The guest kernel's command line.
    pub command_line: String,
    /// The first time the guest's console prints this text, the guest counts as booted (see
    /// [`Report::boot_guest_ns`](crate::message::Report::boot_guest_ns)). Empty: nothing is looked for.
    pub ready_marker: String,
    /// Where it comes from. A guest that comes in has no kernel and initrd in its bundle.
    pub origin: Origin,
    /// What the guest has to survive.
    pub storm: Option<Storm>,
    /// Run many guests, not one.
    pub series: Option<Series>,
    /// Pages of the slot that a measuring guest gets beside its RAM, with a meter (`nestling-meter`); 0: neither.
    pub meter_pages: u32,
}

/// Why a [`RunConfig`] cannot be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// The number of vCPUs is 0 or above [`MAX_VCPUS`].
    Vcpus {
        /// The number asked for.
        asked: u32,
    },
    /// Less than [`MIN_MEMORY_BYTES`].
    MemoryTooSmall {
        /// Bytes asked for.
        asked: u64,
    },
    /// More than [`MAX_MEMORY_BYTES`].
    MemoryTooLarge {
        /// Bytes asked for.
        asked: u64,
    },
    /// Not a multiple of [`MEMORY_GRANULE_BYTES`].
    MemoryUneven {
        /// Bytes asked for.
        asked: u64,
    },
    /// A storm of more than [`MAX_STORM_RATE`] operations of one kind a second.
    StormRate {
        /// The rate asked for.
        asked: u32,
    },
    /// The meter's slot has more than [`nestling_meter::MAX_PAGES`] pages, or the guest's RAM reaches into it.
    Meter {
        /// Pages asked for.
        pages: u32,
    },
    /// The command line is longer than [`MAX_COMMAND_LINE_BYTES`].
    CommandLineTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// The command line holds a byte that ends it early or that no kernel expects (a control character).
    CommandLineControl {
        /// Where, in bytes.
        at: usize,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus { asked } => write!(f, "{asked} vCPUs: a guest has 1 to {MAX_VCPUS}"),
            Self::MemoryTooSmall { asked } => {
                write!(f, "{asked} bytes of memory: a guest needs at least {} MiB", MIN_MEMORY_BYTES >> 20)
            }
            Self::MemoryTooLarge { asked } => {
                write!(f, "{asked} bytes of memory: a guest has at most {} GiB", MAX_MEMORY_BYTES >> 30)
            }
            Self::MemoryUneven { asked } => {
                write!(f, "{asked} bytes of memory: not a multiple of {} MiB", MEMORY_GRANULE_BYTES >> 20)
            }
            Self::StormRate { asked } => {
                write!(f, "a storm of {asked} operations a second: the most is {MAX_STORM_RATE} of a kind")
            }
            Self::Meter { pages } => write!(
                f,
                "a meter's slot of {pages} pages: the most is {}, and the guest has at most {} MiB of RAM below it",
                nestling_meter::MAX_PAGES,
                nestling_meter::BASE >> 20
            ),
            Self::CommandLineTooLong { length } => {
                write!(f, "the guest's command line has {length} bytes: the most is {MAX_COMMAND_LINE_BYTES}")
            }
            Self::CommandLineControl { at } => {
                write!(f, "the guest's command line has a control character at byte {at}")
            }
        }
    }
}

impl core::error::Error for ConfigError {}

impl RunConfig {
    /// The CPUs that a machine needs: one for each vCPU, the first, which keeps house and never runs a guest, and one for a
    /// storm, whose operations wait for vCPUs, which the housekeeper must not.
    #[must_use]
    pub const fn cpus(&self) -> u32 {
        self.vcpus + 1 + self.storm.is_some() as u32
    }

    /// Shadow pages that the guest may have, with [`MmuKind::Shadow`]: one for 50 pages of its memory (KVM's share), and
    /// enough for a few processes in any case. Each is a table of 4 KiB, and 2 KiB of books.
    #[must_use]
    pub const fn shadow_pages(&self) -> u32 {
        let share = self.memory_bytes / 4096 / 50;
        if share < LEAST_SHADOW_PAGES as u64 {
            LEAST_SHADOW_PAGES
        } else if share > MOST_SHADOW_PAGES as u64 {
            MOST_SHADOW_PAGES
        } else {
            share as u32
        }
    }

    /// Checks every bound that this module states.
    ///
    /// # Errors
    /// The first bound that is not kept.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(ConfigError::Vcpus { asked: self.vcpus });
        }
        if self.memory_bytes < MIN_MEMORY_BYTES {
            return Err(ConfigError::MemoryTooSmall { asked: self.memory_bytes });
        }
        if self.memory_bytes > MAX_MEMORY_BYTES {
            return Err(ConfigError::MemoryTooLarge { asked: self.memory_bytes });
        }
        if !self.memory_bytes.is_multiple_of(MEMORY_GRANULE_BYTES) {
            return Err(ConfigError::MemoryUneven { asked: self.memory_bytes });
        }
        let rates = self.storm.map_or([0; STORM_KINDS], |storm| storm.rates);
        if let Some(asked) = rates.into_iter().find(|&rate| rate > MAX_STORM_RATE) {
            return Err(ConfigError::StormRate { asked });
        }
        let pages = self.meter_pages;
        if pages > nestling_meter::MAX_PAGES || pages > 0 && self.memory_bytes > nestling_meter::BASE {
            return Err(ConfigError::Meter { pages });
        }
        if self.command_line.len() > MAX_COMMAND_LINE_BYTES {
            return Err(ConfigError::CommandLineTooLong { length: self.command_line.len() });
        }
        if let Some(at) = self.command_line.bytes().position(|byte| byte.is_ascii_control()) {
            return Err(ConfigError::CommandLineControl { at });
        }
        Ok(())
    }
}
