//! The other side of the [`door`]: finds the command that runs a guest, asks, and shows what it answers.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use super::door::{self, Figures, Reply, Request};
use crate::{args::Which, error::Error, progress::Progress};

/// The guests of this user that run, with the sockets of their commands.
fn guests() -> Vec<(String, PathBuf)> {
    let mut guests: Vec<_> = fs::read_dir(door::directory())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), path)))
        // Sockets may be left of commands that were killed.
        .filter(|(_, path)| UnixStream::connect(path).is_ok())
        .collect();
    guests.sort();
    guests
}

fn socket(which: &Which) -> Result<PathBuf, Error> {
    if let Some(path) = &which.socket {
        return Ok(path.clone());
    }
    if let Some(name) = &which.name {
        return Ok(door::socket(name));
    }
    match &guests()[..] {
        [] => Err(Error::WhichGuest("no guest of this user runs".into())),
        [(_, path)] => Ok(path.clone()),
        several => {
            let names: Vec<_> = several.iter().map(|(name, _)| name.as_str()).collect();
            Err(Error::WhichGuest(format!("several guests run: say --name, one of {}", names.join(", "))))
        }
    }
}

/// Asks the command that runs a guest for something, and waits until it is done. Returns what was said of it, in words and figures.
///
/// # Errors
/// If no such guest runs, or it was not done.
pub fn ask(which: &Which, request: &Request, progress: Progress, doing: &str) -> Result<(String, Figures), Error> {
    let path = socket(which)?;
    let mut stream = connect(&path)?;
    let mut line = serde_json::to_vec(request).map_err(|cause| Error::io("make a request")(cause.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(Error::io(format!("ask {}", path.display())))?;
    let step = progress.step(doing);
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(Error::io(format!("hear from {}", path.display())))?;
        match serde_json::from_str(&line) {
            Ok(Reply::Progress(text)) => step.detail(&text),
            Ok(Reply::Line(text)) => step.line(&text),
            Ok(Reply::Done(text, figures)) => return Ok((text, figures)),
            Ok(Reply::Failed(why)) => return Err(Error::Refused(why)),
            Err(_) => return Err(Error::Refused("the command that runs the guest speaks another language".into())),
        }
    }
    Err(Error::Refused("the command that runs the guest has ended".into()))
}

fn connect(path: &Path) -> Result<UnixStream, Error> {
    UnixStream::connect(path).map_err(|cause| Error::WhichGuest(format!("no guest at {}: {cause}", path.display())))
}
