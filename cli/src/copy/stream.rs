//! The form of a copied guest, in a file and on a socket: a prefix, then records.
//!
//! ```text
//! prefix   magic "NESTCOPY", version u32
//! record   kind u8, length u32, checksum u32, that many bytes
//! ```
//!
//! Numbers are little-endian. The checksum (CRC-32) covers the record's number in the stream, its kind, its length and its
//! bytes, so that a record that is damaged, missing, out of place or too much is noticed where it is read. A copy is
//! complete when its [`Record::End`] was read, which says how much there was. No record is longer than
//! [`MAX_RECORD_BYTES`]: whoever reads needs that much memory and no more, whatever the stream says.

use std::io::{self, Read, Write};

use nestling_control::config::RunConfig;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// First bytes.
const MAGIC: [u8; 8] = *b"NESTCOPY";
/// The version of this form, of what is in it, and of the hypervisor's part of that.
pub const VERSION: u32 = 1;
/// The longest record, in bytes.
pub const MAX_RECORD_BYTES: usize = 1 << 20;
const HEAD_BYTES: usize = 9;

/// What a copy begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// How the guest was run. Where it comes from and what was fired at it is not passed on.
    pub config: RunConfig,
    /// Whether its console will have a verdict.
    pub check: bool,
    /// Tells one copy from another.
    pub number: u64,
}

/// How a page is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// It holds zeros now, and held something else before.
    Zero(u64),
    /// It holds what another frame, which came before, holds now.
    Same(u64, u64),
    /// Its bytes as they are.
    Plain(u64),
    /// Its bytes compressed to so many.
    Packed(u64, u16),
}

/// What the receiving side of a migration answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It will take the guest.
    Accepted,
    /// It will not, or can not go on.
    Refused(String),
    /// It has everything, and waits for the word.
    Ready,
    /// It runs the guest.
    Running,
    /// It never ran that guest and never will.
    Never,
}

/// How much there was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    /// Bytes of the machine's state.
    pub state: u64,
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The first.
    Header(Header),
    /// Pages, with the bytes of those that have some.
    Pages(Vec<Entry>, Vec<u8>),
    /// A piece of the machine's state.
    State(Vec<u8>),
    /// The copy is complete.
    End(Total),
    /// Run it.
    Commit,
    /// Asked on a connection of its own: what became of the guest of that number?
    Query(u64),
    /// From the receiving side.
    Answer(Answer),
}

/// Why a stream cannot be read.
#[derive(Debug, Error)]
pub enum StreamError {
    /// It does not begin as one.
    #[error("not a copy of a guest")]
    NotACopy,
    /// Another version.
    #[error("a copy of version {0}, this command reads version {VERSION}")]
    Version(u32),
    /// It ends too early.
    #[error("cut off in record {0}")]
    CutOff(u64),
    /// A record is damaged, or not where it belongs.
    #[error("damaged in record {0}: its checksum is wrong")]
    Damaged(u64),
    /// A record is longer than any.
    #[error("damaged in record {0}: {1} bytes")]
    TooLong(u64, u32),
    /// A record's bytes are no such record.
    #[error("record {0} is not understood")]
    Garbage(u64),
    /// A record that does not belong where it is.
    #[error("record {0} does not belong there")]
    OutOfPlace(u64),
    /// Reading or writing failed.
    #[error("{0}")]
    Io(io::Error),
}

/// Writes records.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    number: u64,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(mut to: W) -> io::Result<Self> {
        to.write_all(&MAGIC)?;
        to.write_all(&VERSION.to_le_bytes())?;
        Ok(Self { to, number: 0, bytes: (MAGIC.len() + size_of::<u32>()) as u64 })
    }

    /// Writes a record.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        let serialised = |value: postcard::Result<Vec<u8>>| value.map_err(|cause| io::Error::other(cause.to_string()));
        let (kind, bytes) = match record {
            Record::Header(header) => (1, serialised(postcard::to_allocvec(header))?),
            Record::Pages(entries, data) => {
                let mut bytes = serialised(postcard::to_allocvec(entries))?;
                bytes.extend_from_slice(data);
                (2, bytes)
            }
            Record::State(bytes) => (3, bytes.clone()),
            Record::End(total) => (4, serialised(postcard::to_allocvec(total))?),
            Record::Commit => (5, Vec::new()),
            Record::Query(number) => (6, number.to_le_bytes().to_vec()),
            Record::Answer(answer) => (7, serialised(postcard::to_allocvec(answer))?),
        };
        let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut head = [kind, 0, 0, 0, 0, 0, 0, 0, 0];
        head[1..5].copy_from_slice(&length.to_le_bytes());
        head[5..].copy_from_slice(&checksum(self.number, kind, &bytes).to_le_bytes());
        self.to.write_all(&head)?;
        self.to.write_all(&bytes)?;
        self.number += 1;
        self.bytes += (HEAD_BYTES + bytes.len()) as u64;
        Ok(())
    }

    /// Lets everything out.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// Bytes written so far.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is written to.
    pub fn into_inner(self) -> W {
        self.to
    }
}

/// Reads records.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    number: u64,
}

impl<R: Read> Reader<R> {
    /// Begins to read a stream.
    ///
    /// # Errors
    /// If it is none.
    pub fn new(mut from: R) -> Result<Self, StreamError> {
        let mut prefix = [0; MAGIC.len() + size_of::<u32>()];
        from.read_exact(&mut prefix).map_err(|cause| match cause.kind() {
            io::ErrorKind::UnexpectedEof => StreamError::NotACopy,
            _ => StreamError::Io(cause),
        })?;
        let (magic, version) = prefix.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(StreamError::NotACopy);
        }
        let version = version.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
        if version == VERSION { Ok(Self { from, number: 0 }) } else { Err(StreamError::Version(version)) }
    }

    /// The number of the next record.
    #[must_use]
    pub const fn number(&self) -> u64 {
        self.number
    }

    /// Reads a record.
    ///
    /// # Errors
    /// What is wrong with it. Nothing can be read after an error.
    pub fn read(&mut self) -> Result<Record, StreamError> {
        let number = self.number;
        let failed = |cause: io::Error| match cause.kind() {
            io::ErrorKind::UnexpectedEof => StreamError::CutOff(number),
            _ => StreamError::Io(cause),
        };
        let mut head = [0; HEAD_BYTES];
        self.from.read_exact(&mut head).map_err(failed)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (kind, length, stated) = (head[0], word(1), word(5));
        if length as usize > MAX_RECORD_BYTES {
            return Err(StreamError::TooLong(number, length));
        }
        let mut bytes = vec![0; length as usize];
        self.from.read_exact(&mut bytes).map_err(failed)?;
        if checksum(number, kind, &bytes) != stated {
            return Err(StreamError::Damaged(number));
        }
        self.number += 1;
        decode(kind, bytes).ok_or(StreamError::Garbage(number))
    }
}

fn decode(kind: u8, bytes: Vec<u8>) -> Option<Record> {
    /// Everything, and nothing left over.
    fn whole<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Option<T> {
        postcard::take_from_bytes(bytes).ok().filter(|(_, rest)| rest.is_empty()).map(|(value, _)| value)
    }
    Some(match kind {
        1 => Record::Header(whole(&bytes)?),
        2 => {
            let (entries, data) = postcard::take_from_bytes(&bytes).ok()?;
            Record::Pages(entries, data.to_vec())
        }
        3 => Record::State(bytes),
        4 => Record::End(whole(&bytes)?),
        5 if bytes.is_empty() => Record::Commit,
        6 => Record::Query(u64::from_le_bytes(bytes.try_into().ok()?)),
        7 => Record::Answer(whole(&bytes)?),
        _ => return None,
    })
}

fn checksum(number: u64, kind: u8, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(&[kind]);
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let entries = vec![Entry::Zero(1), Entry::Same(7, 1), Entry::Plain(9), Entry::Packed(1 << 40, 5)];
        vec![
            Record::Query(77),
            Record::Pages(entries, vec![5; 4101]),
            Record::State(vec![1, 2, 3]),
            Record::End(Total { state: 3 }),
            Record::Commit,
            Record::Answer(Answer::Refused("no".into())),
        ]
    }

    fn written() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).expect("memory takes everything");
        records().iter().for_each(|record| writer.write(record).expect("memory takes everything"));
        assert_eq!(writer.bytes(), writer.to.len() as u64);
        writer.into_inner()
    }

    fn all(bytes: &[u8]) -> Result<Vec<Record>, StreamError> {
        let mut reader = Reader::new(bytes)?;
        (0..records().len()).map(|_| reader.read()).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(all(&written()).expect("whole"), records());
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let bytes = written();
        for length in 0..bytes.len() {
            let found = all(&bytes[..length]);
            assert!(matches!(found, Err(StreamError::NotACopy | StreamError::CutOff(_))), "{length}: {found:?}");
        }
        for at in (0..bytes.len()).filter(|at| at % 97 == 0 || *at < 60) {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(all(&damaged).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn records_cannot_change_places_or_go_missing() {
        let mut first = Writer::new(Vec::new()).expect("memory takes everything");
        first.write(&Record::State(vec![1])).expect("memory takes everything");
        let one = first.into_inner();
        let mut second = one.clone();
        // The same record again: right by itself, but not as the second.
        second.extend_from_slice(&one[12..]);
        let mut reader = Reader::new(&second[..]).expect("a stream");
        assert!(reader.read().is_ok());
        assert!(matches!(reader.read(), Err(StreamError::Damaged(1))));
    }

    #[test]
    fn another_version_and_an_endless_record_are_named() {
        let mut bytes = written();
        bytes[8] = 9;
        assert!(matches!(all(&bytes), Err(StreamError::Version(9))));
        let mut bytes = written();
        bytes[13..17].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(all(&bytes), Err(StreamError::TooLong(0, u32::MAX))));
    }
}
