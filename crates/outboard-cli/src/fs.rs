//! `outboard fs`: a directory of the host in a guest (virtio 1.3 §5.11).
//!
//! Invariant: a directory that cannot be shared is found before the socket exists; nothing is read from the
//! socket before the process is locked in.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use outboard_devices::fs::semantics::{
    CachePolicy, Config, InodeFileHandlesMode, MigrationMode, MigrationOnError, NegotiationMode,
    xattrmap::XattrMap,
};
use outboard_devices::fs::{self, Confined, Fs, FsOptions, IdMap, Sandbox};

use crate::Failure;
use crate::device::{self, DeviceArgs, Kind, Made, Origin, Prepared};
use crate::report::parse_size;

const EXAMPLES: &str = "\
Examples:
  outboard fs --socket-path /run/fs.sock --shared-dir /srv/share --tag share
  outboard fs --socket-path /run/fs.sock --shared-dir /srv/share --cache always --num-request-queues 4
  outboard fs --socket-path /run/fs.sock --shared-dir /srv/share --readonly --sandbox none

QEMU (its memory must be shared; the guest's tag is QEMU's, and so is the number of queues):
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=c,path=/run/fs.sock -device vhost-user-fs-pci,chardev=c,tag=share ...
In a Linux guest: mount -t virtiofs share /mnt

libvirt: <binary path='...'/> with a program that runs `outboard fs \"$@\"`; options are spelt as virtiofsd
spells them, the -o form too.

Several tags: one process for each, they are small. Two guests may share one directory, with --cache auto or
never. The host's changes reach a guest when what it has cached is old (--cache), never through inotify.
The process is locked in with the directory: as root in namespaces of its own, otherwise with Landlock.
When the VMM is gone the next one is served. Open files move with a guest that migrates (--migration-mode) and
to a newer program (--take-over). After a crash of this program a VMM that connects again (QEMU does not, for
this device) finds them as well, with --recovery-file; without it the guest has to mount again, and is told
ENOTCONN until then.
SIGTERM and SIGINT end the device and remove the socket.";

/// Share a directory of the host with a guest.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs<Share>,
    #[command(flatten, next_help_heading = "Share")]
    share: ShareArgs,
    #[command(flatten, next_help_heading = "Semantics")]
    semantics: SemanticsArgs,
}

#[derive(clap::Args, Clone)]
struct ShareArgs {
    /// The directory.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["options", "print_capabilities"])]
    shared_dir: Option<PathBuf>,
    /// The name to mount it under, for VMMs that ask.
    #[arg(long, default_value = "outboard")]
    tag: String,
    /// How this process is locked in.
    #[arg(long, value_enum, default_value_t = Mode::Namespace, ignore_case = true)]
    sandbox: Mode,
    /// The guest changes nothing.
    #[arg(long)]
    readonly: bool,
    /// Request queues, each with a thread of its own.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_request_queues: u16,
    /// Threads for the requests of all queues; 0: each queue's own.
    #[arg(long, value_name = "THREADS", default_value_t = 0)]
    thread_pool_size: usize,
    /// Largest ring size that a front-end may choose, a power of two.
    #[arg(long, value_name = "ENTRIES", default_value_t = 1024)]
    queue_size: u16,
    /// A DAX window of this size, in units of 2 MiB (8G), where the VMM maps (SHMEM): files are read and written
    /// as memory of the guest, with mount -o dax there.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0", hide_default_value = true)]
    dax_window: u64,
    /// Note in this file what the guest has open: after a crash of this program the next one goes on with it, for
    /// a VMM that connects again (its in-flight requests included). Not in the directory itself.
    #[arg(long, value_name = "FILE")]
    recovery_file: Option<PathBuf>,
    /// Options as older programs have them: source=DIR, cache=none|auto|metadata|always, xattr, xattrmap=RULES,
    /// posix_acl, writeback, sandbox=... (comma-separated, repeatable).
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Namespace,
    Chroot,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Handles {
    Never,
    Prefer,
    Mandatory,
}

#[derive(clap::Args, Clone)]
struct SemanticsArgs {
    /// What the guest may keep: auto, always, never or metadata.
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = CachePolicy::from_str)]
    cache: CachePolicy,
    /// Extended attributes.
    #[arg(long)]
    xattr: bool,
    /// POSIX ACLs, and with them extended attributes: never, auto or always.
    #[arg(long, value_name = "WHEN", require_equals = true, num_args = 0..=1, default_value = "never", default_missing_value = "always", value_parser = NegotiationMode::from_str)]
    posix_acl: NegotiationMode,
    /// Security labels for what the guest makes: never, auto or always.
    #[arg(long, value_name = "WHEN", require_equals = true, num_args = 0..=1, default_value = "never", default_missing_value = "always", value_parser = NegotiationMode::from_str)]
    security_label: NegotiationMode,
    /// How names of extended attributes are mapped, as in :map::user.virtiofs.:
    #[arg(long, value_name = "RULES", value_parser = parse_xattrmap)]
    xattrmap: Option<XattrMap>,
    /// How users are mapped, as in map:0:1000:1 (repeatable).
    #[arg(long, value_name = "TYPE:FROM:TO:COUNT", value_parser = parse_ids)]
    translate_uid: Vec<IdMap>,
    /// How groups are mapped.
    #[arg(long, value_name = "TYPE:FROM:TO:COUNT", value_parser = parse_ids)]
    translate_gid: Vec<IdMap>,
    /// Nodes are kept by file handle instead of an open descriptor: never, prefer or mandatory.
    #[arg(long, value_enum, default_value_t = Handles::Prefer, require_equals = true)]
    inode_file_handles: Handles,
    /// Tell the guest which directories are mounts; so it is.
    #[arg(long)]
    announce_submounts: bool,
    /// Do not tell it.
    #[arg(long, conflicts_with = "announce_submounts")]
    no_announce_submounts: bool,
    /// The guest collects what it writes: for a directory that nobody else uses.
    #[arg(long)]
    writeback: bool,
    /// Honour O_DIRECT.
    #[arg(long)]
    allow_direct_io: bool,
    /// Allow shared mappings where nothing is cached.
    #[arg(long)]
    allow_mmap: bool,
    /// Read directories without the attributes of what is in them.
    #[arg(long)]
    no_readdirplus: bool,
    /// Clear set-user-ID bits here when a file is written, not in the guest.
    #[arg(long)]
    killpriv_v2: bool,
    /// Keep O_NOATIME.
    #[arg(long)]
    preserve_noatime: bool,
    /// How open files are told to the next process: find-paths or file-handles.
    #[arg(long, value_name = "MODE", default_value = "find-paths", value_parser = MigrationMode::from_str)]
    migration_mode: MigrationMode,
    /// A file that the next process does not find: abort or guest-error.
    #[arg(long, value_name = "WHAT", default_value = "abort", value_parser = MigrationOnError::from_str)]
    migration_on_error: MigrationOnError,
    /// Have the next process verify that a path leads to the same file.
    #[arg(long)]
    migration_verify_handles: bool,
    /// Look at all paths once more when the guest has stopped.
    #[arg(long)]
    migration_confirm_paths: bool,
}

/// What the common options have to know of a file system.
#[derive(Clone)]
struct Share;

impl Kind for Share {
    const CAPABILITIES: &str = r#"{"type":"fs","features":["migrate-precopy","separate-options"]}"#;
    const EXAMPLE: &str = "";

    fn feature(_: &str) -> Option<u64> {
        None
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let (share, semantics) = args.all().map_err(Failure::Usage)?;
    let prepare = || share.prepare(args.device.socket_path());
    let sandbox = share.sandbox.to_possible_value();
    let sandbox = sandbox.as_ref().map_or("", |sandbox| sandbox.get_name());
    device::run_confined(&args.device, sandbox, prepare, |prepared| {
        share.make(prepared, &semantics)
    })
}

/// One of many devices: those cannot be locked in with one directory.
pub(crate) fn prepare(args: &Args, origin: Origin<'_>) -> Result<Prepared, Failure> {
    let (share, semantics) = args.all().map_err(Failure::Usage)?;
    if share.sandbox != Mode::None {
        let why = "beside other devices the process cannot be locked in: say sandbox = \"none\"";
        return Err(Failure::Usage(why.to_owned()));
    }
    device::prepare(&args.device, origin, || share.make(share.prepare(None)?, &semantics))
}

impl Args {
    /// The options, with those of the older form.
    fn all(&self) -> Result<(ShareArgs, SemanticsArgs), String> {
        let (mut share, mut semantics) = (self.share.clone(), self.semantics.clone());
        for option in &self.share.options {
            older_option(option, &mut share, &mut semantics)?;
        }
        Ok((share, semantics))
    }
}

/// What has to be open before the process is locked in.
struct Opened {
    prepared: fs::Prepared,
    notes: Option<File>,
}

/// The file for notes, which only its owner reads.
fn opened(path: &Path) -> Result<File, String> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(|error| format!("{}: {error}", path.display()))
}

impl ShareArgs {
    fn prepare(&self, socket: Option<&Path>) -> Result<Opened, Failure> {
        let missing = || Failure::Usage("no directory: say --shared-dir DIR".to_owned());
        let folder = self.shared_dir.as_ref().ok_or_else(missing)?;
        let sandbox = match self.sandbox {
            Mode::Namespace => Sandbox::Namespace,
            Mode::Chroot => Sandbox::Chroot,
            Mode::None => Sandbox::None,
        };
        let prepared = sandbox.prepare(folder).map_err(Failure::usage)?;
        let beside = socket.map(|path| match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        });
        let notes =
            self.recovery_file.as_deref().map(opened).transpose().map_err(Failure::Usage)?;
        Ok(Opened { prepared: prepared.and_remove_in(beside), notes })
    }

    fn make(&self, opened: Opened, semantics: &SemanticsArgs) -> Result<Made<Fs>, Failure> {
        let inside = opened.prepared.enter().map_err(Failure::failed)?;
        let options = FsOptions { notes: opened.notes, ..self.options(inside, semantics) };
        let model = Fs::new(options).map_err(Failure::usage)?;
        let folder = self.shared_dir.clone().unwrap_or_default();
        let mut described = format!("{} as {:?}", folder.display(), self.tag);
        if self.readonly {
            described.push_str(", read-only");
        }
        Ok(Made { model, described: Box::new(move || described), begins: None })
    }

    fn options(&self, inside: Confined, semantics: &SemanticsArgs) -> FsOptions {
        let mut options = FsOptions::new(&self.tag, inside);
        options.readonly = self.readonly;
        options.request_queues = self.num_request_queues;
        options.pool = self.thread_pool_size;
        options.queue_size = self.queue_size;
        options.dax_window = self.dax_window;
        semantics.set(&mut options.semantics);
        options
    }
}

impl SemanticsArgs {
    fn set(&self, config: &mut Config) {
        let valid = match self.cache {
            CachePolicy::Never => Duration::ZERO,
            CachePolicy::Auto => Duration::from_secs(1),
            CachePolicy::Always | CachePolicy::Metadata => Duration::from_secs(86400),
        };
        let labels = self.security_label != NegotiationMode::Never;
        let acls = self.posix_acl != NegotiationMode::Never;
        config.entry_timeout = valid;
        config.attr_timeout = valid;
        config.readdirplus = !self.no_readdirplus && !matches!(self.cache, CachePolicy::Never);
        config.cache_policy = self.cache.clone();
        config.xattr = self.xattr || self.xattrmap.is_some() || labels || acls;
        config.xattrmap.clone_from(&self.xattrmap);
        config.posix_acl = self.posix_acl;
        config.security_label = self.security_label;
        config.uid_map = Some(self.translate_uid.clone());
        config.gid_map = Some(self.translate_gid.clone());
        match self.inode_file_handles {
            Handles::Never => config.inode_file_handles = InodeFileHandlesMode::Never,
            // As it is: where they can be had.
            Handles::Prefer => {}
            Handles::Mandatory => config.inode_file_handles = InodeFileHandlesMode::Mandatory,
        }
        config.announce_submounts = !self.no_announce_submounts;
        config.writeback = self.writeback;
        config.allow_direct_io = self.allow_direct_io;
        config.allow_mmap = self.allow_mmap;
        config.killpriv_v2 = self.killpriv_v2;
        config.clean_noatime = !self.preserve_noatime;
        config.migration_mode = self.migration_mode;
        config.migration_on_error = self.migration_on_error;
        config.migration_verify_handles = self.migration_verify_handles;
        config.migration_confirm_paths = self.migration_confirm_paths;
    }
}

fn parse_xattrmap(text: &str) -> Result<XattrMap, String> {
    XattrMap::try_from(text).map_err(|error| error.to_string())
}

fn parse_ids(text: &str) -> Result<IdMap, String> {
    text.parse().map_err(|error| format!("{error}"))
}

/// One of `-o`.
fn older_option(
    option: &str,
    share: &mut ShareArgs,
    semantics: &mut SemanticsArgs,
) -> Result<(), String> {
    let unknown = || format!("-o {option}: no such option");
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    match (name, value) {
        ("source", folder) if !folder.is_empty() => share.shared_dir = Some(folder.into()),
        ("cache", "none") => semantics.cache = CachePolicy::Never,
        ("cache", policy) => semantics.cache = policy.parse().map_err(|_| unknown())?,
        ("xattrmap", rules) => semantics.xattrmap = Some(parse_xattrmap(rules)?),
        ("sandbox", mode) => share.sandbox = Mode::from_str(mode, true).map_err(|_| unknown())?,
        ("xattr", "") => semantics.xattr = true,
        ("no_xattr", "") => semantics.xattr = false,
        ("posix_acl", "") => semantics.posix_acl = NegotiationMode::Always,
        ("no_posix_acl", "") => semantics.posix_acl = NegotiationMode::Never,
        ("security_label", "") => semantics.security_label = NegotiationMode::Always,
        ("no_security_label", "") => semantics.security_label = NegotiationMode::Never,
        ("readdirplus", "") => semantics.no_readdirplus = false,
        ("no_readdirplus", "") => semantics.no_readdirplus = true,
        ("writeback", "") => semantics.writeback = true,
        ("no_writeback", "") => semantics.writeback = false,
        ("allow_direct_io", "") => semantics.allow_direct_io = true,
        ("no_allow_direct_io", "") => semantics.allow_direct_io = false,
        ("announce_submounts", "") => semantics.no_announce_submounts = false,
        ("killpriv_v2", "") => semantics.killpriv_v2 = true,
        ("no_killpriv_v2", "") => semantics.killpriv_v2 = false,
        // Locks are the guest's own.
        ("no_posix_lock" | "no_flock", "") => {}
        _ => return Err(unknown()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, String> {
        let words = std::iter::once("fs").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    fn older(line: &str) -> Result<(ShareArgs, SemanticsArgs), String> {
        parse(line)?.all()
    }

    #[test]
    fn options_are_spelt_as_virtiofsd_spells_them() {
        let args = parse(
            "--fd 3 --shared-dir /srv --tag t --cache never --xattr --posix-acl --sandbox none \
             --xattrmap :map::user.v.: --readonly --inode-file-handles=never --announce-submounts \
             --thread-pool-size 4 --translate-uid map:0:1000:1",
        )
        .expect("sound");
        assert_eq!(args.semantics.posix_acl, NegotiationMode::Always);
        assert_eq!((args.share.sandbox, args.share.thread_pool_size), (Mode::None, 4));
        for wrong in [
            "--fd 3",
            "--shared-dir d --cache some",
            "--shared-dir d --translate-uid 5",
            "--shared-dir d --xattrmap :what:",
            "--shared-dir d --num-request-queues 0",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_older_form_says_the_same() {
        let (share, semantics) =
            older("--fd 3 -o source=/srv,cache=none,xattr,no_posix_lock -o sandbox=chroot")
                .expect("sound");
        assert_eq!(share.shared_dir.as_deref(), Some(Path::new("/srv")));
        assert_eq!((share.sandbox, semantics.xattr), (Mode::Chroot, true));
        assert!(matches!(semantics.cache, CachePolicy::Never));
        for wrong in ["cache=some", "source=", "xattr=1", "flock", "sandbox=x"] {
            assert!(older(&format!("--fd 3 -o {wrong}")).is_err(), "{wrong}");
        }
    }
}
