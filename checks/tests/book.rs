//! The book speaks of what is there: every link leads to a file that has what the link names, every mutant and rule has its
//! place in the book, and the table of races is that of the scenarios.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use nestling_checks::model::mutants::CASES;
use nestling_checks::model::scenarios::{Op, long};
use nestling_checks::model::{SCENARIOS, SHADOW_SCENARIOS};
use nestling_checks::rules::RULES;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// The chapters, by name.
fn chapters() -> BTreeMap<String, String> {
    let files = fs::read_dir(docs()).unwrap().map(|entry| entry.unwrap().path());
    let chapters = files.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    chapters
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(&path).unwrap()))
        .collect()
}

/// The links of a chapter, as (text, target): those with their target in place, and those whose target is given at the
/// end of the chapter.
fn links(text: &str) -> Vec<(String, String)> {
    let given: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| line.strip_prefix('[')?.split_once("]: "))
        .map(|(name, target)| (name, target.trim()))
        .collect();
    let text = text.replace('\n', " ");
    let mut found = Vec::new();
    for (at, _) in text.match_indices('[') {
        let Some((label, rest)) = text[at + 1..].split_once(']') else { continue };
        let target = if let Some(rest) = rest.strip_prefix('(') {
            rest.split_once(')').map(|(target, _)| target)
        } else if let Some(rest) = rest.strip_prefix('[') {
            let name = rest.split_once(']').map(|(name, _)| name);
            name.map(|name| *given.get(name).unwrap_or_else(|| panic!("[{name}] is given nowhere")))
        } else {
            None
        };
        if let Some(target) = target {
            found.push((label.split_whitespace().collect::<Vec<_>>().join(" "), target.to_owned()));
        }
    }
    found
}

#[test]
fn every_link_leads_to_what_it_names() {
    let mut wrong = String::new();
    let mut seen = 0;
    for (chapter, text) in chapters() {
        for (label, target) in links(&text) {
            seen += 1;
            let path = docs().join(target.split('#').next().unwrap_or_default());
            let Ok(file) = fs::read_to_string(&path) else {
                writeln!(wrong, "{chapter}: {target} is not there").unwrap();
                continue;
            };
            // Code: the file has it. Of a rule, it is the file's own name.
            let Some(code) = label.strip_prefix('`').and_then(|label| label.strip_suffix('`')) else { continue };
            let name = code.rsplit("::").next().unwrap_or(code);
            let named = path.file_stem().is_some_and(|stem| stem == name);
            let has = file.match_indices(name).any(|(at, _)| {
                let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == '-';
                let (before, after) = (&file[..at], &file[at + name.len()..]);
                !before.ends_with(is_part) && !after.starts_with(is_part)
            });
            if !named && !has {
                writeln!(wrong, "{chapter}: {target} has no {name}").unwrap();
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(seen > 100, "the book has links: {seen} were found");
}

#[test]
fn every_chapter_is_in_the_summary() {
    let chapters = chapters();
    for name in chapters.keys().filter(|name| *name != "SUMMARY.md") {
        assert!(chapters["SUMMARY.md"].contains(&format!("({name})")), "{name} is in no summary");
    }
}

#[test]
fn every_mutant_and_rule_has_its_place() {
    let book: String = chapters().into_values().collect();
    let mutants = CASES.iter().map(|case| case.name).filter(|name| !name.ends_with("-in-a-long-run"));
    for name in mutants.chain(RULES.iter().map(|rule| rule.name)) {
        assert!(book.contains(&format!("[`{name}`]")), "the book says nothing of {name}");
    }
}

/// The chapter of races, made from the scenarios.
fn races() -> String {
    let mut text = String::from(
        "# Which races are run\n\n\
         Every pair of operations races in a long scenario, beside a guest that goes on accessing its memory with whatever\n\
         its TLB still holds, in random schedules under shuttle: the same code, with shuttle's atomics. Its name is the pair's:\n\
         \"zap-all beside invalidation\". The pairs that are named below race under loom as well, in every interleaving up to a\n\
         bound and with weak orderings.\n\n\
         This page is made from the scenarios: `NESTLING_BLESS=1 cargo test -p nestling-checks --test book` writes it.\n\n\
         |",
    );
    for op in Op::ALL {
        write!(text, " | {}", op.name()).unwrap();
    }
    text.push_str(" |\n|---");
    text.push_str(&"|---".repeat(Op::ALL.len()));
    text.push_str("|\n");
    let long = long();
    for first in Op::ALL {
        write!(text, "| **{}**", first.name()).unwrap();
        for second in Op::ALL {
            let name = format!("{} beside {}", first.min(second).name(), first.max(second).name());
            let is_long = long.iter().any(|scenario| scenario.name == name);
            let is_small = SCENARIOS.iter().any(|scenario| scenario.name.starts_with(&name));
            let how = match (is_long, is_small) {
                (true, true) => "shuttle, loom",
                (true, false) => "shuttle",
                (false, _) => "NOT RUN",
            };
            write!(text, " | {how}").unwrap();
        }
        text.push_str(" |\n");
    }
    text.push_str("\n## Triples under shuttle\nThose that bugs of the past needed, beside the guest too.\n\n");
    for scenario in long.iter().filter(|scenario| scenario.name.matches(" beside ").count() == 2) {
        writeln!(text, "- {}", scenario.name).unwrap();
    }
    text.push_str("\n## Scenarios under loom\n\"Guest\" runs code through its TLB, and faults as it must; \"fault\" only faults.\n\n");
    for scenario in SCENARIOS {
        writeln!(text, "- {}", scenario.name).unwrap();
    }
    text.push_str(
        "\n## Shadow paging, under loom and shuttle\n\
         A guest that changes the tables it runs on. Under loom once, under shuttle each part several times.\n\n",
    );
    for scenario in SHADOW_SCENARIOS {
        writeln!(text, "- {}", scenario.name).unwrap();
    }
    text
}

#[test]
fn the_table_of_races_is_complete_and_true() {
    let path = docs().join("pairs.md");
    let races = races();
    assert!(!races.contains("NOT RUN"), "{races}");
    if env::var_os("NESTLING_BLESS").is_some() {
        fs::write(path, races).unwrap();
    } else {
        assert_eq!(fs::read_to_string(path).unwrap_or_default(), races, "NESTLING_BLESS=1 writes it anew");
    }
}
