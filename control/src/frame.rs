//! Messages over a byte stream that may lose, damage or invent bytes.
//!
//! A frame is `0x00`, the COBS encoding of (postcard bytes, CRC-32 of them, little-endian), `0x00`. COBS output holds no
//! zero byte, so a zero is always a boundary and a receiver that starts in the middle, or that was fed a firmware's
//! greeting, is in step again at the next one. The zero *before* a frame is what ends such garbage: without it the
//! first good frame would be lost with it. Two boundaries in a row are an empty frame and are skipped.
//!
//! The checksum covers the payload and is looked at before postcard sees a byte. A decoder holds at most its limit of
//! bytes whatever it is fed: of a longer frame the rest is thrown away and one error reported for it.

use alloc::vec::Vec;
use core::{fmt, marker::PhantomData};

use serde::{Serialize, de::DeserializeOwned};

/// The limit that both sides use for one encoded frame, in bytes. A full report of a dead guest with
/// [`MAX_VCPUS`](crate::config::MAX_VCPUS) vCPUs stays well below.
pub const MAX_FRAME_BYTES: usize = 64 << 10;

const BOUNDARY: u8 = 0;
const CHECKSUM_BYTES: usize = 4;

/// Why a message could not be sent or a frame not be understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The message cannot be serialised or its bytes are not such a message.
    Payload(postcard::Error),
    /// The frame is longer than the limit.
    TooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// The bytes between two boundaries are not COBS.
    Encoding,
    /// Too short to hold a checksum.
    TooShort {
        /// Decoded bytes.
        length: usize,
    },
    /// The checksum does not belong to the payload.
    Checksum {
        /// What the frame says.
        stated: u32,
        /// What the payload gives.
        computed: u32,
    },
    /// A message was read but bytes are left over: the sender speaks another version.
    Trailing {
        /// How many bytes are left.
        bytes: usize,
    },
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Payload(cause) => write!(f, "not a message of this protocol: {cause}"),
            Self::TooLong { limit } => write!(f, "frame longer than {limit} bytes"),
            Self::Encoding => write!(f, "frame damaged: not COBS"),
            Self::TooShort { length } => write!(f, "frame of {length} bytes has no room for a checksum"),
            Self::Checksum { stated, computed } => {
                write!(f, "frame damaged: checksum {stated:#010x} stated, {computed:#010x} computed")
            }
            Self::Trailing { bytes } => write!(f, "{bytes} bytes left over after a message"),
        }
    }
}

impl core::error::Error for FrameError {}

/// Appends `message` as one frame to `out`, which is left as it was on an error.
///
/// # Errors
/// [`FrameError::Payload`] if it cannot be serialised, [`FrameError::TooLong`] beyond [`MAX_FRAME_BYTES`].
pub fn encode<M: Serialize>(message: &M, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let mut payload = postcard::to_allocvec(message).map_err(FrameError::Payload)?;
    payload.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    let encoded = cobs::encode_vec(&payload);
    if encoded.len() > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { limit: MAX_FRAME_BYTES });
    }
    out.reserve(encoded.len() + 2);
    out.push(BOUNDARY);
    out.extend_from_slice(&encoded);
    out.push(BOUNDARY);
    Ok(())
}

/// Puts messages of type `M` together from bytes as they arrive.
#[derive(Debug)]
pub struct Decoder<M> {
    buffer: Vec<u8>,
    limit: usize,
    overflowed: bool,
    message: PhantomData<fn() -> M>,
}

impl<M: DeserializeOwned> Default for Decoder<M> {
    fn default() -> Self {
        Self::with_limit(MAX_FRAME_BYTES)
    }
}

impl<M: DeserializeOwned> Decoder<M> {
    /// A decoder that keeps at most `limit` bytes of one frame.
    #[must_use]
    pub const fn with_limit(limit: usize) -> Self {
        Self { buffer: Vec::new(), limit, overflowed: false, message: PhantomData }
    }

    /// Takes all the memory that frames can ever need.
    pub fn reserve(&mut self) {
        self.buffer.reserve_exact(self.limit - self.buffer.len());
    }

    /// Takes one byte; a message or an error comes back when the byte ends a frame.
    ///
    /// An error concerns that frame only: the decoder is in step again and goes on with the next byte.
    pub fn push(&mut self, byte: u8) -> Option<Result<M, FrameError>> {
        if byte != BOUNDARY {
            if self.buffer.len() < self.limit {
                self.buffer.push(byte);
            } else {
                self.overflowed = true;
            }
            return None;
        }
        let overflowed = core::mem::take(&mut self.overflowed);
        if self.buffer.is_empty() && !overflowed {
            return None;
        }
        let result = if overflowed { Err(FrameError::TooLong { limit: self.limit }) } else { self.decode() };
        self.buffer.clear();
        Some(result)
    }

    fn decode(&mut self) -> Result<M, FrameError> {
        let length = cobs::decode_in_place(&mut self.buffer).map_err(|_| FrameError::Encoding)?;
        let (payload, checksum) = self.buffer[..length]
            .split_last_chunk::<CHECKSUM_BYTES>()
            .ok_or(FrameError::TooShort { length })
            .map(|(payload, checksum)| (payload, u32::from_le_bytes(*checksum)))?;
        let computed = crc32fast::hash(payload);
        if computed != checksum {
            return Err(FrameError::Checksum { stated: checksum, computed });
        }
        let (message, rest) = postcard::take_from_bytes(payload).map_err(FrameError::Payload)?;
        if rest.is_empty() { Ok(message) } else { Err(FrameError::Trailing { bytes: rest.len() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::Decoder;

    #[test]
    fn a_reserved_decoder_takes_no_memory_any_more() {
        let mut decoder = Decoder::<u32>::with_limit(100);
        decoder.reserve();
        let had = (decoder.buffer.capacity(), decoder.buffer.as_ptr());
        assert!(had.0 >= 100);
        for byte in (0..500).map(|byte| (byte % 200) as u8) {
            decoder.push(byte);
            decoder.reserve();
        }
        assert_eq!((decoder.buffer.capacity(), decoder.buffer.as_ptr()), had);
    }
}
