//! What two commands say to each other until exactly one of their machines runs the guest.
//!
//! ```text
//!   source                                     target
//!   header          ──────────────────────►    can it run here?
//!                   ◄──────────────────────    Accepted, or Refused
//!   pages, state    ──────────────────────►    into a machine that waits
//!   End (the guest stands still)
//!                   ◄──────────────────────    Ready
//!   Commit          ──────────────────────►    it runs from here on
//!                   ◄──────────────────────    Running
//!   ends its machine
//! ```
//!
//! **Before Commit** the guest is the source's. Whatever fails (the link, the target, the copy), the source's guest goes on as
//! if nothing had been, and the target's machine, which has never run, ends.
//!
//! **Behind Commit** the source no longer knows by itself: Commit may have arrived or not. Its guest stands still until it
//! knows. It asks the target on a new connection ([`Record::Query`]): *Running* means that its own machine ends; *Never* is a
//! promise that the target will not run the guest, however late a Commit arrives, so that the source's goes on. If nobody
//! listens at the target's address any more, the command there is gone, and its machine with it, which it takes along
//! however it ends: then the source's guest goes on, too, from where it stood still; what the target's had done in between
//! is lost with it. A target that cannot be reached at all may run: the source keeps asking, and its guest standing. So
//! never do two of them run. (One wrong belief makes two of one: that a host which refuses connections has no command on
//! it, where something between the two refuses in its name.)
//!
//! The target's fate is decided in one place ([`Fate`]), under a lock: by Commit, or by the first query that comes before it.

use std::{
    io::{self, BufReader, BufWriter},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nestling_control::{
    message::{MigrateLimits, ToHypervisor},
    window::Round,
};
use thiserror::Error;

use super::{
    link::{Address, Link, Listener},
    pages::Tally,
    sink::{Sink, SinkError},
    source::{Source, SourceError, Taken},
    stream::{Answer, Header, Reader, Record, StreamError, Writer},
};

const BUFFER: usize = 1 << 20;
/// How long the other side may be silent. It starts a machine in that time, and takes a guest's state in.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long after Commit the answer may take, before the target is asked again.
const RUNNING_WITHIN: Duration = Duration::from_secs(20);
/// Between two questions.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Why a guest was not given away. It goes on where it was.
#[derive(Debug, Error)]
pub enum MigrateError {
    /// Nobody listens there.
    #[error("{0}: {1}")]
    Connect(Address, io::Error),
    /// The target does not take it.
    #[error("the target refuses: {0}")]
    Refused(String),
    /// The target said what does not belong there.
    #[error("the target said something out of place")]
    OutOfPlace,
    /// The link failed.
    #[error("the target is lost: {0}")]
    Link(#[from] StreamError),
    /// The link failed.
    #[error("the target is lost: {0}")]
    Write(#[from] io::Error),
    /// The copy failed.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// The target was lost behind Commit, and has never run the guest or is gone.
    #[error("the target was lost when it was about to run the guest, and does not run it")]
    Lost,
}

/// What a migration was like.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// What was sent.
    pub taken: Taken,
    /// From the guest's stop here to its first instruction there, as this side saw it.
    pub downtime: Duration,
    /// All of it.
    pub total: Duration,
}

/// What a migration tells on its way.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// Bytes and pages sent so far.
    Sending(&'a Tally),
    /// A round is over.
    Round(&'a Round),
    /// Nobody knows whether the target runs the guest; it is being asked.
    InDoubt,
}

/// Gives the guest of `source` to whoever listens at `to`. `watch` hears how it goes, and says whether it is still wanted.
///
/// # Errors
/// Why it was not given away; it goes on here then.
pub fn give(
    source: &Source,
    header: &Header,
    to: &Address,
    limits: MigrateLimits,
    watch: &mut dyn FnMut(News<'_>) -> bool,
) -> Result<Moved, MigrateError> {
    let began = Instant::now();
    let link = to.connect().map_err(|cause| MigrateError::Connect(to.clone(), cause))?;
    link.set_patience(PATIENCE)?;
    let mut writer = Writer::new(BufWriter::with_capacity(BUFFER, link.share()?))?;
    writer.write(&Record::Header(header.clone()))?;
    writer.flush()?;
    let mut reader = Reader::new(BufReader::new(link.share()?))?;
    expect(reader.read()?, &Answer::Accepted)?;

    let mut session = source.begin(ToHypervisor::Migrate(limits));
    let copied = session.copy(&mut writer, &mut |round, tally| match round {
        Some(round) => watch(News::Round(round)),
        None => watch(News::Sending(tally)),
    });
    let taken = match copied {
        Ok(taken) => taken,
        // A target that gives up says why before it hangs up.
        Err(SourceError::Write(cause)) => {
            return Err(match reader.read() {
                Ok(Record::Answer(Answer::Refused(why))) => MigrateError::Refused(why),
                _ => MigrateError::Write(cause),
            });
        }
        Err(cause) => return Err(cause.into()),
    };
    let stopped = Instant::now();
    expect(reader.read()?, &Answer::Ready)?;
    if !watch(News::Sending(&taken.tally)) {
        return Err(SourceError::GivenUp.into());
    }
    link.set_patience(RUNNING_WITHIN)?;
    // From here on whoever asks for it to be given up comes too late.
    let told = writer.write(&Record::Commit).and_then(|()| writer.flush());
    let runs = match told.map_err(StreamError::Io).and_then(|()| reader.read()) {
        Ok(Record::Answer(Answer::Running)) => true,
        _ => {
            drop((reader, writer, link));
            ask(to, header.number, source, watch)
        }
    };
    if !runs {
        return Err(MigrateError::Lost);
    }
    let downtime = Duration::from_nanos(taken.copied.stopped_ns) + stopped.elapsed();
    session.give_away()?;
    Ok(Moved { taken, downtime, total: began.elapsed() })
}

fn expect(record: Record, wanted: &Answer) -> Result<(), MigrateError> {
    match record {
        Record::Answer(answer) if answer == *wanted => Ok(()),
        Record::Answer(Answer::Refused(why)) => Err(MigrateError::Refused(why)),
        _ => Err(MigrateError::OutOfPlace),
    }
}

/// Asks the target whether it runs the guest, until that is known.
fn ask(to: &Address, number: u64, source: &Source, watch: &mut dyn FnMut(News<'_>) -> bool) -> bool {
    while source.is_alive() {
        match query(to, number) {
            Ok(Answer::Running) => return true,
            Ok(Answer::Never) => return false,
            Ok(_) => {}
            // Nobody is there: neither is the machine that would have to run it.
            Err(StreamError::Io(cause))
                if matches!(cause.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) =>
            {
                return false;
            }
            Err(_) => {}
        }
        // Whether anybody still wants it is no longer the question.
        let _ = watch(News::InDoubt);
        thread::sleep(ASK_EVERY);
    }
    false
}

fn query(to: &Address, number: u64) -> Result<Answer, StreamError> {
    let link = to.connect().map_err(StreamError::Io)?;
    link.set_patience(RUNNING_WITHIN).map_err(StreamError::Io)?;
    let mut writer = Writer::new(link.share().map_err(StreamError::Io)?).map_err(StreamError::Io)?;
    writer.write(&Record::Query(number)).and_then(|()| writer.flush()).map_err(StreamError::Io)?;
    let mut reader = Reader::new(link)?;
    match reader.read()? {
        Record::Answer(answer) => Ok(answer),
        _ => Err(StreamError::OutOfPlace(0)),
    }
}

/// Whether a target runs its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Not decided.
    Open,
    /// It does, or is about to.
    Running,
    /// It never will.
    Never,
}

/// A target that has been asked to take a guest.
#[derive(Debug)]
pub struct Arrival {
    /// What comes.
    pub header: Header,
    reader: Reader<BufReader<Link>>,
    writer: Writer<Link>,
    listener: Listener,
}

/// Waits for a guest. Who asks for another one's fate meanwhile is told that it never ran here.
///
/// # Errors
/// If nobody can be waited for.
pub fn wait(listener: Listener) -> io::Result<Arrival> {
    loop {
        let link = listener.accept()?;
        // Somebody who says nothing understandable is let go; the next one may.
        if let Ok(Some((header, reader, writer))) = hear(link, |_| Answer::Never) {
            return Ok(Arrival { header, reader, writer, listener });
        }
    }
}

type Heard = (Header, Reader<BufReader<Link>>, Writer<Link>);

/// Hears who is there: a guest's header, or a question, which is answered.
fn hear(link: Link, answer: impl FnOnce(u64) -> Answer) -> Result<Option<Heard>, StreamError> {
    link.set_patience(PATIENCE).map_err(StreamError::Io)?;
    let share = link.share().map_err(StreamError::Io)?;
    let mut reader = Reader::new(BufReader::with_capacity(BUFFER, link))?;
    let mut writer = Writer::new(share).map_err(StreamError::Io)?;
    match reader.read()? {
        Record::Header(header) => Ok(Some((header, reader, writer))),
        Record::Query(number) => {
            writer.write(&Record::Answer(answer(number))).and_then(|()| writer.flush()).map_err(StreamError::Io)?;
            Ok(None)
        }
        _ => Err(StreamError::OutOfPlace(0)),
    }
}

impl Arrival {
    /// Tells the source why it cannot be taken.
    pub fn refuse(mut self, why: String) {
        // The source keeps its guest whether it hears this or not.
        let _ = self.writer.write(&Record::Answer(Answer::Refused(why))).and_then(|()| self.writer.flush());
    }

    /// Takes it: the machine of `sink` has been started for it. Returns when it runs.
    ///
    /// # Errors
    /// Why it does not, and never will.
    pub fn take(self, sink: &mut Sink) -> Result<(), SinkError> {
        let Self { header, mut reader, mut writer, listener } = self;
        let fate = Arc::new(Mutex::new(Fate::Open));
        answer_questions(listener, header.number, Arc::clone(&fate));
        let taken = tell(&mut writer, Answer::Accepted)
            .and_then(|()| sink.fill(&mut reader))
            .and_then(|()| tell(&mut writer, Answer::Ready))
            .and_then(|()| match reader.read()? {
                Record::Commit if decide(&fate, Fate::Running) == Fate::Running => Ok(()),
                _ => Err(StreamError::OutOfPlace(reader.number()).into()),
            });
        if let Err(cause) = taken {
            decide(&fate, Fate::Never);
            sink.give_up();
            // If it is still there, it hears why.
            let _ = tell(&mut writer, Answer::Refused(cause.to_string()));
            return Err(cause);
        }
        sink.run()?;
        // If this does not arrive, the source asks.
        let _ = tell(&mut writer, Answer::Running);
        Ok(())
    }
}

fn tell(writer: &mut Writer<Link>, answer: Answer) -> Result<(), SinkError> {
    let told = writer.write(&Record::Answer(answer)).and_then(|()| writer.flush());
    told.map_err(|cause| StreamError::Io(cause).into())
}

/// Decides a fate if it is open; says how it was decided.
fn decide(fate: &Mutex<Fate>, how: Fate) -> Fate {
    let mut fate = fate.lock().unwrap_or_else(PoisonError::into_inner);
    if *fate == Fate::Open {
        *fate = how;
    }
    *fate
}

/// Answers whoever asks what became of a guest, as long as this command runs.
fn answer_questions(listener: Listener, taken: u64, fate: Arc<Mutex<Fate>>) {
    thread::spawn(move || {
        while let Ok(link) = listener.accept() {
            let fate = Arc::clone(&fate);
            thread::spawn(move || {
                // Who asks has given the link up over which Commit would come, or come in time.
                let heard = hear(link, |number| {
                    if number != taken {
                        return Answer::Never;
                    }
                    match decide(&fate, Fate::Never) {
                        Fate::Running => Answer::Running,
                        Fate::Open | Fate::Never => Answer::Never,
                    }
                });
                if let Ok(Some((_, _, mut writer))) = heard {
                    let _ = tell(&mut writer, Answer::Refused("it has a guest already".into()));
                }
            });
        }
    });
}

#[cfg(test)]
mod tests;
