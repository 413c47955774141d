//! Rules of data: what is written is what is read, sizes, holes, times.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::fs::{
    FallocateFlags, OFlags, Timespec, Timestamps, UTIME_OMIT, copy_file_range, fallocate, fsync,
    futimens, sendfile, statvfs,
};
use rustix::io::{Errno, dup};

use crate::rule::{Check, made, opened, refused, rules, same};

pub(crate) const RULES: &[(&str, Check)] = rules![
    what_is_appended_goes_to_the_end_whoever_wrote_before,
    what_was_never_written_is_zero,
    a_file_that_is_cut_and_grown_has_zeros,
    a_file_opened_with_trunc_is_empty,
    a_file_is_larger_than_four_gibibytes,
    a_hole_is_punched_and_room_is_kept,
    data_and_holes_are_found,
    a_range_is_copied_from_file_to_file,
    what_one_descriptor_wrote_another_one_reads_at_once,
    descriptors_that_are_one_share_their_place,
    a_descriptor_does_only_what_it_was_opened_for,
    a_mebibyte_is_written_in_one_call,
    times_are_set_to_the_nanosecond,
    writing_changes_the_time_of_the_data_and_chmod_that_of_the_state,
    data_is_synchronised,
    a_file_system_tells_its_room,
    a_program_runs_from_it,
];

fn both(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

fn what_is_appended_goes_to_the_end_whoever_wrote_before(dir: &Path) -> Result<()> {
    let at = dir.join("log");
    let append = || File::options().append(true).create(true).open(&at);
    let (mut one, mut two) = (append()?, append()?);
    for number in 0..20 {
        let file = if number % 2 == 0 { &mut one } else { &mut two };
        file.write_all(format!("{number} ").as_bytes())?;
    }
    let all: String = (0..20).map(|number| format!("{number} ")).collect();
    same(fs::read_to_string(&at)?, all)
}

fn what_was_never_written_is_zero(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    file.write_all_at(b"end", 100_000)?;
    let mut bytes = vec![7; 100_003];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes[..100_000].iter().all(|byte| *byte == 0), "a hole that is not zero");
    same(&bytes[100_000..], b"end")?;
    same(file.read_at(&mut bytes, 200_000)?, 0)
}

fn a_file_that_is_cut_and_grown_has_zeros(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    file.write_all_at(&[9; 10_000], 0)?;
    file.set_len(5)?;
    file.set_len(10_000)?;
    let mut bytes = vec![7; 10_000];
    file.read_exact_at(&mut bytes, 0)?;
    same(&bytes[..5], &[9; 5][..])?;
    ensure!(bytes[5..].iter().all(|byte| *byte == 0), "what was cut off came back");
    Ok(())
}

fn a_file_opened_with_trunc_is_empty(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"something")?;
    let file = opened(&at, OFlags::WRONLY | OFlags::TRUNC, 0)?;
    same(at.metadata()?.len(), 0)?;
    drop(file);
    Ok(())
}

fn a_file_is_larger_than_four_gibibytes(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    file.write_all_at(b"far", 5 << 30)?;
    let mut far = [0; 3];
    file.read_exact_at(&mut far, 5 << 30)?;
    same((&far, file.metadata()?.len()), (b"far", (5 << 30) + 3))
}

fn a_hole_is_punched_and_room_is_kept(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    file.write_all_at(&[9; 16384], 0)?;
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 4096, 4096)?;
    let mut bytes = vec![7; 16384];
    file.read_exact_at(&mut bytes, 0)?;
    for (at, expected) in [(0, 9), (4095, 9), (4096, 0), (8191, 0), (8192, 9), (16383, 9)] {
        same((at, bytes[at]), (at, expected))?;
    }
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 65536)?;
    same(file.metadata()?.len(), 16384)?;
    fallocate(&file, FallocateFlags::empty(), 0, 65536)?;
    same(file.metadata()?.len(), 65536)
}

fn data_and_holes_are_found(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    file.set_len(3 << 20)?;
    file.write_all_at(&[9; 4096], 1 << 20)?;
    let find = |from| rustix::fs::seek(&file, from);
    // A file system may know of no holes: then all is data up to the end.
    let data = find(rustix::fs::SeekFrom::Data(0))?;
    ensure!(data == 0 || data == 1 << 20, "data at {data}");
    let hole = find(rustix::fs::SeekFrom::Hole(1 << 20))?;
    ensure!(((1 << 20) + 4096..=3 << 20).contains(&hole), "a hole at {hole}");
    refused(find(rustix::fs::SeekFrom::Data(4 << 20)), Errno::NXIO)
}

fn a_range_is_copied_from_file_to_file(dir: &Path) -> Result<()> {
    let (from, to) = (both(&dir.join("from"))?, both(&dir.join("to"))?);
    let bytes: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    from.write_all_at(&bytes, 0)?;
    let (mut read, mut written) = (8, 0);
    while read < bytes.len() as u64 {
        let left = bytes.len() - usize::try_from(read)?;
        let moved = copy_file_range(&from, Some(&mut read), &to, Some(&mut written), left)?;
        ensure!(moved > 0, "nothing more after {written} bytes");
    }
    same(fs::read(dir.join("to"))?.as_slice() == &bytes[8..], true)?;
    let (sent, mut at) = (both(&dir.join("sent"))?, 0);
    while at < bytes.len() as u64 {
        ensure!(sendfile(&sent, &from, Some(&mut at), bytes.len())? > 0, "nothing more at {at}");
    }
    same(fs::read(dir.join("sent"))? == bytes, true)
}

fn what_one_descriptor_wrote_another_one_reads_at_once(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    let (one, two) = (both(&at)?, both(&at)?);
    let mut back = [0; 8];
    for number in 0..50u64 {
        one.write_all_at(&number.to_le_bytes(), number * 500)?;
        two.read_exact_at(&mut back, number * 500)?;
        same(u64::from_le_bytes(back), number)?;
        same(two.metadata()?.len(), number * 500 + 8)?;
    }
    Ok(())
}

fn descriptors_that_are_one_share_their_place(dir: &Path) -> Result<()> {
    let mut file = both(&dir.join("file"))?;
    let mut other = File::from(dup(&file)?);
    file.write_all(b"one")?;
    other.write_all(b"two")?;
    same(file.stream_position()?, 6)?;
    file.seek(SeekFrom::Start(1))?;
    let mut rest = String::new();
    other.read_to_string(&mut rest)?;
    same(rest.as_str(), "netwo")
}

fn a_descriptor_does_only_what_it_was_opened_for(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"x")?;
    let reads = opened(&at, OFlags::RDONLY, 0)?;
    let writes = opened(&at, OFlags::WRONLY, 0)?;
    refused(rustix::io::write(&reads, b"y"), Errno::BADF)?;
    refused(rustix::io::read(&writes, &mut [0; 1][..]), Errno::BADF)?;
    refused(rustix::fs::ftruncate(&reads, 0), Errno::INVAL)?;
    let folder = opened(dir, OFlags::RDONLY, 0)?;
    refused(rustix::io::read(&folder, &mut [0; 1][..]), Errno::ISDIR)
}

fn a_mebibyte_is_written_in_one_call(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    let bytes: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_be_bytes).collect();
    same(file.write_at(&bytes, 3)?, bytes.len())?;
    let mut back = vec![0; bytes.len()];
    same(file.read_at(&mut back, 3)?, bytes.len())?;
    same(back == bytes, true)
}

fn times_are_set_to_the_nanosecond(dir: &Path) -> Result<()> {
    let file = both(&dir.join("file"))?;
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let (atime, mtime) = (time(1_000_000_000, 123_456_789), time(2_000_000_000, 1));
    futimens(&file, &Timestamps { last_access: atime, last_modification: mtime })?;
    let found = dir.join("file").metadata()?;
    same((found.atime(), found.atime_nsec()), (1_000_000_000, 123_456_789))?;
    same((found.mtime(), found.mtime_nsec()), (2_000_000_000, 1))?;
    let omit = time(0, UTIME_OMIT);
    futimens(&file, &Timestamps { last_access: omit, last_modification: time(5, 6) })?;
    let found = file.metadata()?;
    same((found.atime(), found.mtime(), found.mtime_nsec()), (1_000_000_000, 5, 6))
}

fn writing_changes_the_time_of_the_data_and_chmod_that_of_the_state(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    let file = both(&at)?;
    let past = Timespec { tv_sec: 1000, tv_nsec: 0 };
    futimens(&file, &Timestamps { last_access: past, last_modification: past })?;
    file.write_all_at(b"x", 0)?;
    file.sync_all()?;
    ensure!(at.metadata()?.mtime() > 1000, "writing left the time");
    futimens(&file, &Timestamps { last_access: past, last_modification: past })?;
    let before = at.metadata()?;
    fs::set_permissions(&at, fs::Permissions::from_mode(0o600))?;
    let after = at.metadata()?;
    same((before.mtime(), after.mtime()), (1000, 1000))?;
    let stamp = |found: &fs::Metadata| (found.ctime(), found.ctime_nsec());
    ensure!(stamp(&after) >= stamp(&before) && after.ctime() > 1000, "chmod left the time");
    Ok(())
}

fn data_is_synchronised(dir: &Path) -> Result<()> {
    let mut file = both(&dir.join("file"))?;
    file.write_all(b"x")?;
    file.sync_data()?;
    file.sync_all()?;
    fsync(opened(dir, OFlags::RDONLY | OFlags::DIRECTORY, 0)?)?;
    Ok(rustix::fs::syncfs(&file)?)
}

fn a_file_system_tells_its_room(dir: &Path) -> Result<()> {
    let room = statvfs(dir)?;
    ensure!(room.f_bsize >= 512 && room.f_blocks > 0 && room.f_bfree <= room.f_blocks);
    same(room.f_namemax, 255)
}

fn a_program_runs_from_it(dir: &Path) -> Result<()> {
    let script = dir.join("script");
    made(&script, b"#!/bin/sh\nexit 7\n")?;
    let refused = Command::new(&script).status();
    ensure!(refused.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied));
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    same(Command::new(&script).status()?.code(), Some(7))?;
    let program = dir.join("true");
    fs::copy("/bin/busybox", &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    same(Command::new(&program).status()?.code(), Some(0))
}
