//! Loading a Linux kernel by the 64-bit boot protocol, or by the 32-bit one if it has no entry point in long mode.

use core::fmt;

use super::boot_params::{self, BootInfo};
use super::bzimage::{BzImage, Entry, ImageError};
use super::entry::{self, VcpuInit};
use super::layout::{
    ACPI, BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_ROOM, HOLE_START, MemorySizeError, PAGE_BYTES, RamLayout, RamRange,
};
use super::{GuestMemory, GuestMemoryError, acpi};

/// The machine that the kernel is to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinuxConfig {
    /// RAM in bytes; the memory given must be laid out as [`RamLayout`] says.
    pub memory_bytes: u64,
    /// How many vCPUs there are. Their APIC IDs are 0, 1, 2, …
    pub vcpus: u32,
}

/// Why a guest can't be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The kernel image is not usable.
    Image(ImageError),
    /// The size of the memory is not possible.
    MemorySize(MemorySizeError),
    /// The number of vCPUs is 0 or more than the tables can describe.
    Vcpus {
        /// The number asked for.
        asked: u32,
    },
    /// The memory is too small for what is to be loaded.
    NotEnoughMemory {
        /// Its size in bytes.
        bytes: u64,
        /// The least size that would do for loading, in bytes.
        needed: u64,
    },
    /// The initrd doesn't fit between the kernel and the highest address that the kernel accepts for it, however much
    /// memory there is.
    InitrdTooLarge {
        /// Its length in bytes.
        bytes: u64,
        /// The longest that would fit, in bytes.
        room: u64,
    },
    /// The command line is longer than the kernel takes.
    CommandLineTooLong {
        /// Its length in bytes.
        bytes: u64,
        /// The most that the kernel takes, in bytes.
        max: u64,
    },
    /// The command line has a zero byte in it, where the kernel would stop to read.
    CommandLineHasNul,
    /// Guest memory could not be written.
    Memory(GuestMemoryError),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| bytes.div_ceil(1 << 20);
        match self {
            Self::Image(error) => error.fmt(f),
            Self::MemorySize(error) => error.fmt(f),
            Self::Vcpus { asked } => write!(f, "{asked} vCPUs asked for; 1 to {} are possible", acpi::MAX_PROCESSORS),
            Self::NotEnoughMemory { bytes, needed } => write!(
                f,
                "guest memory of {} MiB is too small: loading this kernel and initrd needs {} MiB",
                bytes >> 20,
                mib(needed)
            ),
            Self::InitrdTooLarge { bytes, room } => {
                write!(f, "initrd of {} MiB is too large: this kernel has room for {} MiB", mib(bytes), room >> 20)
            }
            Self::CommandLineTooLong { bytes, max } => {
                write!(f, "kernel command line of {bytes} bytes is too long: this kernel takes {max}")
            }
            Self::CommandLineHasNul => write!(f, "kernel command line has a zero byte in it"),
            Self::Memory(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for LoadError {}

impl From<ImageError> for LoadError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<MemorySizeError> for LoadError {
    fn from(error: MemorySizeError) -> Self {
        Self::MemorySize(error)
    }
}

impl From<GuestMemoryError> for LoadError {
    fn from(error: GuestMemoryError) -> Self {
        Self::Memory(error)
    }
}

/// Puts a kernel, its initrd (empty: none), command line, tables and boot parameters into guest memory; returns the state
/// in which the first vCPU starts. Memory that is not written is expected to be 0.
pub fn load_linux(
    memory: &impl GuestMemory,
    kernel: &[u8],
    initrd: &[u8],
    command_line: &str,
    config: &LinuxConfig,
) -> Result<VcpuInit, LoadError> {
    let ram = RamLayout::new(config.memory_bytes)?;
    if config.vcpus == 0 || config.vcpus > acpi::MAX_PROCESSORS {
        return Err(LoadError::Vcpus { asked: config.vcpus });
    }
    let kernel = BzImage::parse(kernel)?;
    check_command_line(&kernel, command_line)?;
    let initrd_at = place_initrd(&kernel, initrd.len() as u64, &ram)?;

    memory.write(kernel.load_address(), kernel.payload())?;
    if let Some(at) = initrd_at {
        memory.write(at.gpa, initrd)?;
    }
    memory.write(COMMAND_LINE, command_line.as_bytes())?;
    memory.write(COMMAND_LINE + command_line.len() as u64, &[0])?;
    memory.write(ACPI, &acpi::build(ACPI, config.vcpus, acpi::Controllers::Pic))?;
    let info = BootInfo { ram: &ram, initrd: initrd_at, command_line: COMMAND_LINE, rsdp: ACPI };
    memory.write(BOOT_PARAMS, &boot_params::build(&kernel, &info))?;
    match kernel.entry() {
        Entry::Long(at) => {
            entry::write_tables(memory)?;
            Ok(VcpuInit::linux_64(at, BOOT_PARAMS))
        }
        Entry::Protected(at) => {
            entry::write_descriptors_32(memory)?;
            // An image is loaded below 4 GiB, or it was refused.
            Ok(VcpuInit::linux_32(at as u32, BOOT_PARAMS as u32))
        }
    }
}

fn check_command_line(kernel: &BzImage<'_>, command_line: &str) -> Result<(), LoadError> {
    let bytes = command_line.len() as u64;
    let max = kernel.command_line_max().min(COMMAND_LINE_ROOM - 1);
    if bytes > max {
        return Err(LoadError::CommandLineTooLong { bytes, max });
    }
    if command_line.bytes().any(|byte| byte == 0) { Err(LoadError::CommandLineHasNul) } else { Ok(()) }
}

/// Finds room for the kernel and, as high as it may be, for the initrd.
fn place_initrd(kernel: &BzImage<'_>, bytes: u64, ram: &RamLayout) -> Result<Option<RamRange>, LoadError> {
    let floor = kernel.end().next_multiple_of(PAGE_BYTES);
    let room =
        |ceiling: u64| ceiling.min(kernel.initrd_max().saturating_add(1)).saturating_sub(floor) & !(PAGE_BYTES - 1);
    // The end of the last page may lie beyond the highest address; its bytes do not.
    let pages = bytes.next_multiple_of(PAGE_BYTES);
    if pages > room(HOLE_START) {
        return Err(match room(HOLE_START) {
            0 if bytes == 0 => LoadError::NotEnoughMemory { bytes: ram.low_end(), needed: floor },
            room => LoadError::InitrdTooLarge { bytes, room },
        });
    }
    if floor + pages > ram.low_end() {
        return Err(LoadError::NotEnoughMemory { bytes: ram.low_end(), needed: floor + pages });
    }
    if bytes == 0 {
        return Ok(None);
    }
    let ceiling = ram.low_end().min(kernel.initrd_max().saturating_add(1)) & !(PAGE_BYTES - 1);
    Ok(Some(RamRange { gpa: ceiling - pages, bytes }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::bzimage::Lookalike;
    use crate::guest::testing::{TestMemory, kernel};
    use alloc::string::{String, ToString};
    use alloc::vec;

    const MIB: u64 = 1 << 20;

    fn config(memory_bytes: u64) -> LinuxConfig {
        LinuxConfig { memory_bytes, vcpus: 2 }
    }

    #[test]
    fn everything_is_where_the_boot_parameters_say() {
        let memory = TestMemory::new(128 * MIB);
        let initrd: vec::Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        let init = load_linux(&memory, &kernel(9000), &initrd, "console=ttyS0", &config(128 * MIB)).expect("loads");
        assert_eq!((init.rip, init.rsi), (0x100_0200, BOOT_PARAMS));
        assert_eq!(memory.bytes(0x100_0000, 9000), vec![0xcc; 9000]);
        let at = u64::from(memory.u32(BOOT_PARAMS + 0x218));
        assert_eq!((at, memory.u32(BOOT_PARAMS + 0x21c)), (128 * MIB - 8192, 5000));
        assert_eq!(memory.bytes(at, 5000), initrd);
        assert_eq!(memory.bytes(u64::from(memory.u32(BOOT_PARAMS + 0x228)), 14), b"console=ttyS0\0");
        assert_eq!(memory.bytes(memory.u64(BOOT_PARAMS + 0x70), 8), b"RSD PTR ");
    }

    #[test]
    fn a_32_bit_kernel_starts_in_protected_mode_and_has_no_page_tables() {
        let memory = TestMemory::new(128 * MIB);
        let mut image = kernel(9000);
        image[0x236] &= !1;
        let init = load_linux(&memory, &image, &[], "", &config(128 * MIB)).expect("loads");
        assert_eq!(init, VcpuInit::linux_32(0x100_0000, BOOT_PARAMS as u32));
        assert_eq!(memory.u32(BOOT_PARAMS + 0x214), 0x100_0000, "code32_start is where it was loaded");
        assert_eq!(memory.bytes(super::super::layout::PAGE_TABLES, 4096), vec![0; 4096]);
    }

    #[test]
    fn no_initrd_is_said_as_none() {
        let memory = TestMemory::new(128 * MIB);
        load_linux(&memory, &kernel(9000), &[], "", &config(128 * MIB)).expect("loads");
        assert_eq!((memory.u32(BOOT_PARAMS + 0x218), memory.u32(BOOT_PARAMS + 0x21c)), (0, 0));
    }

    #[test]
    fn initrd_stays_below_the_kernels_limit_and_the_hole() {
        let memory = TestMemory::new(8 << 30);
        load_linux(&memory, &kernel(9000), &[1; 100], "", &config(8 << 30)).expect("loads");
        assert_eq!(memory.u32(BOOT_PARAMS + 0x218), 0x8000_0000 - 4096);
    }

    #[test]
    fn too_little_memory_names_the_least_that_would_do() {
        let initrd = vec![0; 3 * MIB as usize + 1];
        let load = |bytes: u64| load_linux(&TestMemory::new(bytes), &kernel(9000), &initrd, "", &config(bytes));
        let needed = 48 * MIB + 3 * MIB + 4096;
        assert_eq!(load(16 * MIB), Err(LoadError::NotEnoughMemory { bytes: 16 * MIB, needed }));
        assert_eq!(load(needed - 4096), Err(LoadError::NotEnoughMemory { bytes: needed - 4096, needed }));
        assert!(load(needed).is_ok(), "the number given is enough");
    }

    #[test]
    fn an_initrd_that_can_never_fit_says_so() {
        let mut image = kernel(9000);
        image[0x22c..0x230].copy_from_slice(&0x03ff_ffffu32.to_le_bytes());
        let initrd = vec![0; 17 * MIB as usize];
        let error = load_linux(&TestMemory::new(1 << 30), &image, &initrd, "", &config(1 << 30));
        assert_eq!(error, Err(LoadError::InitrdTooLarge { bytes: 17 * MIB, room: 16 * MIB }));
    }

    #[test]
    fn command_line_limits() {
        let memory = TestMemory::new(128 * MIB);
        let load = |line: &str| load_linux(&memory, &kernel(9000), &[], line, &config(128 * MIB));
        assert!(load(&"x".repeat(2047)).is_ok());
        assert_eq!(load(&"x".repeat(2048)), Err(LoadError::CommandLineTooLong { bytes: 2048, max: 2047 }));
        assert_eq!(load("a\0b"), Err(LoadError::CommandLineHasNul));
    }

    #[test]
    fn bad_machines_and_images_are_refused_before_anything_is_written() {
        let memory = TestMemory::new(128 * MIB);
        let load = |image: &[u8], bytes, vcpus| {
            load_linux(&memory, image, &[], "", &LinuxConfig { memory_bytes: bytes, vcpus }).expect_err("refused")
        };
        assert_eq!(load(&kernel(9000), 128 * MIB, 0), LoadError::Vcpus { asked: 0 });
        assert_eq!(load(&kernel(9000), 128 * MIB, 256), LoadError::Vcpus { asked: 256 });
        assert!(matches!(load(&kernel(9000), MIB, 1), LoadError::MemorySize(_)));
        assert_eq!(load(b"\x7fELF", 128 * MIB, 1), LoadError::Image(ImageError::NotBzImage(Lookalike::Elf)));
        assert_eq!(memory.bytes(BOOT_PARAMS, 4096), vec![0; 4096]);
    }

    #[test]
    fn memory_that_is_missing_is_an_error() {
        let memory = TestMemory::new(32 * MIB);
        let error = load_linux(&memory, &kernel(9000), &[0; 100], "", &config(128 * MIB)).expect_err("no such RAM");
        assert_eq!(error, LoadError::Memory(GuestMemoryError::NotRam { gpa: 128 * MIB - 4096, bytes: 100 }));
        let text: String = error.to_string();
        assert!(text.contains("0x7fff000"), "{text}");
    }
}
