//! The Linux/x86 boot protocol's view of a bzImage: its setup header and its two parts.
//!
//! An image is a real-mode part (boot sector and setup code, which neither the 64-bit nor the 32-bit protocol runs)
//! followed by the protected-mode kernel. The header in the real-mode part says how the kernel wants to be loaded, and
//! whether it can be entered in long mode. Field offsets are those of the protocol's documentation ("The Linux/x86 Boot
//! Protocol"), counted from the start of the image.

use core::fmt;

/// Oldest protocol that describes everything needed here: 2.12 brought `xloadflags`.
pub const MIN_PROTOCOL: u16 = 0x020c;

/// Where the setup header starts in the image and in the boot parameters.
pub const HEADER_START: usize = 0x1f1;
/// End of the header of protocol 2.12, the least that must be there.
const HEADER_MIN_END: usize = 0x268;
/// The room that the boot parameters have for it; what follows there are other fields.
const HEADER_MAX_END: usize = 0x290;

const SECTOR: usize = 512;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
/// Offset of the 64-bit entry point from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// What an image that is no bzImage looks like, for a message that helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookalike {
    /// An ELF file, such as an uncompressed `vmlinux`.
    Elf,
    /// A gzip file.
    Gzip,
    /// Nothing known.
    Unknown,
}

/// Why an image can't be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// The image ends before its header does.
    TooShort {
        /// Its length in bytes.
        bytes: usize,
    },
    /// It is not a bzImage.
    NotBzImage(Lookalike),
    /// The kernel speaks a boot protocol older than [`MIN_PROTOCOL`].
    ProtocolTooOld {
        /// Its version, major in the high byte.
        version: u16,
    },
    /// A zImage, which must be loaded low.
    LoadedLow,
    /// The image ends before the part that its header announces.
    Truncated {
        /// Its length in bytes.
        bytes: usize,
        /// The length it should have at least.
        needed: usize,
    },
    /// A field of the header makes no sense.
    BadField {
        /// The field's name in the protocol.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { bytes } => write!(f, "kernel image of {bytes} bytes is too short for a setup header"),
            Self::NotBzImage(Lookalike::Elf) => {
                write!(f, "kernel image is an ELF file, not a bzImage (use the compressed vmlinuz, not vmlinux)")
            }
            Self::NotBzImage(Lookalike::Gzip) => write!(f, "kernel image is a gzip file, not a bzImage"),
            Self::NotBzImage(Lookalike::Unknown) => write!(f, "kernel image is not a bzImage (no setup header)"),
            Self::ProtocolTooOld { version } => write!(
                f,
                "kernel speaks boot protocol {}.{:02}, at least {}.{:02} is needed",
                version >> 8,
                version & 0xff,
                MIN_PROTOCOL >> 8,
                MIN_PROTOCOL & 0xff
            ),
            Self::LoadedLow => write!(f, "kernel is a zImage, which must be loaded low; a bzImage is needed"),
            Self::Truncated { bytes, needed } => {
                write!(f, "kernel image is truncated: {bytes} bytes, its header announces {needed}")
            }
            Self::BadField { field, value } => write!(f, "kernel image's setup header has {field} = {value:#x}"),
        }
    }
}

impl core::error::Error for ImageError {}

/// Where the kernel is entered, and in which mode: guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In long mode, at the 64-bit entry point.
    Long(u64),
    /// In protected mode without paging, where the kernel was loaded: it is a 32-bit kernel.
    Protected(u64),
}

/// A checked image.
#[derive(Clone, Copy, Debug)]
pub struct BzImage<'a> {
    header: &'a [u8],
    payload: &'a [u8],
    /// Of the entry point, from the start of the protected-mode kernel; `None`: a 32-bit kernel, entered at its start.
    entry_64: Option<u64>,
    load_address: u64,
    init_size: u64,
    initrd_max: u64,
    command_line_max: u64,
    version: u16,
}

impl<'a> BzImage<'a> {
    /// Checks `image` and takes it apart.
    pub fn parse(image: &'a [u8]) -> Result<Self, ImageError> {
        // What kind of file it is comes first: "too short" would be a poor answer to a small file of another kind.
        if field(image, 0x202) != Some(*b"HdrS") || field(image, 0x1fe) != Some(0xaa55u16.to_le_bytes()) {
            return Err(match image {
                [0x7f, b'E', b'L', b'F', ..] => ImageError::NotBzImage(Lookalike::Elf),
                [0x1f, 0x8b, ..] => ImageError::NotBzImage(Lookalike::Gzip),
                _ if image.len() < HEADER_MIN_END => ImageError::TooShort { bytes: image.len() },
                _ => ImageError::NotBzImage(Lookalike::Unknown),
            });
        }
        let too_short = ImageError::TooShort { bytes: image.len() };
        let u8_at = |at| field::<1>(image, at).map(|[byte]| byte).ok_or(too_short);
        let u16_at = |at| field(image, at).map(u16::from_le_bytes).ok_or(too_short);
        let u32_at = |at| field(image, at).map(u32::from_le_bytes).ok_or(too_short);
        let u64_at = |at| field(image, at).map(u64::from_le_bytes).ok_or(too_short);

        let version = u16_at(0x206)?;
        if version < MIN_PROTOCOL {
            return Err(ImageError::ProtocolTooOld { version });
        }
        if u8_at(0x211)? & LOADED_HIGH == 0 {
            return Err(ImageError::LoadedLow);
        }
        let entry_64 = (u16_at(0x236)? & XLF_KERNEL_64 != 0).then_some(ENTRY_64);
        // The jump at 0x200 skips the header, so its second byte tells where the header ends.
        let jump = u8_at(0x201)?;
        let header_end = 0x202 + usize::from(jump);
        if !(HEADER_MIN_END..=HEADER_MAX_END).contains(&header_end) {
            return Err(ImageError::BadField { field: "jump", value: u64::from(jump) });
        }
        let header = image.get(HEADER_START..header_end).ok_or(too_short)?;

        // 0 sectors means 4, for images older than the field.
        let sectors = match usize::from(u8_at(0x1f1)?) {
            0 => 4,
            sectors => sectors,
        };
        let setup = (sectors + 1) * SECTOR;
        let announced = u32_at(0x1f4)? as usize * 16;
        let payload = image.get(setup..).unwrap_or(&[]);
        // syssize rounds the payload up to 16 bytes.
        let entry = entry_64.unwrap_or(0) as usize;
        if payload.len().next_multiple_of(16) < announced || payload.len() <= entry {
            let needed = setup + announced.max(entry + 1);
            return Err(ImageError::Truncated { bytes: image.len(), needed });
        }
        let load_address = u64_at(0x258)?;
        let init_size = u64::from(u32_at(0x260)?);
        let alignment = u32_at(0x230)?;
        if !alignment.is_power_of_two() {
            return Err(ImageError::BadField { field: "kernel_alignment", value: u64::from(alignment) });
        }
        if !load_address.is_multiple_of(u64::from(alignment)) || load_address < 0x10_0000 || load_address >> 32 != 0 {
            return Err(ImageError::BadField { field: "pref_address", value: load_address });
        }
        if init_size == 0 {
            return Err(ImageError::BadField { field: "init_size", value: init_size });
        }
        Ok(Self {
            header,
            payload,
            entry_64,
            load_address,
            init_size,
            initrd_max: u64::from(u32_at(0x22c)?),
            command_line_max: u64::from(u32_at(0x238)?),
            version,
        })
    }

    /// The setup header, to be copied to offset [`HEADER_START`] of the boot parameters.
    pub fn header(&self) -> &'a [u8] {
        self.header
    }

    /// The protected-mode kernel.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Where the kernel wants to be loaded. One that can be relocated moves itself here anyway when loaded lower.
    pub fn load_address(&self) -> u64 {
        self.load_address
    }

    /// End of the memory that the kernel uses before it knows the memory map.
    pub fn end(&self) -> u64 {
        self.load_address + self.init_size.max(self.payload.len() as u64)
    }

    /// Where it is entered: in long mode if it can be.
    pub fn entry(&self) -> Entry {
        match self.entry_64 {
            Some(offset) => Entry::Long(self.load_address + offset),
            None => Entry::Protected(self.load_address),
        }
    }

    /// Highest address that a byte of the initrd may have.
    pub fn initrd_max(&self) -> u64 {
        self.initrd_max
    }

    /// Longest command line, without its terminating zero.
    pub fn command_line_max(&self) -> u64 {
        self.command_line_max
    }

    /// The boot protocol's version, major in the high byte.
    pub fn version(&self) -> u16 {
        self.version
    }
}

fn field<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;
    use crate::guest::testing::kernel;
    use alloc::string::ToString;
    use alloc::vec;

    #[test]
    fn a_good_image_is_taken_apart() {
        let image = kernel(10_000);
        let parsed = BzImage::parse(&image).expect("a good image");
        assert_eq!(parsed.payload().len(), 10_000);
        assert_eq!(parsed.load_address(), 0x100_0000);
        assert_eq!(parsed.entry(), Entry::Long(0x100_0200));
        assert_eq!(parsed.end(), 0x300_0000);
        assert_eq!(parsed.header().len(), 0x26c - 0x1f1);
        assert_eq!(parsed.version(), 0x020f);
    }

    #[test]
    fn a_32_bit_kernel_is_entered_at_its_start() {
        let mut image = kernel(0x200);
        image[0x236] = 0x3e;
        let parsed = BzImage::parse(&image).expect("a good image");
        assert_eq!(parsed.entry(), Entry::Protected(0x100_0000));
        image[0x236] |= 1;
        assert_eq!(
            BzImage::parse(&image).expect_err("it ends before its 64-bit entry point"),
            ImageError::Truncated { bytes: 2560 + 0x200, needed: 2560 + 0x201 }
        );
    }

    #[test]
    fn each_defect_has_its_own_error() {
        let broken = |at: usize, bytes: &[u8]| {
            let mut image = kernel(10_000);
            image[at..at + bytes.len()].copy_from_slice(bytes);
            BzImage::parse(&image).expect_err("a broken image")
        };
        assert_eq!(broken(0x202, b"hdrs"), ImageError::NotBzImage(Lookalike::Unknown));
        assert_eq!(broken(0x1fe, &[0, 0]), ImageError::NotBzImage(Lookalike::Unknown));
        assert_eq!(broken(0x206, &[0x0b, 0x02]), ImageError::ProtocolTooOld { version: 0x020b });
        assert_eq!(broken(0x211, &[0]), ImageError::LoadedLow);
        assert_eq!(broken(0x201, &[0x10]), ImageError::BadField { field: "jump", value: 0x10 });
        assert_eq!(broken(0x230, &[3, 0, 0, 0]), ImageError::BadField { field: "kernel_alignment", value: 3 });
        assert_eq!(broken(0x258, &[0x10]), ImageError::BadField { field: "pref_address", value: 0x100_0010 });
        assert_eq!(broken(0x25d, &[1]), ImageError::BadField { field: "pref_address", value: 0x100_0100_0000 });
        assert_eq!(broken(0x260, &[0, 0, 0, 0]), ImageError::BadField { field: "init_size", value: 0 });
        assert_eq!(broken(0x1f1, &[0xff]), ImageError::Truncated { bytes: 2560 + 10_000, needed: 256 * 512 + 10_000 });
    }

    #[test]
    fn wrong_files_are_named() {
        let elf = BzImage::parse(b"\x7fELF and so on").expect_err("no bzImage");
        assert_eq!(elf, ImageError::NotBzImage(Lookalike::Elf));
        assert!(elf.to_string().contains("vmlinuz"));
        assert_eq!(BzImage::parse(&[0x1f, 0x8b, 8]).expect_err("no bzImage"), ImageError::NotBzImage(Lookalike::Gzip));
        assert_eq!(BzImage::parse(&[]).expect_err("empty"), ImageError::TooShort { bytes: 0 });
        assert_eq!(BzImage::parse(&vec![0; 1 << 20]).expect_err("zeros"), ImageError::NotBzImage(Lookalike::Unknown));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let image = kernel(1000);
        for length in 0..image.len() {
            // The last bytes are within the rounding of syssize to 16.
            if length + 8 > image.len() {
                continue;
            }
            assert!(BzImage::parse(&image[..length]).is_err(), "{length} of {}", image.len());
        }
    }

    #[test]
    fn random_headers_never_panic() {
        let mut random = Random::new(8);
        let good = kernel(2000);
        for _ in 0..20_000 {
            let mut image = good.clone();
            for _ in 0..=random.below(4) {
                image[HEADER_START + random.below(0x80) as usize] = random.byte();
            }
            image.truncate(random.below(good.len() as u64 + 1).max(good.len() as u64 / 2) as usize);
            if let Ok(parsed) = BzImage::parse(&image) {
                assert!(parsed.end() >= parsed.load_address() + parsed.payload().len() as u64);
            }
        }
    }
}
