//! Rules of names: making, linking, renaming and removing what they stand for.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, link, mkdir, mknodat, openat, rename,
    renameat_with, rmdir, symlink, unlink,
};
use rustix::io::Errno;

use crate::rule::{Check, made, opened, refused, rules, same};

pub(crate) const RULES: &[(&str, Check)] = rules![
    what_is_not_there_is_enoent_and_what_is_no_directory_is_enotdir,
    a_file_is_made_once_with_excl,
    a_symbolic_link_is_not_followed_with_nofollow_or_excl,
    a_name_has_up_to_255_bytes_of_any_kind,
    a_mode_is_cut_by_the_umask,
    a_directory_is_made_once_and_removed_empty,
    files_and_directories_are_removed_by_their_own_calls,
    links_are_counted,
    a_file_outlives_its_name_while_it_is_open,
    a_directory_that_was_removed_takes_no_entries,
    a_symbolic_link_says_what_it_was_told,
    links_in_a_circle_are_eloop,
    a_rename_replaces_a_file_and_its_readers_keep_the_old_one,
    a_rename_of_a_directory_replaces_an_empty_one_alone,
    a_rename_into_itself_is_einval,
    a_rename_between_two_names_of_one_file_does_nothing,
    a_rename_without_replacing_and_an_exchange,
    a_directory_of_a_thousand_lists_each_once_and_can_be_emptied_while_it_is_read,
    pipes_and_devices_are_what_they_are,
    a_socket_is_bound_and_reached,
    a_file_that_never_had_a_name_is_refused,
];

fn what_is_not_there_is_enoent_and_what_is_no_directory_is_enotdir(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    refused(opened(&file, OFlags::RDONLY, 0), Errno::NOENT)?;
    refused(opened(&dir.join("no/file"), OFlags::RDWR | OFlags::CREATE, 0o600), Errno::NOENT)?;
    made(&file, b"x")?;
    refused(opened(&file.join("below"), OFlags::RDONLY, 0), Errno::NOTDIR)?;
    refused(opened(&file, OFlags::RDONLY | OFlags::DIRECTORY, 0), Errno::NOTDIR)?;
    refused(opened(dir, OFlags::RDWR, 0), Errno::ISDIR)
}

fn a_file_is_made_once_with_excl(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
    opened(&file, flags, 0o600)?;
    refused(opened(&file, flags, 0o600), Errno::EXIST)?;
    opened(&file, OFlags::RDWR | OFlags::CREATE, 0o600)?;
    unlink(&file)?;
    opened(&file, flags, 0o600)?;
    Ok(())
}

fn a_symbolic_link_is_not_followed_with_nofollow_or_excl(dir: &Path) -> Result<()> {
    let at = dir.join("link");
    symlink("nowhere", &at)?;
    refused(opened(&at, OFlags::RDONLY, 0), Errno::NOENT)?;
    refused(opened(&at, OFlags::RDONLY | OFlags::NOFOLLOW, 0), Errno::LOOP)?;
    refused(opened(&at, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, 0o600), Errno::EXIST)?;
    // Without it the file is made where the link leads.
    opened(&at, OFlags::RDWR | OFlags::CREATE, 0o600)?;
    ensure!(dir.join("nowhere").is_file(), "no file where the link leads");
    Ok(())
}

fn a_name_has_up_to_255_bytes_of_any_kind(dir: &Path) -> Result<()> {
    made(&dir.join("x".repeat(255)), b"long")?;
    refused(opened(&dir.join("x".repeat(256)), OFlags::RDONLY, 0), Errno::NAMETOOLONG)?;
    let any: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    for name in any.chunks(64) {
        let name = std::os::unix::ffi::OsStrExt::from_bytes(name);
        let name: &std::ffi::OsStr = name;
        made(&dir.join(name), b"odd")?;
        ensure!(fs::read_dir(dir)?.any(|entry| entry.is_ok_and(|entry| entry.file_name() == name)));
    }
    Ok(())
}

fn a_mode_is_cut_by_the_umask(dir: &Path) -> Result<()> {
    let before = rustix::process::umask(Mode::from_raw_mode(0o027));
    let file = opened(&dir.join("file"), OFlags::RDWR | OFlags::CREATE, 0o666);
    let folder = mkdir(dir.join("folder"), Mode::from_raw_mode(0o777));
    rustix::process::umask(before);
    file?;
    folder?;
    same(dir.join("file").metadata()?.mode() & 0o7777, 0o640)?;
    same(dir.join("folder").metadata()?.mode() & 0o7777, 0o750)
}

fn a_directory_is_made_once_and_removed_empty(dir: &Path) -> Result<()> {
    let folder = dir.join("folder");
    mkdir(&folder, Mode::RWXU)?;
    refused(mkdir(&folder, Mode::RWXU), Errno::EXIST)?;
    made(&folder.join("file"), b"")?;
    refused(rmdir(&folder), Errno::NOTEMPTY)?;
    unlink(folder.join("file"))?;
    rmdir(&folder)?;
    refused(rmdir(&folder), Errno::NOENT)
}

fn files_and_directories_are_removed_by_their_own_calls(dir: &Path) -> Result<()> {
    let (file, folder) = (dir.join("file"), dir.join("folder"));
    made(&file, b"")?;
    fs::create_dir(&folder)?;
    refused(rmdir(&file), Errno::NOTDIR)?;
    refused(unlink(&folder), Errno::ISDIR)?;
    unlink(&file)?;
    refused(unlink(&file), Errno::NOENT)
}

fn links_are_counted(dir: &Path) -> Result<()> {
    let (one, two) = (dir.join("one"), dir.join("two"));
    made(&one, b"x")?;
    same(one.metadata()?.nlink(), 1)?;
    link(&one, &two)?;
    same((one.metadata()?.nlink(), two.metadata()?.nlink()), (2, 2))?;
    same(one.metadata()?.ino(), two.metadata()?.ino())?;
    refused(link(&one, &two), Errno::EXIST)?;
    fs::create_dir(dir.join("folder"))?;
    refused(link(dir.join("folder"), dir.join("again")), Errno::PERM)?;
    unlink(&one)?;
    same(two.metadata()?.nlink(), 1)?;
    same(fs::read(two)?, b"x".to_vec())
}

fn a_file_outlives_its_name_while_it_is_open(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"before")?;
    let mut file = File::options().read(true).write(true).open(&at)?;
    unlink(&at)?;
    refused(opened(&at, OFlags::RDONLY, 0), Errno::NOENT)?;
    same(file.metadata()?.nlink(), 0)?;
    file.set_len(3)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    file.write_all(b"after")?;
    file.sync_all()?;
    same((text.as_str(), file.metadata()?.len()), ("bef", 8))?;
    // The name is free for another one.
    made(&at, b"other")?;
    same(file.metadata()?.len(), 8)?;
    ensure!(file.metadata()?.ino() != at.metadata()?.ino(), "one number for two files");
    Ok(())
}

fn a_directory_that_was_removed_takes_no_entries(dir: &Path) -> Result<()> {
    let folder = dir.join("folder");
    fs::create_dir(&folder)?;
    let open = opened(&folder, OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
    rmdir(&folder)?;
    let flags = OFlags::RDWR | OFlags::CREATE;
    refused(openat(&open, "file", flags, Mode::RWXU), Errno::NOENT)
}

fn a_symbolic_link_says_what_it_was_told(dir: &Path) -> Result<()> {
    for target in ["a", "../../../../etc/passwd", "/", &"long/".repeat(200)] {
        let at = dir.join("link");
        symlink(target, &at)?;
        same(fs::read_link(&at)?.as_path(), Path::new(target))?;
        same(at.symlink_metadata()?.len(), target.len() as u64)?;
        unlink(&at)?;
    }
    Ok(())
}

fn links_in_a_circle_are_eloop(dir: &Path) -> Result<()> {
    symlink("two", dir.join("one"))?;
    symlink("one", dir.join("two"))?;
    refused(opened(&dir.join("one"), OFlags::RDONLY, 0), Errno::LOOP)
}

fn a_rename_replaces_a_file_and_its_readers_keep_the_old_one(dir: &Path) -> Result<()> {
    let (old, new) = (dir.join("old"), dir.join("new"));
    made(&old, b"old")?;
    made(&new, b"new")?;
    let mut reader = File::open(&old)?;
    rename(&new, &old)?;
    refused(opened(&new, OFlags::RDONLY, 0), Errno::NOENT)?;
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    same((text.as_str(), fs::read(&old)?), ("old", b"new".to_vec()))
}

fn a_rename_of_a_directory_replaces_an_empty_one_alone(dir: &Path) -> Result<()> {
    let (one, two, file) = (dir.join("one"), dir.join("two"), dir.join("file"));
    fs::create_dir(&one)?;
    fs::create_dir(&two)?;
    made(&two.join("in"), b"")?;
    made(&file, b"")?;
    refused(rename(&one, &two), Errno::NOTEMPTY)?;
    refused(rename(&one, &file), Errno::NOTDIR)?;
    refused(rename(&file, &one), Errno::ISDIR)?;
    rename(&two, &one)?;
    ensure!(one.join("in").exists() && !two.exists(), "it did not move");
    Ok(())
}

fn a_rename_into_itself_is_einval(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("a/b"))?;
    refused(rename(dir.join("a"), dir.join("a/b/c")), Errno::INVAL)
}

fn a_rename_between_two_names_of_one_file_does_nothing(dir: &Path) -> Result<()> {
    let (one, two) = (dir.join("one"), dir.join("two"));
    made(&one, b"x")?;
    link(&one, &two)?;
    rename(&one, &two)?;
    same((one.metadata()?.nlink(), two.metadata()?.nlink()), (2, 2))
}

fn a_rename_without_replacing_and_an_exchange(dir: &Path) -> Result<()> {
    let (one, two) = (dir.join("one"), dir.join("two"));
    made(&one, b"1")?;
    made(&two, b"2")?;
    refused(renameat_with(CWD, &one, CWD, &two, RenameFlags::NOREPLACE), Errno::EXIST)?;
    renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE)?;
    same((fs::read(&one)?, fs::read(&two)?), (b"2".to_vec(), b"1".to_vec()))?;
    renameat_with(CWD, &one, CWD, dir.join("three"), RenameFlags::NOREPLACE)?;
    ensure!(!one.exists());
    Ok(())
}

fn a_directory_of_a_thousand_lists_each_once_and_can_be_emptied_while_it_is_read(
    dir: &Path,
) -> Result<()> {
    let names: BTreeSet<_> = (0..1000).map(|number| format!("entry-{number}")).collect();
    for name in &names {
        made(&dir.join(name), b"")?;
    }
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        unlink(dir.join(&name))?;
        ensure!(found.insert(name.clone()), "{name} twice");
    }
    same(found.len(), names.len())?;
    same(fs::read_dir(dir)?.count(), 0)
}

fn pipes_and_devices_are_what_they_are(dir: &Path) -> Result<()> {
    let node = |name: &str, kind, device| {
        mknodat(CWD, dir.join(name), kind, Mode::RUSR | Mode::WUSR, device)
    };
    node("pipe", FileType::Fifo, 0)?;
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3))?;
    node("socket", FileType::Socket, 0)?;
    ensure!(dir.join("pipe").metadata()?.file_type().is_fifo());
    ensure!(dir.join("socket").metadata()?.file_type().is_socket());
    same(dir.join("null").metadata()?.rdev(), rustix::fs::makedev(1, 3))?;
    let pipe = dir.join("pipe");
    let said = std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read_to_string(&pipe));
        fs::write(&pipe, "through")?;
        reader.join().map_err(|_| std::io::Error::other("panicked"))?
    });
    same(said?.as_str(), "through")
}

fn a_socket_is_bound_and_reached(dir: &Path) -> Result<()> {
    let at = dir.join("s");
    let listener = UnixListener::bind(&at)?;
    let mut here = UnixStream::connect(&at)?;
    let (mut there, _) = listener.accept()?;
    here.write_all(b"hello")?;
    drop(here);
    let mut text = String::new();
    there.read_to_string(&mut text)?;
    same(text.as_str(), "hello")
}

/// The server knows no TMPFILE: programs fall back to a name that they remove.
fn a_file_that_never_had_a_name_is_refused(dir: &Path) -> Result<()> {
    refused(opened(dir, OFlags::TMPFILE | OFlags::RDWR, 0o600), Errno::OPNOTSUPP)?;
    let found = rustix::fs::statat(CWD, dir, AtFlags::empty())?;
    ensure!(found.st_nlink > 0);
    Ok(())
}
