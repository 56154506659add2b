//! Says on standard error what takes long: a spinner at a terminal, otherwise a line at the start of each step.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How to show progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// One spinner, replaced by one line when its step is done.
    Spinner,
    /// Lines.
    Lines,
}

impl Progress {
    /// What suits standard error.
    #[must_use]
    pub fn for_stderr() -> Self {
        if std::io::stderr().is_terminal() { Self::Spinner } else { Self::Lines }
    }

    /// A fact worth knowing.
    pub fn note(self, text: &str) {
        eprintln!("nestling: {text}");
    }

    /// Begins a step. It ends when the value is dropped: quietly, unless [`Step::done`] was called.
    #[must_use]
    pub fn step(self, name: &str) -> Step {
        let bar = match self {
            Self::Spinner => {
                let bar = ProgressBar::new_spinner().with_message(name.to_owned());
                // The template is a constant: it parses or the first spinner of all shows that it does not.
                if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed}) {prefix:.dim}") {
                    bar.set_style(style);
                }
                bar.enable_steady_tick(Duration::from_millis(120));
                Some(bar)
            }
            Self::Lines => {
                eprintln!("nestling: {name}");
                None
            }
        };
        Step { name: name.to_owned(), bar, start: Instant::now() }
    }
}

/// A step under way.
#[derive(Debug)]
pub struct Step {
    name: String,
    bar: Option<ProgressBar>,
    start: Instant,
}

impl Step {
    /// What the step is at, for a spinner only: lines would flood a log.
    pub fn detail(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_prefix(text.chars().filter(|character| !character.is_control()).take(60).collect::<String>());
        }
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        let text: String = text.chars().filter(|character| !character.is_control()).collect();
        match &self.bar {
            Some(bar) => bar.println(format!("nestling: {text}")),
            None => eprintln!("nestling: {text}"),
        }
    }

    /// Ends the step with a line that says how long it took.
    pub fn done(self) {
        let seconds = self.start.elapsed().as_secs_f64();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        // A step that took no time is not worth a line.
        if seconds >= 1.0 {
            eprintln!("nestling: {}: done in {seconds:.1} s", self.name);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
