//! `outboard console` under User-mode Linux: somebody logs in over the pseudo-terminal, leaves and
//! comes back; an agent is talked to through a port with a name.

use crate::lab::{Lab, sound};
use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::guest::uml;

const LONG: Duration = Duration::from_secs(120);

/// The virtio device number of a console (virtio 1.3, section 5).
const CONSOLE: u32 = 3;

/// What the hash in [`SERVE`] is of.
const PASSWORD: &str = "correct horse\r";

/// Waits until the terminal has another size than it had, and says which; not in the words that are typed.
/// Sorted: some kernels take rows for columns (6.1.176 does not).
const SIZE: &str = "until stty size | grep -q 132; do sleep 0.1; done; \
                    echo it is $(stty size | tr ' ' '\\n' | sort -n)\r";

/// A login on the console, and an agent on the port, both beside the script. A port can be opened by one
/// program only, and reads as ended while nobody is at the host's side.
const SERVE: &str = "
echo 'root:$1$outboard$XWm304goqtWWcsRnyt13c1:0:0:root:/:/bin/sh' > /etc/passwd
echo 'root:x:0:' > /etc/group
while ! grep -qs org.outboard.echo /sys/class/virtio-ports/*/name; do sleep 0.1; done
cat /sys/class/virtio-ports/*/name
port=$(basename $(dirname $(grep -l org.outboard.echo /sys/class/virtio-ports/*/name)))
setsid getty -L 115200 hvc0 vt100 < /dev/null > /dev/null 2>&1 &
setsid sh -c \"exec 3<>/dev/$port; while :; do cat <&3 >&3; sleep 0.1; done\" \\
    < /dev/null > /dev/null 2>&1 &
";

/// A terminal, held open by this alone.
struct Terminal(File);

impl Terminal {
    fn open(link: &Path) -> Result<Self> {
        Ok(Self(File::options().read(true).write(true).open(link)?))
    }

    /// Reads until `text` comes.
    fn expect(&mut self, text: &str) -> Result<()> {
        let end = Instant::now() + LONG;
        let mut said = String::new();
        while !said.contains(text) {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
            let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
            if poll(&mut polled, Some(&left))? == 0 {
                bail!("no {text:?} on the terminal, but:\n{said}");
            }
            let mut bytes = [0; 4096];
            let got = self.0.read(&mut bytes)?;
            said.push_str(&String::from_utf8_lossy(&bytes[..got]));
        }
        Ok(())
    }

    /// The window gets another size.
    fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.0, size).context("the terminal has no size")
    }

    fn type_in(&mut self, text: &str) -> Result<()> {
        self.0.write_all(text.as_bytes()).context("the terminal takes nothing")
    }
}

#[test]
fn somebody_logs_in_over_the_terminal_and_talks_to_an_agent_behind_a_port() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let (tty, agent) = (lab.path().join("tty"), lab.path().join("agent"));
    let mut command = Command::new(backend::outboard()?);
    command.args(["console", "--port", &format!("pty:{}", tty.display()), "--port"]);
    command.arg(format!("socket:{},name=org.outboard.echo", agent.display()));
    command.arg("--socket-path").arg(backend::socket(lab.path(), "console"));
    let device = Device::start(&mut command, lab.path(), "console")?;
    let devices = [(device.socket.as_path(), CONSOLE)];
    let mut guest = sound(uml::boot(&lab.root, lab.path(), &devices), &device)?;
    let said = sound(guest.run(SERVE, LONG), &device)?;
    assert!(said.contains("org.outboard.echo"), "{said}");

    let mut terminal = Terminal::open(&tty)?;
    sound(terminal.expect("login: "), &device)?;
    terminal.type_in("root\r")?;
    sound(terminal.expect("Password: "), &device)?;
    terminal.type_in(PASSWORD)?;
    sound(terminal.expect("# "), &device)?;
    terminal.type_in("echo six times seven is $((6 * 7))\r")?;
    sound(terminal.expect("six times seven is 42"), &device)?;
    terminal.resize(132, 50)?;
    terminal.type_in(SIZE)?;
    sound(terminal.expect("it is 50 132"), &device)?;
    // The line breaks off in the middle of a command; its output is there for who comes back.
    terminal.type_in("while [ ! -e /tmp/go ]; do sleep 0.1; done; echo $((7 * 11)) bottles\r")?;
    sound(terminal.expect("bottles"), &device)?;
    drop(terminal);
    sound(guest.run("touch /tmp/go; sleep 1", LONG), &device)?;
    let mut terminal = Terminal::open(&tty)?;
    sound(terminal.expect("77 bottles"), &device)?;

    for round in 0..3 {
        let mut stream = UnixStream::connect(&agent)?;
        stream.set_read_timeout(Some(LONG))?;
        let text = format!("hello for the time number {round}\n");
        stream.write_all(text.as_bytes())?;
        let mut echo = vec![0; text.len()];
        sound(stream.read_exact(&mut echo).context("no echo"), &device)?;
        assert_eq!(String::from_utf8_lossy(&echo), text);
    }
    sound(guest.power_off(), &device)?;
    device.terminate()
}
