//! Puts each bug of the past back into the library, one at a time, and shows which check finds it.
//!
//! Prints a line a mutant and fails if one is not caught. Of bugs that the types rule out, it names the program that
//! does not compile (the test `rules` compiles them all). A mutant is on for a whole process, so each has one of its
//! own: this program again, with the mutant's name as its argument.

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nestling_checks::model::mutants::{CASES, Progress, RULED_OUT, hunt};

/// What a child's line begins with when it has found its mutant.
const FOUND: &str = "found: ";

fn main() -> ExitCode {
    match std::env::args().nth(1) {
        Some(name) => one(&name),
        None => all(),
    }
}

/// In a child: hunts one mutant. A check that fails is a panic, whose hook tells what found it and ends the process.
fn one(name: &str) -> ExitCode {
    let Some(case) = CASES.iter().find(|case| case.name == name) else {
        eprintln!("there is no mutant {name}");
        return ExitCode::from(2);
    };
    let progress = Arc::new(Progress::default());
    let told = Arc::clone(&progress);
    std::panic::set_hook(Box::new(move |panic| {
        let executions = told.executions.load(Ordering::Relaxed);
        let scenario = told.scenario.lock().map(|name| name.clone()).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("a panic").lines().next().unwrap_or_default().to_owned();
        println!("{FOUND}{scenario} ({message}) after {executions} executions");
        std::process::exit(0);
    }));
    hunt(case, &progress);
    ExitCode::FAILURE
}

fn all() -> ExitCode {
    let Ok(program) = std::env::current_exe() else {
        eprintln!("this program does not know where it is");
        return ExitCode::from(2);
    };
    let mut escaped = 0;
    for case in CASES {
        let output = Command::new(&program).arg(case.name).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        match text.lines().find_map(|line| line.strip_prefix(FOUND)) {
            Some(by) => println!("mutant {}: caught by {by}", case.name),
            None => {
                escaped += 1;
                println!("mutant {}: NOT CAUGHT", case.name);
            }
        }
    }
    for bug in RULED_OUT {
        match bug.rule() {
            Some(rule) => println!("mutant {}: ruled out by rules/{}.rs ({})", bug.name, rule.name, rule.error()),
            None => {
                escaped += 1;
                println!("mutant {}: NOT CAUGHT: there is no rule {}", bug.name, bug.rule);
            }
        }
    }
    println!("{} mutants, {} ruled out, {escaped} not caught", CASES.len() + RULED_OUT.len(), RULED_OUT.len());
    if escaped == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
