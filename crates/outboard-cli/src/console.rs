//! `outboard console`: terminals, sockets and files of the host as a guest's console and ports
//! (virtio 1.3 §5.3).
//!
//! Invariant: a host's side that cannot be opened is found before the socket exists.

use std::path::PathBuf;

use outboard_devices::console::{
    Console, ConsoleOptions, Host, PortOptions, Resizer, Size, feature,
};
use signal_hook::consts::SIGWINCH;

use crate::Failure;
use crate::device::{self, Begins, DeviceArgs, Kind, Made, Origin, Prepared};
use crate::lock::{Reach, SandboxArgs};

const EXAMPLES: &str = "\
Examples:
  outboard console --socket-path /run/console.sock                      a console on a terminal of its own
  outboard console --socket-path /run/console.sock --port stdio         on this terminal
  outboard console --socket-path /run/console.sock --port pty:/run/vm.tty \\
    --port socket:/run/agent.sock,name=org.qemu.guest_agent.0 --port file:/var/log/vm.log,name=log

Connect to it:
  screen /run/vm.tty               socat - UNIX-CONNECT:/run/agent.sock

User-mode Linux:  linux.uml virtio_uml.device=/run/console.sock:3 con=null console=hvc0 ...
crosvm:           --vhost-user type=console,socket=/run/console.sock
In a Linux guest consoles are /dev/hvc0 and so on, ports with names /dev/virtio-ports/NAME.

The first port is a console; others are when they say so. With nobody at the host's side the newest
64 KiB are kept for who comes; with somebody there who does not read, that port's guest waits.
A terminal's size is the guest's when its host side says it; --size is for the others.
The log says which terminal a pty is. With a live upgrade (--take-over, with the same ports) terminals and sockets
go along with those who are connected, and no byte is lost; stdio stays with its process, a file is opened anew.
SIGTERM and SIGINT end the device and remove its sockets and links.";

/// Give a guest a console, and ports to talk through.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs<Terminal>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten, next_help_heading = "Console")]
    console: ConsoleArgs,
}

#[derive(clap::Args)]
struct ConsoleArgs {
    /// A port: pty, pty:LINK, stdio, socket:PATH or file:PATH; then ,name=NAME and ,console as
    /// wanted (repeatable; one pty by default).
    #[arg(long = "port", value_name = "HOST[,name=NAME][,console]", value_parser = parse_port)]
    ports: Vec<PortOptions>,
    /// Size of terminals that do not know theirs.
    #[arg(long, value_name = "COLUMNSxROWS", default_value = "80x25", value_parser = parse_size)]
    size: Size,
    /// Largest ring size that a front-end may choose, a power of two.
    #[arg(long, value_name = "ENTRIES", default_value_t = 256)]
    queue_size: u16,
}

/// What the common options have to know of a console.
#[derive(Clone)]
struct Terminal;

impl Kind for Terminal {
    const CAPABILITIES: &str = r#"{"type":"console","features":[]}"#;
    const EXAMPLE: &str = "VIRTIO_CONSOLE_F_MULTIPORT, ";

    fn feature(name: &str) -> Option<u64> {
        feature::by_name(name)
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let make = || args.console.make(args.device.takes_over());
    device::run(&args.device, &args.sandbox, args.console.reach(), make)
}

/// One of many devices.
pub(crate) fn prepare(args: &Args, origin: Origin<'_>) -> Result<Prepared, Failure> {
    args.sandbox.among()?;
    let inherits = origin.takes_over();
    device::prepare(&args.device, origin, || args.console.make(inherits))
}

impl ConsoleArgs {
    fn make(&self, inherits: bool) -> Result<Made<Console>, Failure> {
        let options = ConsoleOptions { inherits, ..self.options() };
        let mut described = match options.ports.len() {
            1 => "a console of 1 port".to_owned(),
            ports => format!("a console of {ports} ports"),
        };
        let stdio = options.ports.iter().position(|port| port.host == Host::Stdio);
        let model = Console::new(options).map_err(Failure::usage)?;
        for (port, terminal) in model.terminals() {
            described.push_str(&format!(", port {port} on {}", terminal.display()));
        }
        let begins = stdio.map(|port| -> Begins {
            let resizer = model.resizer();
            Box::new(move || follow_terminal(resizer, port))
        });
        Ok(Made { model, described: Box::new(move || described), begins })
    }

    /// What a live upgrade did not bring is made anew.
    fn reach(&self) -> Reach {
        let mut reach = Reach::default();
        for port in self.options().ports {
            match port.host {
                Host::Socket(path) => reach.socket(&path),
                Host::Pty { link } => {
                    reach.terminals();
                    link.iter().for_each(|link| reach.link(link));
                }
                Host::Stdio | Host::File(_) => {}
            }
        }
        reach
    }

    fn options(&self) -> ConsoleOptions {
        let mut options = ConsoleOptions {
            size: self.size,
            queue_size: self.queue_size,
            ..ConsoleOptions::default()
        };
        if !self.ports.is_empty() {
            options.ports.clone_from(&self.ports);
        }
        if let Some(first) = options.ports.first_mut() {
            first.console = true;
        }
        options
    }
}

/// The size of this process's own terminal, whenever it changes.
fn follow_terminal(resizer: Resizer, port: usize) -> std::io::Result<()> {
    let (bell, rung) = std::os::unix::net::UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGWINCH, bell)?;
    std::thread::Builder::new().name("terminal".to_owned()).spawn(move || {
        let mut byte = [0; 1];
        while std::io::Read::read(&mut &rung, &mut byte).is_ok_and(|got| got > 0) {
            if let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout()) {
                resizer.resize(port, Size { columns: size.ws_col, rows: size.ws_row });
            }
        }
    })?;
    Ok(())
}

fn parse_port(text: &str) -> Result<PortOptions, String> {
    let mut parts = text.split(',');
    let host = parts.next().unwrap_or_default();
    let host = match host.split_once(':') {
        None if host == "pty" => Host::Pty { link: None },
        None if host == "stdio" => Host::Stdio,
        Some(("pty", link)) if !link.is_empty() => Host::Pty { link: Some(PathBuf::from(link)) },
        Some(("socket", path)) if !path.is_empty() => Host::Socket(PathBuf::from(path)),
        Some(("file", path)) if !path.is_empty() => Host::File(PathBuf::from(path)),
        _ => return Err("pty, pty:LINK, stdio, socket:PATH or file:PATH is wanted".to_owned()),
    };
    let mut port = PortOptions { name: String::new(), console: false, host };
    for part in parts {
        match part.split_once('=') {
            Some(("name", name)) if !name.is_empty() => name.clone_into(&mut port.name),
            None if part == "console" => port.console = true,
            _ => return Err(format!("{part:?} is neither name=NAME nor console")),
        }
    }
    Ok(port)
}

fn parse_size(text: &str) -> Result<Size, String> {
    let parsed = text.split_once('x').and_then(|(columns, rows)| {
        Some(Size { columns: columns.parse().ok()?, rows: rows.parse().ok()? })
    });
    let sound = parsed.filter(|size| size.columns != 0 && size.rows != 0);
    sound.ok_or_else(|| "a size is two numbers, as in 132x50".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_with_their_names_and_kinds() {
        let port = |text: &str| parse_port(text).map_err(|why| format!("{text}: {why}"));
        assert_eq!(port("pty").map(|port| port.host), Ok(Host::Pty { link: None }));
        assert_eq!(port("stdio,console").map(|port| port.console), Ok(true));
        let agent = port("socket:/run/a:b,name=org.a").expect("sound");
        assert_eq!(agent.host, Host::Socket("/run/a:b".into()));
        assert_eq!((agent.name.as_str(), agent.console), ("org.a", false));
        for wrong in ["", "tty", "socket:", "file:", "pty:", "stdio,name=", "pty,what", "null:x"] {
            assert!(parse_port(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_size_is_two_numbers_that_are_not_zero() {
        assert_eq!(parse_size("132x50"), Ok(Size { columns: 132, rows: 50 }));
        for wrong in ["", "80", "80x", "x25", "0x25", "80x0", "70000x1", "80x25x1"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
