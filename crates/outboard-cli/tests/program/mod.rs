//! A program that runs beside a test and says in its log what it does.
//!
//! Invariant: it is gone when this is.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

/// See the module.
pub(crate) struct Program {
    pub(crate) child: Child,
    log: BufReader<ChildStderr>,
}

impl Program {
    /// Starts it in a folder.
    pub(crate) fn run(command: &mut Command, folder: &Path) -> Self {
        let mut child = command
            .current_dir(folder)
            .env("OUTBOARD_LOG", "info")
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("our own program");
        let log = BufReader::new(child.stderr.take().expect("a pipe"));
        Self { child, log }
    }

    /// The first line of the log with this in it; none if the program ended before.
    pub(crate) fn says(&mut self, what: &str) -> Option<String> {
        let mut line = String::new();
        while self.log.read_line(&mut line).expect("text") > 0 {
            if line.contains(what) {
                return Some(line);
            }
            line.clear();
        }
        None
    }

    /// Its exit code, when it has ended.
    pub(crate) fn ends(mut self) -> Option<i32> {
        self.child.wait().expect("it ends").code()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
