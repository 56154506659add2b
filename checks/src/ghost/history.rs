//! What happened, briefly, for the reports: the last events that touched a frame.

use std::collections::VecDeque;
use std::fmt;

use nestling::{Gfn, GfnRange};

/// Whose doing an event is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// An access or a fault: there are many.
    Guest,
    /// A change of what the guest has.
    Host,
}

/// One thing that happened to a range.
#[derive(Clone, Debug)]
pub struct Event {
    /// Whose doing it is.
    pub side: Side,
    /// Ghost time.
    pub time: u64,
    /// The frames.
    pub range: GfnRange,
    /// What, and who did it.
    pub what: String,
}

/// A contradiction between the library and the ghost.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Ghost time.
    pub time: u64,
    /// What is wrong.
    pub what: String,
    /// The frame it is about.
    pub gfn: Option<Gfn>,
    /// Events that touched the frame, oldest first.
    pub history: Vec<Event>,
}

impl Violation {
    /// One without a history.
    pub const fn plain(what: String) -> Self {
        Self { time: 0, what, gfn: None, history: Vec::new() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "at {}: {}", self.time, self.what)?;
        for Event { time, range, what, .. } in &self.history {
            writeln!(f, "    {time:>8} {:#x}..{:#x} {what}", range.start.0, range.end.0)?;
        }
        Ok(())
    }
}

/// The last events of both sides.
#[derive(Debug, Default)]
pub struct History {
    guest: VecDeque<Event>,
    host: VecDeque<Event>,
}

impl History {
    /// Events kept of each side.
    const ROOM: usize = 8 * 1024;
    /// Events of each side that a report shows.
    const SHOWN: usize = 16;

    /// Writes down an event.
    pub fn push(&mut self, event: Event) {
        let events = match event.side {
            Side::Guest => &mut self.guest,
            Side::Host => &mut self.host,
        };
        if events.len() == Self::ROOM {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// The last events that touched `gfn`.
    pub fn of(&self, gfn: Gfn) -> Vec<Event> {
        let last = |events: &VecDeque<Event>| -> Vec<Event> {
            events.iter().rev().filter(|event| event.range.contains(gfn)).take(Self::SHOWN).cloned().collect()
        };
        let mut events = [last(&self.guest), last(&self.host)].concat();
        events.sort_by_key(|event| event.time);
        events
    }
}
