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

use nestling_control::message::ToHypervisor;
use serde::{Deserialize, Serialize};

use super::{
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
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// How far it is.
    Progress(String),
    /// It was done. The last reply.
    Done(String),
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

    fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.told.elapsed() >= TELL {
            self.told = Instant::now();
            self.reply(&Reply::Progress(text()));
        }
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
            Ok(taken) => Reply::Done(summary(&taken)),
            Err(cause) => Reply::Failed(cause.to_string()),
        },
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
        visitor.tell(|| format!("{} read", Mebibytes(tally.pages << 12)));
        visitor.is_there()
    })?;
    drop(to);
    partial.as_file().sync_all()?;
    partial.persist(file).map_err(|cause| cause.error)?;
    Ok(taken)
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
