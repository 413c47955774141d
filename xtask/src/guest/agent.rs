//! The host's end of the line to the guest's agent (`init.sh` tells the exchange).
//!
//! Invariant: every wait has a bound; a guest that restarts in the middle of a script, ends, or
//! says nothing is an error that tells which.

use anyhow::{Context as _, Result, bail};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a script can be, in bytes: what the guest's serial port buffers without flow control.
const SCRIPT_LIMIT: usize = 16 << 10;

/// What a script did.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code.
    pub status: i32,
    /// What it printed, both streams.
    pub output: String,
}

/// The line to one guest.
pub struct Agent {
    to_guest: Box<dyn Write + Send>,
    from_guest: Receiver<String>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

impl Agent {
    /// An agent behind a pair of pipes. A thread reads until the guest ends.
    #[must_use]
    pub fn new(to_guest: Box<dyn Write + Send>, from_guest: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(from_guest).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    break; // nobody listens any more
                }
            }
        });
        Self { to_guest, from_guest: receiver }
    }

    /// Waits until the guest has started; gives its kernel's release.
    ///
    /// # Errors
    /// When the guest ends or the time runs out first.
    pub fn ready(&mut self, within: Duration) -> Result<String> {
        let end = Instant::now() + within;
        loop {
            let line = self.line(end).context("waiting for the guest to start")?;
            if let Some(release) = line.strip_prefix("OUTBOARD READY ") {
                return Ok(release.to_owned());
            }
        }
    }

    /// Starts a script (`sh -eu`) without waiting for its end.
    ///
    /// # Errors
    /// When the guest is gone or the script too long.
    pub fn start(&mut self, script: &str) -> Result<()> {
        anyhow::ensure!(script.len() <= SCRIPT_LIMIT, "a script of {} bytes", script.len());
        let text = format!("OUTBOARD BEGIN\n{}\nOUTBOARD RUN\n", script.trim_end());
        self.to_guest.write_all(text.as_bytes()).context("the guest takes no script")?;
        Ok(self.to_guest.flush()?)
    }

    /// Sends a line that is no script.
    ///
    /// # Errors
    /// When the guest is gone.
    pub fn say(&mut self, line: &str) -> Result<()> {
        self.to_guest
            .write_all(format!("{line}\n").as_bytes())
            .context("the guest hears nothing")?;
        Ok(self.to_guest.flush()?)
    }

    /// Waits for the end of the script that was started.
    ///
    /// # Errors
    /// When the guest ends, restarts or is silent for too long.
    pub fn finish(&mut self, within: Duration) -> Result<Outcome> {
        let end = Instant::now() + within;
        let mut output = String::new();
        loop {
            let line = self.line(end).with_context(|| format!("the script so far:\n{output}"))?;
            if let Some(text) = line.strip_prefix("| ") {
                output.push_str(text);
                output.push('\n');
            } else if let Some(status) = line.strip_prefix("OUTBOARD EXIT ") {
                let status = status.parse().context("the script's exit code")?;
                return Ok(Outcome { status, output });
            } else if line.starts_with("OUTBOARD READY") {
                bail!("the guest restarted while a script ran; the script so far:\n{output}");
            }
        }
    }

    /// Waits until the script that was started prints the line `text`.
    ///
    /// # Errors
    /// When the script ends, or the time runs out, first.
    pub fn expect(&mut self, text: &str, within: Duration) -> Result<()> {
        let end = Instant::now() + within;
        let mut before = String::new();
        loop {
            let line = self.line(end).with_context(|| format!("no {text:?} after:\n{before}"))?;
            if line.strip_prefix("| ") == Some(text) {
                return Ok(());
            }
            anyhow::ensure!(
                !line.starts_with("OUTBOARD"),
                "{line:?}, no {text:?} after:\n{before}"
            );
            before.push_str(&line);
            before.push('\n');
        }
    }

    fn line(&self, end: Instant) -> Result<String> {
        let left = end.saturating_duration_since(Instant::now());
        match self.from_guest.recv_timeout(left) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("the guest was silent for too long"),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest has ended"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn guest(says: &'static str) -> Agent {
        Agent::new(Box::new(std::io::sink()), says.as_bytes())
    }

    #[test]
    fn a_scripts_lines_and_exit_code_are_told_apart_from_noise() {
        let mut agent = guest("noise\nOUTBOARD READY 6.12\r\n| a\nnoise\n| b c\nOUTBOARD EXIT 3\n");
        assert_eq!(agent.ready(SOON).unwrap(), "6.12");
        let outcome = agent.finish(SOON).unwrap();
        assert_eq!((outcome.status, outcome.output.as_str()), (3, "a\nb c\n"));
    }

    #[test]
    fn a_guest_that_restarts_under_a_script_is_an_error() {
        let error = guest("| a\nOUTBOARD READY 6.12\n").finish(SOON).unwrap_err();
        assert!(error.to_string().contains("restarted"), "{error:#}");
    }

    #[test]
    fn a_guest_that_ends_is_not_waited_for() {
        let error = guest("| a\n").finish(Duration::from_secs(600)).unwrap_err();
        assert!(format!("{error:#}").contains("has ended"), "{error:#}");
    }
}
