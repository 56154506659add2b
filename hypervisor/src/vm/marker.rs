//! Finds a text in a stream of bytes that comes in pieces (Knuth, Morris and Pratt).

use alloc::vec::Vec;

/// The search, once: after the text was found, nothing is looked for.
#[derive(Debug)]
pub struct Marker {
    text: Vec<u8>,
    /// For each prefix, the longest of its proper prefixes that also ends it.
    fallback: Vec<usize>,
    matched: usize,
    done: bool,
}

impl Marker {
    /// Looks for `text`; an empty one is never found.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let text = text.as_bytes().to_vec();
        let mut fallback = Vec::with_capacity(text.len());
        let mut length = 0;
        for (index, byte) in text.iter().enumerate() {
            while index > 0 && length > 0 && text[length] != *byte {
                length = fallback[length - 1];
            }
            if index > 0 && text[length] == *byte {
                length += 1;
            }
            fallback.push(length);
        }
        Self { done: text.is_empty(), text, fallback, matched: 0 }
    }

    /// Takes more of the stream; true when the text ends in it, the first time.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        if self.done {
            return false;
        }
        for byte in bytes {
            while self.matched > 0 && self.text[self.matched] != *byte {
                self.matched = self.fallback[self.matched - 1];
            }
            if self.text[self.matched] == *byte {
                self.matched += 1;
            }
            if self.matched == self.text.len() {
                self.done = true;
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn found_once_across_pieces_and_false_starts() {
        let mut marker = Marker::new("abac");
        assert!(!marker.feed(b"xxaba"));
        assert!(!marker.feed(b"b"));
        assert!(marker.feed(b"acc"));
        assert!(!marker.feed(b"abac"));
        assert!(!Marker::new("").feed(b"anything"));
        assert!(Marker::new("aaab").feed(b"aaaaaab"));
    }
}
