//! Many files held open, read and written without end, while the device under them is moved or replaced.
//!
//! Every tenth is removed at the beginning and lives on without a name; every tenth is renamed while it is
//! open. Invariant: each file has what this program wrote last.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

struct Held {
    name: String,
    file: File,
    round: u64,
}

impl Held {
    fn text(&self) -> [u8; 16] {
        let mut text = [b' '; 16];
        let said = format!("{} {}", self.name.trim_start_matches("held-"), self.round);
        for (to, from) in text.iter_mut().zip(said.bytes()) {
            *to = from;
        }
        text
    }

    fn verify(&self) -> Result<()> {
        let mut found = [0; 16];
        self.file.read_exact_at(&mut found, 0).with_context(|| format!("{} lost", self.name))?;
        ensure!(
            found == self.text(),
            "{} has {:?}, not {:?}",
            self.name,
            String::from_utf8_lossy(&found),
            String::from_utf8_lossy(&self.text())
        );
        Ok(())
    }

    fn go_round(&mut self) -> Result<()> {
        self.verify()?;
        self.round += 1;
        let text = self.text();
        self.file.write_all_at(&text, 0).with_context(|| format!("{} not written", self.name))
    }
}

/// `name` of every tenth file, beginning with `first`.
fn is_each_tenth(number: usize, first: usize) -> bool {
    number % 10 == first
}

/// See the module. Says "held" when all are open, and at the end how often it went round.
pub(crate) fn run(dir: &Path, count: usize) -> Result<()> {
    let mut all = Vec::new();
    for number in 0..count {
        let name = format!("held-{number}");
        let file = File::options().read(true).write(true).create_new(true).open(dir.join(&name))?;
        let held = Held { name, file, round: 0 };
        held.file.write_all_at(&held.text(), 0)?;
        match number {
            _ if std::env::var_os("NAMED").is_some() => {}
            _ if is_each_tenth(number, 3) => fs::remove_file(dir.join(&held.name))?,
            _ if is_each_tenth(number, 5) => {
                fs::rename(dir.join(&held.name), dir.join(format!("moved-{number}")))?;
            }
            _ => {}
        }
        all.push(held);
    }
    println!("held");
    let mut rounds = 0;
    while rounds < 2 || !Path::new("/tmp/word").exists() {
        for held in &mut all {
            held.go_round()?;
        }
        rounds += 1;
    }
    for held in &all {
        held.file.sync_all()?;
        held.verify()?;
        let links = held.file.metadata()?.nlink();
        ensure!(links < 2, "{} has {links} links", held.name);
    }
    println!("right after {rounds}");
    Ok(())
}
