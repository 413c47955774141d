//! An apt configuration of our own: sources, state and cache below folders of ours.
//!
//! The archive's address is the machine's own, asked of apt; the suites are ours. The list of
//! installed packages is empty, so that a package's whole closure comes, whatever the machine has.
//! Invariant: the machine's sources, lists and packages are not touched.

use crate::process;
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The release whose packages are used; QEMU and the kernel come from its backports.
const SUITE: &str = "bookworm";

/// The keys that Debian's archives are signed with, from the package debian-archive-keyring.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with our configuration.
#[derive(Debug)]
pub struct Apt {
    config: PathBuf,
    archives: PathBuf,
    none: PathBuf,
}

impl Apt {
    /// Writes the configuration below `dir`; package files are kept in `archives`. With `sources` the lists of
    /// source packages are read as well.
    ///
    /// # Errors
    /// When this machine has no apt or no Debian archive among its sources.
    pub fn set_up(dir: &Path, archives: &Path, sources: bool) -> Result<Self> {
        for sub in [
            "etc/parts",
            "etc/sources.d",
            "etc/preferences.d",
            "state/lists/partial",
            "cache",
            "none/partial",
        ] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        std::fs::create_dir_all(archives.join("partial"))?;
        std::fs::write(dir.join("state/status"), "")?;
        std::fs::write(dir.join("etc/sources.list"), source_list(&addresses()?, sources)?)?;
        let (dir, archives) = (dir.canonicalize()?, archives.canonicalize()?);
        let root = dir.display();
        let text = format!(
            "Dir::Etc \"{root}/etc\";\n\
             Dir::Etc::sourcelist \"{root}/etc/sources.list\";\n\
             Dir::Etc::sourceparts \"{root}/etc/sources.d\";\n\
             Dir::Etc::preferencesparts \"{root}/etc/preferences.d\";\n\
             Dir::State \"{root}/state\";\n\
             Dir::State::status \"{root}/state/status\";\n\
             Dir::Cache \"{root}/cache\";\n\
             Dir::Cache::archives \"{}\";\n\
             APT::Default-Release \"{SUITE}-backports\";\n\
             APT::Install-Recommends \"false\";\n\
             APT::Sandbox::User \"\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n",
            archives.display(),
        );
        let config = dir.join("apt.conf");
        std::fs::write(&config, text)?;
        Ok(Self { config, archives, none: dir.join("none") })
    }

    /// Fetches the package lists.
    ///
    /// # Errors
    /// When the archive cannot be reached.
    pub fn update(&self) -> Result<()> {
        println!("packages: reading the lists of {SUITE}, its backports and security updates");
        process::output(self.command("apt-get").args(["-q", "update"])).map(drop)
    }

    /// Downloads `wanted` with all that they depend on, and the one kernel package that
    /// `kernel` stands for, if it is asked for. Files that are there already, whole, are not fetched again.
    ///
    /// # Errors
    /// When a package is not known or does not arrive.
    pub fn fetch(&self, wanted: &[&str], kernel: Option<&str>) -> Result<Vec<PathBuf>> {
        println!("packages: fetching {}", wanted.join(" "));
        // Files that are there already are not listed, hence the folder that has none.
        let none = format!("Dir::Cache::archives={}", self.none.display());
        let mut list = self.command("apt-get");
        list.args(["-o", &none, "install", "--print-uris", "-qq", "-y"]).args(wanted);
        let mut names = file_names(&process::output(&mut list)?);
        let mut install = self.command("apt-get");
        install.args(["install", "--download-only", "-qq", "-y"]).args(wanted);
        process::output(&mut install)?;
        if let Some(kernel) = kernel {
            let image = self.newest_image(kernel)?;
            println!("packages: fetching {image}");
            let mut list = self.command("apt-get");
            list.args(["download", "--print-uris", "-qq", &image]);
            names.extend(file_names(&process::output(&mut list)?));
            let mut download = self.command("apt-get");
            download.args(["download", "-qq", &image]).current_dir(&self.archives);
            process::output(&mut download)?;
        }
        for name in wanted {
            let found = names.iter().any(|file| file.split('_').next() == Some(*name));
            ensure!(found, "apt leaves out {name}");
        }
        self.files(names)
    }

    /// Downloads the source of `package` into the new folder `into`, as its authors packed it.
    ///
    /// # Errors
    /// When there is no such source or it does not arrive.
    pub fn fetch_source(&self, package: &str, into: &Path) -> Result<()> {
        println!("packages: fetching the source of {package}");
        std::fs::create_dir_all(into)?;
        let mut source = self.command("apt-get");
        source.args(["-o", &format!("APT::Default-Release={SUITE}")]);
        source.args(["source", "--download-only", "-qq", package]).current_dir(into);
        process::output(&mut source).map(drop)
    }

    /// The package that the metapackage `kernel` depends on.
    fn newest_image(&self, kernel: &str) -> Result<String> {
        let shown = process::output(self.command("apt-cache").args(["show", kernel]))?;
        let needs = shown.lines().find_map(|line| line.strip_prefix("Depends: "));
        let first = needs.and_then(|line| line.split([' ', ',']).next());
        Ok(first.with_context(|| format!("{kernel} names no image"))?.to_owned())
    }

    fn files(&self, names: Vec<String>) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut bytes = 0;
        for name in names {
            // `apt-get install` keeps the percent signs of a name, `apt-get download` too.
            let file = self.archives.join(&name);
            bytes += file.metadata().with_context(|| format!("{name} did not arrive"))?.len();
            files.push(file);
        }
        println!("packages: {} files, {} MB", files.len(), bytes / 1_000_000);
        Ok(files)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        command
    }
}

/// `'URI' FILE SIZE HASH`, as `--print-uris` has it, down to the file names.
fn file_names(uris: &str) -> Vec<String> {
    let rows = uris.lines().filter(|line| line.starts_with('\''));
    rows.filter_map(|line| line.split(' ').nth(1)).map(String::from).collect()
}

/// The addresses of the archives that this machine takes packages from, with the suites named
/// there. A machine on which `apt-get update` never ran knows no index targets yet; what an
/// update would fetch names the same archives.
fn addresses() -> Result<Vec<(String, String)>> {
    let format = "$(REPO_URI) $(RELEASE)";
    let known =
        process::output(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    let mut pairs: Vec<_> = known
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(a, b)| (a.into(), b.into()))
        .collect();
    if pairs.is_empty() {
        let planned = process::output(Command::new("apt-get").args(["update", "--print-uris"]))?;
        pairs = planned.lines().filter_map(release_file).collect();
    }
    Ok(pairs)
}

/// `'ADDRESS/dists/SUITE/InRelease' …` to the address and the suite.
fn release_file(line: &str) -> Option<(String, String)> {
    let uri = line.strip_prefix('\'')?.split('\'').next()?.strip_suffix("/InRelease")?;
    let (address, suite) = uri.split_once("/dists/")?;
    Some((format!("{address}/"), suite.to_owned()))
}

/// Our list of sources: the suite, its updates and backports from the archive that has the
/// suite, security updates from where this machine gets its own.
fn source_list(addresses: &[(String, String)], sources: bool) -> Result<String> {
    let main = addresses.iter().find(|(_, suite)| suite == SUITE);
    let main = &main.with_context(|| format!("this machine's apt has no archive of {SUITE}"))?.0;
    let security = addresses.iter().find(|(_, suite)| *suite == format!("{SUITE}-security"));
    let line =
        |at: &str, suite: &str| format!("deb [arch=amd64 signed-by={KEYS}] {at} {suite} main\n");
    let mut text: String = ["", "-updates", "-backports"]
        .iter()
        .map(|part| line(main, &format!("{SUITE}{part}")))
        .collect();
    if let Some((at, suite)) = security {
        text.push_str(&line(at, suite));
    }
    if sources {
        text.push_str(&format!("deb-src [signed-by={KEYS}] {main} {SUITE} main\n"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_found_on_a_machine_that_never_ran_an_update() {
        let line = "'http://archive.test/debian/dists/bookworm/InRelease' archive.test_x 0 ";
        let found = release_file(line).unwrap();
        assert_eq!(found, ("http://archive.test/debian/".to_owned(), "bookworm".to_owned()));
        assert_eq!(release_file("'http://archive.test/debian/dists/bookworm/main/x.xz' y 0"), None);
    }

    #[test]
    fn our_sources_have_the_backports_and_the_security_updates() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let text = source_list(
            &[
                pair("http://other.test/", "stable"),
                pair("http://archive.test/debian/", "bookworm"),
                pair("http://archive.test/security/", "bookworm-security"),
            ],
            false,
        );
        let text = text.unwrap();
        assert_eq!(text.lines().count(), 4);
        assert!(text.contains("http://archive.test/debian/ bookworm-backports main"));
        assert!(text.contains("http://archive.test/security/ bookworm-security main"));
        assert!(!text.contains("other.test"));
    }

    #[test]
    fn a_machine_without_the_release_is_told_so() {
        let error = source_list(&[("http://x.test/".into(), "trixie".into())], false).unwrap_err();
        assert_eq!(error.to_string(), "this machine's apt has no archive of bookworm");
    }
}
