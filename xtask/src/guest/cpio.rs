//! Writes the archive format that Linux unpacks as its first file system: cpio, "newc"
//! (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Invariant: every header and every file's data begins on a multiple of 4 bytes.

use std::io::Write as _;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An archive that grows in memory. Parents must be added before what lies in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file that anyone may read, and run if `program` says so.
    pub fn file(&mut self, path: &str, program: bool, data: &[u8]) {
        self.entry(path, FILE | if program { 0o755 } else { 0o644 }, data);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK, target.as_bytes());
    }

    /// The finished archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // Fields: inode, mode, uid, gid, links, time, size, device (2), own device (2),
        // length of the name with its zero, checksum (unused).
        let (inode, size, name) = (self.entries, data.len(), path.len() + 1);
        let head = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}\
             {0:08x}{0:08x}{0:08x}{0:08x}{name:08x}{0:08x}{path}\0",
            0,
        );
        self.aligned(head.as_bytes());
        self.aligned(data);
    }

    fn aligned(&mut self, data: &[u8]) {
        // Writing to memory does not fail.
        let _ = self.bytes.write_all(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_is_a_header_of_110_bytes_then_name_and_data_padded_to_four() {
        let mut archive = Archive::default();
        archive.directory("etc");
        archive.file("etc/x", true, b"hello");
        let bytes = archive.finish();
        // 110 + 4 -> 116; 110 + 6 = 116, + 5 -> 124; 110 + 11 -> 124.
        assert_eq!(bytes.len(), 116 + 124 + 124);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[116 + 14..116 + 22], b"000081ed");
        assert_eq!(&bytes[116 + 116..116 + 121], b"hello");
    }
}
