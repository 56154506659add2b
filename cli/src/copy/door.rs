//! Where a running command hears what it is asked for: a socket in this user's runtime directory.
//!
//! The directory is `$XDG_RUNTIME_DIR/nestling`, or `/tmp/nestling-UID` where there is none; it belongs to this user alone
//! (mode 0700) or is not used. A socket in it is called after its guest. One that nobody listens on was left by a command
//! that was killed, and is replaced.
//!
//! A request is one line of JSON ([`Request`]); what is answered is lines of JSON ([`Reply`]), the last of which says how
//! it ended. A requester that hangs up takes its request back. One copy of a guest is made at a time.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, TryLockError},
    thread,
    time::{Duration, Instant},
};

use nestling_control::{
    message::{MigrateLimits, ToHypervisor},
    window::Round,
};
use serde::{Deserialize, Serialize};

use super::{
    link::Address,
    migrate::{self, Moved, News},
    pages::Tally,
    source::{Source, SourceError, Taken},
    stream::{Header, Record, Writer},
};
use crate::error::{Error, Mebibytes};

/// The longest request, in bytes.
const MAX_REQUEST: u64 = 16 << 10;
const BUFFER: usize = 1 << 20;
/// How often progress is told.
const TELL: Duration = Duration::from_millis(500);

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// A snapshot in that file (an absolute path).
    Snapshot {
        /// The file.
        file: PathBuf,
    },
    /// To give the guest to whoever listens at that address.
    Migrate {
        /// The address (an absolute path, if it is one).
        to: String,
        /// How long the guest may stand still, in milliseconds, if that can be kept.
        downtime_ms: u32,
        /// After so many rounds it is stopped whatever it still writes.
        rounds: u32,
    },
}

/// A copy in figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// All of it.
    pub total_s: f64,
    /// For how long the guest stood still.
    pub downtime_s: f64,
    /// The longest time for which a vCPU was kept from its guest before that.
    pub longest_vcpu_stall_s: f64,
    /// Rounds before the guest stood still.
    pub rounds: u32,
    /// Pages sent, those that were sent again counted again.
    pub pages: u64,
    /// Those that were sent while the guest stood still.
    pub last_pages: u64,
    /// Those that held zeros.
    pub zero_pages: u64,
    /// Those that held what others hold.
    pub repeated_pages: u64,
    /// Bytes written to the file or the link.
    pub bytes: u64,
    /// Bytes that were on huge pages before the copy.
    pub huge_bytes_before: u64,
    /// The same when the guest's logs were stopped, of a snapshot.
    pub huge_bytes_after: u64,
    /// Bytes that were put back on huge pages in place, without a fault.
    pub huge_bytes_made: u64,
}

impl Figures {
    fn new(taken: &Taken, total: Duration, downtime: Duration) -> Self {
        let Taken { copied, tally, bytes } = *taken;
        Self {
            total_s: total.as_secs_f64(),
            downtime_s: downtime.as_secs_f64(),
            longest_vcpu_stall_s: copied.longest_stall_ns as f64 / 1e9,
            rounds: copied.rounds,
            pages: tally.pages,
            last_pages: copied.last_pages,
            zero_pages: tally.zeros,
            repeated_pages: tally.same,
            bytes,
            huge_bytes_before: copied.huge_pages.before,
            huge_bytes_after: copied.huge_pages.after,
            huge_bytes_made: copied.huge_pages.made,
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// How far it is.
    Progress(String),
    /// Something worth a line.
    Line(String),
    /// It was done: in words, and in figures. The last reply.
    Done(String, Figures),
    /// It was not. The last reply.
    Failed(String),
}

/// The directory of this user's sockets.
#[must_use]
pub fn directory() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_dir()) {
        Some(path) => path.join("nestling"),
        None => format!("/tmp/nestling-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

/// The socket of a guest of that name.
#[must_use]
pub fn socket(name: &str) -> PathBuf {
    directory().join(format!("{name}.sock"))
}

/// What a door needs to know of its machine.
#[derive(Clone, Debug)]
pub struct House {
    /// The machine.
    pub source: Source,
    /// What a copy of it begins with.
    pub header: Header,
    /// Held while a copy is made.
    pub busy: Arc<Mutex<()>>,
}

/// An open door. Closed when dropped.
#[derive(Debug)]
pub struct Door {
    path: PathBuf,
}

impl Door {
    /// Opens the door of a guest of that name.
    ///
    /// # Errors
    /// If a guest of that name runs already, or the socket cannot be made.
    pub fn open(name: &str, house: House) -> Result<Self, Error> {
        let directory = directory();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(Error::io(format!("make {}", directory.display())))?;
        let owner = fs::symlink_metadata(&directory).map_err(Error::io(format!("look at {}", directory.display())))?;
        if !owner.is_dir() || owner.uid() != rustix::process::geteuid().as_raw() || owner.mode() & 0o077 != 0 {
            return Err(Error::io(format!("use {}", directory.display()))(io::Error::other(
                "it is not this user's alone",
            )));
        }
        refuse_taken(name)?;
        let path = socket(name);
        // A socket without a listener, or nothing at all.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(Error::io(format!("listen on {}", path.display())))?;
        thread::spawn(move || {
            for visitor in listener.incoming().flatten() {
                let house = house.clone();
                thread::spawn(move || serve(visitor, &house));
            }
        });
        Ok(Self { path })
    }
}

/// Refuses a name that a running guest has.
///
/// # Errors
/// One has.
pub fn refuse_taken(name: &str) -> Result<(), Error> {
    match UnixStream::connect(socket(name)) {
        Ok(_) => Err(Error::WhichGuest(format!("a guest called {name} runs already: choose another --name"))),
        Err(_) => Ok(()),
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // It may be gone, with its directory.
        let _ = fs::remove_file(&self.path);
    }
}

/// A requester.
struct Visitor {
    stream: UnixStream,
    told: Instant,
}

impl Visitor {
    fn reply(&mut self, reply: &Reply) {
        let mut line = serde_json::to_vec(reply).unwrap_or_default();
        line.push(b'\n');
        // A requester that is gone is noticed by `is_there`.
        let _ = self.stream.write_all(&line);
    }

    /// Tells how far it is, not too often; says whether it did.
    fn tell(&mut self, text: impl FnOnce() -> String) -> bool {
        let due = self.told.elapsed() >= TELL;
        if due {
            self.told = Instant::now();
            self.reply(&Reply::Progress(text()));
        }
        due
    }

    /// It says nothing after its request: whatever can be read is its end.
    fn is_there(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Err(cause) if cause.kind() == io::ErrorKind::WouldBlock)
    }
}

fn serve(stream: UnixStream, house: &House) {
    let mut line = Vec::new();
    let heard = BufReader::new(Read::take(&stream, MAX_REQUEST)).read_until(b'\n', &mut line);
    let mut visitor = Visitor { stream, told: Instant::now() };
    let request = heard.ok().and_then(|_| serde_json::from_slice(&line).ok());
    let Some(request) = request else {
        return visitor.reply(&Reply::Failed("the request is not understood".into()));
    };
    if visitor.stream.set_nonblocking(true).is_err() {
        return;
    }
    let alone = match house.busy.try_lock() {
        Ok(alone) => alone,
        Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
        Err(TryLockError::WouldBlock) => {
            return visitor.reply(&Reply::Failed("another copy of this guest is being made".into()));
        }
    };
    let reply = match request {
        Request::Snapshot { file } => match snapshot(house, &file, &mut visitor) {
            Ok(taken) => {
                let [total, downtime] = [taken.copied.total_ns, taken.copied.stopped_ns].map(Duration::from_nanos);
                Reply::Done(summary(&taken), Figures::new(&taken, total, downtime))
            }
            Err(cause) => Reply::Failed(cause.to_string()),
        },
        Request::Migrate { to, downtime_ms, rounds } => {
            let limits = MigrateLimits { downtime_ms, rounds };
            match migrate(house, &to, limits, &mut visitor) {
                Ok(moved) => Reply::Done(told(&to, &moved), Figures::new(&moved.taken, moved.total, moved.downtime)),
                Err(cause) => Reply::Failed(cause),
            }
        }
    };
    drop(alone);
    visitor.reply(&reply);
}

/// Writes a snapshot beside the file and then in its place: there is never half a snapshot under that name.
fn snapshot(house: &House, file: &Path, visitor: &mut Visitor) -> Result<Taken, SourceError> {
    let directory = file.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let partial = tempfile::Builder::new().prefix(".nestling-").tempfile_in(directory)?;
    let mut to = Writer::new(BufWriter::with_capacity(BUFFER, partial.as_file()))?;
    to.write(&Record::Header(house.header.clone()))?;
    let mut session = house.source.begin(ToHypervisor::Snapshot);
    let taken = session.copy(&mut to, &mut |_, tally| {
        let _ = visitor.tell(|| format!("{} read", Mebibytes(tally.pages << 12)));
        visitor.is_there()
    })?;
    drop(to);
    partial.as_file().sync_all()?;
    partial.persist(file).map_err(|cause| cause.error)?;
    Ok(taken)
}

/// Gives the guest away, and tells how that goes.
fn migrate(house: &House, to: &str, limits: MigrateLimits, visitor: &mut Visitor) -> Result<Moved, String> {
    let to = Address::parse(to)?;
    let began = Instant::now();
    let mut last = (began, 0);
    migrate::give(&house.source, &house.header, &to, limits, &mut |news| {
        match news {
            News::Sending(tally) => {
                let rate = (tally.pages - last.1) as f64 / 256.0 / last.0.elapsed().as_secs_f64().max(0.001);
                if visitor.tell(|| format!("{} sent, {rate:.0} MiB/s", Mebibytes(tally.pages << 12))) {
                    last = (Instant::now(), tally.pages);
                }
            }
            News::Round(round) => visitor.reply(&Reply::Line(words(round))),
            News::InDoubt => {
                let _ = visitor
                    .tell(|| "the target is lost; asking whether it runs the guest, which stands still here".into());
            }
        }
        visitor.is_there()
    })
    .map_err(|cause| format!("{cause}; the guest goes on here"))
}

/// What a migration was like.
fn told(to: &str, moved: &Moved) -> String {
    let Moved { taken: Taken { copied, tally, bytes }, downtime, total } = *moved;
    format!(
        "the guest goes on at {to}: {:.2} s, of which it stood still {:.3} s; {} pages in {} rounds, {} over the link ({} \
         pages hold zeros, {} what others hold); longest stall of a vCPU before that {:.3} s",
        total.as_secs_f64(),
        downtime.as_secs_f64(),
        tally.pages,
        copied.rounds,
        Mebibytes(bytes),
        tally.zeros,
        tally.same,
        copied.longest_stall_ns as f64 / 1e9,
    )
}

/// A round, for people.
fn words(round: &Round) -> String {
    let seconds = (round.ns as f64 / 1e9).max(1e-9);
    format!(
        "round {}: {} pages in {seconds:.2} s ({:.0} MiB/s), {} written meanwhile ({:.0} MiB/s), {} used; stopping now would \
         take {:.3} s{}",
        round.number,
        round.pages,
        round.pages as f64 / 256.0 / seconds,
        round.dirty,
        round.dirty as f64 / 256.0 / seconds,
        Mebibytes(round.used << 12),
        round.downtime_ns as f64 / 1e9,
        if round.throttle > 0 {
            format!("; the guest is kept from running {} %", round.throttle)
        } else {
            String::new()
        },
    )
}

/// What a snapshot was like.
fn summary(taken: &Taken) -> String {
    let Taken { copied, tally, bytes } = taken;
    let Tally { pages, zeros, same, .. } = tally;
    format!(
        "{} in {:.2} s: {pages} pages, of which {zeros} hold zeros and {same} what others hold; {} written; the guest stood \
         still for {:.3} s",
        Mebibytes(pages << 12),
        copied.total_ns as f64 / 1e9,
        Mebibytes(*bytes),
        copied.stopped_ns as f64 / 1e9,
    )
}

/// Opens a file for reading and says what it holds.
///
/// # Errors
/// If it cannot be read or does not begin as a copy.
pub fn open_copy(path: &Path) -> Result<(super::stream::Reader<BufReader<File>>, Header), Error> {
    let refused = |cause: String| Error::Copy { option: "--restore", path: path.to_owned(), cause };
    let file = File::open(path).map_err(|cause| Error::File { option: "--restore", path: path.to_owned(), cause })?;
    let mut reader = super::stream::Reader::new(BufReader::with_capacity(BUFFER, file))
        .map_err(|cause| refused(cause.to_string()))?;
    match reader.read() {
        Ok(Record::Header(header)) => Ok((reader, header)),
        Ok(_) => Err(refused("it does not begin as a copy does".into())),
        Err(cause) => Err(refused(cause.to_string())),
    }
}
