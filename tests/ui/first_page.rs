//! The first page of the guide, followed to the letter in a fresh folder.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// The blocks of a page in this language.
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let begin = format!("```{language}\n");
    page.split(&*begin).skip(1).filter_map(|rest| rest.split_once("\n```").map(|(block, _)| block)).collect()
}

/// The text with what differs from run to run replaced: process ids, and which worker it was.
fn without_numbers(text: &str) -> String {
    let mut text = text.trim().to_string();
    for before in ["process ", "(pid ", "PoolWorker-"] {
        let mut parts = text.split(before);
        let first = parts.next().unwrap_or_default().to_string();
        text =
            parts.fold(first, |all, part| all + before + "N" + part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    text
}

fn text_of(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn the_first_page_of_the_guide_works_to_the_letter() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let page = fs::read_to_string(root.join("docs/guide/first-program.md")).unwrap();
    let folder = std::env::temp_dir().join(format!("multiprocess-first-page-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let run = |line: &str, directory: &Path| {
        let words: Vec<_> = line.split(' ').collect();
        assert_eq!(words[0], "cargo", "{line}");
        let mut command = Command::new(env!("CARGO"));
        // Built beside this crate, so that a second run need not build it all again. Nothing is fetched.
        command.env("CARGO_TARGET_DIR", root.join("target/first-page")).env("CARGO_NET_OFFLINE", "true");
        command.args(&words[1..]).current_dir(directory).output().unwrap()
    };

    let mut directory = folder.clone();
    let mut last = None;
    for line in blocks(&page, "sh").iter().flat_map(|block| block.lines()) {
        if let Some(name) = line.strip_prefix("cd ") {
            directory = directory.join(name);
            continue;
        }
        // The crate is the one of this checkout.
        let line = match line {
            "cargo add multiprocess" => &*format!("cargo add multiprocess --path {}", root.display()),
            "cargo run" => {
                fs::write(directory.join("src/main.rs"), blocks(&page, "rust")[0]).unwrap();
                // The versions that are here.
                fs::copy(root.join("Cargo.lock"), directory.join("Cargo.lock")).unwrap();
                line
            }
            other => other,
        };
        let output = run(line, &directory);
        let text = text_of(&output);
        if ["offline", "--offline", "no matching package"].iter().any(|word| text.contains(word))
            && !output.status.success()
        {
            // In CI it is: this test program needs all that the page does.
            assert!(std::env::var_os("CI").is_none(), "a crate is not on this machine: {text}");
            return eprintln!("SKIPPED: a crate is not on this machine: {text}");
        }
        assert!(output.status.success(), "{line}: {text}");
        last = Some(output);
    }
    fs::remove_dir_all(&folder).unwrap();
    let output = last.expect("the page has commands");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(without_numbers(&printed), without_numbers(blocks(&page, "text")[0]), "{}", text_of(&output));
}
