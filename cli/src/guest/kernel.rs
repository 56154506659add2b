//! What the header of a Linux kernel image says (Linux's Documentation/arch/x86/boot.rst), read to refuse early what the
//! hypervisor would refuse late.

use thiserror::Error;

/// The parts of the setup header that decide whether and where a kernel can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// Boot protocol version, major in the high byte.
    pub protocol: u16,
    /// How it is entered.
    pub width: Width,
    /// Where the kernel would like to be loaded, a guest physical address.
    pub preferred_address: u64,
    /// Bytes from its load address that it needs before it knows the memory map.
    pub init_bytes: u64,
    /// The longest command line it takes, without the terminating zero.
    pub command_line_bytes: usize,
}

/// For which CPUs a kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// In protected mode: a 32-bit kernel.
    Bits32,
    /// In long mode.
    Bits64,
}

/// Why a file is not a kernel that can be booted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum KernelError {
    /// Too short to be one.
    #[error("not a Linux kernel image: {bytes} bytes are too few")]
    TooShort {
        /// Its length.
        bytes: usize,
    },
    /// No boot sector signature or no setup header.
    #[error("not a Linux bzImage: it has no setup header (a vmlinux or a compressed file is not one)")]
    NoHeader,
    /// Too old to say how it is entered.
    #[error("boot protocol {}.{:02}: 2.12 or later is needed", protocol >> 8, protocol & 0xff)]
    TooOld {
        /// What it speaks.
        protocol: u16,
    },
    /// A zImage, to be loaded below 1 MiB.
    #[error("a zImage: a bzImage is needed")]
    NotBig,
    /// The file ends before the code its header states.
    #[error("cut off: {bytes} bytes, its header states {stated}")]
    CutOff {
        /// Its length.
        bytes: usize,
        /// What it should have.
        stated: u64,
    },
}

const SETUP_SECTORS: usize = 0x1f1;
const SYSTEM_SIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOAD_FLAGS: usize = 0x211;
const EXTENDED_LOAD_FLAGS: usize = 0x236;
const COMMAND_LINE_SIZE: usize = 0x238;
const PREFERRED_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const HEADER_END: usize = 0x264;

const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
const PROTOCOL_2_12: u16 = 0x020c;

impl KernelImage {
    /// Reads the header of `file`.
    ///
    /// # Errors
    /// The first reason why it cannot be booted.
    pub fn parse(file: &[u8]) -> Result<Self, KernelError> {
        let header = file.get(..HEADER_END).ok_or(KernelError::TooShort { bytes: file.len() })?;
        let byte = |at: usize| header[at];
        let half = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
        let word = |at: usize| u32::from(half(at)) | (u32::from(half(at + 2)) << 16);
        if half(BOOT_FLAG) != 0xaa55 || &header[MAGIC..MAGIC + 4] != b"HdrS" {
            return Err(KernelError::NoHeader);
        }
        let protocol = half(VERSION);
        if protocol < PROTOCOL_2_12 {
            return Err(KernelError::TooOld { protocol });
        }
        if byte(LOAD_FLAGS) & LOADED_HIGH == 0 {
            return Err(KernelError::NotBig);
        }
        let width = if half(EXTENDED_LOAD_FLAGS) & KERNEL_64 == 0 { Width::Bits32 } else { Width::Bits64 };
        // 0 sectors stand for 4, for images of the last century.
        let sectors = match byte(SETUP_SECTORS) {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let stated = (sectors + 1) * 512 + u64::from(word(SYSTEM_SIZE)) * 16;
        // The size counts paragraphs, rounded up: the last one may be short.
        if (file.len() as u64) + 15 < stated {
            return Err(KernelError::CutOff { bytes: file.len(), stated });
        }
        Ok(Self {
            protocol,
            width,
            preferred_address: u64::from(word(PREFERRED_ADDRESS)) | (u64::from(word(PREFERRED_ADDRESS + 4)) << 32),
            init_bytes: word(INIT_SIZE).into(),
            command_line_bytes: word(COMMAND_LINE_SIZE) as usize,
        })
    }

    /// The least guest memory with which this kernel gets as far as to its own memory management, in bytes: what it
    /// unpacks into and the initrd above it.
    #[must_use]
    pub fn least_memory_bytes(&self, initrd_bytes: u64) -> u64 {
        self.preferred_address.saturating_add(self.init_bytes).saturating_add(initrd_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest image that passes.
    fn image() -> Vec<u8> {
        let mut file = vec![0; 1024 + 64];
        file[SETUP_SECTORS] = 1;
        file[SYSTEM_SIZE] = 4;
        file[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        file[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        file[VERSION..VERSION + 2].copy_from_slice(&[0x0f, 0x02]);
        file[LOAD_FLAGS] = LOADED_HIGH;
        file[EXTENDED_LOAD_FLAGS] = 1;
        file[COMMAND_LINE_SIZE..COMMAND_LINE_SIZE + 4].copy_from_slice(&2047u32.to_le_bytes());
        file[PREFERRED_ADDRESS..PREFERRED_ADDRESS + 8].copy_from_slice(&0x100_0000u64.to_le_bytes());
        file[INIT_SIZE..INIT_SIZE + 4].copy_from_slice(&0x300_0000u32.to_le_bytes());
        file
    }

    #[test]
    fn a_good_header_is_read() {
        let kernel = KernelImage::parse(&image()).expect("a good image");
        assert_eq!((kernel.protocol, kernel.command_line_bytes, kernel.width), (0x020f, 2047, Width::Bits64));
        assert_eq!(kernel.least_memory_bytes(5), 0x400_0005);
        let mut file = image();
        file[EXTENDED_LOAD_FLAGS] = 0;
        assert_eq!(KernelImage::parse(&file).map(|kernel| kernel.width), Ok(Width::Bits32));
    }

    #[test]
    fn each_fault_has_its_error() {
        let broken = |change: fn(&mut Vec<u8>)| {
            let mut file = image();
            change(&mut file);
            KernelImage::parse(&file).expect_err("broken")
        };
        assert_eq!(broken(Vec::clear), KernelError::TooShort { bytes: 0 });
        assert_eq!(broken(|f| f.truncate(0x263)), KernelError::TooShort { bytes: 0x263 });
        assert_eq!(broken(|f| f[BOOT_FLAG] = 0), KernelError::NoHeader);
        assert_eq!(broken(|f| f[MAGIC] = b'h'), KernelError::NoHeader);
        assert_eq!(broken(|f| f[VERSION] = 0x0b), KernelError::TooOld { protocol: 0x020b });
        assert_eq!(broken(|f| f[LOAD_FLAGS] = 0), KernelError::NotBig);
        assert_eq!(broken(|f| f.truncate(1024 + 40)), KernelError::CutOff { bytes: 1064, stated: 1088 });
        assert_eq!(broken(|f| f[SYSTEM_SIZE + 3] = 0xff).to_string().split(':').next(), Some("cut off"));
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let mut file = image();
        file[PREFERRED_ADDRESS..PREFERRED_ADDRESS + 8].fill(0xff);
        let kernel = KernelImage::parse(&file).expect("the address is judged by the memory there is");
        assert_eq!(kernel.least_memory_bytes(u64::MAX), u64::MAX);
    }
}
