//! Takes a copy from a running machine: asks the hypervisor for it, and turns what comes through the window into records.
//!
//! Whatever happens on this side, the session in the window is seen to its last message: only then may another one begin.
//! A machine that has ended sends none; [`Source::alive`] says so.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nestling_control::{
    message::ToHypervisor,
    window::{
        self, Copied, DATA_BYTES, FromCommand, FromHypervisor, PAGE_BYTES, Receiver, Round, Sender, Shared, Way,
        WindowError,
    },
};
use thiserror::Error;

use super::{
    pages::{Packer, Tally},
    stream::{Record, Total, Writer},
    window::Window,
};
use crate::session::Remote;

/// How long the hypervisor may take to begin, and to end what it is asked to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the window is looked at while nothing comes.
const LOOK: Duration = Duration::from_micros(200);

/// Why there is no copy.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The hypervisor says why.
    #[error("{0}")]
    Kept(String),
    /// It says nothing.
    #[error("the hypervisor does not answer")]
    Silent,
    /// The machine has ended.
    #[error("the guest has ended")]
    Ended,
    /// What it says is not understood.
    #[error("{0}")]
    Window(#[from] WindowError),
    /// It says what does not belong there.
    #[error("the hypervisor said something out of place")]
    OutOfPlace,
    /// The copy cannot be written.
    #[error("{0}")]
    Write(#[from] io::Error),
    /// Nobody wants it any more.
    #[error("given up")]
    GivenUp,
}

/// A running machine, as far as copies of it go.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its window.
    pub window: Arc<Window>,
    /// Its session, which sends requests.
    pub remote: Remote,
    /// Whether it runs.
    pub alive: Arc<AtomicBool>,
}

/// What a copy became.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// What the hypervisor did.
    pub copied: Copied,
    /// What this side did.
    pub tally: Tally,
    /// Bytes written.
    pub bytes: u64,
}

/// A copy under way. Dropped before its end, it is ended.
#[derive(Debug)]
pub struct Session<'a> {
    source: &'a Source,
    messages: Receiver<FromHypervisor>,
    answers: Sender<FromCommand>,
    packer: Packer,
    state: u64,
    ended: bool,
}

impl Source {
    /// Whether the machine runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    /// Asks for a copy. The machine's owner sees to it that there is one at a time.
    pub fn begin(&self, request: ToHypervisor) -> Session<'_> {
        window::open(&*self.window);
        self.remote.request(request);
        let (messages, answers) = (Receiver::new(Way::ToCommand), Sender::new(Way::ToHypervisor));
        Session { source: self, messages, answers, packer: Packer::default(), state: 0, ended: false }
    }
}

impl Session<'_> {
    /// Writes memory and state to `to`, until the hypervisor has sent everything: `Complete` for a snapshot, `Sent` for a
    /// migration. `watch` hears how it goes, and says whether anybody still wants it.
    ///
    /// # Errors
    /// Why there is no copy.
    pub fn copy<W: Write>(
        &mut self,
        to: &mut Writer<W>,
        watch: &mut dyn FnMut(Option<&Round>, &Tally) -> bool,
    ) -> Result<Taken, SourceError> {
        loop {
            let tally = self.packer.tally;
            let (message, data) = self.next(PATIENCE, &mut || watch(None, &tally))?;
            match message {
                FromHypervisor::Pages(runs) => {
                    let frames = window::frames(&runs)?;
                    let mut pages = vec![0; frames.len() * PAGE_BYTES];
                    self.source.window.read(data, &mut pages);
                    self.done();
                    if let Some(record) = self.packer.pack(&frames, &pages) {
                        to.write(&record)?;
                    }
                    if !watch(None, &self.packer.tally) {
                        return Err(SourceError::GivenUp);
                    }
                    continue;
                }
                FromHypervisor::State(length) => {
                    let length = length as usize;
                    if length > DATA_BYTES {
                        return Err(SourceError::OutOfPlace);
                    }
                    let mut bytes = vec![0; length];
                    self.source.window.read(data, &mut bytes);
                    self.state += length as u64;
                    to.write(&Record::State(bytes))?;
                }
                FromHypervisor::Round(round) => {
                    if !watch(Some(&round), &self.packer.tally) {
                        return Err(SourceError::GivenUp);
                    }
                }
                FromHypervisor::Complete(copied) | FromHypervisor::Sent(copied) => {
                    self.ended = message.is_last();
                    self.done();
                    to.write(&Record::End(Total { state: self.state }))?;
                    to.flush()?;
                    return Ok(Taken { copied, tally: self.packer.tally, bytes: to.bytes() });
                }
                FromHypervisor::Kept(why) => {
                    self.ended = true;
                    return Err(SourceError::Kept(why));
                }
                FromHypervisor::Given
                | FromHypervisor::Ready
                | FromHypervisor::Running
                | FromHypervisor::Refused(_) => return Err(SourceError::OutOfPlace),
            }
            self.done();
        }
    }

    /// Tells the hypervisor that the other machine has the guest, and waits until it has ended its own.
    ///
    /// # Errors
    /// If it does not.
    pub fn give_away(&mut self) -> Result<(), SourceError> {
        self.answers.send(&*self.source.window, &FromCommand::GiveAway, 0, &mut |_| ())?;
        let (message, _) = self.next(PATIENCE, &mut || true)?;
        self.ended = message.is_last();
        self.done();
        if message == FromHypervisor::Given { Ok(()) } else { Err(SourceError::OutOfPlace) }
    }

    fn done(&mut self) {
        self.messages.done(&*self.source.window);
    }

    fn next(
        &self,
        patience: Duration,
        wanted: &mut dyn FnMut() -> bool,
    ) -> Result<(FromHypervisor, usize), SourceError> {
        let began = Instant::now();
        loop {
            if let Some(message) = self.messages.peek(&*self.source.window)? {
                return Ok(message);
            }
            if !self.source.alive.load(Ordering::SeqCst) {
                return Err(SourceError::Ended);
            }
            if !wanted() {
                return Err(SourceError::GivenUp);
            }
            if began.elapsed() > patience {
                return Err(SourceError::Silent);
            }
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Session<'_> {
    /// Ends what has not ended: the guest goes on.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        window::abort(&*self.source.window);
        // Damage, or silence: the hypervisor has failed, which its session notices.
        while let Ok((message, _)) = self.next(PATIENCE, &mut || true) {
            self.done();
            if message.is_last() {
                return;
            }
        }
    }
}
