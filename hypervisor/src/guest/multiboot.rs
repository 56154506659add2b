//! Loading a kernel by Multiboot, version 1 (specification 0.6.96).
//!
//! Two kinds of image: ELF of 32 or 64 bits, loaded by its segments' physical addresses, and anything with the addresses
//! in its Multiboot header (flag 16). Either starts in 32-bit protected mode. The information structure has what test
//! kernels read: memory sizes and map, command line, one module, the loader's name.
//!
//! In memory: the information structure and what it points to are below 640 KiB, where the image must not load;
//! the ACPI tables are where firmware has them, just below 1 MiB, and so are the handlers of its interrupts
//! ([`super::firmware`]); the module follows the image at the next page.

use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use elf::ElfBytes;
use elf::abi::{EM_386, EM_X86_64, ET_EXEC, PT_LOAD};
use elf::endian::LittleEndian;

use super::entry::VcpuInit;
use super::layout::{ACPI_ROOM, COMMAND_LINE_ROOM, HIGH_START, LOW_END, MemorySizeError, PAGE_BYTES, RamLayout};
use super::{GuestMemory, GuestMemoryError, acpi, firmware};
use crate::devices::ports::COM1;

/// What a kernel finds in EAX.
pub const BOOT_MAGIC: u32 = 0x2bad_b002;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header is in the first bytes of the image.
const HEADER_SEARCH: usize = 8192;
const HEADER_ALIGN: usize = 4;

/// Flags of the header that a loader may not ignore: 0 modules at pages, 1 memory information, 2 video mode, others new.
const MUST_UNDERSTAND: u32 = 0xffff;
const UNDERSTOOD: u32 = 1 << 0 | 1 << 1;
/// The header has addresses.
const HAS_ADDRESSES: u32 = 1 << 16;

/// High in conventional memory: images that run in real mode lie low in it.
const INFO: u64 = 0x6_0000;
const INFO_BYTES: usize = 120;
const MODULE_ENTRY: u64 = INFO + 0x100;
const MEMORY_MAP: u64 = INFO + 0x200;
const LOADER_NAME: u64 = INFO + 0x400;
const COMMAND_LINE: u64 = INFO + 0x1_0000;
/// What the loader keeps below 640 KiB for itself.
const OURS: Range<u64> = INFO..COMMAND_LINE + COMMAND_LINE_ROOM;
/// Two words of firmware's data area that kernels read to find their way below 1 MiB: the first serial port, and the end
/// of conventional memory in KiB. That there is no extended data area, zeros say.
const BIOS_COM1: u64 = 0x400;
const BIOS_BASE_MEMORY_KIB: u64 = 0x413;
/// Where software looks for the RSDP (ACPI 5.2.5.1).
const FIRMWARE: Range<u64> = 0xe_0000..HIGH_START;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// The machine that the kernel is to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultibootConfig {
    /// RAM in bytes; the memory given must be laid out as [`RamLayout`] says, and also be there between 640 KiB and 1 MiB.
    pub memory_bytes: u64,
    /// How many vCPUs there are. Their APIC IDs are 0, 1, 2, …
    pub vcpus: u32,
}

/// Why an image can't be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MultibootError {
    /// No header with the right magic number and checksum in the first 8192 bytes.
    NoHeader,
    /// The header demands something that this loader does not have.
    Demands {
        /// The flags that are not understood.
        flags: u32,
    },
    /// The header's addresses contradict each other or the image.
    HeaderAddresses,
    /// The image has no addresses in its header and is not an ELF file either, or a broken one.
    NotElf,
    /// The ELF file is not a little-endian executable for x86.
    WrongElf {
        /// Its type.
        kind: u16,
        /// Its machine.
        machine: u16,
    },
    /// A segment lies partly outside the file, or is smaller in memory than in the file.
    BrokenSegment {
        /// Its physical address.
        address: u64,
    },
    /// Two segments want the same memory. (Refused not for what would be there: a file of many segments that all mean the
    /// whole of it would be copied for hours.)
    Overlap {
        /// The first byte that both want.
        address: u64,
    },
    /// There is nothing to load.
    Empty,
    /// The image wants memory that belongs to the loader or to firmware.
    Reserved {
        /// Where, in guest-physical memory.
        address: u64,
    },
    /// The entry point is not below 4 GiB, or not in what is loaded.
    Entry {
        /// The entry point.
        address: u64,
    },
    /// The memory is too small for image and module.
    NotEnoughMemory {
        /// RAM below the hole in bytes.
        bytes: u64,
        /// What would do, in bytes.
        needed: u64,
    },
    /// The command line is too long.
    CommandLineTooLong {
        /// Its length in bytes.
        bytes: u64,
    },
    /// The command line has a zero byte in it.
    CommandLineHasNul,
    /// The number of vCPUs is 0 or more than the tables can describe.
    Vcpus {
        /// The number asked for.
        asked: u32,
    },
    /// The size of the memory is not possible.
    MemorySize(MemorySizeError),
    /// Guest memory could not be written.
    Memory(GuestMemoryError),
}

impl fmt::Display for MultibootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader => write!(f, "not a Multiboot image: no header in its first {HEADER_SEARCH} bytes"),
            Self::Demands { flags } => {
                write!(f, "the image's Multiboot header demands what is not there: flags {flags:#x}")
            }
            Self::HeaderAddresses => write!(f, "the addresses in the image's Multiboot header are not possible"),
            Self::NotElf => write!(f, "the image is neither ELF nor has load addresses in its Multiboot header"),
            Self::WrongElf { kind, machine } => {
                write!(f, "the image is ELF, but not an executable for x86 (type {kind}, machine {machine})")
            }
            Self::BrokenSegment { address } => write!(f, "the image's segment for {address:#x} is broken"),
            Self::Overlap { address } => write!(f, "two of the image's segments want {address:#x}"),
            Self::Empty => write!(f, "the image has nothing to load"),
            Self::Reserved { address } => write!(f, "the image wants {address:#x}, which the loader needs"),
            Self::Entry { address } => write!(f, "the image's entry point {address:#x} is not in it"),
            Self::NotEnoughMemory { bytes, needed } => write!(
                f,
                "guest memory of {} MiB is too small: loading this image needs {} MiB",
                bytes >> 20,
                needed.div_ceil(1 << 20)
            ),
            Self::CommandLineTooLong { bytes } => {
                write!(f, "command line of {bytes} bytes is too long: {} are possible", COMMAND_LINE_ROOM - 1)
            }
            Self::CommandLineHasNul => write!(f, "command line has a zero byte in it"),
            Self::Vcpus { asked } => write!(f, "{asked} vCPUs asked for; 1 to {} are possible", acpi::MAX_PROCESSORS),
            Self::MemorySize(error) => error.fmt(f),
            Self::Memory(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for MultibootError {}

impl From<MemorySizeError> for MultibootError {
    fn from(error: MemorySizeError) -> Self {
        Self::MemorySize(error)
    }
}

impl From<GuestMemoryError> for MultibootError {
    fn from(error: GuestMemoryError) -> Self {
        Self::Memory(error)
    }
}

/// A piece of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece<'image> {
    /// Guest-physical address.
    address: u64,
    bytes: &'image [u8],
    /// Its end in memory; above its bytes are zeros.
    end: u64,
}

/// What an image asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Image<'image> {
    pieces: Vec<Piece<'image>>,
    entry: u32,
}

/// Puts an image, its module (empty: none), command line and tables into guest memory; returns the state in which the
/// first vCPU starts. Memory that is not written is expected to be 0.
pub fn load_multiboot(
    memory: &impl GuestMemory,
    image: &[u8],
    module: &[u8],
    command_line: &str,
    config: &MultibootConfig,
) -> Result<VcpuInit, MultibootError> {
    let ram = RamLayout::new(config.memory_bytes)?;
    if config.vcpus == 0 || config.vcpus > acpi::MAX_PROCESSORS {
        return Err(MultibootError::Vcpus { asked: config.vcpus });
    }
    let bytes = command_line.len() as u64;
    if bytes >= COMMAND_LINE_ROOM {
        return Err(MultibootError::CommandLineTooLong { bytes });
    }
    if command_line.contains('\0') {
        return Err(MultibootError::CommandLineHasNul);
    }
    let image = Image::parse(image)?;
    let module_at = image.check(&ram, module.len() as u64)?;

    // Before the image: one for real mode may have vectors of its own where these are.
    firmware::write(memory)?;
    for piece in &image.pieces {
        memory.write(piece.address, piece.bytes)?;
    }
    memory.write(module_at, module)?;
    memory.write(COMMAND_LINE, command_line.as_bytes())?;
    memory.write(COMMAND_LINE + bytes, &[0])?;
    let tables = acpi::build(FIRMWARE.start, config.vcpus, acpi::Controllers::IoApic);
    memory.write(FIRMWARE.start, &tables)?;
    memory.write(BIOS_COM1, &COM1.to_le_bytes())?;
    memory.write(BIOS_BASE_MEMORY_KIB, &((LOW_END >> 10) as u16).to_le_bytes())?;
    write_information(memory, &ram, module_at..module_at + module.len() as u64)?;
    Ok(VcpuInit::multiboot(image.entry, BOOT_MAGIC, INFO as u32))
}

/// Where a guest that was loaded so wants to go on after a sleep ([`acpi::waking_vector`]).
pub fn waking_vector(memory: &impl GuestMemory) -> Option<u32> {
    acpi::waking_vector(memory, FIRMWARE.start)
}

const _: () = assert!(FIRMWARE.start + ACPI_ROOM <= firmware::HANDLERS.start);
const _: () = assert!(firmware::HANDLERS.end <= FIRMWARE.end && OURS.end <= LOW_END);

impl<'image> Image<'image> {
    fn parse(file: &'image [u8]) -> Result<Self, MultibootError> {
        let (at, flags) = find_header(file).ok_or(MultibootError::NoHeader)?;
        let unknown = flags & MUST_UNDERSTAND & !UNDERSTOOD;
        if unknown != 0 {
            return Err(MultibootError::Demands { flags: unknown });
        }
        if flags & HAS_ADDRESSES != 0 { Self::by_header(file, at) } else { Self::by_elf(file) }
    }

    /// By the addresses in the header (3.1.3).
    fn by_header(file: &'image [u8], at: usize) -> Result<Self, MultibootError> {
        let word = |index: usize| word_at(file, at + 12 + 4 * index).ok_or(MultibootError::HeaderAddresses);
        let (header, load, load_end, bss_end, entry) = (word(0)?, word(1)?, word(2)?, word(3)?, word(4)?);
        let wrong = MultibootError::HeaderAddresses;
        let before = header.checked_sub(load).ok_or(wrong)?;
        let start = at.checked_sub(before as usize).ok_or(wrong)?;
        // A load end of 0 means all of the file, and a BSS end of 0 that there is none.
        let bytes = match load_end {
            0 => file.get(start..),
            end => end.checked_sub(load).and_then(|length| file.get(start..start.checked_add(length as usize)?)),
        }
        .ok_or(wrong)?;
        let loaded = u64::from(load) + bytes.len() as u64;
        let end = if bss_end == 0 { loaded } else { u64::from(bss_end) };
        if end < loaded {
            return Err(wrong);
        }
        let pieces = [Piece { address: u64::from(load), bytes, end }].into();
        Ok(Self { pieces, entry })
    }

    fn by_elf(file: &'image [u8]) -> Result<Self, MultibootError> {
        let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|_| MultibootError::NotElf)?;
        let (kind, machine) = (elf.ehdr.e_type, elf.ehdr.e_machine);
        if kind != ET_EXEC || !matches!(machine, EM_386 | EM_X86_64) {
            return Err(MultibootError::WrongElf { kind, machine });
        }
        let mut pieces = Vec::new();
        let mut entry = None;
        let segments = elf.segments().ok_or(MultibootError::Empty)?;
        for segment in segments.iter().filter(|segment| segment.p_type == PT_LOAD && segment.p_memsz != 0) {
            let address = segment.p_paddr;
            let broken = MultibootError::BrokenSegment { address };
            let from = usize::try_from(segment.p_offset).map_err(|_| broken)?;
            let to = segment.p_offset.checked_add(segment.p_filesz).ok_or(broken)?;
            let bytes = usize::try_from(to).ok().and_then(|to| file.get(from..to)).ok_or(broken)?;
            let end = address.checked_add(segment.p_memsz).ok_or(broken)?;
            if segment.p_filesz > segment.p_memsz {
                return Err(broken);
            }
            // The entry point is a linear address; there is no paging yet, so it is where its segment is.
            let inside = elf.ehdr.e_entry.checked_sub(segment.p_vaddr).filter(|inside| *inside < segment.p_memsz);
            entry = entry.or(inside.map(|inside| address + inside));
            pieces.push(Piece { address, bytes, end });
        }
        if pieces.is_empty() {
            return Err(MultibootError::Empty);
        }
        let wrong = MultibootError::Entry { address: elf.ehdr.e_entry };
        let entry = entry.and_then(|entry| u32::try_from(entry).ok()).ok_or(wrong)?;
        Ok(Self { pieces, entry })
    }

    /// Checks where everything goes, and says where the module does.
    fn check(&self, ram: &RamLayout, module: u64) -> Result<u64, MultibootError> {
        let mut ranges: Vec<_> = self.pieces.iter().map(|piece| (piece.address, piece.end)).collect();
        ranges.sort_unstable();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            return Err(MultibootError::Overlap { address: pair[1].0 });
        }
        let mut top = HIGH_START;
        for piece in &self.pieces {
            for taken in [OURS, FIRMWARE] {
                if piece.address < taken.end && piece.end > taken.start {
                    return Err(MultibootError::Reserved { address: piece.address.max(taken.start) });
                }
            }
            top = top.max(piece.end);
        }
        let entry = u64::from(self.entry);
        if !self.pieces.iter().any(|piece| (piece.address..piece.end).contains(&entry)) {
            return Err(MultibootError::Entry { address: entry });
        }
        let at = top.checked_next_multiple_of(PAGE_BYTES);
        let needed = at.and_then(|at| at.checked_add(module)).unwrap_or(u64::MAX);
        if needed > ram.low_end() {
            return Err(MultibootError::NotEnoughMemory { bytes: ram.low_end(), needed });
        }
        Ok(needed - module)
    }
}

fn word_at(file: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?))
}

/// Where the header is, and its flags.
fn find_header(file: &[u8]) -> Option<(usize, u32)> {
    let end = file.len().min(HEADER_SEARCH);
    (0..end).step_by(HEADER_ALIGN).find_map(|at| {
        let (magic, flags, checksum) = (word_at(file, at)?, word_at(file, at + 4)?, word_at(file, at + 8)?);
        let right = magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0;
        (right && at + 12 <= end).then_some((at, flags))
    })
}

/// Writes the information structure (3.3).
fn write_information(memory: &impl GuestMemory, ram: &RamLayout, module: Range<u64>) -> Result<(), MultibootError> {
    let mut map = Vec::new();
    let mut map_entry = |range: Range<u64>, kind: u32| {
        // Its own length does not count in an entry's length.
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&range.start.to_le_bytes());
        map.extend_from_slice(&(range.end - range.start).to_le_bytes());
        map.extend_from_slice(&kind.to_le_bytes());
    };
    for (index, range) in ram.ranges().iter().enumerate() {
        map_entry(range.gpa..range.end(), MAP_RAM);
        if index == 0 {
            map_entry(FIRMWARE, MAP_RESERVED);
        }
    }
    memory.write(MEMORY_MAP, &map)?;

    let mut flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    let mut info = [0; INFO_BYTES];
    let mut put = |at: usize, value: u64| info[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    put(4, ram.ranges()[0].bytes >> 10);
    put(8, (ram.low_end() - HIGH_START) >> 10);
    put(16, COMMAND_LINE);
    if !module.is_empty() {
        flags |= INFO_MODULES;
        put(20, 1);
        put(24, MODULE_ENTRY);
        let name = LOADER_NAME;
        let entry = [module.start, module.end, name, 0].map(|word| (word as u32).to_le_bytes());
        memory.write(MODULE_ENTRY, entry.as_flattened())?;
    }
    put(44, map.len() as u64);
    put(48, MEMORY_MAP);
    put(64, LOADER_NAME);
    put(0, u64::from(flags));
    memory.write(INFO, &info)?;
    let mut name = "nestling".to_string();
    name.push('\0');
    memory.write(LOADER_NAME, name.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;
    use crate::guest::testing::TestMemory;
    use alloc::vec;

    const MIB: u64 = 1 << 20;
    const LOAD: u64 = 0x40_0000;

    fn header(flags: u32, words: &[u32]) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        [HEADER_MAGIC, flags, checksum].iter().chain(words).flat_map(|word| word.to_le_bytes()).collect()
    }

    /// An ELF of either class with one segment at 4 MiB whose file part is a Multiboot header and `body`.
    fn elf(wide: bool, body: &[u8], memsz: u64) -> Vec<u8> {
        let mut content = header(0, &[]);
        content.extend_from_slice(body);
        let (offset, filesz) = (0x1000u64, content.len() as u64);
        let mut file = vec![0; 0x1000];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1]);
        put(16, &2u16.to_le_bytes());
        put(18, &if wide { 62u16 } else { 3 }.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        let narrow = |value: u64| (value as u32).to_le_bytes();
        if wide {
            put(24, &(LOAD + 12).to_le_bytes());
            put(32, &64u64.to_le_bytes());
            put(52, &[64, 0, 56, 0, 1, 0]);
            let words = [offset, LOAD, LOAD, filesz, memsz, 0x1000];
            put(64, &[1, 0, 0, 0, 7, 0, 0, 0]);
            put(72, words.map(u64::to_le_bytes).as_flattened());
        } else {
            put(24, &narrow(LOAD + 12));
            put(28, &narrow(52));
            put(40, &[52, 0, 32, 0, 1, 0]);
            let words = [1, offset, LOAD, LOAD, filesz, memsz, 7, 0x1000];
            put(52, words.map(narrow).as_flattened());
        }
        file.extend_from_slice(&content);
        file
    }

    fn load(image: &[u8], module: &[u8]) -> (TestMemory, Result<VcpuInit, MultibootError>) {
        let memory = TestMemory::whole(64 * MIB);
        let config = MultibootConfig { memory_bytes: 64 * MIB, vcpus: 2 };
        let init = load_multiboot(&memory, image, module, "test.flat -x 1", &config);
        (memory, init)
    }

    #[test]
    fn both_classes_load_and_are_told_about_the_machine() {
        for wide in [false, true] {
            // The header is searched in the first 8 KiB of the file, so it is found at 0x1000.
            let (memory, init) = load(&elf(wide, b"code", 0x5000), b"NR_CPUS=2\n");
            let init = init.expect("loads");
            assert_eq!((init.rip, init.rax, init.rbx), (LOAD + 12, 0x2bad_b002, INFO));
            assert_eq!((init.cr0, init.efer, init.cs.attributes), (0x11, 0, 0xc9b));
            assert_eq!(memory.bytes(LOAD + 12, 4), b"code");
            let word = |at: u64| u64::from(memory.u32(INFO + at));
            assert_eq!(word(0), 0x24d);
            assert_eq!((word(4), word(8)), (640, 63 * 1024));
            assert_eq!(memory.bytes(word(16), 15), b"test.flat -x 1\0");
            let module = word(24);
            let (start, end) = (u64::from(memory.u32(module)), u64::from(memory.u32(module + 4)));
            assert_eq!((word(20), start, memory.bytes(start, 10)), (1, LOAD + 0x5000, b"NR_CPUS=2\n".to_vec()));
            assert_eq!(end - start, 10);
            assert_eq!((word(44), memory.u32(word(48)), memory.u64(word(48) + 12)), (72, 20, 640 << 10));
            assert_eq!(memory.bytes(0xe_0000, 8), b"RSD PTR ");
            assert_eq!((memory.bytes(0x400, 2), memory.bytes(0x413, 2)), (vec![0xf8, 3], vec![0x80, 2]));
        }
    }

    #[test]
    fn without_a_module_there_is_none() {
        let (memory, init) = load(&elf(true, b"code", 0x5000), b"");
        assert!(init.is_ok());
        assert_eq!((memory.u32(INFO) & INFO_MODULES, memory.u32(INFO + 20)), (0, 0));
    }

    #[test]
    fn addresses_in_the_header() {
        let load_at = LOAD as u32;
        let words = [load_at + 0x20, load_at, load_at + 0x60, load_at + 0x9000, load_at + 0x40];
        let mut image = vec![0; 0x120];
        image.splice(0x120.., header(HAS_ADDRESSES, &words));
        image.resize(0x180, 0xcc);
        let (memory, init) = load(&image, b"");
        assert_eq!(init.expect("loads").rip, LOAD + 0x40);
        assert_eq!(
            (memory.u32(LOAD + 0x20), memory.bytes(LOAD + 0x5c, 8)),
            (HEADER_MAGIC, vec![0xcc, 0xcc, 0xcc, 0xcc, 0, 0, 0, 0])
        );
        for bad in [
            [load_at - 1, load_at, 0, 0, load_at],
            [load_at + 0x200, load_at, 0, 0, load_at],
            [load_at, load_at, load_at - 1, 0, load_at],
            [load_at, load_at, load_at + 0x1000, 0, load_at],
            [load_at, load_at, 0, load_at + 1, load_at],
        ] {
            let image = header(HAS_ADDRESSES, &bad);
            assert_eq!(load(&image, b"").1, Err(MultibootError::HeaderAddresses), "{bad:x?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |image: &[u8]| load(image, b"").1.expect_err("refused");
        assert_eq!(error(b"#!/bin/sh"), MultibootError::NoHeader);
        assert_eq!(error(&header(1 << 2, &[])), MultibootError::Demands { flags: 4 });
        assert_eq!(error(&header(3, &[])), MultibootError::NotElf);
        let good = elf(true, b"code", 0x5000);
        let changed = |at: usize, bytes: &[u8]| {
            let mut image = good.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            image
        };
        assert_eq!(error(&changed(18, &[183])), MultibootError::WrongElf { kind: 2, machine: 183 });
        assert_eq!(error(&changed(16, &[3])), MultibootError::WrongElf { kind: 3, machine: 62 });
        assert_eq!(error(&changed(24, &0u64.to_le_bytes())), MultibootError::Entry { address: 0 });
        assert_eq!(error(&changed(64, &[2])), MultibootError::Empty);
        let broken = MultibootError::BrokenSegment { address: LOAD };
        assert_eq!(error(&changed(72, &u64::MAX.to_le_bytes())), broken);
        assert_eq!(error(&changed(96, &0x6000u64.to_le_bytes())), broken, "longer than the file");
        assert_eq!(error(&changed(104, &4u64.to_le_bytes())), broken, "smaller in memory");
        assert_eq!(error(&changed(104, &u64::MAX.to_le_bytes())), broken, "beyond 64 bits");
        let needed = LOAD + (1 << 40);
        let huge = MultibootError::NotEnoughMemory { bytes: 64 * MIB, needed };
        assert_eq!(error(&changed(104, &(1u64 << 40).to_le_bytes())), huge);
        let low = changed(88, &0x6_8000u64.to_le_bytes());
        assert_eq!(error(&low), MultibootError::Reserved { address: 0x6_8000 });
    }

    #[test]
    fn segments_must_not_want_the_same_memory() {
        let with_second = |address: u64| {
            let mut image = elf(true, b"code", 0x5000);
            image[56] = 2;
            let (first, second) = image[64..].split_at_mut(56);
            second[..56].copy_from_slice(first);
            second[24..32].copy_from_slice(&address.to_le_bytes());
            load(&image, b"").1.map(|init| init.rip)
        };
        assert_eq!(with_second(LOAD + 0x5000), Ok(LOAD + 12));
        assert_eq!(with_second(LOAD - 0x5000), Ok(LOAD + 12));
        for (second, both) in [(LOAD + 0x4fff, LOAD + 0x4fff), (LOAD, LOAD), (LOAD - 0x4fff, LOAD)] {
            assert_eq!(with_second(second), Err(MultibootError::Overlap { address: both }));
        }
    }

    #[test]
    fn a_module_must_fit() {
        let (_, init) = load(&elf(true, b"", 0x1000), &vec![0; 60 * MIB as usize]);
        assert_eq!(init, Err(MultibootError::NotEnoughMemory { bytes: 64 * MIB, needed: LOAD + 0x1000 + 60 * MIB }));
    }

    #[test]
    fn broken_images_never_panic() {
        let mut random = Random::new(66);
        let memory = TestMemory::whole(64 * MIB);
        let config = MultibootConfig { memory_bytes: 64 * MIB, vcpus: 1 };
        for round in 0..30_000 {
            let mut image = elf(round % 2 == 0, &[0x90; 64], 0x3000);
            for _ in 0..1 + random.below(6) {
                let at = if random.below(2) == 0 { random.below(128) } else { random.below(image.len() as u64) };
                image[at as usize] = random.byte();
            }
            image.truncate(if random.below(4) == 0 { random.below(0x1060) as usize } else { usize::MAX });
            let _ = load_multiboot(&memory, &image, b"", "", &config);
        }
    }
}
