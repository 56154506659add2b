//! Migrations of a running guest, and links and targets that fail in the middle of one.
//!
//! A guest of several CPUs keeps writing patterns over most of its memory and checking them, its clock, and its files. It is
//! given from command to command. What fails is cut at random moments: the connection, by a relay that stands in between,
//! or the target, which is killed. Every other machine waits at a TCP port, the rest at sockets in the file system. The guest
//! must find itself right at the end, on whichever machine it is.
//!
//! By default once there, and a cut. With numbers of one's own, which take a while:
//!
//! ```text
//! NESTLING_MIGRATIONS=20 NESTLING_FAILURES=20 cargo test --release -p nestling-cli --test migrations -- --nocapture
//! ```

#[path = "common/files.rs"]
mod files;
#[path = "common/kernel.rs"]
mod kernel;
#[path = "common/machine.rs"]
mod machine;

use std::{
    env, fs, io,
    io::{BufRead, BufReader},
    net::{Shutdown, TcpListener},
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use files::path;
use kernel::kernel;
use machine::one_machine_at_a_time;
use nestling_cli::copy::link::{Address, Link, Listener};
use rustix::process::{Pid, Signal, kill_process};

/// Seconds for one machine's part.
const LIMIT: &str = "3000";

/// The command.
fn nestling() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestling"));
    command.stdin(Stdio::null());
    command
}

fn asked(name: &str, default: usize) -> usize {
    env::var(name).map_or(default, |number| number.parse().unwrap_or_else(|_| panic!("{name}={number}: no number")))
}

/// A command that runs a guest, or waits for one.
struct Running {
    name: String,
    address: Address,
    child: Child,
    /// What its console has shown.
    seen: Arc<Mutex<String>>,
}

fn collect(console: ChildStdout, seen: &Arc<Mutex<String>>) {
    let seen = Arc::clone(seen);
    thread::spawn(move || {
        for line in BufReader::new(console).lines().map_while(Result::ok) {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            *seen += &line;
            *seen += "\n";
        }
    });
}

impl Running {
    fn start(number: usize, arguments: &[&str]) -> Self {
        let name = format!("migration-test-{}-{number}", std::process::id());
        let address = if number % 2 == 1 {
            // Free now, and nobody here asks for a port in between.
            let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
            Address::Tcp(free.to_string())
        } else {
            Address::Unix(path(&format!("{name}.socket")))
        };
        let mut command = nestling();
        command.args(["run", "--timeout", LIMIT, "--name", &name]).args(arguments);
        if arguments.is_empty() {
            command.arg("--incoming").arg(address.to_string());
        }
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the command can be started");
        let seen = Arc::default();
        collect(child.stdout.take().expect("a pipe"), &seen);
        Self { name, address, child, seen }
    }

    fn target(number: usize) -> Self {
        Self::start(number, &[])
    }

    fn count(&self, wanted: &str) -> usize {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!seen.contains("FAIL"), "{seen}");
        seen.matches(wanted).count()
    }

    /// The guest goes on: its console shows that it has checked all its memory once more.
    #[track_caller]
    fn goes_on(&self) {
        let before = self.count("memory: round");
        until("the guest goes on", || self.count("memory: round") > before + 3);
    }

    /// Asks for a migration to an address.
    fn migrate(&self, to: &Address) -> Child {
        self.migrate_in(to, &["--rounds", "5"])
    }

    fn migrate_in(&self, to: &Address, how: &[&str]) -> Child {
        let mut command = nestling();
        command.args(["migrate", "--name", &self.name, "--to"]).arg(to.to_string()).args(how);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the command can be started")
    }

    #[track_caller]
    fn ends_with(mut self, status: i32) {
        let ended = self.child.wait().expect("ends");
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(ended.code(), Some(status), "{seen}");
    }

    fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ends");
        // Nobody is left to take it away.
        if let Address::Unix(path) = &self.address {
            let _ = fs::remove_file(path);
        }
    }
}

#[track_caller]
fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(600), "waited in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn end(child: Child) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = child.wait_with_output().expect("ends");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// Stands between a source and a target, and can be cut.
struct Relay {
    address: Address,
    cut: Arc<AtomicBool>,
    /// Bytes that went to the target.
    passed: Arc<AtomicUsize>,
}

impl Relay {
    /// By the same means as the target, which may yet have to begin to listen.
    fn start(to: Address) -> Self {
        Self::with_rate(to, None)
    }

    /// One that passes on so many bytes a second to the target.
    fn with_rate(to: Address, rate: Option<f64>) -> Self {
        let address = match &to {
            Address::Unix(path) => Address::Unix(path.with_extension("relay")),
            Address::Tcp(_) => Address::Tcp("127.0.0.1:0".into()),
        };
        let listener = address.listen().expect("bound");
        let address = match &listener {
            Listener::Tcp(listener) => Address::Tcp(listener.local_addr().expect("bound").to_string()),
            Listener::Unix(..) => address,
        };
        let (cut, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let relay = Self { address, cut: Arc::clone(&cut), passed: Arc::clone(&passed) };
        thread::spawn(move || {
            // What comes after the cut gets through again: the link was lost, not the target.
            while let Ok(source) = listener.accept() {
                let Some(target) = reached(&to) else { continue };
                let share = |link: &Link| link.share().expect("shared");
                let first = !cut.load(Ordering::SeqCst);
                let flag = Arc::new(AtomicBool::new(false));
                for (from, into, counted) in [(&source, &target, true), (&target, &source, false)] {
                    let (from, into) = (share(from), share(into));
                    let (cut, passed) = if first { (&cut, &passed) } else { (&flag, &passed) };
                    let (cut, passed) = (Arc::clone(cut), Arc::clone(passed));
                    let rate = rate.filter(|_| counted);
                    thread::spawn(move || pass_on(from, into, &cut, counted.then_some(&*passed), rate));
                }
            }
        });
        relay
    }
}

/// Connects, if somebody begins to listen there within a minute.
fn reached(address: &Address) -> Option<Link> {
    let began = Instant::now();
    loop {
        match address.connect() {
            Ok(link) => return Some(link),
            Err(_) if began.elapsed() < Duration::from_secs(60) => thread::sleep(Duration::from_millis(20)),
            Err(_) => return None,
        }
    }
}

fn shut(link: &Link) {
    // It may be shut already.
    let _ = match link {
        Link::Tcp(stream) => stream.shutdown(Shutdown::Both),
        Link::Unix(stream) => stream.shutdown(Shutdown::Both),
    };
}

fn pass_on(mut from: Link, mut into: Link, cut: &AtomicBool, count: Option<&AtomicUsize>, rate: Option<f64>) {
    use io::{Read, Write};
    let mut bytes = vec![0; 64 << 10];
    let read_patience = match &from {
        Link::Tcp(stream) => stream.set_read_timeout(Some(Duration::from_millis(5))),
        Link::Unix(stream) => stream.set_read_timeout(Some(Duration::from_millis(5))),
    };
    read_patience.expect("a valid time");
    loop {
        if cut.load(Ordering::SeqCst) {
            break;
        }
        match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(length) => {
                if into.write_all(&bytes[..length]).is_err() {
                    break;
                }
                count.map(|count| count.fetch_add(length, Ordering::SeqCst));
                if let Some(rate) = rate {
                    thread::sleep(Duration::from_secs_f64(length as f64 / rate));
                }
            }
            Err(cause) if matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    shut(&from);
    shut(&into);
}

/// Random enough, and different each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end.max(1)
    }
}

#[test]
fn a_guest_goes_from_machine_to_machine_and_survives_what_fails_on_the_way() {
    let _machine = one_machine_at_a_time();
    let (migrations, failures) = (asked("NESTLING_MIGRATIONS", 1), asked("NESTLING_FAILURES", 1));
    let large = migrations + failures > 2;
    let (vcpus, memory) = if large { ("4", "512M") } else { ("2", "128M") };
    let guest = ["--vcpus", vcpus, "--memory", memory, "--append", "nestling.seconds=1000000"];
    let mut here = Running::start(0, &guest);
    until("the guest checks its memory", || here.count("memory: round") > 0);
    let seed = std::process::id() as u64;
    println!("seed {seed}");
    let (mut random, mut number) = (Random(seed), 0);
    // How much a whole migration sends: the last one, and the one that sent least.
    let (mut bytes, mut least) = (60 << 20, 60 << 20);
    let (mut moved, mut failed) = (0, 0);
    while moved < migrations || failed < failures {
        let fail = failed < failures && (moved >= migrations || moved * failures > failed * migrations);
        number += 1;
        let target = Running::target(number);
        if !fail {
            let relay = Relay::start(target.address.clone());
            let (status, said) = end(here.migrate(&relay.address));
            assert_eq!(status, Some(0), "{said}");
            bytes = relay.passed.load(Ordering::SeqCst);
            least = bytes.min(least);
            println!("migration {moved}: {}", said.trim());
            assert!(said.contains("round 1: ") && said.contains("it stood still"), "{said}");
            here.ends_with(0);
            here = target;
            moved += 1;
        } else if random.below(2) == 0 {
            let relay = Relay::start(target.address.clone());
            let at = random.below(bytes + bytes / 20);
            let mut asking = here.migrate(&relay.address);
            while relay.passed.load(Ordering::SeqCst) < at && asking.try_wait().expect("asked").is_none() {
                thread::sleep(Duration::from_millis(1));
            }
            relay.cut.store(true, Ordering::SeqCst);
            let (status, said) = end(asking);
            println!("link cut after {at} bytes: {status:?}: {}", said.trim().lines().last().unwrap_or_default());
            if status == Some(0) {
                // It was over already, or the target had it when the link failed.
                here.ends_with(0);
                here = target;
                moved += 1;
            } else {
                assert!(said.contains("goes on here"), "{said}");
                target.kill();
                failed += 1;
            }
        } else {
            // Before the end, when the target may have the guest already, and it would be killed with it: by what has gone
            // over, not by the clock.
            let relay = Relay::start(target.address.clone());
            let at = random.below(least * 6 / 10);
            let mut asking = here.migrate(&relay.address);
            while relay.passed.load(Ordering::SeqCst) < at && asking.try_wait().expect("asked").is_none() {
                thread::sleep(Duration::from_millis(1));
            }
            target.kill();
            let (status, said) = end(asking);
            println!("target killed after {at} bytes: {status:?}: {}", said.trim().lines().last().unwrap_or_default());
            assert!(status != Some(0) && said.contains("goes on here"), "{said}");
            failed += 1;
        }
        here.goes_on();
    }
    // All its checks once more, from the first to the last.
    let good = here.count(" times good");
    until("the guest finds itself right", || here.count(" times good") > good + 1);
    kill_process(Pid::from_child(&here.child), Signal::TERM).expect("it runs");
    here.ends_with(128 + 15);
}

/// A guest that does nothing but write: round after round it fills 28 MiB with words that no compression makes smaller, each
/// of its address and the round's number, looks before whether the last round's is still there, and says so at the end of
/// a round. What it finds wrong it says by its status.
#[rustfmt::skip]
const WRITER: &[u8] = &[
    0x31, 0xf6,                                                 //         xor esi, esi
    0x48, 0xbb, 0x15, 0x7c, 0x4a, 0x7f, 0xb9, 0x79, 0x37, 0x9e, //         movabs rbx, 0x9e3779b97f4a7c15
    0xbf, 0x00, 0x00, 0x00, 0x02,                               // round:  mov edi, 0x2000000
    0x85, 0xf6,                                                 // cell:   test esi, esi
    0x74, 0x0d,                                                 //         je first
    0x48, 0x8d, 0x04, 0x37,                                     //         lea rax, [rdi + rsi]
    0x48, 0x0f, 0xaf, 0xc3,                                     //         imul rax, rbx
    0x48, 0x39, 0x07,                                           //         cmp [rdi], rax
    0x75, 0x32,                                                 //         jne wrong
    0x48, 0x8d, 0x44, 0x37, 0x01,                               // first:  lea rax, [rdi + rsi + 1]
    0x48, 0x0f, 0xaf, 0xc3,                                     //         imul rax, rbx
    0x48, 0x89, 0x07,                                           //         mov [rdi], rax
    0x83, 0xc7, 0x08,                                           //         add edi, 8
    0x81, 0xff, 0x00, 0x00, 0xc0, 0x03,                         //         cmp edi, 0x3c00000
    0x72, 0xd8,                                                 //         jb cell
    0xff, 0xc6,                                                 //         inc esi
    0x48, 0x8d, 0x2d, 0x1e, 0x00, 0x00, 0x00,                   //         lea rbp, [text]
    0xba, 0xf8, 0x03, 0x00, 0x00,                               //         mov edx, 0x3f8
    0x8a, 0x45, 0x00,                                           // letter: mov al, [rbp]
    0x84, 0xc0,                                                 //         test al, al
    0x74, 0xbe,                                                 //         je round
    0xee,                                                       //         out dx, al
    0x48, 0xff, 0xc5,                                           //         inc rbp
    0xeb, 0xf3,                                                 //         jmp letter
    0xb8, 0x15, 0x00, 0x00, 0x00,                               // wrong:  mov eax, 21
    0xba, 0xf4, 0x00, 0x00, 0x00,                               //         mov edx, 0xf4
    0xef,                                                       //         out dx, eax
    0xf4,                                                       //         hlt
    b'm', b'e', b'm', b'o', b'r', b'y', b':', b' ', b'r', b'o', b'u', b'n', b'd', b'\n', 0, // text
];

/// It writes all its memory in less time than the link takes to carry it: it is kept from running more and more, which is
/// told, and arrives.
#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_and_arrives() {
    let _machine = one_machine_at_a_time();
    let [image, initrd, report] =
        ["writer.bzImage", "writer.initrd", "slow-link.json"].map(|name| path(name).display().to_string());
    fs::write(&image, kernel(WRITER)).expect("written");
    fs::write(&initrd, b"no archive").expect("written");
    let guest = ["--vcpus", "1", "--memory", "64M", "--kernel", &image, "--initrd", &initrd];
    let here = Running::start(1000, &guest);
    here.goes_on();
    let target = Running::target(1001);
    let relay = Relay::with_rate(target.address.clone(), Some(f64::from(4 << 20)));
    let how = ["--rounds", "6", "--downtime", "300", "--report", &report];
    let (status, said) = end(here.migrate_in(&relay.address, &how));
    println!("{said}");
    assert_eq!(status, Some(0), "{said}");
    // The first two rounds show that it gets no nearer.
    for told in ["round 1: ", "MiB/s), ", " written meanwhile", " used; stopping now would take"] {
        assert!(said.contains(told), "no {told:?} in\n{said}");
    }
    for (round, percent) in [(3, 20), (4, 40), (5, 60), (6, 80)] {
        let line = said.lines().find(|line| line.contains(&format!("round {round}: "))).unwrap_or_default();
        assert!(line.contains(&format!("the guest is kept from running {percent} %")), "{line:?} in\n{said}");
    }
    let figures: serde_json::Value = serde_json::from_str(&fs::read_to_string(report).expect("written")).expect("JSON");
    println!("{figures}");
    for figure in ["total_s", "downtime_s", "longest_vcpu_stall_s", "pages", "last_pages", "bytes"] {
        assert!(figures[figure].as_f64().is_some_and(|value| value > 0.0), "{figure} in {figures}");
    }
    assert_eq!(figures["rounds"], 6, "{figures}");
    here.ends_with(0);
    target.goes_on();
    kill_process(Pid::from_child(&target.child), Signal::TERM).expect("it runs");
    target.ends_with(128 + 15);
}

#[test]
fn nobody_at_the_address_is_said_at_once() {
    let output = nestling()
        .args(["migrate", "--name", "nobody-has-this-name", "--to", "127.0.0.1:1"])
        .output()
        .expect("started");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    for bad in ["nonsense", "host:99999"] {
        let output = nestling().args(["migrate", "--to", bad]).output().expect("started");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}
