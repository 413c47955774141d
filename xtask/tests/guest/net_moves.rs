//! QEMU migrates a guest with a network card between two processes of `outboard net`, each on an interface in a network
//! of its own: the card's state comes along, and the new network hears where the guest is.

use crate::lab::sound;
use crate::migrate::{folder, outcome, rounds};
use crate::net::{LONG, Network, UP, lab, machine};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

/// The guest's address, as QEMU gives it to the first card.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
/// Goes on until a word comes over the agent's port; counts the answers.
const LOAD: &str = "
rm -f /tmp/word
{ IFS= read -r word < /dev/ttyS1; echo $word > /tmp/word; } &
echo talking
n=0
while [ ! -e /tmp/word ]; do ping -c 1 -W 1 10.7.0.1 > /dev/null && n=$((n + 1)); sleep 0.05; done
ping -c 3 10.7.0.1
echo answers $n";

/// Whether a broadcast of the guest that says where it is stands in the packets that a card has kept.
fn is_announced(pcap: &Path) -> Result<bool> {
    let kept = std::fs::read(pcap)?;
    let head = [&[0xff; 6][..], &MAC].concat();
    let at = kept.windows(14).find(|bytes| {
        // ARP, or RARP where the device speaks for the guest.
        bytes.starts_with(&head) && matches!(bytes[12..], [0x08, 0x06] | [0x80, 0x35])
    });
    Ok(at.is_some())
}

#[test]
fn a_guest_moves_to_another_network_which_hears_of_it_and_goes_on_talking() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let pcap = lab.path().join("there.pcap");
    let kept = pcap.to_str().context("a path that is text")?;
    let here = Network::named("here", &lab, &["--queue-pairs", "2"])?;
    let there = Network::named("there", &lab, &["--queue-pairs", "2", "--pcap", kept])?;
    let networks = [here, there];
    let on = |at: usize| machine(&networks[at].device.socket, 2, "");
    let mut at = 0;
    let mut guest = sound(on(at).boot(&lab.root, &folder(&lab, 0)?), &networks[at].device)?;
    sound(guest.run(UP, LONG), &networks[at].device)?;
    for moved in 1..=2 * rounds() {
        sound(guest.start(LOAD), &networks[at].device)?;
        sound(guest.expect("talking", LONG), &networks[at].device)?;
        let dir = folder(&lab, moved)?;
        let stream = dir.join("stream");
        let next = &networks[1 - at].device;
        let waiting = sound(on(1 - at).receive(&lab.root, &dir, &stream), next)?;
        let mut monitor = guest.monitor()?;
        monitor.execute("migrate", &json!({ "uri": format!("unix:{}", stream.display()) }))?;
        let done = sound(outcome(&mut monitor), next)?;
        ensure!(done["status"] == "completed", "{done}\n{}", networks[at].device.said());
        eprintln!("moved, downtime {} ms", done["downtime"]);
        (guest, at) = (waiting, 1 - at);
        let end = Instant::now() + LONG;
        while at == 1 && !is_announced(&pcap)? {
            ensure!(Instant::now() < end, "nobody said where the guest is\n{}", next.said());
            std::thread::sleep(Duration::from_millis(20)); // a file that grows sends no event
        }
        guest.say("enough")?;
        let said = sound(guest.finish(LONG), next)?;
        ensure!(said.contains("3 packets received"), "{said}");
        eprintln!("{}", said.lines().last().unwrap_or_default());
    }
    let queues =
        sound(guest.run("ethtool -l eth0 | grep -c 'Combined:.*2'", LONG), &networks[at].device)?;
    assert_eq!(queues.trim(), "2", "pairs, most and in use");
    sound(guest.power_off(), &networks[at].device)?;
    for network in networks {
        network.device.terminate()?;
    }
    Ok(())
}
