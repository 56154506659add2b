//! Every seeded mutant is caught by a model check.

use std::process::Command;

#[test]
fn every_mutant_is_caught() {
    let output = Command::new(env!("CARGO_BIN_EXE_mutants")).output().expect("the program is built with the tests");
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    assert!(output.status.success() && !text.contains("NOT CAUGHT"), "a mutant escaped:\n{text}");
}
