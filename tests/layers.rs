//! Calls go down the page: every room uses only rooms below its own, `unsafe` stays in two of them, and a
//! file that shares state between processes opens with the page that says how.

use std::path::{Path, PathBuf};
use std::{collections::HashMap, fs};

/// Each room and what it may use. `error` is used by all and uses none; `lib` may use everything.
const ROOMS: &[(&str, &[&str])] = &[
    ("manager", &["connection", "process", "channel", "sync", "wait", "wire", "shm", "os"]),
    ("pool", &["process", "channel", "wait", "wire", "shm", "os"]),
    ("connection", &["wire", "os"]),
    ("memory", &["process", "wire", "shm", "os"]),
    ("process", &["wait", "wire", "shm", "os"]),
    ("channel", &["wait", "wire", "shm", "os"]),
    ("sync", &["wait", "wire", "shm", "os"]),
    ("wait", &["shm", "os"]),
    ("wire", &["shm", "os"]),
    ("shm", &["os"]),
    ("os", &[]),
    ("error", &[]),
];
const MAY_BE_UNSAFE: &[&str] = &["os", "shm"];
/// Files that keep state in memory which other processes see. Models of them owe no page.
const SHARED: &[&str] = &[
    "channel/lane.rs",
    "channel/link.rs",
    "channel/news.rs",
    "channel/extents.rs",
    "channel/ring.rs",
    "channel/segment.rs",
    "channel/spsc.rs",
    "shm/family.rs",
    "shm/latch.rs",
    "sync/array.rs",
    "sync/notices.rs",
    "sync/register.rs",
    "sync/rounds.rs",
    "sync/value.rs",
    "sync/event.rs",
    "sync/ledger.rs",
    "sync/mutex.rs",
    "sync/patience.rs",
    "sync/semaphore.rs",
    "sync/turns.rs",
    "wait/event.rs",
    "wait/line.rs",
];
/// Files whose atomics belong to one process, and those that only hand atomics out.
const ALONE: &[&str] = &[
    "channel/pipe.rs",
    "shm/atomic.rs",
    "shm/heap.rs",
    "shm/region.rs",
    "shm/view.rs",
    "sync/barrier.rs",
    "sync/condition.rs",
    "sync/debug.rs",
    "sync/lock.rs",
    "sync/object.rs",
    "sync/rlock.rs",
    "sync/rwlock.rs",
    "sync/stress.rs",
    "memory/shared_memory.rs",
    "shm/lent.rs",
    "wait/look.rs",
];
const PAGE: [&str; 5] = ["//! # State", "//! # Moves", "//! # Invariants", "//! # Death", "//! # Cancel"];

/// What is wrong with one file, given its path below `src` and which room the crate root's names come from.
fn complaints(file: &str, text: &str, exports: &HashMap<&str, &str>) -> Vec<String> {
    let path: Vec<_> = file.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let (room, tokens, mut found) = (path[0], tokens(text), Vec::new());
    let Some((_, below)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        return if room == "lib" { found } else { vec![format!("{room} has no place among the rooms")] };
    };
    for name in used(&tokens, path.len()) {
        let is_room = ROOMS.iter().any(|(room, _)| *room == name);
        let target = if is_room { name } else { exports.get(name).copied().unwrap_or("an unknown room") };
        if target != room && target != "error" && !below.contains(&target) {
            found.push(format!("{room} may not use {target} ({name})"));
        }
    }
    // An attribute, `#[unsafe(..)]`, is left to the compiler: in a macro it lands in the caller's crate.
    let is_unsafe = |pair: &[&str]| pair[0] == "unsafe" && pair[1] != "(";
    if !MAY_BE_UNSAFE.contains(&room) && tokens.windows(2).any(is_unsafe) {
        found.push(format!("unsafe belongs to {MAY_BE_UNSAFE:?}"));
    }
    let is_model = file.ends_with("/model.rs") || file.ends_with("models.rs");
    if !is_model
        && ["wait", "channel", "sync", "shm"].contains(&room)
        && tokens.iter().any(|token| token.starts_with("Atomic"))
    {
        let lacks = PAGE.iter().filter(|head| !text.lines().any(|line| line.starts_with(**head)));
        match (SHARED.contains(&file), ALONE.contains(&file)) {
            (true, false) => found.extend(lacks.map(|head| format!("lacks `{head}`"))),
            (false, true) => {}
            _ => found.push("has atomics: is it on SHARED or on ALONE?".to_string()),
        }
    }
    found
}

/// Words and punctuation marks, without line comments.
fn tokens(text: &str) -> Vec<&str> {
    let lines = text.lines().filter_map(|line| line.split("//").next());
    let pieces = lines.flat_map(|code| code.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_'));
    let halves = pieces.flat_map(|piece| match piece.char_indices().last() {
        Some((at, c)) if !c.is_alphanumeric() && c != '_' => [&piece[..at], &piece[at..]],
        _ => [piece, ""],
    });
    halves.filter(|token| !token.trim().is_empty()).collect()
}

/// The names taken from the crate root: by `crate::`, or by as many `super::` as lead there.
fn used<'a>(tokens: &[&'a str], depth: usize) -> Vec<&'a str> {
    let climb = ["super", ":", ":"].repeat(depth);
    let mut names = Vec::new();
    for at in 0..tokens.len() {
        let (path, starts) = (&tokens[at..], at == 0 || tokens[at - 1] != ":");
        if path.starts_with(&["crate", ":", ":", "{"]) {
            let mut open = 0;
            for pair in path[3..].windows(2) {
                open += i32::from(pair[0] == "{") - i32::from(pair[0] == "}");
                match pair {
                    ["{" | ",", name] if open == 1 && *name != "}" => names.push(*name),
                    _ if open == 0 => break,
                    _ => {}
                }
            }
        } else if path.starts_with(&["crate", ":", ":"]) {
            names.extend(path.get(3));
        } else if starts && path.starts_with(&climb) {
            // From a module within the file this leads to a sibling, which only counts if it is called like a room.
            names.extend(path.get(climb.len()).filter(|name| ROOMS.iter().any(|(room, _)| room == *name)));
        }
    }
    names
}

/// What `lib.rs` re-exports, and from which room.
fn exports<'a>(lib: &[&'a str]) -> HashMap<&'a str, &'a str> {
    let uses = lib.split(|token| *token == ";").filter_map(|item| {
        let at = item.windows(2).position(|pair| pair == ["pub", "use"])?;
        item[at + 2..].split_first()
    });
    uses.flat_map(|(room, names)| names.iter().map(|name| (*name, *room))).collect()
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

#[test]
fn calls_go_down_the_page_and_unsafe_stays_in_its_rooms() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let forbids = |path: &Path| read(path).lines().any(|line| line == "#![forbid(unsafe_code)]");
    let (lib, mut found) = (read(&src.join("lib.rs")), Vec::new());
    for path in files_below(&src) {
        let file = path.strip_prefix(&src).unwrap().to_str().unwrap();
        let room = file.split('/').next().unwrap();
        let of_file = complaints(file, &read(&path), &exports(&tokens(&lib)));
        found.extend(of_file.iter().map(|complaint| format!("{file}: {complaint}")));
        if file != "lib.rs"
            && !MAY_BE_UNSAFE.contains(&room)
            && !forbids(&path)
            && !forbids(&src.join(room).join("mod.rs"))
        {
            found.push(format!("{file}: neither it nor its mod.rs has #![forbid(unsafe_code)]"));
        }
    }
    let gone = SHARED.iter().chain(ALONE).filter(|file| !src.join(file).exists());
    found.extend(gone.map(|file| format!("{file}: is on a list and does not exist")));
    assert!(!lib.is_empty() && found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_check_can_fail() {
    let lib = tokens("pub use error::{Error, Result};\npub use pool::Pool;");
    let count = |file, text| complaints(file, text, &exports(&lib)).len();
    assert_eq!(count("wire/frame.rs", "use crate::{Error, shm::{family, view}, os};"), 0);
    assert_eq!(count("wire/frame.rs", "use crate::{Error, shm::{family, view}, channel};"), 1);
    assert_eq!(count("wire/frame.rs", "use crate::Pool; // crate::process"), 1);
    assert_eq!(count("wire/frame.rs", "fn f() { super::super::pool::go() }"), 1);
    assert_eq!(count("wire/mod.rs", "use super::process::entry;"), 1);
    assert_eq!(count("process/mod.rs", "use crate::channel::Queue;"), 1);
    assert_eq!(count("channel/queue.rs", "use crate::process::Process;"), 1);
    assert_eq!(count("channel/queue.rs", "use crate::Unheard;"), 1);
    assert_eq!(count("error.rs", "use crate::os::memfd;"), 1);
    assert_eq!(count("garage/car.rs", ""), 1);
    assert_eq!(count("pool/pool.rs", "fn f() { unsafe { g() } }"), 1);
    assert_eq!(count("pool/pool.rs", "#[unsafe(link_section = \"x\")]"), 0);
    assert_eq!(count("shm/new.rs", "use std::sync::atomic::AtomicU32;"), 1);
    assert_eq!(count("shm/family.rs", "//! # State\nstatic A: AtomicU32 = AtomicU32::new(0);"), 4);
}
