//! Figures: numbers with names, in lines that scripts read.
//!
//! A line is `figure NAME = VALUE`. A name is made of words in lower case with `.` between them; a value is a decimal
//! number. The general form of a name is `OPERATION.THREADS[.ORDER].WHAT`, with WHAT one of `CONTENDER.ns_per_page`,
//! `CONTENDER.min_ns_per_page`, `CONTENDER.instructions_per_page`, `ratio_to_floor`, `min_ratio_to_floor`,
//! `speedup_over_CONTENDER`, `instructions_ratio_to_floor`. Without an order it is the sequential one.
//! Names that begin with `zap_all` or `zap_range` are those of [`crate::zap_all`].

use std::fmt;

/// A named number.
#[derive(Clone, PartialEq, Debug)]
pub struct Figure {
    /// See the module head.
    pub name: String,
    /// The number, finite.
    pub value: f64,
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "figure {} = {:.3}", self.name, self.value)
    }
}

impl Figure {
    /// What a line says; `None` if it is no figure.
    pub fn parse(line: &str) -> Option<Self> {
        let (name, value) = line.strip_prefix("figure ")?.split_once(" = ")?;
        let word = |word: &str| {
            !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let value: f64 = value.parse().ok()?;
        (name.split('.').all(word) && value.is_finite()).then(|| Self { name: name.into(), value })
    }
}

/// Median and minimum of some samples.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    /// The middle one; the lower of the two middle ones of an even number.
    pub median: f64,
    /// The smallest.
    pub min: f64,
}

impl Summary {
    /// Of `samples`, which are not empty and all finite.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self { median: sorted[(sorted.len() - 1) / 2], min: sorted[0] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_parse_to_what_they_were_made_of() {
        let figure = Figure { name: "fault.two_threads.speedup_over_x86_64".into(), value: 12.375 };
        assert_eq!(Figure::parse(&figure.to_string()), Some(figure));
    }

    #[test]
    fn other_lines_are_no_figures() {
        for line in [
            "",
            "figure",
            "figure  = 1.0",
            "figure a..b = 1.0",
            "figure a b = 1.0",
            "figure a = ",
            "figure a = NaN",
            "figure a = inf",
            "figure a = 1.0 ns",
            "a figure b = 1.0",
        ] {
            assert_eq!(Figure::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn summaries_do_not_depend_on_the_order() {
        assert_eq!(Summary::of(&[3.0, 1.0, 2.0]), Summary { median: 2.0, min: 1.0 });
        assert_eq!(Summary::of(&[4.0, 3.0, 1.0, 2.0]), Summary { median: 2.0, min: 1.0 });
        assert_eq!(Summary::of(&[7.0]), Summary { median: 7.0, min: 7.0 });
    }
}
