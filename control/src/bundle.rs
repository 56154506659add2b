//! The bundle: everything one run needs, in one file.
//!
//! Under PVH QEMU hands a kernel at most one module, and the command line has no room for a guest's. So the command
//! writes one file and the hypervisor reads it in place:
//!
//! ```text
//! 0     magic "NESTLING"
//! 8     version         u32, PROTOCOL_VERSION
//! 12    header length   u32, bytes of postcard after these 24
//! 16    header checksum u32, CRC-32 of those bytes
//! 20    zero            u32
//! 24    header          postcard: RunConfig, then offset, length and CRC-32 of each blob
//! …     zeros up to the next multiple of 4096: here "the data" starts
//! data  kernel, then initrd, each at a multiple of 4096 from the data's start
//! ```
//!
//! All integers are little-endian. Blob offsets count from the start of the data, so that they do not depend on the
//! length of the header that holds them. Blobs are aligned for the reader's convenience in copying them by pages; the
//! file itself may lie anywhere in memory.
//!
//! [`Bundle::parse`] checks everything before it returns anything: bounds, alignment, order, checksums of the header and
//! of every blob, and the configuration. It borrows from the file and allocates for the configuration only, never by a
//! length that the file states without holding that many bytes.

use alloc::vec::Vec;
use core::{fmt, ops::Range};

use serde::{Deserialize, Serialize};

use crate::{
    PROTOCOL_VERSION,
    config::{ConfigError, Origin, RunConfig},
};

/// The first bytes of a bundle.
pub const MAGIC: [u8; 8] = *b"NESTLING";
/// Alignment of the data and of each blob in it, in bytes.
pub const BLOB_ALIGNMENT: usize = 4096;

const PREFIX_BYTES: usize = 24;

/// Which blob an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blob {
    /// The guest's kernel.
    Kernel,
    /// The guest's initial RAM disk.
    Initrd,
}

impl fmt::Display for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        })
    }
}

/// Why a file is not a bundle that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// The file ends before what it must hold.
    TooShort {
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// It does not start with [`MAGIC`].
    Magic {
        /// What is there instead.
        found: [u8; 8],
    },
    /// Another version of the protocol.
    Version {
        /// The version of the file.
        found: u32,
    },
    /// The reserved word is not zero.
    Reserved {
        /// What is there instead.
        found: u32,
    },
    /// The header is damaged.
    HeaderChecksum {
        /// What the file states.
        stated: u32,
        /// What the header gives.
        computed: u32,
    },
    /// The header's bytes are not a header.
    Header(postcard::Error),
    /// Bytes are left over after the header.
    HeaderTrailing {
        /// How many bytes are left.
        bytes: usize,
    },
    /// The configuration cannot be run.
    Config(ConfigError),
    /// A blob without a byte.
    BlobEmpty(Blob),
    /// A blob that does not start at a multiple of [`BLOB_ALIGNMENT`].
    BlobMisaligned {
        /// Which.
        blob: Blob,
        /// Its offset from the start of the data.
        offset: u64,
    },
    /// A blob that does not lie in the file, or not after the blob before it.
    BlobOutOfBounds {
        /// Which.
        blob: Blob,
        /// Its offset from the start of the data.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Where it may lie, from the start of the data.
        allowed: Range<usize>,
    },
    /// A damaged blob.
    BlobChecksum {
        /// Which.
        blob: Blob,
        /// What the header states.
        stated: u32,
        /// What its bytes give.
        computed: u32,
    },
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { need, have } => write!(f, "bundle cut off: {have} bytes, {need} needed"),
            Self::Magic { found } => write!(f, "not a bundle: starts with {found:02x?}"),
            Self::Version { found } => write!(f, "bundle of version {found}, this is version {PROTOCOL_VERSION}"),
            Self::Reserved { found } => write!(f, "bundle damaged: reserved word is {found:#x}"),
            Self::HeaderChecksum { stated, computed } => {
                write!(f, "bundle header damaged: checksum {stated:#010x} stated, {computed:#010x} computed")
            }
            Self::Header(cause) => write!(f, "bundle header not understood: {cause}"),
            Self::HeaderTrailing { bytes } => write!(f, "bundle header has {bytes} bytes left over"),
            Self::Config(cause) => write!(f, "configuration refused: {cause}"),
            Self::BlobEmpty(blob) => write!(f, "{blob} is empty"),
            Self::BlobMisaligned { blob, offset } => write!(f, "{blob} at offset {offset:#x} is not page-aligned"),
            Self::BlobOutOfBounds { blob, offset, length, allowed } => write!(
                f,
                "{blob} of {length} bytes at offset {offset:#x} is not within {:#x}..{:#x}",
                allowed.start, allowed.end
            ),
            Self::BlobChecksum { blob, stated, computed } => {
                write!(f, "{blob} damaged: checksum {stated:#010x} stated, {computed:#010x} computed")
            }
        }
    }
}

impl core::error::Error for BundleError {}

#[derive(Serialize, Deserialize)]
struct Header {
    config: RunConfig,
    kernel: Option<BlobPlace>,
    initrd: Option<BlobPlace>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct BlobPlace {
    offset: u64,
    length: u64,
    checksum: u32,
}

/// A checked bundle that borrows the kernel and the initrd from its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle<'file> {
    /// What to run.
    pub config: RunConfig,
    /// The guest's kernel, empty only for a guest that comes in by other ways; whether it is a bzImage is for the loader
    /// to say.
    pub kernel: &'file [u8],
    /// The guest's initrd, never empty if there is one.
    pub initrd: Option<&'file [u8]>,
}

impl<'file> Bundle<'file> {
    /// Writes the bundle as a file.
    ///
    /// # Errors
    /// What [`parse`](Self::parse) would refuse: a configuration out of bounds, an empty blob.
    pub fn to_bytes(&self) -> Result<Vec<u8>, BundleError> {
        self.config.validate().map_err(BundleError::Config)?;
        let kernel = match self.config.origin {
            Origin::Boot => Some(place(Blob::Kernel, self.kernel, 0)?),
            Origin::Window => None,
        };
        let initrd = match self.initrd {
            Some(bytes) => Some(place(Blob::Initrd, bytes, self.kernel.len().next_multiple_of(BLOB_ALIGNMENT))?),
            None => None,
        };
        let header = postcard::to_allocvec(&Header { config: self.config.clone(), kernel, initrd })
            .map_err(BundleError::Header)?;
        // The configuration's strings are bounded by `validate` but for the ready marker; a header of 4 GiB is not one.
        let length =
            u32::try_from(header.len()).map_err(|_| BundleError::Header(postcard::Error::SerializeBufferFull))?;

        let mut file = Vec::new();
        file.extend_from_slice(&MAGIC);
        file.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        file.extend_from_slice(&length.to_le_bytes());
        file.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        file.extend_from_slice(&[0; 4]);
        file.extend_from_slice(&header);
        for blob in [kernel.map(|_| self.kernel), self.initrd].into_iter().flatten() {
            file.resize(file.len().next_multiple_of(BLOB_ALIGNMENT), 0);
            file.extend_from_slice(blob);
        }
        Ok(file)
    }

    /// Reads and checks a bundle in place. Bytes after the last blob are ignored: a loader may round the file up.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the file.
    pub fn parse(file: &'file [u8]) -> Result<Self, BundleError> {
        let magic = array_at::<8>(file, 0)?;
        if magic != MAGIC {
            return Err(BundleError::Magic { found: magic });
        }
        let version = word_at(file, 8)?;
        if version != PROTOCOL_VERSION {
            return Err(BundleError::Version { found: version });
        }
        let header_length = word_at(file, 12)?;
        let stated = word_at(file, 16)?;
        let reserved = word_at(file, 20)?;
        if reserved != 0 {
            return Err(BundleError::Reserved { found: reserved });
        }

        let rest = &file[PREFIX_BYTES..];
        let header_length = usize::try_from(header_length).unwrap_or(usize::MAX);
        let header_bytes = rest
            .get(..header_length)
            .ok_or(BundleError::TooShort { need: PREFIX_BYTES.saturating_add(header_length), have: file.len() })?;
        let computed = crc32fast::hash(header_bytes);
        if computed != stated {
            return Err(BundleError::HeaderChecksum { stated, computed });
        }
        let (header, left) = postcard::take_from_bytes::<Header>(header_bytes).map_err(BundleError::Header)?;
        if !left.is_empty() {
            return Err(BundleError::HeaderTrailing { bytes: left.len() });
        }
        header.config.validate().map_err(BundleError::Config)?;

        let data_start = (PREFIX_BYTES + header_length).next_multiple_of(BLOB_ALIGNMENT);
        let blobs = header.kernel.is_some() || header.initrd.is_some();
        let data = match file.get(data_start..) {
            Some(data) => data,
            None if !blobs => &[],
            None => return Err(BundleError::TooShort { need: data_start, have: file.len() }),
        };
        let kernel = match (header.config.origin, header.kernel) {
            (Origin::Boot, None) => return Err(BundleError::BlobEmpty(Blob::Kernel)),
            (Origin::Boot, Some(place)) => take(data, Blob::Kernel, place, 0)?,
            (Origin::Window, _) => &[],
        };
        let initrd = match header.initrd {
            Some(place) => Some(take(data, Blob::Initrd, place, kernel.len())?),
            None => None,
        };
        Ok(Self { config: header.config, kernel, initrd })
    }
}

fn place(blob: Blob, bytes: &[u8], offset: usize) -> Result<BlobPlace, BundleError> {
    if bytes.is_empty() {
        return Err(BundleError::BlobEmpty(blob));
    }
    Ok(BlobPlace { offset: offset as u64, length: bytes.len() as u64, checksum: crc32fast::hash(bytes) })
}

/// The blob at `place`, which must not start before `free_from`.
fn take(data: &[u8], blob: Blob, place: BlobPlace, free_from: usize) -> Result<&[u8], BundleError> {
    let BlobPlace { offset, length, checksum: stated } = place;
    if length == 0 {
        return Err(BundleError::BlobEmpty(blob));
    }
    if !offset.is_multiple_of(BLOB_ALIGNMENT as u64) {
        return Err(BundleError::BlobMisaligned { blob, offset });
    }
    let bytes = usize::try_from(offset)
        .ok()
        .filter(|&start| start >= free_from)
        .zip(offset.checked_add(length).and_then(|end| usize::try_from(end).ok()))
        .and_then(|(start, end)| data.get(start..end))
        .ok_or(BundleError::BlobOutOfBounds { blob, offset, length, allowed: free_from..data.len() })?;
    let computed = crc32fast::hash(bytes);
    if computed != stated {
        return Err(BundleError::BlobChecksum { blob, stated, computed });
    }
    Ok(bytes)
}

fn array_at<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], BundleError> {
    file.get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(BundleError::TooShort { need: PREFIX_BYTES, have: file.len() })
}

fn word_at(file: &[u8], at: usize) -> Result<u32, BundleError> {
    array_at::<4>(file, at).map(u32::from_le_bytes)
}
