//! `outboard probe`: what a back-end offers, in words or as JSON.
//!
//! Invariant: the questions are [`outboard_check::probe`]'s; this module only shows the answers.

use std::path::PathBuf;
use std::time::Duration;

use outboard_check::probe::{Bits, DeviceType, Offer, hex, probe};
use outboard_frontend::{Connection, Error, SocketError};

use crate::Failure;
use crate::report::{process_name, say};

const EXAMPLES: &str = "\
Examples:
  outboard probe /run/disk.sock                what is this?
  outboard probe /run/net.sock --type net      decode its configuration as a network card's
  outboard probe /run/disk.sock --json | jq .queues

Nothing is started and no memory is shared: it connects, asks and leaves. A back-end that serves a
single connection in its life (crosvm's do) has then served it.";

/// Ask a vhost-user back-end what it offers: features, queues, memory slots, configuration.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The socket that the back-end listens on.
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// What kind of device it is; guessed when it can be.
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_type)]
    device: Option<DeviceType>,
    /// Longest wait for one answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Answer as one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let timeout = Duration::from_secs(args.timeout);
    let connection = Connection::connect(&args.socket, timeout).map_err(connect_failure)?;
    let offer = probe(connection, args.device).map_err(Failure::failed)?;
    if args.json {
        say(serde_json::to_string_pretty(&offer).map_err(Failure::failed)?);
    } else {
        say(in_words(&offer, &args.socket.display().to_string()).trim_end());
    }
    Ok(())
}

/// A socket that is not there is a wrong command line; anything else is the back-end's failure.
pub(crate) fn connect_failure(error: Error) -> Failure {
    match error {
        Error::Socket(SocketError::PathTooLong { .. } | SocketError::Connect { .. }) => {
            Failure::usage(error)
        }
        other => Failure::failed(other),
    }
}

fn parse_type(text: &str) -> Result<DeviceType, String> {
    DeviceType::named(text).ok_or_else(|| {
        let known: Vec<_> = DeviceType::ALL.iter().map(|device| device.name()).collect();
        format!("no such type; known are {}", known.join(", "))
    })
}

fn in_words(offer: &Offer, socket: &str) -> String {
    use std::fmt::Write as _;
    let mut text = socket.to_owned();
    if let Some(pid) = offer.pid {
        let _ = write!(text, ", served by process {pid}{}", process_name(pid));
    }
    text.push('\n');
    let device = match (offer.device, offer.guessed) {
        (Some(device), true) => {
            format!("{device}, by its looks (say --type if it is something else)")
        }
        (Some(device), false) => format!("{device}, as you say"),
        (None, _) => "not known (say it with --type)".to_owned(),
    };
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<16}{value}");
    };
    line("device", &device);
    let count = |count: Option<u64>, without: &str| {
        count.map_or_else(|| format!("not said (no {without})"), |count| count.to_string())
    };
    line("queues", &count(offer.queues, "MQ"));
    line("memory slots", &count(offer.memory_slots, "CONFIGURE_MEM_SLOTS"));
    text.push_str("\nFeatures ");
    text.push_str(&set(&offer.features));
    match &offer.protocol_features {
        Some(features) => {
            text.push_str("\nProtocol features ");
            text.push_str(&set(features));
        }
        None => text.push_str("\nProtocol features: none, it does not speak of them\n"),
    }
    match &offer.config {
        None => text.push_str("\nConfiguration: none to read\n"),
        Some(bytes) if offer.fields.is_empty() => {
            let _ = writeln!(text, "\nConfiguration, {} bytes\n  {}", bytes.len(), hex(bytes));
        }
        Some(_) => {
            text.push_str("\nConfiguration\n");
            for field in &offer.fields {
                let _ = writeln!(text, "  {:<22}{}", field.name, field.value);
            }
        }
    }
    text
}

fn set(bits: &Bits) -> String {
    use std::fmt::Write as _;
    let mut text = format!("{:#x}\n", bits.value);
    for bit in &bits.set {
        let _ = writeln!(text, "  {:>2}  {:<24}{}", bit.bit, bit.name, bit.meaning);
    }
    text
}
