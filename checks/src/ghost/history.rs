//! What happened, briefly, for the reports: the last events that touched a frame.

use std::collections::VecDeque;
use std::fmt;

use nestling::{Gfn, GfnRange};

/// One thing that happened to a range.
#[derive(Clone, Debug)]
pub struct Event {
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
        for Event { time, range, what } in &self.history {
            writeln!(f, "    {time:>8} {:#x}..{:#x} {what}", range.start.0, range.end.0)?;
        }
        Ok(())
    }
}

/// The last events.
#[derive(Debug, Default)]
pub struct History(VecDeque<Event>);

impl History {
    const ROOM: usize = 16 * 1024;
    const SHOWN: usize = 40;

    /// Writes down an event.
    pub fn push(&mut self, event: Event) {
        if self.0.len() == Self::ROOM {
            self.0.pop_front();
        }
        self.0.push_back(event);
    }

    /// The last events that touched `gfn`.
    pub fn of(&self, gfn: Gfn) -> Vec<Event> {
        let mut events: Vec<_> =
            self.0.iter().rev().filter(|event| event.range.contains(gfn)).take(Self::SHOWN).cloned().collect();
        events.reverse();
        events
    }
}
