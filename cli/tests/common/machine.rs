//! The tests that run machines take turns.

use std::fs::File;

use crate::files::path;

/// Held while a machine runs: a second one would only make both slow, and time limits are for real hangs.
pub(crate) fn one_machine_at_a_time() -> File {
    let path = path("machine.lock");
    let file = File::create(&path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display()));
    file.lock().expect("a lock");
    file
}
