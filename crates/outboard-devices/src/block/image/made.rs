//! Images that are no files: `ram:SIZE`, gone with the process, and `null:SIZE`, which stores nothing.
//!
//! Both lie on a memfd, so that everything that works on a file works on them. Invariant: what a disk
//! of memory holds is never taken for the state of another one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, memfd_create};

use super::{BLOCK_SIZES, Geometry, Image, ImageError, ImageOptions, check_block_size};

/// Where the contents of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeps {
    /// In the file that it was opened from.
    File,
    /// In memory that ends with this process.
    Memory,
    /// Nowhere.
    Nothing,
}

impl Image {
    /// An image without a file, on memory of its own.
    pub(super) fn made(
        path: PathBuf,
        keeps: Keeps,
        size: Option<u64>,
        options: ImageOptions,
    ) -> Result<Self, ImageError> {
        let Some(size) = size else { return Err(ImageError::NoSize { path }) };
        let failed = |source| ImageError::Open { path: path.clone(), source };
        if options.direct {
            let source = io::ErrorKind::Unsupported.into();
            return Err(ImageError::Direct { path, source });
        }
        let block_size = options.block_size.unwrap_or(BLOCK_SIZES[0]);
        check_block_size(&path, block_size, BLOCK_SIZES[0])?;
        if size == 0 {
            return Err(ImageError::Empty { path });
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return Err(ImageError::Size { path, size, block_size });
        }
        let file = memfd_create("outboard-disk", MemfdFlags::CLOEXEC);
        let file = File::from(file.map_err(|error| failed(error.into()))?);
        file.set_len(size).map_err(failed)?;
        Ok(Self {
            in_memory: true,
            keeps,
            engine: Arc::default(),
            map: OnceLock::new(),
            file: Arc::new(file),
            direct: None,
            geometry: Geometry { size, block_size, physical_block_size: BLOCK_SIZES[1] },
            size: AtomicU64::new(size),
            read_only: options.read_only,
            granularity: 1,
            path,
        })
    }
}

/// `null:SIZE` or `ram:SIZE`; the size is None when it is none.
pub(super) fn special(path: &Path) -> Option<(Keeps, Option<u64>)> {
    let name = path.to_str()?;
    let (keeps, size) = match name.split_once(':')? {
        ("null", size) => (Keeps::Nothing, size),
        ("ram", size) => (Keeps::Memory, size),
        _ => return None,
    };
    let shift = match size.bytes().last().map(|last| last.to_ascii_uppercase()) {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        _ => 0,
    };
    let digits = if shift == 0 { size } else { size.get(..size.len() - 1).unwrap_or_default() };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    Some((keeps, size.filter(|size| i64::try_from(*size).is_ok())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_a_file_has_the_size_that_its_name_says() {
        let open = |name: &str| Image::open(name, ImageOptions::default());
        for (name, size) in [("null:4096", 4096), ("null:2k", 2048), ("ram:3M", 3 << 20)] {
            let image = open(name).expect(name);
            assert_eq!(image.geometry().size, size, "{name}");
            assert_eq!((image.stores_nothing(), image.is_volatile()).0, name.starts_with('n'));
            assert_eq!(image.stores_nothing(), !image.is_volatile(), "{name}");
        }
        for name in ["null:", "ram:G", "ram:1GG", "null:-1", "ram:9999999999T", "null:1.5G"] {
            let error = open(name).expect_err("no size").to_string();
            assert!(error.contains("no size"), "{name}: {error}");
        }
        assert!(open("ram:0").is_err_and(|error| error.to_string().contains("is empty")));
        assert!(open("ram:513").is_err_and(|error| error.to_string().contains("no multiple")));
        assert!(open("rom:4k").is_err_and(|error| error.to_string().contains("No such file")));
        let direct = ImageOptions { direct: true, ..ImageOptions::default() };
        Image::open("ram:4k", direct).expect_err("nothing to go past");
    }
}
