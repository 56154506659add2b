//! Has the emulator tell of instructions between marks only: to tell of all took minutes, and most of them were of other
//! operations.
//!
//! The machine starts stopped, with a breakpoint at the mark, and this side is the debugger. At each mark the machine stands
//! still while the log is switched, so that not an instruction of what is between is missed; with instructions counted, its
//! own time stands still as well. The log stays open all the time: `page` is a kind of line that a whole machine never has.
//!
//! Spoken is what QEMU's stub understands of GDB's remote protocol, of which little is needed: packets `$words#sum`, each
//! acknowledged, and QEMU's own monitor inside of one.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::{self, JoinHandle},
};

/// What is told of while nothing is followed, for QEMU's `-d`.
pub(crate) const NOTHING: &str = "page";
/// One instruction a block of translated code, and no jumps from block to block without a line. QEMU 8.1 gave the first
/// another name.
const FOLLOW: [&str; 2] = ["singlestep on", "log page,exec,nochain"];
const LET_GO: [&str; 2] = ["log page", "singlestep off"];

/// Follows the machine that connects to `path`, to its end, in a thread: from each odd hit of `mark` to the next.
pub(super) fn follow(path: &Path, mark: u64) -> io::Result<JoinHandle<io::Result<()>>> {
    let listener = UnixListener::bind(path)?;
    Ok(thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        Stub { input: BufReader::new(stream.try_clone()?), output: stream }.follow(mark)
    }))
}

#[derive(Debug)]
struct Stub {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Stub {
    fn follow(mut self, mark: u64) -> io::Result<()> {
        let breakpoint = format!("0,{mark:x},1");
        self.must(&format!("Z{breakpoint}"))?;
        let mut following = false;
        // An exit, or an end of the connection: the machine's.
        while self.ask("c").is_some_and(|stop| stop.starts_with('T')) {
            if !following {
                self.monitor(FOLLOW)?;
            }
            // Over the breakpoint, which would be hit again.
            self.must(&format!("z{breakpoint}"))?;
            self.ask("s");
            self.must(&format!("Z{breakpoint}"))?;
            if following {
                self.monitor(LET_GO)?;
            }
            following = !following;
        }
        Ok(())
    }

    /// Has QEMU's monitor do something that it has no words for, unless it fails.
    fn monitor(&mut self, lines: [&str; 2]) -> io::Result<()> {
        lines.iter().try_for_each(|line| {
            let coded: String = line.bytes().map(|byte| format!("{byte:02x}")).collect();
            self.must(&format!("qRcmd,{coded}")).map_err(|cause| io::Error::other(format!("{line}: {cause}")))
        })
    }

    fn must(&mut self, request: &str) -> io::Result<()> {
        match self.ask(request) {
            Some(answer) if answer == "OK" => Ok(()),
            answer => Err(io::Error::other(format!("QEMU's answer to {request} is {answer:?}"))),
        }
    }

    /// The answer; nothing if the machine is gone.
    fn ask(&mut self, request: &str) -> Option<String> {
        self.output.write_all(packet(request).as_bytes()).ok()?;
        let answer = read_packet(&mut self.input)?;
        // Who has left needs no thanks.
        let _ = self.output.write_all(b"+");
        Some(answer)
    }
}

fn packet(words: &str) -> String {
    let sum = words.bytes().fold(0u8, u8::wrapping_add);
    format!("${words}#{sum:02x}")
}

/// The next packet, whatever was before it; nothing if the machine is gone.
fn read_packet(input: &mut impl BufRead) -> Option<String> {
    let mut words = Vec::new();
    input.skip_until(b'$').ok()?;
    input.read_until(b'#', &mut words).ok()?;
    words.pop_if(|&mut end| end == b'#')?;
    // A local socket damages nothing: the sum is read, and that is all.
    input.read_exact(&mut [0; 2]).ok()?;
    Some(String::from_utf8_lossy(&words).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_as_they_are_written() {
        assert_eq!(packet("Z0,20,1"), "$Z0,20,1#75");
        let mut stream =
            io::Cursor::new([b"+" as &[u8], packet("OK").as_bytes(), b"+", packet("T05").as_bytes()].concat());
        assert_eq!(read_packet(&mut stream).as_deref(), Some("OK"));
        assert_eq!(read_packet(&mut stream).as_deref(), Some("T05"));
        assert_eq!(read_packet(&mut stream), None);
    }

    /// Half of what is between two marks must never be told of: neither mark is missed, nor one of them taken for two.
    #[test]
    fn the_log_is_on_from_each_odd_mark_to_the_next() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stub");
        let follower = follow(&path, 0x20).expect("listening");
        let mut machine = UnixStream::connect(&path).expect("connected");
        let mut requests = BufReader::new(machine.try_clone().expect("cloned"));
        let mut heard = Vec::new();
        for _ in 0..2 {
            loop {
                let request = read_packet(&mut requests).expect("a request");
                let stops = matches!(&request[..], "c" | "s");
                let at_mark = request == "c";
                machine.write_all(packet(if stops { "T05thread:01;" } else { "OK" }).as_bytes()).expect("sent");
                heard.push(request);
                if at_mark {
                    break;
                }
            }
        }
        while let Some(request) = read_packet(&mut requests) {
            if request == "c" {
                machine.write_all(packet("W00").as_bytes()).expect("sent");
                break;
            }
            machine.write_all(packet(if request == "s" { "T05" } else { "OK" }).as_bytes()).expect("sent");
            heard.push(request);
        }
        follower.join().expect("ends").expect("good");
        let coded =
            |line: &str| format!("qRcmd,{}", line.bytes().map(|byte| format!("{byte:02x}")).collect::<String>());
        let (on, off) = (FOLLOW.map(coded), LET_GO.map(coded));
        let over = ["z0,20,1", "s", "Z0,20,1"].map(str::to_owned);
        let start = ["Z0,20,1", "c"].map(str::to_owned);
        let next = ["c".to_owned()];
        assert_eq!(heard, [&start[..], &on, &over, &next, &over, &off].concat());
    }
}
