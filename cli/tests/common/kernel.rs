//! Kernels of a few instructions.

/// A bzImage whose 64-bit entry point is `code`, loaded at 16 MiB.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    const SETUP_BYTES: usize = 2 * 512;
    // The 64-bit entry point is 0x200 bytes into the part that is loaded.
    const ENTRY: usize = SETUP_BYTES + 0x200;
    let mut file = vec![0; (ENTRY + code.len()).next_multiple_of(16)];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(ENTRY, code);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    // The header's length is in the jump over it.
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x100_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    let paragraphs = ((file.len() - SETUP_BYTES) / 16) as u32;
    file[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    file
}
