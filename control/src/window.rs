//! The window: memory that command and hypervisor share, for what is too much for the byte stream of [`crate::frame`].
//!
//! Under QEMU it is the second BAR of an `ivshmem-plain` device on one side and a file on the other. It holds a ring of
//! slots for each direction. A slot is a page with one message and [`SLOT_PAGES`] pages of data that belong to it. A
//! ring has one producer and one consumer; each writes one counter and reads the other's:
//!
//! ```text
//! 0      magic, version
//! 64     produced, by the hypervisor      128  consumed, by the command
//! 192    produced, by the command         256  consumed, by the hypervisor
//! 320    abort: the command wants no more of this session
//! 4096   slots to the command, then slots to the hypervisor
//! ```
//!
//! **Sessions.** The command sets all words to zero, then asks for a session by [`ToHypervisor`](crate::message::ToHypervisor).
//! It ends with the hypervisor's last message ([`FromHypervisor::is_last`]), which comes whatever happens; before that the
//! command must not begin another one. Between sessions the hypervisor does not touch the window.
//!
//! **Trust.** None: counters, lengths and messages are checked by whoever reads them, and everything that is checked is
//! copied out before. Data are bytes, and a side that scribbles over them spoils what it gets or gives itself.

use alloc::{string::String, vec::Vec};
use core::{fmt, marker::PhantomData};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::PROTOCOL_VERSION;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Pages of data in a slot.
pub const SLOT_PAGES: usize = 32;
/// Bytes of data in a slot.
pub const DATA_BYTES: usize = SLOT_PAGES * PAGE_BYTES;
/// Bytes of the window.
pub const WINDOW_BYTES: usize = 8 << 20;

const SLOT_BYTES: usize = PAGE_BYTES + DATA_BYTES;
/// Slots of one direction.
const SLOTS: u32 = ((WINDOW_BYTES - PAGE_BYTES) / 2 / SLOT_BYTES) as u32;
const MAGIC: [u8; 8] = *b"NESTWIND";
const VERSION: usize = 8;
const ABORT: usize = 320;
const LENGTH_BYTES: usize = 4;

const _: () = assert!(PAGE_BYTES + 2 * SLOTS as usize * SLOT_BYTES <= WINDOW_BYTES && SLOTS > 1);

/// Memory that another program uses at the same time. Offsets are within [`WINDOW_BYTES`].
pub trait Shared {
    /// Reads a word; what the other side wrote before it wrote that word is seen after it.
    fn load(&self, offset: usize) -> u32;
    /// Writes a word; what was written before is seen by who reads it.
    fn store(&self, offset: usize, value: u32);
    /// Copies bytes out.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies bytes in.
    fn write(&self, offset: usize, bytes: &[u8]);
    /// Lets `fill` write `length` bytes.
    fn fill(&self, offset: usize, length: usize, fill: &mut dyn FnMut(&mut [u8])) {
        let mut bytes = alloc::vec![0; length];
        fill(&mut bytes);
        self.write(offset, &bytes);
    }
}

/// A run of guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first.
    pub start: u64,
    /// How many.
    pub count: u32,
}

/// What the hypervisor sends through the window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHypervisor {
    /// Guest frames; their content is the slot's data, in this order.
    Pages(Vec<Run>),
    /// A round over the guest's memory is over, and the guest ran on meanwhile.
    Round(Round),
    /// A piece of the machine's state: that many bytes of data. The pieces follow one another.
    State(u32),
    /// All that there is was sent; the guest stands still. (Not for a snapshot, after which it goes on.)
    Sent(Copied),
    /// Last: a snapshot is complete, and the guest goes on.
    Complete(Copied),
    /// Last: the guest goes on here; why it was not given away, or not copied.
    Kept(String),
    /// Last: the guest has been given away, and this machine ends.
    Given,
    /// The machine whose state came in is ready to run.
    Ready,
    /// Last: it runs.
    Running,
    /// Last: what came in cannot be run.
    Refused(String),
}

impl FromHypervisor {
    /// Whether nothing follows in this session.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        matches!(self, Self::Complete(_) | Self::Kept(_) | Self::Given | Self::Running | Self::Refused(_))
    }
}

/// What a round over the guest's memory has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 1.
    pub number: u32,
    /// Pages that it sent.
    pub pages: u64,
    /// Pages that the guest has written since they were sent.
    pub dirty: u64,
    /// Pages that the guest has used meanwhile, as far as accessed bits tell: its working set.
    pub used: u64,
    /// Its length, in nanoseconds.
    pub ns: u64,
    /// How long the guest would have to stand still if the rest were sent now, in nanoseconds.
    pub downtime_ns: u64,
    /// How much of its time the guest is kept from running, in percent.
    pub throttle: u8,
}

/// What a whole copy has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// Pages sent, those that were sent again counted again.
    pub pages: u64,
    /// Of these, the ones that were sent while the guest stood still.
    pub last_pages: u64,
    /// Rounds before the guest stood still.
    pub rounds: u32,
    /// How long the guest has stood still by now, in nanoseconds.
    pub stopped_ns: u64,
    /// From the request to this message, in nanoseconds.
    pub total_ns: u64,
    /// The longest time for which a vCPU was kept from its guest while the copy was made behind its back.
    pub longest_stall_ns: u64,
    /// What became of huge pages; of a snapshot that is complete.
    pub huge_pages: HugePages,
}

/// Bytes that the guest's memory has on huge pages, which dirty logs split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// Before there were logs.
    pub before: u64,
    /// When there were none any more.
    pub after: u64,
    /// Made whole in place, without a fault. A page of 1 GiB counts once as such, and once as its parts.
    pub made: u64,
}

/// What the command sends through the window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCommand {
    /// Guest frames; their content is the slot's data, in this order.
    Pages(Vec<Run>),
    /// Guest frames that hold zeros.
    Zeros(Vec<Run>),
    /// A guest frame that holds what another one, which was sent before, holds now: (frame, other).
    Same(Vec<(u64, u64)>),
    /// A piece of the machine's state: that many bytes of data.
    State(u32),
    /// The state is complete.
    End,
    /// Run it. (To a machine that is ready.)
    Run,
    /// The other machine has it: end. (To a machine whose guest stands still.)
    GiveAway,
}

/// Why a message could not be understood or sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowError {
    /// The window does not begin as one does.
    NoWindow,
    /// The other side speaks another version.
    Version {
        /// The version found.
        found: u32,
    },
    /// The counters contradict each other.
    Counters {
        /// What was produced.
        produced: u32,
        /// What was consumed.
        consumed: u32,
    },
    /// A message that is none.
    Message(postcard::Error),
    /// A message that states more data, or other, than a slot holds.
    Data,
    /// A message that does not fit into its page.
    TooLong,
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoWindow => write!(f, "the shared window is not set up"),
            Self::Version { found } => {
                write!(f, "shared window of version {found}, this is version {PROTOCOL_VERSION}")
            }
            Self::Counters { produced, consumed } => {
                write!(f, "shared window damaged: {produced} messages produced, {consumed} consumed")
            }
            Self::Message(cause) => write!(f, "shared window: not a message of this protocol: {cause}"),
            Self::Data => write!(f, "shared window: a message with data that no slot holds"),
            Self::TooLong => write!(f, "shared window: a message is too long"),
        }
    }
}

impl core::error::Error for WindowError {}

/// Which way messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the hypervisor to the command.
    ToCommand,
    /// From the command to the hypervisor.
    ToHypervisor,
}

impl Way {
    const fn produced(self) -> usize {
        match self {
            Self::ToCommand => 64,
            Self::ToHypervisor => 192,
        }
    }

    const fn consumed(self) -> usize {
        self.produced() + 64
    }

    const fn slot(self, number: u32) -> usize {
        let ring = match self {
            Self::ToCommand => 0,
            Self::ToHypervisor => SLOTS,
        };
        PAGE_BYTES + (ring + number % SLOTS) as usize * SLOT_BYTES
    }
}

/// Sets the window up for a session. For the command, when no session goes on.
pub fn open(window: &impl Shared) {
    for way in [Way::ToCommand, Way::ToHypervisor] {
        window.store(way.produced(), 0);
        window.store(way.consumed(), 0);
    }
    window.store(ABORT, 0);
    window.write(0, &MAGIC);
    window.store(VERSION, PROTOCOL_VERSION);
}

/// Looks whether this is a window of this version.
///
/// # Errors
/// Why it is not.
pub fn check(window: &impl Shared) -> Result<(), WindowError> {
    let mut magic = [0; 8];
    window.read(0, &mut magic);
    let found = window.load(VERSION);
    if magic != MAGIC {
        return Err(WindowError::NoWindow);
    }
    if found == PROTOCOL_VERSION { Ok(()) } else { Err(WindowError::Version { found }) }
}

/// The command wants no more of this session.
pub fn abort(window: &impl Shared) {
    window.store(ABORT, 1);
}

/// Whether the command wants no more of this session.
pub fn aborted(window: &impl Shared) -> bool {
    window.load(ABORT) != 0
}

/// The producing end of a ring.
#[derive(Debug)]
pub struct Sender<M> {
    way: Way,
    produced: u32,
    message: PhantomData<fn(M)>,
}

impl<M: Serialize> Sender<M> {
    /// The end for a session that was just opened.
    #[must_use]
    pub const fn new(way: Way) -> Self {
        Self { way, produced: 0, message: PhantomData }
    }

    /// Whether there is room for a message.
    ///
    /// # Errors
    /// The other side's counter is wrong.
    pub fn has_room(&self, window: &impl Shared) -> Result<bool, WindowError> {
        let consumed = window.load(self.way.consumed());
        match self.produced.wrapping_sub(consumed) {
            0..SLOTS => Ok(true),
            SLOTS => Ok(false),
            _ => Err(WindowError::Counters { produced: self.produced, consumed }),
        }
    }

    /// Messages that the other side has not taken in yet.
    pub fn unread(&self, window: &impl Shared) -> u32 {
        self.produced.wrapping_sub(window.load(self.way.consumed()))
    }

    /// Sends a message with `length` bytes of data, which `fill` writes. Only when there is room.
    ///
    /// # Errors
    /// The message or its data are too long.
    pub fn send(
        &mut self,
        window: &impl Shared,
        message: &M,
        length: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), WindowError> {
        let bytes = postcard::to_allocvec(message).map_err(WindowError::Message)?;
        if bytes.len() > PAGE_BYTES - LENGTH_BYTES || length > DATA_BYTES {
            return Err(WindowError::TooLong);
        }
        let slot = self.way.slot(self.produced);
        window.write(slot, &(bytes.len() as u32).to_le_bytes());
        window.write(slot + LENGTH_BYTES, &bytes);
        if length > 0 {
            window.fill(slot + PAGE_BYTES, length, fill);
        }
        self.produced = self.produced.wrapping_add(1);
        window.store(self.way.produced(), self.produced);
        Ok(())
    }
}

/// The consuming end of a ring.
#[derive(Debug)]
pub struct Receiver<M> {
    way: Way,
    consumed: u32,
    message: PhantomData<fn() -> M>,
}

impl<M: DeserializeOwned> Receiver<M> {
    /// The end for a session that was just opened.
    #[must_use]
    pub const fn new(way: Way) -> Self {
        Self { way, consumed: 0, message: PhantomData }
    }

    /// The next message, if there is one, and the offset of its data, which stay until [`Receiver::done`].
    ///
    /// # Errors
    /// The other side's counter or message is wrong.
    pub fn peek(&self, window: &impl Shared) -> Result<Option<(M, usize)>, WindowError> {
        let produced = window.load(self.way.produced());
        match produced.wrapping_sub(self.consumed) {
            0 => return Ok(None),
            1..=SLOTS => {}
            _ => return Err(WindowError::Counters { produced, consumed: self.consumed }),
        }
        let slot = self.way.slot(self.consumed);
        let mut page = [0; PAGE_BYTES];
        window.read(slot, &mut page);
        let (length, rest) = page.split_first_chunk::<LENGTH_BYTES>().ok_or(WindowError::TooLong)?;
        let bytes = rest.get(..u32::from_le_bytes(*length) as usize).ok_or(WindowError::TooLong)?;
        let message = postcard::from_bytes(bytes).map_err(WindowError::Message)?;
        Ok(Some((message, slot + PAGE_BYTES)))
    }

    /// Gives the slot of the message that [`Receiver::peek`] showed back.
    pub fn done(&mut self, window: &impl Shared) {
        self.consumed = self.consumed.wrapping_add(1);
        window.store(self.way.consumed(), self.consumed);
    }
}

/// The frames of runs whose content fits into a slot's data.
///
/// # Errors
/// There are more, or a run leaves the space of frame numbers.
pub fn frames(runs: &[Run]) -> Result<Vec<u64>, WindowError> {
    let frames = listed(runs)?;
    if frames.len() > SLOT_PAGES { Err(WindowError::Data) } else { Ok(frames) }
}

/// Frames listed without content: at most that many in one message.
pub const LISTED_FRAMES: usize = 16 * SLOT_PAGES;

/// The frames of runs without content.
///
/// # Errors
/// As [`frames`], with the bound [`LISTED_FRAMES`].
pub fn listed(runs: &[Run]) -> Result<Vec<u64>, WindowError> {
    let total = runs.iter().fold(0u64, |sum, run| sum.saturating_add(u64::from(run.count)));
    if total > LISTED_FRAMES as u64 || runs.iter().any(|run| run.start.checked_add(u64::from(run.count)).is_none()) {
        return Err(WindowError::Data);
    }
    Ok(runs.iter().flat_map(|run| run.start..run.start + u64::from(run.count)).collect())
}

/// Frames, in their order, as runs.
#[must_use]
pub fn runs(frames: &[u64]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &frame in frames {
        match runs.last_mut() {
            Some(run) if run.start + u64::from(run.count) == frame => run.count += 1,
            _ => runs.push(Run { start: frame, count: 1 }),
        }
    }
    runs
}
