//! What the two processes say on the control socket: one datagram each (SOCK_SEQPACKET), lines of
//! text, descriptors beside them.
//!
//! Invariant: a letter is decoded whole or refused; descriptors are those that its `fds` line
//! names, in that order.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use outboard_protocol::Frame;
use rustix::time::{ClockId, clock_gettime};

use crate::hooks::Heirloom;

/// The version of these letters. Another one is refused: the old process goes on.
const VERSION: &str = "1";

/// Everything that is handed over beside what the protocol itself carries.
#[derive(Debug, Default)]
pub(crate) struct Estate {
    /// The socket that front-ends connect to, and its file.
    pub(crate) listener: Option<OwnedFd>,
    pub(crate) socket_file: Option<PathBuf>,
    /// The control socket that the next new process asks on, and its file.
    pub(crate) control: Option<OwnedFd>,
    pub(crate) control_file: Option<PathBuf>,
    /// The front-end of the moment.
    pub(crate) front_end: Option<FrontEnd>,
    /// Shared memory that the front-end has mapped: region, offset, bytes.
    pub(crate) mappings: Vec<(u8, u64, u64)>,
    /// When the rings were told to stop, in nanoseconds of the monotonic clock, which both
    /// processes share.
    pub(crate) stopped: u64,
}

/// A front-end that is handed over.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    /// On which the old process plays it.
    pub(crate) play: OwnedFd,
    /// Its own.
    pub(crate) socket: OwnedFd,
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let (seconds, rest) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(rest.unwrap_or(0))
}

/// See the module.
#[derive(Debug)]
pub(crate) enum Letter {
    /// New to old: hand over what you have.
    TakeOver,
    /// Old to new, any number of times before the next one: what the device itself hands over.
    Heirlooms(Vec<Heirloom>),
    /// Old to new: here is what there is.
    HandOver(Box<Estate>),
    /// Old to new: everything is yours.
    Go,
    /// Either: it will not be.
    Refused(String),
}

impl Letter {
    pub(crate) fn encode(self) -> Frame<OwnedFd> {
        let mut bytes = format!("outboard {VERSION} ").into_bytes();
        let mut fds = Vec::new();
        match self {
            Self::TakeOver => bytes.extend(b"take-over\n"),
            Self::Go => bytes.extend(b"go\n"),
            Self::Refused(why) => {
                bytes.extend(b"refused\n");
                bytes.extend(why.replace('\n', " ").bytes());
                bytes.push(b'\n');
            }
            Self::Heirlooms(heirlooms) => {
                bytes.extend(b"heirlooms\n");
                for Heirloom { name, fd } in heirlooms {
                    bytes.extend(name.bytes());
                    bytes.push(b'\n');
                    fds.push(fd);
                }
            }
            Self::HandOver(estate) => {
                bytes.extend(b"hand-over\n");
                estate.encode(&mut bytes, &mut fds);
            }
        }
        Frame { bytes, fds }
    }

    /// Decodes a datagram; the reason in words if it is no letter.
    pub(crate) fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, String> {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let first = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
        let mut words = first.split(' ');
        if words.next() != Some("outboard") {
            return Err("not a letter of Outboard".to_owned());
        }
        let version = words.next().unwrap_or_default();
        if version != VERSION {
            return Err(format!("letters of version {version:?}, ours are of version {VERSION}"));
        }
        match words.next() {
            Some("take-over") => Ok(Self::TakeOver),
            Some("go") => Ok(Self::Go),
            Some("refused") => {
                let why = lines.next().unwrap_or_default();
                Ok(Self::Refused(String::from_utf8_lossy(why).into_owned()))
            }
            Some("heirlooms") => heirlooms(lines, fds).map(Self::Heirlooms),
            Some("hand-over") => {
                Estate::decode(lines, fds).map(|estate| Self::HandOver(estate.into()))
            }
            other => Err(format!("an unknown letter {:?}", other.unwrap_or_default())),
        }
    }
}

/// Decodes a datagram and encodes what it was: for the fuzz target, and in its builds alone.
///
/// # Errors
/// The reason in words if it is no letter.
#[cfg(fuzzing)]
pub fn letter_again(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Frame<OwnedFd>, String> {
    Letter::decode(bytes, fds).map(Letter::encode)
}

impl Estate {
    /// Whether its paths can stand in lines.
    pub(crate) fn can_be_told(&self) -> bool {
        let mut paths = [&self.socket_file, &self.control_file].into_iter().flatten();
        paths.all(|path| !path.as_os_str().as_bytes().contains(&b'\n'))
    }

    fn encode(self, bytes: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) {
        let Self { listener, socket_file, control, control_file, front_end, mappings, stopped } =
            self;
        let (play, socket) = front_end.map(|both| (both.play, both.socket)).unzip();
        bytes.extend(b"fds");
        let named =
            [("listener", listener), ("control", control), ("play", play), ("front-end", socket)];
        for (name, fd) in named {
            if let Some(fd) = fd {
                bytes.push(b' ');
                bytes.extend(name.bytes());
                fds.push(fd);
            }
        }
        bytes.push(b'\n');
        for (name, path) in [("socket-file ", socket_file), ("control-file ", control_file)] {
            if let Some(path) = path {
                bytes.extend(name.bytes());
                bytes.extend(path.as_os_str().as_bytes());
                bytes.push(b'\n');
            }
        }
        bytes.extend(format!("stopped {stopped}\n").bytes());
        for (region, offset, size) in mappings {
            bytes.extend(format!("mapping {region} {offset} {size}\n").bytes());
        }
    }

    fn decode<'a>(
        lines: impl Iterator<Item = &'a [u8]>,
        fds: Vec<OwnedFd>,
    ) -> Result<Self, String> {
        let mut estate = Self::default();
        let (mut play, mut socket) = (None, None);
        let mut fds = fds.into_iter();
        for line in lines {
            let cut = line.iter().position(|byte| *byte == b' ').unwrap_or(line.len());
            let (key, rest) = line.split_at_checked(cut).unwrap_or((line, &[]));
            let value = rest.get(1..).unwrap_or_default();
            let path = || Some(PathBuf::from(OsStr::from_bytes(value)));
            match key {
                b"fds" => {
                    for name in value.split(|byte| *byte == b' ').filter(|name| !name.is_empty()) {
                        let fd = fds.next().ok_or("a descriptor is missing")?;
                        match name {
                            b"listener" => estate.listener = Some(fd),
                            b"control" => estate.control = Some(fd),
                            b"play" => play = Some(fd),
                            b"front-end" => socket = Some(fd),
                            _ => return Err("a descriptor that nobody knows".to_owned()),
                        }
                    }
                }
                b"socket-file" => estate.socket_file = path(),
                b"control-file" => estate.control_file = path(),
                b"stopped" => {
                    let text = std::str::from_utf8(value).unwrap_or_default();
                    estate.stopped = text.parse().map_err(|_| "a time that is none")?;
                }
                b"mapping" => estate.mappings.push(mapping(value).ok_or("a mapping that is none")?),
                b"" => {}
                _ => return Err(format!("a line of {} bytes that nobody knows", line.len())),
            }
        }
        estate.front_end = match (play, socket) {
            (Some(play), Some(socket)) => Some(FrontEnd { play, socket }),
            (None, None) => None,
            _ => return Err("half a front-end".to_owned()),
        };
        Ok(estate)
    }
}

/// Descriptors of one letter; the kernel carries 253.
const HEIRLOOMS: usize = 128;
/// Bytes of a name.
const NAME: usize = 64;

/// The letters that these go in.
///
/// # Errors
/// A name cannot stand in a letter.
pub(crate) fn parcels(heirlooms: Vec<Heirloom>) -> Result<Vec<Letter>, String> {
    if let Some(bad) = heirlooms.iter().find(|one| !is_name(one.name.as_bytes())) {
        return Err(format!("{:?} is no name of an heirloom", bad.name));
    }
    let mut rest = heirlooms.into_iter().peekable();
    let mut letters = Vec::new();
    while rest.peek().is_some() {
        letters.push(Letter::Heirlooms(rest.by_ref().take(HEIRLOOMS).collect()));
    }
    Ok(letters)
}

fn is_name(name: &[u8]) -> bool {
    (1..=NAME).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic)
}

fn heirlooms<'a>(
    lines: impl Iterator<Item = &'a [u8]>,
    fds: Vec<OwnedFd>,
) -> Result<Vec<Heirloom>, String> {
    let mut fds = fds.into_iter();
    let mut all = Vec::new();
    for name in lines.filter(|line| !line.is_empty()) {
        let fd = fds.next().ok_or("a descriptor is missing")?;
        if !is_name(name) {
            return Err("an heirloom whose name is none".to_owned());
        }
        all.push(Heirloom { name: String::from_utf8_lossy(name).into_owned(), fd });
    }
    match fds.next() {
        None => Ok(all),
        Some(_) => Err("a descriptor without a name".to_owned()),
    }
}

fn mapping(text: &[u8]) -> Option<(u8, u64, u64)> {
    let text = std::str::from_utf8(text).ok()?;
    let mut words = text.split(' ');
    let all =
        (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn fd() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    fn round(letter: Letter) -> Letter {
        let Frame { bytes, fds } = letter.encode();
        Letter::decode(&bytes, fds).unwrap()
    }

    #[test]
    fn a_whole_estate_survives_its_letter() {
        let estate = Estate {
            listener: Some(fd()),
            socket_file: Some(PathBuf::from("/run/a disk.sock")),
            control: Some(fd()),
            control_file: Some(PathBuf::from("ctl")),
            front_end: Some(FrontEnd { play: fd(), socket: fd() }),
            mappings: vec![(0, 0, 4096), (255, u64::MAX - 4095, 4096)],
            stopped: u64::MAX,
        };
        let Letter::HandOver(back) = round(Letter::HandOver(Box::new(estate))) else {
            panic!("another letter")
        };
        assert!(back.listener.is_some() && back.control.is_some() && back.front_end.is_some());
        assert_eq!(back.socket_file.unwrap().as_os_str(), "/run/a disk.sock");
        assert_eq!(back.control_file.unwrap().as_os_str(), "ctl");
        assert_eq!(back.stopped, u64::MAX);
        assert_eq!(back.mappings, [(0, 0, 4096), (255, u64::MAX - 4095, 4096)]);
    }

    #[test]
    fn an_idle_device_hands_over_its_sockets_alone() {
        let estate = Estate { listener: Some(fd()), ..Estate::default() };
        let Letter::HandOver(back) = round(Letter::HandOver(Box::new(estate))) else {
            panic!("another letter")
        };
        assert!(back.listener.is_some() && back.control.is_none() && back.front_end.is_none());
        assert!(back.mappings.is_empty() && back.socket_file.is_none());
    }

    #[test]
    fn heirlooms_go_in_as_many_letters_as_they_need_and_come_in_order() {
        let all = (0..HEIRLOOMS + 1).map(|at| Heirloom { name: format!("n{at}"), fd: fd() });
        let letters = parcels(all.collect()).unwrap();
        assert_eq!(letters.len(), 2);
        let mut names = Vec::new();
        for letter in letters {
            let Letter::Heirlooms(some) = round(letter) else { panic!("another letter") };
            names.extend(some.into_iter().map(|one| one.name));
        }
        assert!(names.iter().enumerate().all(|(at, name)| *name == format!("n{at}")));
        assert_eq!(names.len(), HEIRLOOMS + 1);
        assert!(parcels(Vec::new()).unwrap().is_empty(), "none need no letter");
        for name in ["", "a b", "a\nb", &"n".repeat(NAME + 1)] {
            let one = Heirloom { name: name.to_owned(), fd: fd() };
            assert!(parcels(vec![one]).is_err(), "{name:?}");
        }
        let error = Letter::decode(b"outboard 1 heirlooms\n", vec![fd()]).unwrap_err();
        assert!(error.contains("without a name"), "{error}");
        let error = Letter::decode(b"outboard 1 heirlooms\na\n", Vec::new()).unwrap_err();
        assert!(error.contains("missing"), "{error}");
    }

    #[test]
    fn a_reason_of_many_lines_becomes_one() {
        let Letter::Refused(why) = round(Letter::Refused("no\nno".to_owned())) else {
            panic!("another letter")
        };
        assert_eq!(why, "no no");
    }

    #[test]
    fn what_is_no_letter_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "not a letter"),
            ("hello", "not a letter"),
            ("outboard 2 take-over\n", "version \"2\""),
            ("outboard 1\n", "unknown letter"),
            ("outboard 1 sing\n", "unknown letter"),
            ("outboard 1 hand-over\nfds listener\n", "missing"),
            ("outboard 1 hand-over\nmapping 256 0 0\n", "mapping"),
            ("outboard 1 hand-over\nmapping 1 0 0 0\n", "mapping"),
            ("outboard 1 hand-over\nstopped soon\n", "time"),
            ("outboard 1 hand-over\nhat 1\n", "nobody knows"),
        ] {
            let error = Letter::decode(text.as_bytes(), Vec::new()).unwrap_err();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
        let error = Letter::decode(b"outboard 1 hand-over\nfds play\n", vec![fd()]).unwrap_err();
        assert!(error.contains("half a front-end"), "{error}");
    }
}
