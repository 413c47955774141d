//! The FUSE server: what a guest asks for, carried out by a file system of the crate `virtiofsd`
//! (virtio 1.3 §5.11.6.1; fuse(4), protocol 7.27 to 7.38).
//!
//! ```text
//!  fuse_in_header ─▶ sound? initialised? room for the reply? ─▶ operation ─▶ FileSystem ─▶ fuse_out_header, reply
//! ```
//! Invariants: a request is looked at whole before it is carried out, so that what cannot be answered is not
//! done; a name is one component, never "." or ".."; nothing that a request says makes more than a MiB be
//! allocated; a request that makes no sense gets an errno, one that cannot be told so is dropped.

mod again;
mod extensions;
mod files;
mod folders;
mod mappings;
mod names;
mod nodes;
mod notes;

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use tracing::warn;
use virtiofsd::filesystem::{Context, FileSystem, SerializableFileSystem};
use virtiofsd::fuse::{
    FsOptions, InHeader, InitInCompat, InitInExt, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
    MIN_KERNEL_MINOR_VERSION, Opcode, OutHeader,
};
use vm_memory::ByteValued;

use super::exchange::Exchange;
use super::ledger::{Ledger, Note};
use super::nameless::Places;
use super::window::Window;

/// Most data of one READ or WRITE, in bytes.
pub(super) const MOST_DATA: u32 = 1 << 20;
/// Most that names, a value and extensions of one request may have together, in bytes.
const MOST_WORDS: u64 = 72 << 10;
/// Bytes of the header of a reply.
const REPLY: u64 = size_of::<OutHeader>() as u64;
/// Set in [`Server::options`] once there was an INIT; no option of FUSE.
const INITIALISED: u64 = 1 << 63;

/// FUSE_MAP_ALIGNMENT: there is a window, and the reply to INIT says how mappings are aligned.
const MAP_ALIGNMENT: u64 = 1 << 26;

/// What an operation has to say.
enum Answer {
    /// No reply, by the protocol.
    Nothing,
    /// Structures.
    Words(Words),
    /// Bytes.
    Bytes(Vec<u8>),
    /// So many bytes are in what was set aside.
    Aside(usize),
}

/// Structures of a reply, up to the longest: CREATE's.
struct Words {
    bytes: [u8; 144],
    length: usize,
}

impl Words {
    fn none() -> Self {
        Self { bytes: [0; 144], length: 0 }
    }

    fn of<T: ByteValued>(value: &T) -> Self {
        Self::none().and(value)
    }

    fn and<T: ByteValued>(mut self, value: &T) -> Self {
        let from = value.as_slice();
        let end = self.length + from.len();
        if let Some(to) = self.bytes.get_mut(self.length..end) {
            to.copy_from_slice(from);
            self.length = end;
        }
        self
    }
}

impl Answer {
    fn done() -> Self {
        Self::Words(Words::none())
    }

    fn of<T: ByteValued>(value: &T) -> Self {
        Self::Words(Words::of(value))
    }
}

/// A request under way.
struct Call<'a> {
    header: InHeader,
    exchange: &'a mut dyn Exchange,
    /// A process that was killed may have carried it out.
    repeated: bool,
}

impl Call<'_> {
    /// Takes a structure.
    fn take<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let mut value = T::default();
        self.exchange.take(value.as_mut_slice())?;
        Ok(value)
    }

    /// Takes all that is left.
    fn rest(&mut self) -> io::Result<Vec<u8>> {
        let left = self.exchange.left();
        if left > MOST_WORDS {
            return Err(Errno::TOOBIG.into());
        }
        let mut bytes = vec![0; usize::try_from(left).unwrap_or(0)];
        self.exchange.take(&mut bytes)?;
        Ok(bytes)
    }

    /// Who asks.
    fn context(&self) -> Context {
        Context::from(self.header)
    }

    /// Room for what follows the reply's header.
    fn room(&mut self) -> u64 {
        self.exchange.room().saturating_sub(REPLY)
    }
}

/// A file system, as the queues see it.
pub(super) trait Serve: Send + Sync {
    /// Carries a request out, which a killed process may have done before. Returns the bytes of the reply; 0: none.
    fn serve(&self, exchange: &mut dyn Exchange, repeated: bool) -> u32;
    /// Lets go of all that the guest has open.
    fn destroy(&self);
    /// The front-end has gone: lets go of all that the guest has open, unless it will come back for it.
    fn leave(&self);
    /// Requests of this front-end outlive this process: it comes back when one of us is gone.
    fn will_return(&self, returns: bool);
    /// What was negotiated with the guest, and the file system's own state.
    fn save(&self) -> io::Result<(u64, Vec<u8>)>;
    /// Takes what [`Serve::save`] made; on failure nothing is open.
    fn load(&self, options: u64, state: &[u8]) -> io::Result<()>;
    /// The file of a node, open to be mapped.
    fn file(&self, node: u64, writable: bool) -> io::Result<std::fs::File>;
}

/// See the module.
pub(super) struct Server<F> {
    fs: F,
    /// What the file system can do and is not offered.
    hidden: FsOptions,
    places: Option<Places>,
    /// Negotiated by INIT, and [`INITIALISED`].
    options: AtomicU64,
    /// See [`Serve::will_return`].
    returns: AtomicBool,
    window: Option<Arc<Window>>,
    ledger: Option<Ledger>,
    /// Nodes that a killed process had and that were not found again.
    lost: Mutex<BTreeSet<u64>>,
}

/// What a server is told beside its file system.
#[derive(Debug)]
pub(super) struct Setting {
    /// The guest may leave the clearing of set-user-ID bits to us altogether.
    pub(super) killpriv_v2: bool,
    /// Where files without a name are looked for, when the state is saved.
    pub(super) places: Option<Places>,
    pub(super) window: Option<Arc<Window>>,
    /// Where it is noted what the guest has open.
    pub(super) ledger: Option<Ledger>,
}

impl<F: FileSystem> Server<F> {
    pub(super) fn new(fs: F, setting: Setting) -> Self {
        let Setting { killpriv_v2, places, window, ledger } = setting;
        let hidden = if killpriv_v2 { FsOptions::empty() } else { FsOptions::HANDLE_KILLPRIV_V2 };
        let (options, returns) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { fs, hidden, places, options, returns, window, ledger, lost: Mutex::default() }
    }

    fn options(&self) -> FsOptions {
        FsOptions::from_bits_truncate(self.options.load(Ordering::Relaxed))
    }

    /// Carries a request out, as far as it makes sense.
    fn call(&self, call: &mut Call<'_>, opcode: Opcode) -> io::Result<Answer> {
        if u64::from(call.header.len) != size_of::<InHeader>() as u64 + call.exchange.left() {
            return Err(Errno::INVAL.into());
        }
        let initialised = self.options.load(Ordering::Relaxed) & INITIALISED != 0;
        match opcode {
            Opcode::Init => return self.init(call),
            _ if !initialised => return Err(Errno::NOTCONN.into()),
            _ => {}
        }
        match opcode {
            Opcode::Destroy => {
                self.give_window_back();
                self.shut();
                Ok(Answer::Nothing)
            }
            Opcode::Interrupt => Ok(Answer::Nothing),
            Opcode::Forget | Opcode::BatchForget => self.forget(call, opcode),
            Opcode::Getattr => self.getattr(call),
            Opcode::Setattr => self.setattr(call),
            Opcode::Readlink => self.readlink(call),
            Opcode::Statfs => self.statfs(call),
            Opcode::Access => self.access(call),
            Opcode::Setxattr => self.setxattr(call),
            Opcode::Getxattr => self.getxattr(call),
            Opcode::Listxattr => self.listxattr(call),
            Opcode::Removexattr => self.removexattr(call),
            Opcode::Open => self.open(call),
            Opcode::Create => self.create(call),
            Opcode::Read => self.read(call),
            Opcode::Write => self.write(call),
            Opcode::Release => self.release(call),
            Opcode::Flush => self.flush(call),
            Opcode::Fsync => self.fsync(call),
            Opcode::Fallocate => self.fallocate(call),
            Opcode::Lseek => self.lseek(call),
            Opcode::CopyFileRange => self.copy_file_range(call),
            Opcode::Syncfs => self.syncfs(call),
            Opcode::SetupMapping => self.setup_mapping(call),
            Opcode::RemoveMapping => self.remove_mapping(call),
            _ => self.call_by_name(call, opcode),
        }
    }

    fn call_by_name(&self, call: &mut Call<'_>, opcode: Opcode) -> io::Result<Answer> {
        match opcode {
            Opcode::Lookup => self.lookup(call),
            Opcode::Symlink => self.symlink(call),
            Opcode::Mknod => self.mknod(call),
            Opcode::Mkdir => self.mkdir(call),
            Opcode::Unlink => self.unlink(call),
            Opcode::Rmdir => self.rmdir(call),
            Opcode::Rename => self.rename(call),
            Opcode::Rename2 => self.rename2(call),
            Opcode::Link => self.link(call),
            Opcode::Opendir => self.opendir(call),
            Opcode::Readdir => self.readdir(call, false),
            Opcode::Readdirplus => self.readdir(call, true),
            Opcode::Releasedir => self.releasedir(call),
            Opcode::Fsyncdir => self.fsyncdir(call),
            _ => Err(Errno::NOSYS.into()),
        }
    }

    fn init(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let InitInCompat { major, minor, max_readahead, flags } = call.take()?;
        let offered = FsOptions::from_bits_truncate(flags.into());
        let InitInExt { flags2, .. } = match offered.contains(FsOptions::INIT_EXT) {
            true => call.take()?,
            false => InitInExt::default(),
        };
        if major > KERNEL_VERSION {
            // The driver asks again, in this version.
            let (major, minor) = (KERNEL_VERSION, KERNEL_MINOR_VERSION);
            return Ok(Answer::of(&InitOut { major, minor, ..InitOut::default() }));
        }
        if major < KERNEL_VERSION || minor < MIN_KERNEL_MINOR_VERSION {
            return Err(Errno::PROTO.into());
        }
        let said = u64::from(flags2) << 32 | u64::from(flags);
        let capable = FsOptions::from_bits_truncate(said);
        self.give_window_back();
        let wanted = self.fs.init(capable)?;
        let enabled =
            (capable & ((wanted | ours()) - self.hidden)).bits() | said & self.of_window();
        self.options.store(enabled | INITIALISED, Ordering::Relaxed);
        self.note_mounted(enabled | INITIALISED);
        let page = rustix::param::page_size();
        let pages = u64::from(MOST_DATA).div_ceil(page as u64);
        let maps = enabled & MAP_ALIGNMENT != 0;
        let map_alignment = if maps { u16::try_from(page.ilog2()).unwrap_or(0) } else { 0 };
        Ok(Answer::of(&InitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION,
            max_readahead,
            flags: low(enabled),
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MOST_DATA,
            time_gran: 1,
            max_pages: u16::try_from(pages).unwrap_or(u16::MAX),
            flags2: low(enabled >> 32),
            map_alignment,
            ..InitOut::default()
        }))
    }

    /// Options of a window, where there is one and the front-end maps.
    fn of_window(&self) -> u64 {
        match &self.window {
            Some(window) if window.is_available() => MAP_ALIGNMENT,
            _ => 0,
        }
    }

    fn give_window_back(&self) {
        if let Some(window) = &self.window {
            window.clear_all();
        }
    }

    fn shut(&self) {
        self.fs.destroy();
        if self.options.swap(0, Ordering::Relaxed) != 0 {
            self.note(&[Note::Unmounted]);
        }
    }
}

/// What this server can do by itself, whatever the file system wants.
fn ours() -> FsOptions {
    FsOptions::ASYNC_READ
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::BIG_WRITES
        | FsOptions::AUTO_INVAL_DATA
        | FsOptions::ASYNC_DIO
        | FsOptions::ATOMIC_O_TRUNC
        | FsOptions::MAX_PAGES
        | FsOptions::SUBMOUNTS
        | FsOptions::INIT_EXT
        | FsOptions::CREATE_SUPP_GROUP
        | FsOptions::ALLOW_IDMAP
}

/// The low 32 bits.
fn low(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0)
}

/// Bytes that a reply has behind its header, as far as the operation tells: those of its structures.
fn size_of_answer(opcode: Opcode) -> Option<u64> {
    use virtiofsd::fuse::{AttrOut, EntryOut, Kstatfs, LseekOut, OpenOut, WriteOut};
    let size = match opcode {
        Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::Destroy => return None,
        Opcode::Lookup | Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link => {
            size_of::<EntryOut>()
        }
        Opcode::Create => size_of::<EntryOut>() + size_of::<OpenOut>(),
        Opcode::Open | Opcode::Opendir => size_of::<OpenOut>(),
        Opcode::Getattr | Opcode::Setattr => size_of::<AttrOut>(),
        Opcode::Write | Opcode::CopyFileRange => size_of::<WriteOut>(),
        Opcode::Lseek => size_of::<LseekOut>(),
        Opcode::Statfs => size_of::<Kstatfs>(),
        Opcode::Init => size_of::<InitOut>(),
        _ => 0,
    };
    Some(size as u64)
}

/// Writes the reply. Returns its length; 0 when it does not fit.
fn reply(exchange: &mut dyn Exchange, unique: u64, outcome: io::Result<Answer>) -> u32 {
    let (error, words, bytes, aside) = match &outcome {
        Ok(Answer::Nothing) => return 0,
        Ok(Answer::Words(words)) => (0, words.bytes.get(..words.length), None, 0),
        Ok(Answer::Bytes(bytes)) => (0, None, Some(bytes.as_slice()), 0),
        Ok(Answer::Aside(length)) => (0, None, None, *length),
        Err(error) => (error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()), None, None, 0),
    };
    let data = words.or(bytes).unwrap_or_default();
    let length = size_of::<OutHeader>() + data.len() + aside;
    let Ok(length) = u32::try_from(length) else { return 0 };
    if exchange.room() < REPLY + data.len() as u64 {
        return 0;
    }
    let header = OutHeader { len: length, error: -error, unique };
    let put = exchange.put(header.as_slice()).and_then(|()| exchange.put(data));
    if put.is_ok() { length } else { 0 }
}

impl<F> Serve for Server<F>
where
    F: FileSystem + SerializableFileSystem + Send + Sync,
{
    fn serve(&self, exchange: &mut dyn Exchange, repeated: bool) -> u32 {
        let mut header = InHeader::default();
        if exchange.take(header.as_mut_slice()).is_err() {
            return 0;
        }
        let opcode = Opcode::try_from(header.opcode);
        let needed = opcode.map_or(Some(0), size_of_answer);
        if needed.is_some_and(|needed| exchange.room() < REPLY + needed) {
            return 0;
        }
        let outcome = match opcode {
            Ok(opcode) => {
                let done = self.call(&mut Call { header, exchange, repeated }, opcode);
                done.map_err(|error| self.told(header.nodeid, error))
            }
            Err(()) => Err(Errno::NOSYS.into()),
        };
        if needed.is_none() {
            return 0;
        }
        reply(exchange, header.unique, outcome)
    }

    fn destroy(&self) {
        self.shut();
    }

    fn leave(&self) {
        if !self.returns.load(Ordering::Relaxed) {
            self.shut();
        }
    }

    fn will_return(&self, returns: bool) {
        self.returns.store(returns, Ordering::Relaxed);
    }

    fn save(&self) -> io::Result<(u64, Vec<u8>)> {
        let options = self.options.load(Ordering::Relaxed);
        if options & INITIALISED == 0 {
            return Ok((0, Vec::new()));
        }
        let mut image = self.image()?;
        if let Some(Err(error)) = self.places.as_ref().map(|at| at.find(&self.fs, &mut image)) {
            warn!("files without a name are not looked for: {error}");
        }
        Ok((options, image.write()?))
    }

    fn load(&self, options: u64, state: &[u8]) -> io::Result<()> {
        self.shut();
        if options & INITIALISED == 0 {
            return Ok(());
        }
        if let Err(error) = self.apply(state) {
            self.shut();
            return Err(error);
        }
        self.options.store(options, Ordering::Relaxed);
        self.note_all(options, state);
        Ok(())
    }

    fn file(&self, node: u64, writable: bool) -> io::Result<std::fs::File> {
        let nobody = Context::from(InHeader::default());
        let (file, can_be) = self.file_to_map(nobody, node, mappings::NONE, writable)?;
        if can_be >= writable { Ok(file) } else { Err(Errno::ACCESS.into()) }
    }
}

/// The name of an entry: one component, neither "." nor "..", that no file system takes for more.
fn component(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    match bytes {
        b"" | b"." | b".." => Err(Errno::INVAL.into()),
        _ if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
        _ if bytes.len() > 255 => Err(Errno::NAMETOOLONG.into()),
        _ => Ok(name),
    }
}

/// Splits off what ends with a NUL.
fn word(bytes: &[u8]) -> io::Result<(&CStr, &[u8])> {
    let name = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    let rest = bytes.get(name.count_bytes() + 1..).unwrap_or_default();
    Ok((name, rest))
}

/// What is to be one word and nothing behind it.
fn only_word(bytes: &[u8]) -> io::Result<&CStr> {
    match word(bytes)? {
        (word, []) => Ok(word),
        _ => Err(Errno::INVAL.into()),
    }
}

/// What is to be the name of an entry and nothing behind it.
fn only_name(bytes: &[u8]) -> io::Result<&CStr> {
    only_word(bytes).and_then(component)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b75_a_name_is_one_component_and_nothing_else() {
        for good in
            [&b"a\0"[..], b"...\0", b".hidden\0", b"\xff\xfe\0", &[&[b'x'; 255][..], &[0]].concat()]
        {
            assert!(only_name(good).is_ok(), "{good:?}");
        }
        let long = [&[b'x'; 4096][..], &[0]].concat();
        for bad in [
            &b""[..],
            b"\0",
            b".\0",
            b"..\0",
            b"a/b\0",
            b"/\0",
            b"/etc\0",
            b"../x\0",
            b"a",
            b"a\0b\0",
            b"a\0\0",
            &long,
        ] {
            assert!(only_name(bad).is_err(), "{bad:?}");
        }
    }
}
