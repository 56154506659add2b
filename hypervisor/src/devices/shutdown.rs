//! The shutdown port of old PC emulators: the letters of "Shutdown", written one after the other to 0x8900, switch the
//! machine off. Test kernels fall back on it when there is no test exit port.

use serde::{Deserialize, Serialize};

/// The port.
pub const SHUTDOWN: u16 = 0x8900;

const WORD: &[u8] = b"Shutdown";

/// How far the word has come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ShutdownPort {
    matched: usize,
}

impl ShutdownPort {
    /// Nothing was written.
    pub const fn new() -> Self {
        Self { matched: 0 }
    }

    /// Writes a letter; `true` when the word is complete.
    pub fn write(&mut self, letter: u8) -> bool {
        // No letter of the word but the first is its first, so a mismatch can only start it over.
        self.matched = match WORD.get(self.matched) {
            Some(next) if *next == letter => self.matched + 1,
            _ => usize::from(letter == WORD[0]),
        };
        let complete = self.matched == WORD.len();
        if complete {
            self.matched = 0;
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completions(text: &[u8]) -> usize {
        let mut port = ShutdownPort::new();
        text.iter().filter(|letter| port.write(**letter)).count()
    }

    #[test]
    fn only_the_whole_word_counts() {
        assert_eq!(completions(b"Shutdown"), 1);
        assert_eq!(completions(b"ShutShutdown"), 1);
        assert_eq!(completions(b"SShutdownShutdown"), 2);
        assert_eq!(completions(b"Shutdow Shut down shutdown"), 0);
    }
}
