//! The test kernel as QEMU's own Multiboot loader takes it: a 32-bit ELF file with the same segment.

use elf::{ElfBytes, abi::PT_LOAD, endian::LittleEndian};

use crate::error::Error;

const HEADER_BYTES: u32 = 52;
const SEGMENT_HEADER_BYTES: u32 = 32;
/// Where the segment begins in the file. Its Multiboot header must lie in the first 8 KiB.
const SEGMENT_AT: u32 = HEADER_BYTES + SEGMENT_HEADER_BYTES;

/// Makes the 32-bit file.
///
/// # Errors
/// If the image is not one segment below 4 GiB.
pub(super) fn narrow(image: &[u8]) -> Result<Vec<u8>, Error> {
    let refused = || Error::Conformance("the test kernel is not one segment below 4 GiB".into());
    let file = ElfBytes::<LittleEndian>::minimal_parse(image).map_err(|_| refused())?;
    let segments: Vec<_> =
        file.segments().ok_or_else(refused)?.iter().filter(|segment| segment.p_type == PT_LOAD).collect();
    let [segment] = &segments[..] else { return Err(refused()) };
    let content = file.segment_data(segment).map_err(|_| refused())?;
    let word = |value: u64| u32::try_from(value).map_err(|_| refused());
    let mut narrow = Vec::with_capacity(content.len() + SEGMENT_AT as usize);
    // 32 bits, little-endian, version 1.
    narrow.extend_from_slice(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |words: &[u32]| words.iter().for_each(|word| narrow.extend_from_slice(&word.to_le_bytes()));
    // An executable for the 386; where it starts, where the segment's header is; no sections, no flags; sizes of headers.
    put(&[3 << 16 | 2, 1, word(file.ehdr.e_entry)?, HEADER_BYTES, 0, 0]);
    put(&[SEGMENT_HEADER_BYTES << 16 | HEADER_BYTES, 1, 0]);
    let (at, file_bytes, memory_bytes) = (word(segment.p_paddr)?, word(segment.p_filesz)?, word(segment.p_memsz)?);
    put(&[PT_LOAD, SEGMENT_AT, at, at, file_bytes, memory_bytes, 7, 4]);
    narrow.extend_from_slice(content);
    Ok(narrow)
}
