//! Man pages and completions say what the command line says.
#![expect(clippy::unwrap_used, reason = "a failed step of a test is its end")]

use std::process::Command;

fn outboard(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_outboard")).args(args).output().unwrap()
}

#[test]
fn every_command_has_a_man_page_with_its_options() {
    let folder = tempfile::tempdir().unwrap();
    let made = outboard(&["manual", "--pages", folder.path().to_str().unwrap()]);
    assert!(made.status.success());
    for command in [
        "block", "console", "fs", "net", "rng", "switch", "vsock", "demo", "probe", "bench",
        "check",
    ] {
        let page = folder.path().join(format!("outboard-{command}.1"));
        let page = std::fs::read_to_string(page).unwrap();
        assert!(page.contains(".SH OPTIONS"), "{command}");
    }
    let block = std::fs::read_to_string(folder.path().join("outboard-block.1")).unwrap();
    assert!(block.contains("num\\-queues"));
}

#[test]
fn completions_are_printed_and_a_missing_folder_is_a_usage_error() {
    let bash = outboard(&["manual", "--completion", "bash"]);
    assert!(String::from_utf8(bash.stdout).unwrap().contains("--socket-path"));
    assert_eq!(outboard(&["manual", "--pages", "/nowhere/at/all"]).status.code(), Some(2));
    assert_eq!(outboard(&["manual"]).status.code(), Some(2));
}
