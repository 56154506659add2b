//! `seeds DIRECTORY`: writes the seed inputs of every target to `DIRECTORY/TARGET/`, beside what a fuzzer has found.

use std::{env, fs, io, path::Path};

use nestling_surface::targets::{TARGETS, seeds};

fn main() -> io::Result<()> {
    let Some(corpus) = env::args_os().nth(1) else {
        return Err(io::Error::other("usage: seeds DIRECTORY"));
    };
    for (name, _) in TARGETS {
        let directory = Path::new(&corpus).join(name);
        fs::create_dir_all(&directory)?;
        for (number, bytes) in seeds(name).into_iter().enumerate() {
            fs::write(directory.join(format!("seed-{number}")), bytes)?;
        }
    }
    Ok(())
}
