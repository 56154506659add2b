//! The Multiboot2 hand-over (specification version 2.0, 3.6), as GRUB gives it: tags in the loader's memory.
//!
//! The crate `multiboot2` reads the tags. It asserts what a tag of its type must look like, and a loader's mistake should
//! end in words and not in an assertion: so the length of the whole is bounded before the crate sees it, and every tag that
//! is used is measured here before the crate makes a value of it. What the tags say is checked as well: a memory map must
//! be there, what it calls reserved stays untouched even where it overlaps what it calls RAM, and a module must lie in RAM.
//!
//! Only the address itself is trusted, as any loader's is.

use core::fmt;
use core::ops::Range;
use core::ptr;
use core::slice;

use multiboot2::{BootInformation, BootInformationHeader, LoadError, MemoryArea, MemoryAreaType, TagType};

use super::{Handover, RangeList};

/// What the loader has in `eax` at the entry point.
pub const MAGIC: u32 = multiboot2::MAGIC;

/// The longest information that is looked at. GRUB's is a few KiB.
const MAX_BYTES: u32 = 1 << 20;
/// The header of the whole, and the one of a tag.
const HEADER: usize = 8;
const MEMORY_MAP_ENTRY: usize = 24;

/// Why the loader's information was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Multiboot2Error {
    /// It does not lie at a multiple of 8.
    Misaligned(u64),
    /// Its length is absurd, in bytes.
    Length(u32),
    /// Its tags are no chain that ends with the end tag.
    Tags(LoadError),
    /// A tag's size is not one that its type can have.
    TagSize {
        /// The type's number.
        kind: u32,
        /// The size that it states, in bytes.
        size: u32,
    },
    /// The memory map's entries have this size in bytes, and not 24.
    EntrySize(u32),
    /// There is no memory map.
    NoMemoryMap,
    /// The first module ends before it starts, or does not lie in RAM.
    Module {
        /// Its first byte.
        start: u32,
        /// Behind its last byte.
        end: u32,
    },
}

impl fmt::Display for Multiboot2Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the Multiboot2 information is damaged: ")?;
        match *self {
            Self::Misaligned(address) => write!(f, "its address {address:#x} is not a multiple of 8"),
            Self::Length(bytes) => write!(f, "it states a length of {bytes} bytes"),
            Self::Tags(LoadError::NoEndTag) => f.write_str("the end tag is missing"),
            Self::Tags(LoadError::Memory(cause)) => write!(f, "{cause}"),
            Self::TagSize { kind, size } => write!(f, "a tag of type {kind} states a size of {size} bytes"),
            Self::EntrySize(size) => write!(f, "entries of the memory map have {size} bytes"),
            Self::NoMemoryMap => f.write_str("there is no memory map"),
            Self::Module { start, end } => write!(f, "the module at {start:#x}..{end:#x} is not in RAM"),
        }
    }
}

/// Reads the hand-over.
///
/// # Errors
/// What is wrong with it.
///
/// # Safety
/// From `address` on there must be as many readable bytes as the first word there states, and nobody may write them while
/// the result is used: it points to them.
pub unsafe fn read(address: u64) -> Result<Handover, Multiboot2Error> {
    if address == 0 || !address.is_multiple_of(HEADER as u64) {
        return Err(Multiboot2Error::Misaligned(address));
    }
    let start: *const u8 = ptr::with_exposed_provenance(address as usize);
    // SAFETY: the caller vouches for the address, which is aligned.
    let length = unsafe { start.cast::<u32>().read() };
    if !(2 * HEADER as u32..=MAX_BYTES).contains(&length) {
        return Err(Multiboot2Error::Length(length));
    }
    // SAFETY: the caller vouches for that many bytes.
    let bytes = unsafe { slice::from_raw_parts(start, length as usize) };
    // SAFETY: as above; the crate reads no further than that length.
    let information =
        unsafe { BootInformation::load(start.cast::<BootInformationHeader>()) }.map_err(Multiboot2Error::Tags)?;
    let rsdp = measure(bytes)?.map(|tag| address + tag.start as u64);

    let mut handover = Handover { rsdp, ..Handover::default() };
    handover.kept.push(address..address + u64::from(length));
    handover.ram = memory(&information)?;
    if let Some(module) = information.module_tags().next() {
        handover.module = Some(module_in(&handover.ram, module.start_address(), module.end_address())?);
        handover.kept.push(handover.module.clone().unwrap_or_default());
    }
    handover.command_line = information.command_line_tag().and_then(|tag| tag.cmdline().ok()).map(|words| {
        let start = words.as_ptr().expose_provenance() as u64;
        start..start + words.len() as u64
    });
    Ok(handover)
}

/// Checks the size of each tag that is used, and finds the ACPI root pointer, the newer if there are both.
///
/// The chain of tags was found whole: each has a header and lies within the bytes.
fn measure(bytes: &[u8]) -> Result<Option<Range<usize>>, Multiboot2Error> {
    let word = |at: usize| bytes[at..].first_chunk().map_or(0, |four| u32::from_le_bytes(*four));
    let (mut old, mut new) = (None, None);
    let mut at = HEADER;
    while at + HEADER <= bytes.len() {
        let (kind, size) = (word(at), word(at + 4));
        let body = at + HEADER..at + size as usize;
        let fits = match TagType::from_val(kind) {
            // At least the zero that ends it.
            TagType::Cmdline => !body.is_empty(),
            // Start, end, and a string.
            TagType::Module => body.len() > 8,
            TagType::Mmap => {
                if body.len() >= 8 && word(at + 8) as usize != MEMORY_MAP_ENTRY {
                    return Err(Multiboot2Error::EntrySize(word(at + 8)));
                }
                body.len() >= 8 && (body.len() - 8).is_multiple_of(MEMORY_MAP_ENTRY)
            }
            TagType::AcpiV1 => {
                old = old.or(Some(body.clone()));
                body.len() >= 20
            }
            TagType::AcpiV2 => {
                new = new.or(Some(body.clone()));
                body.len() >= 36
            }
            _ => true,
        };
        if !fits {
            return Err(Multiboot2Error::TagSize { kind, size });
        }
        at = (at + size as usize).next_multiple_of(8);
    }
    Ok(new.or(old))
}

/// What the memory map calls available, without what it calls anything else.
fn memory(information: &BootInformation<'_>) -> Result<RangeList, Multiboot2Error> {
    let areas = information.memory_map_tag().ok_or(Multiboot2Error::NoMemoryMap)?.memory_areas();
    let mut ram = RangeList::default();
    let range = |area: &MemoryArea| area.start_address()..area.start_address().saturating_add(area.size());
    let is_available = |area: &&MemoryArea| area.typ() == MemoryAreaType::Available;
    areas.iter().filter(is_available).for_each(|area| ram.push(range(area)));
    areas.iter().filter(|area| !is_available(area)).for_each(|area| ram.exclude(range(area)));
    Ok(ram)
}

fn module_in(ram: &RangeList, start: u32, end: u32) -> Result<Range<u64>, Multiboot2Error> {
    let module = u64::from(start)..u64::from(end);
    let mut outside = RangeList::default();
    outside.push(module.clone());
    ram.as_slice().iter().for_each(|range| outside.exclude(range.clone()));
    if module.is_empty() || !outside.as_slice().is_empty() {
        return Err(Multiboot2Error::Module { start, end });
    }
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Information in memory, aligned as a loader's.
    struct Information(Vec<u64>);

    impl Information {
        fn new(tags: &[(u32, Vec<u8>)]) -> Self {
            let mut bytes = std::vec![0; HEADER];
            for (kind, body) in tags {
                bytes.extend(kind.to_le_bytes());
                bytes.extend((HEADER as u32 + body.len() as u32).to_le_bytes());
                bytes.extend(body);
                bytes.resize(bytes.len().next_multiple_of(8), 0);
            }
            bytes.extend([0, 0, 0, 0, 8, 0, 0, 0]);
            let length = bytes.len() as u32;
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            Self(bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect())
        }

        fn address(&self) -> u64 {
            self.0.as_ptr().expose_provenance() as u64
        }

        fn read(&self) -> Result<Handover, Multiboot2Error> {
            // SAFETY: the words live on, and the length in the first is theirs or is refused.
            unsafe { read(self.address()) }
        }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn map(entries: &[(u64, u64, u32)]) -> (u32, Vec<u8>) {
        let mut body = words(&[24, 0]);
        for (base, length, kind) in entries {
            body.extend(base.to_le_bytes());
            body.extend(length.to_le_bytes());
            body.extend(words(&[*kind, 0]));
        }
        (6, body)
    }

    fn module(start: u32, end: u32) -> (u32, Vec<u8>) {
        (3, [words(&[start, end]), b"guest\0".to_vec()].concat())
    }

    const RAM: [(u64, u64, u32); 2] = [(0, 0x9fc00, 1), (0x10_0000, 0x700_0000, 1)];

    #[test]
    fn a_hand_over_is_read() {
        let root = |revision| [b"RSD PTR ".to_vec(), std::vec![0; 7], std::vec![revision], std::vec![0; 20]].concat();
        let information = Information::new(&[
            (1, b"end=halt verbose\0".to_vec()),
            (2, b"GRUB\0".to_vec()),
            map(&[RAM[0], RAM[1], (0x20_0000, 0x1000, 2), (u64::MAX - 5, u64::MAX, 1)]),
            (14, root(0)[..20].to_vec()),
            (15, root(2)),
            (77, b"unheard of".to_vec()),
            module(0x30_0000, 0x30_1234),
            module(0, 0),
        ]);
        let handover = information.read().unwrap();
        assert_eq!(
            handover.ram.as_slice(),
            [0..0x9fc00, 0x10_0000..0x20_0000, 0x20_1000..0x710_0000, u64::MAX - 5..u64::MAX]
        );
        assert_eq!(handover.module, Some(0x30_0000..0x30_1234));
        let all = information.address()..information.address() + information.0.len() as u64 * 8;
        assert_eq!(handover.kept.as_slice(), [all, 0x30_0000..0x30_1234]);
        let bytes = |range: Range<u64>| {
            let start = ptr::with_exposed_provenance::<u8>(range.start as usize);
            // SAFETY: the information lives on.
            unsafe { slice::from_raw_parts(start, (range.end - range.start) as usize) }
        };
        assert_eq!(bytes(handover.command_line.unwrap()), b"end=halt verbose");
        let rsdp = handover.rsdp.unwrap();
        assert_eq!(bytes(rsdp..rsdp + 16), [&b"RSD PTR "[..], &[0; 7], &[2]].concat(), "the newer one");
    }

    #[test]
    fn without_module_words_or_acpi_there_is_still_a_machine() {
        let handover = Information::new(&[map(&RAM)]).read().unwrap();
        assert_eq!((handover.module, handover.rsdp, handover.command_line), (None, None, None));
    }

    #[test]
    fn each_damage_has_its_error() {
        let refused = |tags: &[(u32, Vec<u8>)]| Information::new(tags).read().unwrap_err();
        assert_eq!(refused(&[]), Multiboot2Error::NoMemoryMap);
        assert_eq!(refused(&[(6, words(&[20, 0]))]), Multiboot2Error::EntrySize(20));
        assert_eq!(refused(&[(6, words(&[24]))]), Multiboot2Error::TagSize { kind: 6, size: 12 });
        assert_eq!(refused(&[(6, words(&[24, 0, 1]))]), Multiboot2Error::TagSize { kind: 6, size: 20 });
        for (kind, most) in [(1, 0), (3, 8), (14, 19), (15, 35)] {
            let size = HEADER as u32 + most as u32;
            assert_eq!(refused(&[map(&RAM), (kind, std::vec![0; most])]), Multiboot2Error::TagSize { kind, size });
        }
        for (start, end) in
            [(0x30_0000, 0x30_0000), (0x30_0000, 0x20_0000), (0x9f000, 0x10_1000), (0xffff_0000, u32::MAX)]
        {
            assert_eq!(refused(&[map(&RAM), module(start, end)]), Multiboot2Error::Module { start, end });
        }
        let mut information = Information::new(&[map(&RAM)]);
        for misaligned in [0, information.address() + 4] {
            // SAFETY: refused by the address alone.
            let refused = unsafe { read(misaligned) };
            assert_eq!(refused.unwrap_err(), Multiboot2Error::Misaligned(misaligned));
        }
        let whole = information.0[0];
        for length in [0, 8, MAX_BYTES + 8, u32::MAX] {
            information.0[0] = u64::from(length);
            assert_eq!(information.read().unwrap_err(), Multiboot2Error::Length(length));
        }
        information.0[0] = whole - 8;
        assert!(matches!(information.read(), Err(Multiboot2Error::Tags(_))), "the end tag is cut off");
        information.0[0] = whole - 3;
        assert!(matches!(information.read(), Err(Multiboot2Error::Tags(_))), "an odd length");
    }

    #[test]
    fn garbled_information_is_refused_or_read_and_never_a_panic() {
        let whole = Information::new(&[
            (1, b"end=halt\0".to_vec()),
            map(&RAM),
            (15, std::vec![0; 36]),
            module(0x30_0000, 0x30_1000),
        ]);
        for word in 1..whole.0.len() {
            for value in [0, 1, 7, 8, 9, 0x17, 0x18, 1 << 31, 1 << 32, 15 << 32, 16 << 32, 1 << 40, u64::MAX] {
                for change in [value, whole.0[word] ^ value, whole.0[word] & u64::from(u32::MAX) | value] {
                    let mut garbled = Information(whole.0.clone());
                    garbled.0[word] = change;
                    let _ = garbled.read();
                }
            }
        }
    }
}
