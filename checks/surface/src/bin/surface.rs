//! `surface [ACCESSES [SEED]]`: so many accesses (ten million unless told), a new machine every hundred thousand steps.

use std::{env, process::ExitCode, time::Instant};

use nestling_surface::{run, source::Seeded};

const STEPS: u64 = 100_000;

fn main() -> ExitCode {
    let mut words = env::args().skip(1).map(|word| word.parse::<u64>());
    let (Some(Ok(accesses)), Some(Ok(seed))) = (words.next().or(Some(Ok(10_000_000))), words.next().or(Some(Ok(1))))
    else {
        eprintln!("usage: surface [ACCESSES [SEED]]");
        return ExitCode::from(2);
    };
    let start = Instant::now();
    let (mut done, mut next) = (0, seed);
    while done < accesses {
        // Said before, so that it stands there when it fails.
        if next.is_multiple_of(32) {
            println!("seed {next}: {done} accesses so far");
        }
        done += run(&mut Seeded::new(next), STEPS);
        next += 1;
    }
    println!(
        "{done} accesses with seeds {seed} to {} in {:.1} s, at most {} KiB resident: good",
        next - 1,
        start.elapsed().as_secs_f64(),
        peak_kib()
    );
    ExitCode::SUCCESS
}

/// The most memory that this process has had.
fn peak_kib() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "?".into(), |line| line.trim().trim_end_matches(" kB").to_owned())
}
