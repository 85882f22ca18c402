//! The top-level modules are layers: every layer uses only layers below its own, `unsafe` stays in two of them, and a
//! file that shares state between processes opens with the page that says how. No file of a layer depends on itself by
//! way of others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// Each layer and what it may use. `error` is used by all and uses none; `lib` may use everything.
const LAYERS: &[(&str, &[&str])] = &[
    ("dashboard", &["observe", "manager", "pool", "channel", "sync", "os"]),
    ("observe", &["manager", "pool", "channel", "os"]),
    ("cluster", &["pool", "process", "os"]),
    ("manager", &["connection", "process", "channel", "sync", "wait", "wire", "shm", "os"]),
    ("pool", &["process", "channel", "wait", "wire", "shm", "os"]),
    ("supervision", &["process", "channel", "os"]),
    ("connection", &["wire", "os"]),
    ("memory", &["process", "wire", "shm", "os"]),
    ("process", &["wait", "wire", "shm", "os"]),
    ("channel", &["wait", "wire", "shm", "os"]),
    ("sync", &["wait", "wire", "shm", "os"]),
    ("wait", &["shm", "os"]),
    ("wire", &["shm", "os"]),
    ("shm", &["os"]),
    ("os", &[]),
    ("guide", &[]),
    ("error", &[]),
];
const MAY_BE_UNSAFE: &[&str] = &["os", "shm"];
/// Files that keep state in memory which other processes see. Models of them owe no page.
const SHARED: &[&str] = &[
    "channel/lane.rs",
    "channel/channel_core.rs",
    "channel/result_notification.rs",
    "channel/extents.rs",
    "channel/leases.rs",
    "channel/recent.rs",
    "channel/ring.rs",
    "channel/segment.rs",
    "channel/spsc.rs",
    "shm/family.rs",
    "shm/robust_lock.rs",
    "sync/array.rs",
    "sync/condition_state.rs",
    "sync/double_buffer.rs",
    "sync/barrier_state.rs",
    "sync/value.rs",
    "sync/event.rs",
    "sync/holders.rs",
    "sync/mutex.rs",
    "sync/fairness.rs",
    "sync/semaphore.rs",
    "sync/rwlock_state.rs",
    "wait/sleepers.rs",
    "wait/local_queue.rs",
];
/// Files with a part of the state whose page opens another file.
const PARTS: &[(&str, &str)] =
    &[("channel/lane/board.rs", "channel/lane.rs"), ("channel/unfinished.rs", "channel/channel_core.rs")];
/// Files whose atomics belong to one process, and those that only hand atomics out.
const ALONE: &[&str] = &[
    "channel/reclaim.rs",
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
    "wait/spin.rs",
];
const PAGE: [&str; 5] = ["//! # State", "//! # Moves", "//! # Invariants", "//! # Death", "//! # Cancel"];

/// What is wrong with one file, given its path below `src`. A layer names what it uses by its layer, not by the crate root's names.
fn complaints(file: &str, text: &str) -> Vec<String> {
    let path: Vec<_> = file.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let (layer, tokens, mut found) = (path[0], tokens(text), Vec::new());
    let Some((_, below)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
        return if layer == "lib" { found } else { vec![format!("{layer} has no place among the layers")] };
    };
    for name in used(&tokens, path.len()) {
        if name != layer && name != "error" && !below.contains(&name) {
            found.push(format!("{layer} may not use {name}"));
        }
    }
    // An attribute, `#[unsafe(..)]`, is left to the compiler: in a macro it lands in the caller's crate.
    let is_unsafe = |pair: &[&str]| pair[0] == "unsafe" && pair[1] != "(";
    if !MAY_BE_UNSAFE.contains(&layer) && tokens.windows(2).any(is_unsafe) {
        found.push(format!("unsafe belongs to {MAY_BE_UNSAFE:?}"));
    }
    let is_model = file.ends_with("/model.rs") || file.ends_with("models.rs");
    if !is_model
        && ["wait", "channel", "sync", "shm"].contains(&layer)
        && tokens.iter().any(|token| token.starts_with("Atomic"))
    {
        let lacks = PAGE.iter().filter(|head| !text.lines().any(|line| line.starts_with(**head)));
        let is_part = PARTS.iter().any(|(part, page)| *part == file && SHARED.contains(page));
        match (SHARED.contains(&file), ALONE.contains(&file) || is_part) {
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
            // From a module within the file this leads to a sibling, which only counts if it is called like a layer.
            names.extend(path.get(climb.len()).filter(|name| LAYERS.iter().any(|(layer, _)| layer == *name)));
        }
    }
    names
}

/// The modules that the files below `src` are, by their paths: `["sync", "lock"]`, and `["sync"]` for `sync/mod.rs`.
type Modules<'a> = BTreeMap<Vec<&'a str>, Vec<&'a str>>;

fn module_of(file: &str) -> Vec<&str> {
    file.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect()
}

/// All paths of the tree that begins at the first token: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths<'a>(tokens: &[&'a str]) -> Vec<Vec<&'a str>> {
    let (mut found, mut path, mut open) = (Vec::new(), Vec::new(), Vec::new());
    let mut is_named = true;
    for (at, token) in tokens.iter().enumerate() {
        match *token {
            ":" => is_named = true,
            "{" if is_named && at > 0 => {
                open.push(path.len());
                is_named = true;
            }
            "," | "}" if !open.is_empty() => {
                if !is_named {
                    found.push(path.clone());
                }
                path.truncate(open[open.len() - 1]);
                is_named = true;
                if *token == "}" {
                    open.pop();
                    is_named = !open.is_empty();
                    if open.is_empty() {
                        return found;
                    }
                }
            }
            "as" | "_" if !open.is_empty() => {}
            name if is_named && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '*') => {
                path.push(name);
                is_named = false;
            }
            _ if open.is_empty() => break,
            _ => {}
        }
    }
    found.push(path);
    found
}

/// The paths that a file names from the crate root or by `super`, from the root on; and which of them it only re-exports.
fn named<'a>(module: &[&'a str], tokens: &[&'a str]) -> Vec<(Vec<&'a str>, bool)> {
    let (mut found, mut inline, mut depth) = (Vec::new(), Vec::new(), 0_usize);
    let mut is_export = false;
    for (at, token) in tokens.iter().enumerate() {
        let starts = at == 0 || tokens[at - 1] != ":";
        match *token {
            "{" => {
                depth += 1;
                if at > 1 && tokens[at - 2] == "mod" {
                    inline.push(depth);
                }
            }
            "}" => {
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
                depth = depth.saturating_sub(1);
            }
            ";" => is_export = false,
            "use" if at > 0 && [")", "pub"].contains(&tokens[at - 1]) => is_export = true,
            "crate" | "super" if starts && tokens.get(at + 1) == Some(&":") => {
                for path in paths(&tokens[at..]) {
                    let climbs = path.iter().take_while(|name| **name == "super").count();
                    let base: Vec<_> = match climbs {
                        0 => Vec::new(),
                        // A module within the file is not a level of its own here.
                        _ => module[..module.len().saturating_sub(climbs.saturating_sub(inline.len()))].to_vec(),
                    };
                    let rest = path.iter().skip(climbs.max(1)).copied();
                    found.push((base.into_iter().chain(rest).collect(), is_export));
                }
            }
            _ => {}
        }
    }
    found
}

/// The module whose file a path leads to; names that a `mod.rs` re-exports lead on.
fn target<'a>(path: &[&'a str], modules: &Modules<'a>, exports: &HashMap<Vec<&'a str>, Vec<&'a str>>) -> Vec<&'a str> {
    let longest = (1..=path.len()).rev().find(|len| modules.contains_key(&path[..*len])).unwrap_or(0);
    match exports.get(path.get(..longest + 1).unwrap_or_default()) {
        Some(origin) if origin.len() > longest => target(origin, modules, exports),
        _ => path[..longest].to_vec(),
    }
}

/// For each module the others of its layer that it needs.
fn needs<'a>(modules: &Modules<'a>) -> BTreeMap<Vec<&'a str>, BTreeSet<Vec<&'a str>>> {
    let mut exports = HashMap::new();
    for (module, tokens) in modules {
        // `pub use line::{Line, Turn};`
        for item in tokens.split(|token| *token == ";") {
            let Some(at) = item.iter().rposition(|token| *token == "use") else { continue };
            if at == 0 || !["pub", ")"].contains(&item[at - 1]) {
                continue;
            }
            for path in paths(&item[at + 1..]) {
                let Some(name) = path.last() else { continue };
                let names = |first: &str| modules.contains_key(&[module.as_slice(), &[first]].concat());
                if path.first().is_some_and(|first| names(first)) {
                    let named = [module.as_slice(), &[*name]].concat();
                    exports.insert(named, [module.as_slice(), &path].concat());
                }
            }
        }
    }
    let of = |module: &Vec<&'a str>, tokens: &Vec<&'a str>| {
        let named = named(module, tokens).into_iter().filter(|(_, is_export)| !is_export);
        let targets = named.map(|(path, _)| target(&path, modules, &exports));
        targets.filter(|other| other.first() == module.first() && other != module).collect()
    };
    modules.iter().map(|(module, tokens)| (module.clone(), of(module, tokens))).collect()
}

/// For each layer the modules that need themselves by way of others, each with a way.
fn circles<'a>(modules: &Modules<'a>) -> BTreeMap<&'a str, Vec<String>> {
    let needs = needs(modules);
    let mut found = BTreeMap::<_, Vec<_>>::new();
    for start in needs.keys() {
        let (mut ways, mut seen) = (vec![vec![start]], BTreeSet::new());
        while let Some(way) = ways.pop() {
            for next in &needs[way[way.len() - 1]] {
                if next == start {
                    let names: Vec<_> = way.iter().chain([&start]).map(|module| module.join("/")).collect();
                    found.entry(start[0]).or_default().push(names.join(" -> "));
                    ways.clear();
                    break;
                }
                if seen.insert(next) {
                    ways.push([way.as_slice(), &[next]].concat());
                }
            }
        }
    }
    found
}

#[test]
fn files_of_a_room_import_each_other_in_one_direction() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let read = |path: PathBuf| {
        let file = path.strip_prefix(&src).unwrap().to_str().unwrap().to_string();
        (file, fs::read_to_string(path).unwrap())
    };
    let texts: Vec<_> = files_below(&src).into_iter().map(read).collect();
    let modules: Modules<'_> =
        texts.iter().map(|(file, text)| (module_of(file), tokens(without_tests(text)))).collect();
    let circles = circles(&modules);
    assert!(circles.is_empty(), "{circles:#?}");
}

#[test]
fn circles_are_found_by_every_way_to_name_a_file() {
    let layer = ["layer/mod.rs", "layer/a.rs", "layer/b.rs", "layer/c.rs"];
    let count = |texts: [&'static str; 4]| {
        let modules = layer.into_iter().zip(texts).map(|(file, text)| (module_of(file), tokens(text)));
        circles(&modules.collect()).get("layer").map_or(0, Vec::len)
    };
    let exports = "mod a; pub(crate) use b::{B, Bee};";
    assert_eq!(count(["", "use super::b::B;", "use crate::layer::{c, other};", "pub struct C;"]), 0);
    assert_eq!(count(["", "use super::b::B;", "use crate::layer::{c::C, other};", "use super::{a, b};"]), 3);
    assert_eq!(count(["", "fn f() { super::b::f() }", "use super::a;", ""]), 2);
    assert_eq!(count([exports, "use super::Bee;", "use super::a;", ""]), 2);
    assert_eq!(count([exports, "use super::b;", "", "use super::Bee;"]), 0, "a re-export needs nothing");
    assert_eq!(
        count(["", "use super::b; mod tests { use super::*; }", "mod tests { use super::a; fn a() {} }", ""]),
        0
    );
    assert_eq!(count(["use self::a::A; pub fn f() {}", "pub(super) struct A;", "use crate::elsewhere::a;", ""]), 0);
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
        let layer = file.split('/').next().unwrap();
        let of_file = complaints(file, &read(&path));
        found.extend(of_file.iter().map(|complaint| format!("{file}: {complaint}")));
        if file != "lib.rs"
            && !MAY_BE_UNSAFE.contains(&layer)
            && !forbids(&path)
            && !forbids(&src.join(layer).join("mod.rs"))
        {
            found.push(format!("{file}: neither it nor its mod.rs has #![forbid(unsafe_code)]"));
        }
    }
    let parts = PARTS.iter().map(|(part, _)| part);
    let gone = SHARED.iter().chain(ALONE).chain(parts).filter(|file| !src.join(file).exists());
    found.extend(gone.map(|file| format!("{file}: is on a list and does not exist")));
    assert!(!lib.is_empty() && found.is_empty(), "{}", found.join("\n"));
}

/// A file without the module of its tests, which may use what stands above it.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default()
}

/// The sides of the manager's layer, and which of them each may use.
const SIDES: &[(&str, &[&str])] =
    &[("client", &["client", "wire"]), ("server", &["server", "wire"]), ("wire", &["wire"])];

/// The files of the manager's layer that a file of it imports, as `side/file`; those of its tests do not count.
fn imports_in_manager(file: &str, text: &str) -> Vec<String> {
    let (tokens, own) = (tokens(without_tests(text)), file.split('/').next().unwrap_or_default());
    let starts = (0..tokens.len()).filter(|at| tokens[*at] == "use");
    let paths = starts.map(|at| tokens[at + 1..].iter().filter(|token| **token != ":").take(4).collect::<Vec<_>>());
    let named = paths.filter_map(|path| match path[..] {
        [&"super", &"super", side, file] => Some((*side, *file)),
        [&"super", file, ..] => Some((own, *file)),
        [&"crate", &"manager", side, file] => Some((*side, *file)),
        _ => None,
    });
    named.map(|(side, file)| format!("{side}/{file}")).collect()
}

/// What is wrong with the files of the manager's layer, given what each imports.
fn complaints_of_sides(imports: &HashMap<String, Vec<String>>) -> Vec<String> {
    let side = |file: &str| file.split('/').next().unwrap_or_default().to_string();
    let mut found = Vec::new();
    for (file, used) in imports {
        let Some((_, may)) = SIDES.iter().find(|(name, _)| *name == side(file)) else {
            found.push(format!("{file} is of no side"));
            continue;
        };
        let wrong = used.iter().filter(|used| !may.contains(&side(used).as_str()));
        found.extend(wrong.map(|used| format!("{file} may not use {used}")));
    }
    found
}

/// What `os` calls that no test has fail: a reason, and names of calls, or of functions with calls (`file.rs:name`).
const NOT_REFUSED: &[(&str, &str)] = &[
    (
        "no system call, or a part of one that asks",
        "retry_on_intr page_size getenv getauxval sigemptyset sigaddset dl_iterate_phdr pthread_atfork fflush stderr sched_getcpu \
         clock_gettime clock_getres posix_spawn_file_actions_init posix_spawn_file_actions_adddup2 posix_spawn_file_actions_destroy \
         posix_spawnattr_init posix_spawnattr_setsigdefault posix_spawnattr_setflags posix_spawnattr_destroy",
    ),
    (
        "reports something of this process or sets a field of it, and fails for wrong arguments only",
        "getpid getppid getpgrp gettid getuid geteuid getgid getegid getresuid getresgid getgroups setfsuid setfsgid getrlimit \
         getpriority_process sched_getaffinity umask no_new_privs set_no_new_privs set_name capabilities_secure_bits \
         capability_is_in_bounding_set secure_computing_mode dumpable_behavior child_subreaper set_parent_process_death_signal \
         parent_process_death_signal prctl sigaction sigprocmask signal raise munmap close _exit",
    ),
    (
        "fails only for what is no child, process, descriptor or socket, or not the right one",
        "waitid waitpid kill_process ioctl shutdown getsockopt socket_domain socket_type set_socket_timeout set_socket_passcred \
         set_socket_keepalive set_tcp_keepidle set_tcp_keepintvl set_tcp_keepcnt",
    ),
    (
        "made only where an exec may give rights (tests/rights.rs); a failure counts as rights, or ends the process",
        "getxattr_query remove_capability_from_bounding_set configure_capability_in_ambient_set set_capabilities",
    ),
    ("whether a number is open, for any number", "spawn.rs:is_inheritable spawn.rs:look_at"),
    ("in a handler, which reads no variables", "signal.rs:on_abort fork.rs:in_forked_process"),
    ("what asks itself", "refuse.rs:control"),
];

/// The functions of a file of `os` that call the kernel more often than they ask `refuse`, with these calls.
fn unasked(file: &str, text: &str) -> Vec<String> {
    let tokens = tokens(without_tests(text));
    let is_lower = |name: &str| name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    let of_kernel = |name: &str| ["rustix", "nix", "libc"].contains(&name);
    let uses = tokens.split(|token| *token == ";").filter_map(|item| {
        let at = item.iter().rposition(|token| *token == "use")?;
        item.get(at + 1).is_some_and(|root| of_kernel(root)).then(|| paths(&item[at + 1..]))
    });
    // `epoll`, `getrlimit`; and `thread` of `rustix::thread::{self, ..}`.
    let imported: Vec<&str> = uses
        .flatten()
        .filter_map(|path| path.iter().rev().find(|name| **name != "self").copied())
        .filter(|name| is_lower(name))
        .collect();
    let not_refused = |entry: &str| NOT_REFUSED.iter().any(|(_, names)| names.split(' ').any(|name| name == entry));
    let (mut found, mut function, mut calls, mut asks) = (Vec::new(), "", Vec::new(), 0);
    for at in 0..=tokens.len() {
        if at == tokens.len() || tokens[at] == "fn" {
            if calls.len() > asks && !not_refused(&format!("{file}:{function}")) {
                found.push(format!("{file}: {function} makes {calls:?}, and asks {asks} times"));
            }
            (function, calls, asks) = (tokens.get(at + 1).copied().unwrap_or_default(), Vec::new(), 0);
            continue;
        }
        // A call by a path: from its last name back to its root.
        let (name, mut root, mut owner) = (tokens[at], at, "");
        while root > 2 && tokens[root - 1] == ":" && tokens[root - 2] == ":" {
            root -= 3;
            owner = if owner.is_empty() { tokens[root] } else { owner };
        }
        let is_call = tokens.get(at + 1) == Some(&"(") && is_lower(name) && (root == 0 || tokens[root - 1] != ".");
        let is_path = root < at && is_lower(owner) && (of_kernel(tokens[root]) || imported.contains(&tokens[root]));
        if is_call && owner == "refuse" {
            asks += 1;
        } else if is_call && !not_refused(name) && (is_path || root == at && imported.contains(&name)) {
            calls.push(name);
        }
    }
    found
}

#[test]
fn every_system_call_of_os_that_can_fail_can_be_refused() {
    let os = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/os");
    let found: Vec<String> = files_below(&os)
        .into_iter()
        .flat_map(|path| {
            let file = path.strip_prefix(&os).unwrap().to_str().unwrap().to_string();
            unasked(&file, &fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "call `refuse::at` before each, or say in NOT_REFUSED why not:\n{}", found.join("\n"));
}

#[test]
fn the_check_of_refused_calls_can_fail() {
    let count = |text| unasked("new.rs", text).len();
    assert_eq!(count("fn f() { rustix::fs::open(path) }"), 1);
    assert_eq!(count("fn f() { refuse::at(\"open\")?; rustix::fs::open(path) }"), 0);
    assert_eq!(count("fn f() { refuse::at(\"open\")?; rustix::fs::open(path); rustix::fs::open(other) }"), 1);
    assert_eq!(
        count("fn f() { refuse::at(\"open\")?; } fn g() { super::refuse::at(\"x\") } fn h() { libc::open(path) }"),
        1
    );
    assert_eq!(count("use rustix::mm::{MapFlags, mmap_anonymous};\nfn f() { mmap_anonymous(len) }"), 1);
    assert_eq!(count("use rustix::event::{Timespec, epoll};\nfn f() { epoll::wait(fd) }"), 1);
    assert_eq!(count("use rustix::thread::{self, CapabilitySet};\nfn f() { thread::something_new(fd) }"), 1);
    assert_eq!(count("fn f() { rustix::process::Pid::from_raw(1); std::thread::sleep(time); socket.connect(); }"), 0);
    assert_eq!(count("fn f() { rustix::process::getpid(); }\n#[cfg(test)]\nmod tests { fn f() { libc::fork(); } }"), 0);
}

#[test]
fn neither_side_of_the_manager_uses_the_other() {
    let layer = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/manager");
    let mut imports = HashMap::new();
    for path in SIDES.iter().flat_map(|(side, _)| files_below(&layer.join(side))) {
        let file = path.strip_prefix(&layer).unwrap().to_str().unwrap().trim_end_matches(".rs").to_string();
        let used = imports_in_manager(&file, &fs::read_to_string(&path).unwrap());
        imports.insert(file, used);
    }
    let found = complaints_of_sides(&imports);
    assert!(imports.len() > 20 && found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_check_of_the_managers_sides_can_fail() {
    let count = |files: &[(&str, &str)]| {
        let imports = files.iter().map(|(file, text)| (file.to_string(), imports_in_manager(file, text)));
        complaints_of_sides(&imports.collect()).len()
    };
    assert_eq!(
        count(&[("client/a", "use super::b::B;\nuse crate::manager::wire::c::{self, D};"), ("client/b", "")]),
        0
    );
    assert_eq!(count(&[("client/a", "use crate::manager::server::b::B;")]), 1);
    assert_eq!(count(&[("server/a", "use super::super::client::b::B;")]), 1);
    assert_eq!(count(&[("wire/a", "use crate::manager::client::b::B;")]), 1);
    assert_eq!(count(&[("client/a", "#[cfg(test)]\nmod tests { use crate::manager::server::b::B; }")]), 0);
    assert_eq!(count(&[("garage/a", "")]), 1);
}

#[test]
fn the_check_can_fail() {
    let count = |file, text| complaints(file, text).len();
    assert_eq!(count("wire/frame.rs", "use crate::{error::Error, shm::{family, view}, os};"), 0);
    assert_eq!(count("wire/frame.rs", "use crate::{error::Error, shm::{family, view}, channel};"), 1);
    assert_eq!(count("wire/frame.rs", "use crate::Pool; // crate::process"), 1);
    assert_eq!(count("wire/frame.rs", "fn f() { super::super::pool::go() }"), 1);
    assert_eq!(count("wire/mod.rs", "use super::process::entry;"), 1);
    assert_eq!(count("process/mod.rs", "use crate::channel::Queue;"), 1);
    assert_eq!(count("channel/queue.rs", "use crate::process::Process;"), 1);
    assert_eq!(count("channel/queue.rs", "use crate::Error;"), 1, "a name of the root");
    assert_eq!(count("error.rs", "use crate::os::memfd;"), 1);
    assert_eq!(count("garage/car.rs", ""), 1);
    assert_eq!(count("pool/pool.rs", "fn f() { unsafe { g() } }"), 1);
    assert_eq!(count("pool/pool.rs", "#[unsafe(link_section = \"x\")]"), 0);
    assert_eq!(count("shm/new.rs", "use std::sync::atomic::AtomicU32;"), 1);
    assert_eq!(count("shm/family.rs", "//! # State\nstatic A: AtomicU32 = AtomicU32::new(0);"), 4);
}

/// The public items of a file, and headers of `impl`s, that name something of the crate `krate`; each as its tokens.
fn shown_of(krate: &str, text: &str) -> Vec<String> {
    let tokens = tokens(without_tests(text));
    let imports = (0..tokens.len()).filter(|at| tokens[*at] == "use" && tokens.get(at + 1) == Some(&krate));
    let imported = imports.flat_map(|at| tokens[at..].iter().take_while(|token| **token != ";"));
    let types = imported.filter(|token| token.starts_with(char::is_uppercase)).copied();
    let names: BTreeSet<_> = types.chain([krate]).collect();
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        let is_public = tokens[at] == "pub" && tokens[at + 1] != "(" && tokens[at + 1] != "use";
        let is_header = tokens[at] == "impl" && (at == 0 || ["}", ";", "]"].contains(&tokens[at - 1]));
        if !is_public && !is_header {
            continue;
        }
        // Variants of an enum are as public as it is; fields say so themselves.
        let ends: &[&str] = match tokens[at + 1] {
            "enum" => &["}"],
            // A field.
            _ if tokens.get(at + 2) == Some(&":") => &[",", "}"],
            _ => &["{", ";"],
        };
        let item: Vec<_> = tokens[at..].iter().take_while(|token| !ends.contains(token)).copied().collect();
        if item.iter().any(|token| names.contains(token)) {
            found.push(item.join(" "));
        }
    }
    let exports = (0..tokens.len()).filter(|at| tokens[*at..].starts_with(&["pub", "use", krate]));
    found.extend(exports.map(|_| format!("pub use {krate}")));
    found
}

#[test]
fn no_type_of_the_client_of_nats_is_public() {
    let layer = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cluster");
    let files = files_below(&layer);
    let of_file = |path: &PathBuf| {
        let found = shown_of("async_nats", &fs::read_to_string(path).unwrap());
        found.into_iter().map(|item| format!("{}: {item}", path.display())).collect::<Vec<_>>()
    };
    let found: Vec<_> = files.iter().flat_map(of_file).collect();
    assert!(files.len() > 20 && found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_check_of_public_types_can_fail() {
    let count =
        |text: &str| shown_of("nats", &format!("use nats::{{Client, header::{{Map as Other}}}};\n{text}")).len();
    assert_eq!(count("pub fn client(&self) -> Client {"), 1);
    assert_eq!(count("pub(super) fn client(&self) -> Client { pub(crate) struct A(Client);"), 0);
    assert_eq!(count("pub struct A { pub client: Client, other: u8 }"), 1);
    assert_eq!(count("pub struct A { client: Client }"), 0);
    assert_eq!(count("pub struct A(pub Client);"), 2);
    assert_eq!(count("pub enum A { One(Client), Two }"), 1);
    assert_eq!(count("impl From<Other> for A {"), 1);
    assert_eq!(count("fn say(what: impl Client) {}"), 0);
    assert_eq!(count("pub use nats::Client;"), 1);
    assert_eq!(count("pub fn other() -> Option<nats::Url> { let client: Client = 1; }"), 1);
}
