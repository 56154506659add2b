//! The wrong order does not compile: one small program for each rule that the library's types carry, and the message
//! that a reader who breaks it meets.
//!
//! Each file of `checks/rules` is a module that is put into the library's own crate, where it sees what any of its
//! modules sees. It has what is right, which must compile, and (under `cfg(wrong)`) what is wrong, whose message must be
//! that of the `.stderr` file beside it. So a rule can not pass because something was renamed: then the right program
//! fails as well.
//!
//! `NESTLING_BLESS=1 cargo test -p nestling-checks --test rules` writes the messages anew; read the difference before
//! you keep it. On a compiler of another version than the workspace's, where messages are worded differently, only
//! the numbers of the errors are compared.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use nestling_checks::rules::{RULES, Rule};

/// A directory in which the library's source can be compiled with modules that it does not have.
struct Workshop {
    /// Holds `mmu/src` (links) and `checks/rules` (a link), so that messages name files as a reader knows them.
    root: PathBuf,
    rustc: String,
    /// What the compiler is told of the library's dependencies.
    externs: Vec<String>,
}

impl Workshop {
    fn open() -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rules");
        let _ = fs::remove_dir_all(root.join("mmu"));
        let _ = fs::remove_dir_all(root.join("checks"));
        for folder in ["mmu/src", "checks", "out"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        let checks = Path::new(env!("CARGO_MANIFEST_DIR"));
        std::os::unix::fs::symlink(checks.join("rules"), root.join("checks/rules")).unwrap();
        for entry in fs::read_dir(checks.join("../mmu/src")).unwrap() {
            let path = entry.unwrap().path().canonicalize().unwrap();
            std::os::unix::fs::symlink(&path, root.join("mmu/src").join(path.file_name().unwrap())).unwrap();
        }
        let rustc = env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let externs = dependencies(&root.join("target"));
        Self { root, rustc, externs }
    }

    /// Compiles the library with `modules`; what the compiler said if it refused.
    fn compile(&self, name: &str, modules: &[&str], wrong: bool) -> Result<(), String> {
        let mut source = fs::read_to_string(self.root.join("mmu/src/lib.rs")).unwrap();
        for module in modules {
            write!(source, "\n#[path = \"../../checks/rules/{module}.rs\"]\nmod {module};\n").unwrap();
        }
        let library = format!("mmu/src/with_{name}.rs");
        fs::write(self.root.join(&library), source).unwrap();
        let output = Command::new(&self.rustc)
            .current_dir(&self.root)
            .args(["--crate-name", "nestling", "--edition", "2024", "--crate-type", "lib", "--emit", "metadata"])
            .args(["--diagnostic-width", "120", "-A", "warnings", "-D", "unused_must_use"])
            .args(["-o", &format!("out/{name}.rmeta")])
            .args(&self.externs)
            .args(if wrong { &["--cfg", "wrong"][..] } else { &[] })
            .arg(&library)
            .output()
            .expect("there is a compiler");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    }
}

/// Has cargo make the library's dependencies, and says where they are in the compiler's words.
fn dependencies(target: &Path) -> Vec<String> {
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["check", "--package", "nestling", "--lib", "--message-format", "json", "--target-dir"])
        .arg(target)
        .output()
        .expect("there is a cargo");
    assert!(output.status.success(), "the library does not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let libraries = text.split('"').filter(|word| word.ends_with(".rmeta"));
    let mut externs = Vec::new();
    for path in libraries {
        let file = Path::new(path).file_stem().unwrap().to_string_lossy().into_owned();
        let name = file.strip_prefix("lib").unwrap_or(&file).split('-').next().unwrap_or_default();
        if name != "nestling" {
            externs.extend(["--extern".into(), format!("{name}={path}")]);
        }
    }
    externs.extend(["-L".into(), format!("dependency={}", target.join("debug/deps").display())]);
    externs
}

/// A message's parts: the error itself, and each note and help that follows.
fn notes(said: &str) -> Vec<String> {
    let mut notes: Vec<String> = Vec::new();
    for line in said.lines() {
        match notes.last_mut() {
            Some(note) if !line.starts_with(|letter: char| letter.is_ascii_lowercase()) => {
                *note += &format!("\n{line}")
            }
            _ => notes.push(line.to_owned()),
        }
    }
    notes
}

/// What has to be the same: all of a message but its quotes of the library, whose signatures change for other reasons.
fn essence(message: &str) -> Vec<String> {
    let cut = |note: String| note.split_inclusive('\n').take_while(|line| !line.contains("mmu/src/")).collect();
    notes(message).into_iter().filter(|note| !note.contains("\n  --> mmu/src/")).map(cut).collect()
}

/// The message as it is kept: without what changes with every edit of the library (line numbers), with the place where
/// it is compiled, and with what is installed there (notes about the standard library's source).
fn normal(said: &str) -> String {
    let said = said.replace("mmu/src/../../", "");
    let mut notes: Vec<String> = Vec::new();
    for line in said.lines() {
        match notes.last_mut() {
            Some(note) if !line.starts_with(|letter: char| letter.is_ascii_lowercase()) => {
                *note += &format!("\n{line}")
            }
            _ => notes.push(line.to_owned()),
        }
    }
    let mut kept = String::new();
    let lines =
        notes.iter().filter(|note| !note.contains("library/core/")).flat_map(|note| note.lines()).filter(|line| {
            !line.starts_with("error: aborting due to")
                && !line.starts_with("For more information about")
                && !line.starts_with("Some errors have detailed")
        });
    for line in lines {
        let bare = line.trim_start();
        let digits = bare.trim_start_matches(|letter: char| letter.is_ascii_digit());
        let rest = digits.trim_start();
        let line = if digits.len() < bare.len() && ["|", "- ", "+ "].iter().any(|mark| rest.starts_with(mark)) {
            format!("LL {rest}")
        } else if ["|", "=", "..."].iter().any(|mark| bare.starts_with(mark)) && bare.len() < line.len() {
            format!("   {bare}")
        } else if bare.starts_with("--> ") || bare.starts_with("::: ") {
            let file = bare.split_inclusive(".rs").next().unwrap_or(bare);
            format!("  {file}:LL:CC")
        } else {
            line.to_owned()
        };
        kept.push_str(line.trim_end());
        kept.push('\n');
    }
    format!("{}\n", kept.trim_end())
}

/// The numbers of the errors in a message.
fn numbers(message: &str) -> Vec<&str> {
    let errors = message.lines().filter(|line| line.starts_with("error"));
    errors.map(|line| line.split_once(':').map_or(line, |(number, _)| number)).collect()
}

fn check(workshop: &Workshop, rule: &Rule, bless: bool, same_compiler: bool) -> Result<(), String> {
    let Err(said) = workshop.compile(rule.name, &[rule.name], true) else {
        return Err(format!("{}: the wrong program compiles\n", rule.name));
    };
    let said = normal(&said);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("rules").join(rule.name).with_extension("stderr");
    if bless {
        fs::write(path, said).unwrap();
        return Ok(());
    }
    let is_expected =
        if same_compiler { essence(&said) == essence(rule.message) } else { numbers(&said) == numbers(rule.message) };
    if is_expected {
        return Ok(());
    }
    let title = format!("{}: the compiler says something else than {}", rule.name, path.display());
    Err(format!("{title}\n--- expected\n{}--- said\n{said}", rule.message))
}

#[test]
fn the_wrong_order_does_not_compile() {
    let workshop = Workshop::open();
    let names: Vec<_> = RULES.iter().map(|rule| rule.name).collect();
    workshop.compile("what_is_right", &names, false).unwrap_or_else(|said| panic!("what is right does not:\n{said}"));
    let version = Command::new(&workshop.rustc).arg("--version").output().unwrap();
    let same_compiler =
        String::from_utf8_lossy(&version.stdout).starts_with(concat!("rustc ", env!("CARGO_PKG_RUST_VERSION"), "."));
    let bless = env::var_os("NESTLING_BLESS").is_some();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failures = String::new();
        while let Some(rule) = RULES.get(next.fetch_add(1, Ordering::Relaxed)) {
            failures.extend(check(&workshop, rule, bless, same_compiler).err());
        }
        failures
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let failures: String = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(failures.is_empty(), "{failures}");
}

#[test]
fn every_program_is_in_the_table() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("rules");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let programs = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let on_disk: BTreeSet<_> = programs.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    let in_table: BTreeSet<_> = RULES.iter().map(|rule| rule.name.to_owned()).collect();
    assert_eq!(on_disk, in_table);
}
