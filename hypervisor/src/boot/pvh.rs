//! The PVH hand-over: the start-info structure in the loader's memory.
//!
//! The loader is trusted to give addresses that are memory (it could have loaded anything else in our place); what is
//! checked is the magic number and the version, so that a wrong entry is told and not guessed at.

use core::ptr;

use super::Handover;

/// In the structure; `entry.rs` passes it on as well, to say by which of its entries the loader came.
pub const MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;
/// What follows is not read.
const MAX_COMMAND_LINE_BYTES: u64 = 2048;

/// `struct hvm_start_info`, version 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `struct hvm_modlist_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Module {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56 && size_of::<Module>() == 32 && size_of::<MemoryMapEntry>() == 24);

/// Why a start-info structure was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PvhError {
    /// The magic number is another one: not started by PVH.
    Magic(u32),
    /// Version 0 has no memory map.
    Version(u32),
}

/// Reads the hand-over.
///
/// # Safety
/// `address` and all that it points to must be readable memory in the loader's format.
pub unsafe fn read(address: u64) -> Result<Handover, PvhError> {
    // SAFETY: the caller vouches for the address.
    let info: StartInfo = unsafe { read_at(address) };
    if info.magic != MAGIC {
        return Err(PvhError::Magic(info.magic));
    }
    if info.version < 1 {
        return Err(PvhError::Version(info.version));
    }
    let mut handover = Handover { rsdp: (info.rsdp != 0).then_some(info.rsdp), ..Handover::default() };
    for index in 0..u64::from(info.memory_map_entries) {
        // SAFETY: the loader gives an array of that many entries.
        let entry: MemoryMapEntry = unsafe { read_at(info.memory_map + index * size_of::<MemoryMapEntry>() as u64) };
        if entry.kind == MEMMAP_RAM {
            handover.ram.push(entry.address..entry.address.saturating_add(entry.size));
        }
    }
    if info.module_count > 0 {
        // SAFETY: the loader gives an array of that many entries.
        let module: Module = unsafe { read_at(info.modules) };
        let module = module.address..module.address.saturating_add(module.size);
        handover.kept.push(module.clone());
        handover.module = Some(module);
    }
    if info.command_line != 0 {
        // SAFETY: the loader gives a string that ends with a zero.
        let ended = |length: &u64| unsafe { read_at::<u8>(info.command_line + length) } == 0;
        let length = (0..MAX_COMMAND_LINE_BYTES).find(ended).unwrap_or(MAX_COMMAND_LINE_BYTES);
        let words = info.command_line..info.command_line + length;
        handover.kept.push(words.clone());
        handover.command_line = Some(words);
    }
    Ok(handover)
}

/// # Safety
/// `address` must be readable for a `T`, any bit pattern of which must be valid.
unsafe fn read_at<T: Copy>(address: u64) -> T {
    // SAFETY: the caller vouches for it; alignment is not asked for.
    unsafe { ptr::with_exposed_provenance::<T>(address as usize).read_unaligned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address<T>(value: &T) -> u64 {
        ptr::from_ref(value).expose_provenance() as u64
    }

    #[test]
    fn a_hand_over_is_read() {
        let map = [
            MemoryMapEntry { address: 0, size: 0x9fc00, kind: 1, reserved: 0 },
            MemoryMapEntry { address: 0xf0000, size: 0x10000, kind: 2, reserved: 0 },
            MemoryMapEntry { address: 1 << 20, size: u64::MAX, kind: 1, reserved: 0 },
        ];
        let module = Module { address: 0x7000, size: 0x1234, command_line: 0, reserved: 0 };
        let mut info = StartInfo {
            magic: MAGIC,
            version: 1,
            flags: 0,
            module_count: 1,
            modules: address(&module),
            command_line: address(c"end=halt".to_bytes_with_nul().first().unwrap()),
            rsdp: 0xf5000,
            memory_map: address(&map),
            memory_map_entries: 3,
            reserved: 0,
        };
        // SAFETY: the structures above live on.
        let handover = unsafe { read(address(&info)) }.unwrap();
        assert_eq!(handover.ram.as_slice(), [0..0x9fc00, 1 << 20..u64::MAX]);
        assert_eq!(handover.module, Some(0x7000..0x8234));
        let words = info.command_line..info.command_line + 8;
        assert_eq!(handover.kept.as_slice(), [0x7000..0x8234, words.clone()]);
        assert_eq!(handover.command_line, Some(words));
        assert_eq!(handover.rsdp, Some(0xf5000));
        info.version = 0;
        // SAFETY: as above.
        assert_eq!(unsafe { read(address(&info)) }.unwrap_err(), PvhError::Version(0));
        info.magic = 0x2bad_b002;
        // SAFETY: as above.
        assert_eq!(unsafe { read(address(&info)) }.unwrap_err(), PvhError::Magic(0x2bad_b002));
    }
}
