//! The page of `cargo xtask judged`: a section for each program, and a table of all of them in front.
//!
//! Invariant: sections that are not replaced stay as they are, in the order of the programs.

use super::{Judged, SUBJECTS, repeated};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;

const HEAD: &str = "# Back-ends under the judge\n\n\
    Written by `cargo xtask judged` from the `--json` of `outboard check`: do not edit. It fetches or builds the\n\
    programs (Debian packages, one crate), gives each a scratch folder with an image of 8 MiB and an empty folder to\n\
    share, and starts a fresh process for every check. *Breaks*, *crashes*, *hangs*, *spins* and *leaks* are the\n\
    program's; *not offered* says that it does not offer what the check is about. \"Known\" is the reason in\n\
    `crates/outboard-check/peers`, which `--expect` reads.\n";

/// The judgements of a report.
pub(super) fn judgements(report: &Value) -> impl Iterator<Item = &Value> {
    report["judgements"].as_array().into_iter().flatten()
}

/// Whether the program is at fault.
pub(super) fn bad(one: &Value) -> bool {
    !["holds", "not-offered", "not-judged"].iter().any(|fine| one["verdict"] == *fine)
}

fn text<'v>(one: &'v Value, field: &str) -> &'v str {
    one[field].as_str().unwrap_or_default()
}

/// How often each verdict came, in one line.
pub(super) fn counts(report: &Value) -> String {
    let mut all = BTreeMap::new();
    for one in judgements(report) {
        *all.entry(text(one, "verdict")).or_insert(0u32) += 1;
    }
    let mut parts = Vec::new();
    for verdict in
        ["holds", "breaks", "crashes", "hangs", "spins", "leaks", "not-offered", "not-judged"]
    {
        if let Some(count) = all.get(verdict) {
            parts.push(format!("{count} {}", verdict.replace('-', " ")));
        }
    }
    format!("{} checks: {}", judgements(report).count(), parts.join(", "))
}

/// The page with the section of what was judged.
pub(super) fn with_section(there: &str, judged: &Judged) -> String {
    let mut sections: BTreeMap<_, _> = there
        .split("\n## ")
        .skip(1)
        .filter_map(|part| part.split_once('\n'))
        .map(|(name, body)| (name.to_owned(), body.trim_end().to_owned() + "\n"))
        .collect();
    sections.insert(judged.subject.name.to_owned(), section(judged));
    let mut page = HEAD.to_owned();
    let _ = write!(page, "\n| program | version | result |\n|---|---|---|\n");
    let known = |name: &str| sections.get(name);
    for subject in SUBJECTS {
        let Some(body) = known(subject.name) else { continue };
        let field = |name: &str| {
            body.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned()
        };
        let (version, result) = (field("- Version: "), field("- Result: "));
        let _ = writeln!(page, "| [{0}](#{0}) | {version} | {result} |", subject.name);
    }
    for subject in SUBJECTS {
        if let Some(body) = known(subject.name) {
            let _ = write!(page, "\n## {}\n{body}", subject.name);
        }
    }
    page
}

fn section(judged: &Judged) -> String {
    let Judged { subject, version, report, .. } = judged;
    let (again, check) = repeated(judged);
    let mut out = format!("- What: {}\n- Version: {version}\n", subject.origin);
    let _ = writeln!(out, "- Result: {}", counts(report));
    let _ = writeln!(out, "- Again: `{again}`, which runs\n");
    let _ = writeln!(out, "```\n{check} -- \\\n    {}\n```", subject.command.join(" "));
    if !subject.defects.is_empty() {
        let _ = write!(out, "\nDefects that are known of it, as found:\n\n");
        let _ = write!(out, "| defect | check | verdict | why |\n|---|---|---|---|\n");
        for (what, id) in subject.defects {
            let row = judgements(report).find(|one| text(one, "id") == *id);
            let (verdict, why) =
                row.map_or(("", ""), |one| (text(one, "verdict"), text(one, "why")));
            let _ = writeln!(out, "| **{what}** | `{id}` | {verdict} | {} |", cell(why));
        }
    }
    let wrong: Vec<_> = judgements(report).filter(|one| bad(one)).collect();
    if !wrong.is_empty() {
        let _ =
            write!(out, "\n| check | section | verdict | why | known |\n|---|---|---|---|---|\n");
    }
    for one in wrong {
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} | {} |",
            text(one, "id"),
            text(one, "section"),
            text(one, "verdict"),
            cell(text(one, "why")),
            cell(text(one, "expected")),
        );
    }
    out + &reasons(report)
}

/// Why checks were not offered or not judged, each reason once.
fn reasons(report: &Value) -> String {
    let mut all = BTreeMap::<(&str, &str), Vec<&str>>::new();
    for one in judgements(report) {
        let verdict = text(one, "verdict");
        if verdict == "not-offered" || verdict == "not-judged" {
            all.entry((verdict, text(one, "why"))).or_default().push(text(one, "id"));
        }
    }
    let mut out = String::new();
    if !all.is_empty() {
        out.push_str("\n| not offered, because | checks |\n|---|---|\n");
    }
    for ((verdict, why), ids) in all {
        let mark = if verdict == "not-judged" { "(not judged) " } else { "" };
        let shown = match ids.as_slice() {
            few if few.len() <= 6 => {
                few.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ")
            }
            many => format!("{} of them", many.len()),
        };
        let _ = writeln!(out, "| {mark}{} | {shown} |", cell(why));
    }
    out
}

/// Text for a cell of a table, without paths of one machine.
fn cell(text: &str) -> String {
    // "(/a/b/s)" is a path as well.
    let is_path = |word: &str| word.trim_start_matches('(').starts_with('/') && word.len() > 20;
    let words = text.split(' ').map(|word| match is_path(word) {
        true => word.rsplit('/').next().unwrap_or_default(),
        false => word,
    });
    words.collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn judged(name: &str, why: &str) -> Judged {
        let subject = SUBJECTS.iter().find(|subject| subject.name == name).unwrap();
        let report = json!({ "judgements": [
            { "id": "a", "section": "S", "verdict": "holds", "why": "" },
            { "id": "b", "section": "S", "verdict": "breaks", "why": why, "expected": "old" },
            { "id": "c", "section": "S", "verdict": "not-offered", "why": "no C" },
        ]});
        Judged { subject, version: "version 1".to_owned(), quick: true, report }
    }

    #[test]
    fn a_section_has_counts_the_broken_checks_and_the_reasons() {
        let page = with_section("", &judged("virtiofsd", "said | so"));
        for line in [
            "- Result: 3 checks: 1 holds, 1 breaks, 1 not offered",
            "| `b` | S | breaks | said \\| so | old |",
            "| no C | `c` |",
            "- Again: `cargo xtask judged --quick --only virtiofsd`, which runs",
            "outboard check --json --quick --expect crates/outboard-check/peers/virtiofsd.txt -- \\",
            "| [virtiofsd](#virtiofsd) | version 1 | 3 checks: 1 holds, 1 breaks, 1 not offered |",
        ] {
            assert!(page.lines().any(|there| there == line), "{line}\n{page}");
        }
    }

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let page = with_section("", &judged("virtiofsd", "one"));
        let page = with_section(&page, &judged("outboard-block", "two"));
        let page = with_section(&page, &judged("virtiofsd", "three"));
        assert!(page.contains("two") && page.contains("three") && !page.contains("one |"));
        assert_eq!(page.matches("\n## ").count(), 2);
        assert!(page.find("## outboard-block") < page.find("## virtiofsd"));
    }
}
