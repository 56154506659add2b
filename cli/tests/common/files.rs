//! Where tests leave files.

use std::path::PathBuf;

/// A file of this name in the tests' own directory, which cargo makes.
pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}
