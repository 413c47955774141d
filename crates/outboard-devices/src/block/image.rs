//! Disk images: regular files and block devices, opened, measured and locked (contract §6).
//!
//! Invariants: an image is judged by its open descriptor, never by its name, so that a file put in
//! its place meanwhile changes nothing; its size is read when it is opened and when somebody says
//! that it has grown, and nothing here ever makes a file grow; the lock belongs to the open file, so every duplicate and every thread shares it.

mod made;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use outboard::memory::MapError;
use rustix::fs::{AtFlags, FileType, OFlags, SeekFrom, StatxAttributes, StatxFlags};
use thiserror::Error;

use super::config::SECTOR;
use super::mapped::Mapped;
use made::Keeps;

/// Smallest and largest `blk_size`, in bytes.
const BLOCK_SIZES: [u32; 2] = [512, 4096];
/// O_DIRECT's alignment where the system does not tell: enough for every disk.
const SAFE_ALIGNMENT: u32 = 4096;
/// File systems whose files live in memory (statfs(2)): tmpfs, ramfs, hugetlbfs.
const IN_MEMORY: [u32; 3] = [0x0102_1994, 0x8584_58f6, HUGETLBFS];
const HUGETLBFS: u32 = 0x9584_58f6;

/// Why an image cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The system does not open it.
    #[error("image {path}: {source}", path = path.display())]
    Open {
        /// Its name.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It opens for reading only.
    #[error("image {path} cannot be written ({source}): open it read-only?", path = path.display())]
    NotWritable {
        /// Its name.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, a pipe …
    #[error("image {path} is neither a regular file nor a block device", path = path.display())]
    Kind {
        /// Its name.
        path: PathBuf,
    },
    /// It holds nothing.
    #[error("image {path} is empty", path = path.display())]
    Empty {
        /// Its name.
        path: PathBuf,
    },
    /// The last block would be a part of one.
    #[error(
        "image {path} has {size} bytes, no multiple of the block size {block_size}",
        path = path.display()
    )]
    Size {
        /// Its name.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Bytes.
        block_size: u32,
    },
    /// The block size is none of 512 and 4096, or smaller than the disk's own.
    #[error("image {path}: block size {block_size} is not possible, {why}", path = path.display())]
    BlockSize {
        /// Its name.
        path: PathBuf,
        /// Bytes.
        block_size: u32,
        /// Why.
        why: String,
    },
    /// A disk of memory or of nothing, of a size that is none.
    #[error("image {path}: no size, which is a number of bytes or of K, M, G, T", path = path.display())]
    NoSize {
        /// Its name.
        path: PathBuf,
    },
    /// O_DIRECT is not to be had.
    #[error("image {path}: its file system has no direct access ({source})", path = path.display())]
    Direct {
        /// Its name.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be measured anew, or is no larger than it was.
    #[error("image {path} keeps its size: {why}", path = path.display())]
    Resize {
        /// Its name.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Another running device holds it.
    #[error("image {path} is in use by another running device", path = path.display())]
    Locked {
        /// Its name.
        path: PathBuf,
    },
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageOptions {
    /// Nothing is ever written; many devices may share it.
    pub read_only: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// `blk_size` in bytes, 512 or 4096; the disk's own when None.
    pub block_size: Option<u32>,
}

/// Sizes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Of the whole disk.
    pub size: u64,
    /// Of the unit that the driver is told to use.
    pub block_size: u32,
    /// Of the unit that is written at once below; a multiple of `block_size`.
    pub physical_block_size: u32,
}

/// What O_DIRECT asks of a transfer: powers of two, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses and lengths in memory.
    pub(crate) memory: u32,
    /// Of positions and lengths in the file.
    pub(crate) offset: u32,
}

/// The second open file of an image with O_DIRECT.
#[derive(Debug)]
pub(crate) struct Direct {
    pub(crate) alignment: Alignment,
    /// Without O_DIRECT, for transfers that it does not take. The kernel keeps both in step.
    pub(crate) buffered: File,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: Arc<File>,
    direct: Option<Direct>,
    /// As it was opened.
    geometry: Geometry,
    /// Bytes; grows with the file when that is told.
    size: AtomicU64,
    read_only: bool,
    in_memory: bool,
    /// `null:`, `ram:` or a file.
    keeps: Keeps,
    /// How it is reached, once a worker has been built.
    engine: Arc<OnceLock<&'static str>>,
    /// Made when an engine asks for it.
    map: OnceLock<Result<Arc<Mapped>, MapError>>,
    /// Of what can be discarded at once: the logical block of a block device, 1 in a file.
    granularity: u64,
}

impl Image {
    /// Opens and measures an image: a file, a block device, or one that is no file at all. `null:1G`
    /// stores nothing (for measuring), `ram:1G` lives as long as this process; sizes in bytes, or
    /// with K, M, G or T. (A file of such a name is `./null:1G`.)
    ///
    /// # Errors
    /// It cannot be opened as asked, or it is no disk; nothing was changed.
    pub fn open(path: impl AsRef<Path>, options: ImageOptions) -> Result<Self, ImageError> {
        let path = path.as_ref().to_owned();
        if let Some((keeps, size)) = made::special(&path) {
            return Self::made(path, keeps, size, options);
        }
        let system = |source| ImageError::Open { path: path.clone(), source };
        let file = open(&path, options.read_only)?;
        let kind = kind_of(&file).map_err(system)?;
        let block_device = match kind {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(ImageError::Kind { path }),
        };
        let direct =
            if options.direct { Some(make_direct(&path, &file, options.read_only)?) } else { None };
        let (logical, physical) = block_sizes(&file, block_device).map_err(system)?;
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| system(e.into()))?;
        // What direct access takes suits best, where the disk can be divided so.
        let best = direct.as_ref().map_or(logical, |direct| direct.alignment.offset.max(logical));
        let own = if size.is_multiple_of(u64::from(best)) { best } else { logical };
        let block_size = options.block_size.unwrap_or(own);
        check_block_size(&path, block_size, logical)?;
        if size == 0 {
            return Err(ImageError::Empty { path });
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return Err(ImageError::Size { path, size, block_size });
        }
        let physical_block_size = physical.max(block_size);
        Ok(Self {
            in_memory: !block_device && lives_in_memory(&file),
            keeps: Keeps::File,
            engine: Arc::default(),
            map: OnceLock::new(),
            file: Arc::new(file),
            direct,
            geometry: Geometry { size, block_size, physical_block_size },
            size: AtomicU64::new(size),
            read_only: options.read_only,
            granularity: if block_device { u64::from(logical) } else { 1 },
            path,
        })
    }

    /// Whether reads read nothing and writes write nothing.
    #[must_use]
    pub fn stores_nothing(&self) -> bool {
        self.keeps == Keeps::Nothing
    }

    /// Whether its contents end with this process.
    #[must_use]
    pub fn is_volatile(&self) -> bool {
        self.keeps == Keeps::Memory
    }

    /// The name of the engine that the workers reach it by, for the log; empty until one is built.
    #[must_use]
    pub fn engine(&self) -> Arc<OnceLock<&'static str>> {
        Arc::clone(&self.engine)
    }

    pub(crate) fn reached_by(&self, engine: &'static str) {
        let _ = self.engine.set(engine);
    }

    /// The image as memory of this process, mapped at the first call.
    pub(crate) fn map(&self) -> &Result<Arc<Mapped>, MapError> {
        self.map.get_or_init(|| {
            let file = self.file.try_clone().map_err(|error| MapError::Host {
                call: "dup",
                errno: error.raw_os_error().unwrap_or_default(),
            })?;
            let holes = !lies_open(&self.file);
            Mapped::new(file.into(), self.geometry.size, !self.read_only, holes).map(Arc::new)
        })
    }

    /// As it was named.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its sizes.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Ordering::Relaxed), ..self.geometry }
    }

    /// Number of sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.size.load(Ordering::Relaxed) / SECTOR
    }

    /// Measures the image anew: it may have grown. Returns its size in bytes.
    ///
    /// # Errors
    /// It has not grown, not to a whole number of blocks, or is no file; it keeps its size.
    pub(crate) fn grow(&self) -> Result<u64, ImageError> {
        let failed = |why: String| ImageError::Resize { path: self.path.clone(), why };
        if self.keeps != Keeps::File {
            return Err(failed("it is no file".to_owned()));
        }
        // Never the position of the shared file: nobody uses it.
        let size = rustix::fs::seek(&self.file, SeekFrom::End(0));
        let size = size.map_err(|error| failed(error.to_string()))?;
        let (before, block) = (self.size.load(Ordering::Relaxed), self.geometry.block_size);
        if size <= before || !size.is_multiple_of(u64::from(block)) {
            return Err(failed(format!(
                "the file has {size} bytes, more than {before} in blocks of {block} are wanted"
            )));
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(size)
    }

    /// Whether nothing may be written.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether transfers are copies in memory, which the kernel finishes at once.
    #[must_use]
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// The open file, for transfers. With direct access they must be aligned.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(crate) fn direct(&self) -> Option<&Direct> {
        self.direct.as_ref()
    }

    pub(crate) fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Claims the image for a running device: alone when it writes, with others when it reads.
    ///
    /// # Errors
    /// Another device runs on it.
    pub fn lock(&self) -> Result<(), ImageError> {
        let locked =
            if self.read_only { self.file.try_lock_shared() } else { self.file.try_lock() };
        match locked {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(ImageError::Locked { path: self.path.clone() }),
            Err(TryLockError::Error(error)) => {
                tracing::warn!("image {} cannot be locked: {error}", self.path.display());
                Ok(())
            }
        }
    }

    /// Gives the claim back.
    pub fn unlock(&self) {
        if let Err(error) = self.file.unlock() {
            tracing::warn!("image {} cannot be unlocked: {error}", self.path.display());
        }
    }

    /// An image of the unit tests, on a file without a name.
    #[cfg(test)]
    pub(crate) fn for_tests(geometry: Geometry, read_only: bool) -> Self {
        let memfd =
            rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(memfd);
        file.set_len(geometry.size).expect("room");
        Self {
            path: "test".into(),
            file: Arc::new(file),
            direct: None,
            geometry,
            size: AtomicU64::new(geometry.size),
            read_only,
            in_memory: true,
            keeps: Keeps::File,
            engine: Arc::default(),
            map: OnceLock::new(),
            granularity: 1,
        }
    }
}

/// Opens without waiting, also when the name is a pipe's.
fn open(path: &Path, read_only: bool) -> Result<File, ImageError> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    let failed = |source| ImageError::Open { path: path.to_owned(), source };
    let file = opened.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
            ImageError::NotWritable { path: path.to_owned(), source }
        }
        io::ErrorKind::IsADirectory => ImageError::Kind { path: path.to_owned() },
        _ => failed(source),
    })?;
    // Operations on it are to wait.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| failed(error.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)
        .map_err(|error| failed(error.into()))?;
    Ok(file)
}

fn kind_of(file: &File) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode))
}

/// Turns `file` to O_DIRECT and opens the same image once more without.
fn make_direct(path: &Path, file: &File, read_only: bool) -> Result<Direct, ImageError> {
    let failed = |source| ImageError::Open { path: path.to_owned(), source };
    let flags = rustix::fs::fcntl_getfl(file).map_err(|error| failed(error.into()))?;
    let buffered = open(path, read_only)?;
    let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
    if identity(file).map_err(failed)? != identity(&buffered).map_err(failed)? {
        return Err(failed(io::Error::other("the file was replaced while it was opened")));
    }
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)
        .map_err(|error| ImageError::Direct { path: path.to_owned(), source: error.into() })?;
    Ok(Direct { alignment: direct_alignment(file), buffered })
}

fn direct_alignment(file: &File) -> Alignment {
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|found| found.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .map(|found| (found.stx_dio_mem_align, found.stx_dio_offset_align))
        .filter(|(memory, offset)| memory.is_power_of_two() && offset.is_power_of_two());
    let (memory, offset) = told.unwrap_or((SAFE_ALIGNMENT, SAFE_ALIGNMENT));
    Alignment { memory: memory.min(SAFE_ALIGNMENT), offset }
}

/// Logical and physical block size, in bytes.
fn block_sizes(file: &File, block_device: bool) -> io::Result<(u32, u32)> {
    if block_device {
        let logical = rustix::fs::ioctl_blksszget(file)?;
        return Ok((logical, rustix::fs::ioctl_blkpbszget(file)?.max(logical)));
    }
    let preferred = u32::try_from(file.metadata()?.blksize()).unwrap_or(u32::MAX);
    let physical = if preferred.is_power_of_two() { preferred } else { BLOCK_SIZES[0] };
    Ok((BLOCK_SIZES[0], physical.clamp(BLOCK_SIZES[0], BLOCK_SIZES[1])))
}

fn check_block_size(path: &Path, block_size: u32, logical: u32) -> Result<(), ImageError> {
    let why = if !BLOCK_SIZES.contains(&block_size) {
        format!("it must be {} or {}", BLOCK_SIZES[0], BLOCK_SIZES[1])
    } else if block_size < logical {
        format!("the disk's own is {logical}")
    } else {
        return Ok(());
    };
    Err(ImageError::BlockSize { path: path.to_owned(), block_size, why })
}

fn lives_in_memory(file: &File) -> bool {
    IN_MEMORY.iter().any(|magic| is_on(file, *magic)) || is_dax(file)
}

/// Whether any of its bytes can be touched without taking more room than it has.
fn lies_open(file: &File) -> bool {
    is_on(file, HUGETLBFS) || is_dax(file)
}

fn is_on(file: &File, magic: u32) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| i64::from(magic) == found.f_type & 0xffff_ffff)
}

/// Persistent memory whose file system gives it out page by page, past the page cache.
fn is_dax(file: &File) -> bool {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::DAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(size).expect("room");
        file
    }

    #[test]
    fn a_regular_file_is_measured() {
        let file = sparse(8 << 20);
        let image = Image::open(file.path(), ImageOptions::default()).expect("opens");
        assert_eq!(image.geometry().size, 8 << 20);
        assert_eq!(image.geometry().block_size, 512);
        assert_eq!(image.sectors(), 16384);
        assert!(image.geometry().physical_block_size.is_multiple_of(512));
    }

    #[test]
    fn what_is_no_disk_is_refused_with_its_reason() {
        let says = |path: &Path, options: ImageOptions| {
            Image::open(path, options).expect_err("no disk").to_string()
        };
        let plain = ImageOptions::default();
        assert!(says(sparse(0).path(), plain).ends_with("is empty"));
        assert!(says(sparse(513).path(), plain).contains("513 bytes, no multiple of"));
        let blocks = ImageOptions { block_size: Some(4096), ..plain };
        assert!(says(sparse(4096 + 512).path(), blocks).contains("block size 4096"));
        let odd = ImageOptions { block_size: Some(1024), ..plain };
        assert!(says(sparse(4096).path(), odd).contains("must be 512 or 4096"));
        let directory = tempfile::tempdir().expect("a directory");
        assert!(says(directory.path(), plain).contains("neither"));
        assert!(says(&directory.path().join("none"), plain).contains("No such file"));
        let read_only = ImageOptions { read_only: true, ..plain };
        assert!(says(directory.path(), read_only).contains("neither"));
    }

    #[test]
    fn a_pipe_is_refused_without_waiting_for_its_other_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .expect("a pipe");
        for read_only in [false, true] {
            let options = ImageOptions { read_only, ..ImageOptions::default() };
            let error = Image::open(&path, options).expect_err("no disk");
            assert!(matches!(error, ImageError::Kind { .. }), "{error}");
        }
    }

    #[test]
    fn one_writer_excludes_all_others_and_readers_share() {
        let file = sparse(4096);
        let read_only = ImageOptions { read_only: true, ..ImageOptions::default() };
        let open = |options| Image::open(file.path(), options).expect("opens");
        let (writer, second) = (open(ImageOptions::default()), open(ImageOptions::default()));
        let (reader, another) = (open(read_only), open(read_only));
        writer.lock().expect("free");
        writer.lock().expect("ours already");
        assert!(second.lock().expect_err("taken").to_string().contains("in use by another"));
        reader.lock().expect_err("a writer runs");
        writer.unlock();
        reader.lock().expect("free");
        another.lock().expect("shared");
        writer.lock().expect_err("readers run");
        drop(reader);
        another.unlock();
        second.lock().expect("free again");
    }

    #[test]
    fn a_file_in_memory_is_known_as_one() {
        let image = Geometry { size: 4096, block_size: 512, physical_block_size: 512 };
        assert!(lives_in_memory(Image::for_tests(image, false).file()));
    }
}
