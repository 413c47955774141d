//! `outboard manual`: man pages and shell completions, made from the command line itself, so that
//! they say what `--help` says.

use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;

use crate::Failure;

const EXAMPLES: &str = "\
Examples:
  outboard manual --pages /usr/local/share/man/man1
  outboard manual --completion bash > /etc/bash_completion.d/outboard";

/// Write the man pages, or a shell's completions.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Write outboard.1, outboard-block.1 and so on into this folder.
    #[arg(long, value_name = "FOLDER", required_unless_present = "completion")]
    pages: Option<PathBuf>,
    /// Print completions for this shell.
    #[arg(long, value_name = "SHELL")]
    completion: Option<Shell>,
}

/// Runs the command on the whole program's command line.
pub(crate) fn run(args: &Args, mut program: Command) -> Result<(), Failure> {
    if let Some(shell) = args.completion {
        clap_complete::generate(shell, &mut program, "outboard", &mut std::io::stdout());
    }
    let Some(folder) = &args.pages else { return Ok(()) };
    if !folder.is_dir() {
        return Err(Failure::Usage(format!("{} is no folder", folder.display())));
    }
    program.build();
    page(folder, &program, "outboard")?;
    for command in program.get_subcommands() {
        page(folder, command, &format!("outboard-{}", command.get_name()))?;
    }
    Ok(())
}

fn page(folder: &Path, command: &Command, name: &str) -> Result<(), Failure> {
    // `Command` wants a name that lives as long as the program.
    let title: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let path = folder.join(format!("{name}.1"));
    let mut bytes = Vec::new();
    clap_mangen::Man::new(command.clone().name(title))
        .render(&mut bytes)
        .map_err(Failure::failed)?;
    std::fs::write(&path, bytes)
        .map_err(|error| Failure::Failed(format!("{}: {error}", path.display())))
}
