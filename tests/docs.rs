//! The documents: their links lead somewhere, and what they quote of the source is there.

use multiprocess as mp;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files_below(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = entries.flat_map(|path| if path.is_dir() { files_below(&path, extension) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// The documents with links, by their paths from the root.
fn documents() -> Vec<PathBuf> {
    let mut found = files_below(&root().join("docs"), "md");
    found.extend(["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"].map(|name| root().join(name)));
    found.extend([root().join("benches/peers/README.md")]);
    found.retain(|path| path.exists());
    found.iter().map(|path| path.strip_prefix(root()).unwrap().to_path_buf()).collect()
}

/// The lines outside of code blocks.
fn prose(text: &str) -> Vec<&str> {
    let mut is_code = false;
    let is_prose = |line: &&str| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    };
    text.lines().filter(is_prose).collect()
}

/// The same without what stands between backticks.
fn without_code(text: &str) -> String {
    prose(text).join("\n").split('`').step_by(2).collect()
}

/// The anchors of the headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).into_iter().filter(|line| line.starts_with('#'));
    let slug = |line: &str| {
        let words = line.trim_start_matches('#').trim().to_lowercase();
        let kept = words.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

/// What `[..]: ..` lines define: labels, in lower case, and their targets.
fn definitions(text: &str) -> BTreeMap<String, String> {
    let defined = prose(text).into_iter().filter_map(|line| line.strip_prefix('[')?.split_once("]: "));
    defined.map(|(label, target)| (label.to_lowercase(), target.trim().to_string())).collect()
}

/// The targets of all links and pictures, and the labels that nothing defines.
fn links(text: &str) -> (Vec<String>, Vec<String>) {
    let (text, defined) = (without_code(text), definitions(text));
    let after = |begin: &'static str, end: char| {
        let found = text.split(begin).skip(1).filter_map(move |rest| rest.split_once(end));
        found.map(|(target, _)| target.replace('\n', " ")).collect::<Vec<_>>()
    };
    let targets = ["](", "src=\""].into_iter().zip([')', '"']).flat_map(|(begin, end)| after(begin, end));
    let targets = targets.chain(defined.values().cloned()).collect();
    let labels = after("][", ']').into_iter().map(|label| label.to_lowercase());
    (targets, labels.filter(|label| !defined.contains_key(label)).collect())
}

/// What is wrong with the links of one document, given where it lies.
fn complaints(document: &Path, text: &str) -> Vec<String> {
    let (targets, undefined) = links(text);
    let mut found: Vec<_> = undefined.iter().map(|label| format!("nothing defines [{label}]")).collect();
    for target in targets.iter().filter(|target| !target.contains("://")) {
        let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
        let there = root().join(document).parent().unwrap().join(path);
        let text = if path.is_empty() { Some(text.to_string()) } else { fs::read_to_string(&there).ok() };
        match text {
            None if !there.exists() => found.push(format!("{target} leads nowhere")),
            Some(text) if !anchor.is_empty() && !anchors(&text).contains(anchor) => {
                found.push(format!("{target} has no such heading"));
            }
            _ => {}
        }
    }
    found
}

#[test]
fn every_relative_link_and_anchor_leads_somewhere() {
    let documents = documents();
    let found: Vec<_> = documents
        .iter()
        .flat_map(|path| {
            complaints(path, &read(path)).into_iter().map(move |what| format!("{}: {what}", path.display()))
        })
        .collect();
    assert!(documents.len() > 15 && found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_check_of_links_can_fail() {
    let count = |text: &str| complaints(Path::new("README.md"), text).len();
    assert_eq!(count("[a](docs/guide/pools.md#which-call) [b](https://example.com/x) [c](#here)\n# Here"), 0);
    assert_eq!(count("[a](docs/no.md)"), 1);
    assert_eq!(count("[a](docs/guide/pools.md#no)"), 1);
    assert_eq!(count("[a](#no)"), 1);
    assert_eq!(count("<img src=\"docs/no.png\" alt=\"none\">"), 1);
    assert_eq!(count("[a][pools]"), 1);
    assert_eq!(count("[a][pools]\n\n[pools]: docs/guide/pools.md"), 0);
    assert_eq!(count("[pools]: docs/no.md"), 1);
    assert_eq!(count("```\n[a](docs/no.md)\n```\n`[a](docs/no.md)`"), 0);
}

#[test]
fn every_page_of_the_guide_is_in_the_book_and_in_rustdoc() {
    let (book, module) = (read("docs/guide/SUMMARY.md"), read("src/guide/mod.rs"));
    let ours = definitions(&read("src/guide/links.md"));
    for path in files_below(&root().join("docs/guide"), "md") {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name == "SUMMARY.md" {
            continue;
        }
        assert!(book.contains(&format!("({name})")), "{name} is not in SUMMARY.md");
        assert!(module.contains(name), "{name} is not in src/guide/mod.rs");
        for (label, target) in definitions(&read(&path)).into_iter().filter(|(_, target)| !target.ends_with(".png")) {
            let page = target.split(['.', '#']).next().unwrap().replace('-', "_");
            let there = ours.get(&label).unwrap_or_else(|| panic!("{name}: [{label}] is not in src/guide/links.md"));
            assert!(there.starts_with(&format!("self::{page}")), "{name}: [{label}] leads to {there} in rustdoc");
        }
        // What is not by label leads nowhere in rustdoc, but for anchors of the same page.
        let (targets, _) = links(&read(&path));
        let defined = definitions(&read(&path));
        let stray = targets.iter().find(|target| {
            !defined.values().any(|value| value == *target) && !target.starts_with('#') && !target.contains("://")
        });
        assert_eq!(stray, None, "{name}: a link to another page has a label");
        assert!(!without_code(&read(&path)).contains("<img"), "{name}: a picture has a label");
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let number = three.iter().chain(&[0, 0]).take(3).fold(0, |number, byte| number << 8 | usize::from(*byte));
        let digit = |at: usize| if at > three.len() { '=' } else { DIGITS[number >> (18 - 6 * at) & 63].into() };
        [0, 1, 2, 3].map(digit)
    };
    bytes.chunks(3).flat_map(group).collect()
}

#[test]
fn the_pictures_of_the_guide_are_in_rustdoc_too() {
    const PICTURES: &str = "src/guide/pictures.md";
    assert_eq!(["", "a", "ab", "abc"].map(|text| base64(text.as_bytes())), ["", "YQ==", "YWI=", "YWJj"]);
    let pages = files_below(&root().join("docs/guide"), "md").into_iter();
    let labels = pages.flat_map(|path| definitions(&read(path))).filter(|(_, target)| target.ends_with(".png"));
    let lines = labels.map(|(label, target)| {
        let bytes = fs::read(root().join("docs/guide").join(target)).unwrap();
        format!("[{label}]: data:image/png;base64,{}\n", base64(&bytes))
    });
    let wanted: String = lines.collect::<BTreeSet<_>>().into_iter().collect();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(root().join(PICTURES), &wanted).unwrap();
    }
    assert_eq!(wanted.lines().count(), 2);
    assert!(read(PICTURES) == wanted, "`UPDATE_DOCS=1 cargo test --test docs` writes {PICTURES}");
}

#[test]
fn every_program_of_the_guide_is_compiled() {
    for path in files_below(&root().join("docs/guide"), "md") {
        let text = fs::read_to_string(&path).unwrap();
        let ignored = text.lines().find(|line| line.starts_with("```") && line.contains("ignore"));
        assert_eq!(ignored, None, "{}", path.display());
    }
}

/// All text of the source but for the list of short names.
fn source() -> String {
    let files = files_below(&root().join("src"), "rs").into_iter();
    files.filter(|path| !path.ends_with("error/topic.rs")).map(read).collect()
}

/// The same text, in which a literal of several lines is one line.
fn joined(text: &str) -> String {
    let lines = text.split("\\\n").enumerate();
    lines.map(|(n, line)| if n == 0 { line } else { line.trim_start() }).collect()
}

/// The entries of the page on troubleshooting: short names, with the texts that they quote.
fn troubles() -> BTreeMap<String, Vec<String>> {
    let page = read("docs/guide/troubleshooting.md");
    let entries = page.split("\n### ").skip(1).map(|entry| {
        let (name, rest) = entry.split_once('\n').unwrap();
        let quotes = rest.lines().filter_map(|line| line.strip_prefix("> ")).map(str::to_owned);
        (name.to_owned(), quotes.collect())
    });
    entries.collect()
}

/// The short names that errors have: by the names in the source, and as they are printed.
fn topics() -> BTreeMap<String, String> {
    let text = read("src/error/topic.rs");
    let list = text.split("topics! {").nth(1).unwrap().split('}').next().unwrap();
    let topic = |line: &str| {
        let (topic, name) = line.trim().strip_suffix("\",")?.split_once(" \"")?;
        Some((topic.to_owned(), name.to_owned()))
    };
    list.lines().filter_map(topic).collect()
}

/// What the compiler prints, and an answer of the dashboard, have their names in the text.
const IN_THE_TEXT: [&str; 3] = ["captures", "not-serde", "dashboard-foreign-host"];

#[test]
fn each_entry_of_the_troubleshooting_page_is_a_name_that_the_crate_prints_and_the_reverse() {
    let (troubles, topics, source) = (troubles(), topics(), source());
    let entries: BTreeSet<_> = troubles.keys().map(String::as_str).collect();
    let printed: BTreeSet<_> = topics.values().map(String::as_str).chain(IN_THE_TEXT).collect();
    assert_eq!(entries, printed);
    assert!(printed.len() > 70);
    let is_used = |topic: &&String| source.contains(&format!("Topic::{topic}"));
    let unused: Vec<_> = topics.keys().filter(|topic| !is_used(topic)).collect();
    assert!(unused.is_empty(), "{unused:?}");
    let unnamed: Vec<_> = troubles.iter().filter(|(_, quotes)| quotes.is_empty()).collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
    let page = read("docs/guide/troubleshooting.md");
    let [headings, links] = ["\n### ", "](#"].map(|begin| page.matches(begin).count());
    assert!(headings == troubles.len() && links > 0, "an entry stands twice");
}

/// Texts that stand farther from the name than [`NEAR`], and in which file. `tests/help.rs` has most of these errors happen.
const SAID_IN: [(&str, &str); 12] = [
    ("cluster-refused", "cluster/link.rs"),
    ("damaged", "error/cause.rs"),
    ("forked", "error/cause.rs"),
    ("manager-client", "manager/server/leader.rs"),
    ("no-runtime", "os/reactor.rs"),
    ("no-runtime", "wait/doorbell.rs"),
    ("owner-died", "sync/mutex.rs"),
    ("owner-died", "sync/rwlock.rs"),
    ("too-deep", "wire/format/ser.rs"),
    ("too-large", "wire/limits.rs"),
    ("too-many-descriptors", "process/protocol.rs"),
    ("two-copies", "process/boot.rs"),
];

/// How far from its name the text of an error is at most.
const NEAR: usize = 2000;

#[test]
fn texts_quoted_by_the_troubleshooting_page_stand_beside_the_names_of_their_entries() {
    let topics: BTreeMap<_, _> = topics().into_iter().map(|(topic, name)| (name, topic)).collect();
    let files = files_below(&root().join("src"), "rs").into_iter();
    let files: Vec<_> = files.map(|path| (joined(&read(&path)), path)).collect();
    let mut quotes = 0;
    for (name, texts) in troubles() {
        let mark = topics.get(&name).map_or_else(|| format!("[{name}]"), |topic| format!("Topic::{topic}"));
        for text in texts {
            quotes += 1;
            let parts: Vec<_> = text.split("..").map(str::trim).collect();
            let is_near = |file: &str| {
                file.match_indices(&mark).any(|(at, _)| {
                    let around = at.saturating_sub(NEAR)..file.len().min(at + NEAR);
                    let near = String::from_utf8_lossy(&file.as_bytes()[around]);
                    parts.iter().all(|part| near.contains(part))
                })
            };
            let is_known = |file: &str, path: &Path| {
                SAID_IN.iter().any(|(entry, place)| *entry == name && path.ends_with(place))
                    && parts.iter().all(|part| file.contains(part))
            };
            let is_there = files.iter().any(|(file, path)| is_near(file) || is_known(file, path));
            assert!(is_there, "{name}: nothing in the source says {text:?} beside {mark}");
        }
    }
    assert!(quotes > 100, "{quotes}");
}

/// The calls of a macro or function in a text, each from its name to the parenthesis that closes it.
fn calls<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let end = |from: usize| {
        let (mut depth, mut is_text, mut is_escaped) = (0, false, false);
        for (at, c) in text[from..].char_indices() {
            match c {
                '"' if !is_escaped => is_text = !is_text,
                '(' if !is_text => depth += 1,
                ')' if !is_text && depth == 1 => return from + at + 1,
                ')' if !is_text => depth -= 1,
                _ => {}
            }
            is_escaped = c == '\\' && !is_escaped;
        }
        panic!("no end of {name} in {:?}", &text[from..text.len().min(from + 80)])
    };
    text.match_indices(name).map(|(from, _)| &text[from..end(from)]).collect()
}

#[test]
fn each_warning_has_a_short_name_and_its_text_is_on_the_troubleshooting_page() {
    let troubles = troubles();
    let is_quoted = |text: &str| {
        let is_part = |quote: &&String| quote.split("..").all(|part| text.contains(part.trim()));
        troubles.values().flatten().any(|quote| is_part(&quote))
    };
    let (mut warnings, mut lines) = (0, 0);
    for path in files_below(&root().join("src"), "rs") {
        let text = joined(&read(&path));
        for call in ["tracing::warn!(", "tracing::error!("].iter().flat_map(|name| calls(&text, name)) {
            warnings += 1;
            assert!(call.contains("help"), "{}: {call} has no field `help`", path.display());
            // The last literal is the message; one that stands in a constant or variable is printed to stderr too.
            let message = call.rsplit('"').nth(1).unwrap();
            assert!(message.starts_with('{') || is_quoted(message), "{}: {message:?}", path.display());
        }
        for call in calls(&text, "spawn::print_line(") {
            lines += 1;
            let has_name = ["{topic}", "Topic::"].iter().any(|name| call.contains(name));
            assert!(has_name, "{}: {call} has no short name", path.display());
        }
    }
    assert!(warnings > 25 && lines > 3, "{warnings} and {lines}");
    let text = "a(\"(\"); a(b(\"\\\"\"), c); d()";
    assert_eq!(calls(text, "a("), ["a(\"(\")", "a(b(\"\\\"\"), c)"]);
}

#[test]
fn the_page_of_decisions_has_a_row_for_each_tool() {
    let page = read("docs/guide/which-one.md");
    let cells = page.lines().filter(|line| line.starts_with("| ")).filter_map(|line| line.split(" | ").nth(1));
    let tools = "Process Group Supervised Pool apply map starmap imap imap_stream state checkout preload emit Task cluster in_process \
        Queue JoinableQueue lease pipe simplex oneshot watch broadcast QueueSet connection Fd Lock RLock RwLock Semaphore \
        BoundedSemaphore Event Condition Barrier CancellationToken Value Array SharedMemory Manager Batch Namespace service PoolService \
        Dashboard MetricsReporter";
    assert_eq!(lacks(&cells.collect::<Vec<_>>().join("\n"), tools), [""; 0]);
}

/// Those of joblib 1.6.
const JOBLIB: &str = "Memory MemorizedResult expires_after Parallel delayed cpu_count effective_n_jobs \
    wrap_non_picklable_objects parallel_config parallel_backend ParallelBackendBase StoreBackendBase \
    register_compressor register_parallel_backend register_store_backend PrintTime Logger hash dump load";

fn lacks(page: &str, names: &str) -> Vec<String> {
    let words: BTreeSet<_> = page.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    names.split_whitespace().filter(|name| !words.contains(name)).map(str::to_string).collect()
}

#[test]
fn the_page_for_those_from_python_has_each_public_name() {
    let page = read("docs/guide/from-python.md");
    assert_eq!(lacks(&page, JOBLIB), [""; 0]);
    let script = "import multiprocessing as m, concurrent.futures as f; print(*m.__all__, *f.__all__)";
    let Ok(output) = Command::new("python3").args(["-c", script]).output() else {
        return eprintln!("SKIPPED: there is no python3 here to ask");
    };
    let names = String::from_utf8(output.stdout).unwrap();
    assert!(names.contains("JoinableQueue"), "{names}");
    assert_eq!(lacks(&page, &names), [""; 0]);
}

#[test]
fn the_figures_of_the_readme_are_those_that_the_check_enforces() {
    let (readme, check) = (read("README.md"), read("benches/peers/check.py"));
    let mut rows = 0;
    for line in readme.lines().filter(|line| line.contains("./check.py --only")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let (figure, workload) = (cells[2].trim_end_matches(" ×"), cells[3].trim_matches('`').split(' ').next_back());
        let goal = format!("Goal(\"{}\"", workload.unwrap());
        let is_enforced =
            |row: &str| row.contains(&goal) && row.split(", ").any(|part| part.trim_end_matches(".0") == figure);
        assert!(check.lines().any(is_enforced), "no goal of {workload:?} is {figure}");
        assert!(cells[1].starts_with('[') && cells[1].contains("]("), "a row leads somewhere: {line}");
        rows += 1;
    }
    assert_eq!(rows, 5);
    assert!(readme.lines().count() < 150);
}

#[test]
fn every_example_is_in_the_index_by_question() {
    let index = read("examples/README.md");
    let mut files = Vec::new();
    for folder in ["", "tutorials", "heavy", "ecosystem", "cluster", "treesum", "pool_top"] {
        let entries = fs::read_dir(root().join("examples").join(folder)).unwrap();
        let paths =
            entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|ext| ext == "rs"));
        files.extend(paths.map(|path| Path::new(folder).join(path.file_name().unwrap()).display().to_string()));
    }
    assert!(files.len() > 40, "{files:?}");
    // Tests of examples.
    files.retain(|file| !["heavy/picture.rs", "cluster/tests.rs", "pool_top/screen.rs"].contains(&file.as_str()));
    let missing: Vec<_> = files.iter().filter(|file| !index.contains(&format!("]({file})"))).collect();
    assert_eq!(missing, [""; 0]);
}

/// What cargo prints for these arguments; nothing where it cannot, because a crate is not to be had here.
fn cargo(arguments: &[&str]) -> Option<String> {
    let output = Command::new(env!("CARGO")).args(arguments).arg("--locked").current_dir(root()).output().unwrap();
    if !output.status.success() {
        eprintln!("SKIPPED: cargo {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The crates, by name and version, that a user compiles with a feature of ours.
fn crates_with(feature: &str) -> Option<BTreeSet<(String, String)>> {
    let tree = ["tree", "--package", "multiprocess", "--edges", "normal", "--prefix", "none", "--format", "{p}"];
    let text = cargo(&[&tree[..], &["--features", feature]].concat())?;
    let crates = text.lines().filter_map(|line| {
        let mut words = line.split(' ');
        Some((words.next()?.to_owned(), words.next()?.trim_start_matches('v').to_owned()))
    });
    Some(crates.collect())
}

/// The table of features: of each the Rust version that its crates ask for and the crates that it adds, and the sentence that the README has of these.
struct Features {
    table: String,
    sentences: Vec<(String, String)>,
}

impl Features {
    fn compute() -> Option<Self> {
        let metadata = cargo(&[
            "metadata",
            "--all-features",
            "--format-version",
            "1",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        let text = |package: &serde_json::Value, key: &str| package[key].as_str().unwrap_or("0").to_owned();
        let version = |rust: &str| {
            let mut numbers = rust.split('.').map(|number| number.parse::<u32>().unwrap());
            (numbers.next().unwrap(), numbers.next().unwrap_or(0))
        };
        let needs: BTreeMap<_, _> = packages
            .iter()
            .map(|package| {
                let key = (text(package, "name"), text(package, "version"));
                (key, version(&text(package, "rust_version")))
            })
            .collect();
        let own = packages.iter().find(|package| package["name"] == "multiprocess").unwrap();
        let stated = version(&text(own, "rust_version"));
        let features = own["features"].as_object().unwrap();

        let bare = crates_with("default")?;
        let (mut table, mut sentences) =
            (String::from("| feature | Rust | crates | which |\n|---|---|---|---|\n"), vec![]);
        let mut names: Vec<_> = features.keys().collect();
        names.sort_by_key(|name| *name != "default");
        for feature in names {
            let crates = crates_with(feature)?;
            // One that builds on another of ours says what it adds to that.
            let mut below = features[feature].as_array().unwrap().iter().filter_map(serde_json::Value::as_str);
            let base = below.rfind(|name| features.contains_key(*name));
            let before = base.map_or(Some(bare.clone()), crates_with)?;
            let newest = crates.iter().map(|each| needs[each]).max().unwrap();
            let rust = format!("{}.{}", newest.0, newest.1);
            let is_bare = feature == "default";
            let added: Vec<_> = crates.iter().filter(|each| is_bare || !before.contains(*each)).collect();
            let names: BTreeSet<_> =
                added.iter().map(|(name, _)| &**name).filter(|name| *name != "multiprocess").collect();
            let count = added.iter().filter(|(name, _)| name != "multiprocess").count();
            let names = names.into_iter().collect::<Vec<_>>().join(", ");
            let label = if is_bare { "none".into() } else { format!("`{feature}`") };
            let on_top = base.map_or(String::new(), |base| format!(" than `{base}`"));
            let count = if is_bare { count.to_string() } else { format!("{count} more{on_top}") };
            table += &format!("| {label} | {rust} | {count} | {names} |\n");
            if is_bare {
                assert_eq!(newest, stated, "`rust-version` of Cargo.toml and what the crates without features ask for");
            } else {
                let newer = if newest > stated { format!("Rust {rust}, ") } else { String::new() };
                // CI builds the feature with the version that is stated there.
                let examples = packages.iter().find(|package| package["name"] == "multiprocess-cluster-examples");
                let of_examples = version(&text(examples.unwrap(), "rust_version"));
                assert!(feature != "cluster" || newest == of_examples, "`rust-version` of examples/cluster/Cargo.toml");
                sentences.push((label, format!("{newer}{count}")));
            }
        }
        Some(Self { table, sentences })
    }
}

#[test]
fn rust_version_and_crates_of_each_feature_are_those_of_the_dependency_tree() {
    const PAGE: &str = "docs/guide/where-it-runs.md";
    const BEGIN: &str = "<!-- computed by tests/docs.rs -->\n\n";
    let Some(computed) = Features::compute() else { return };
    let page = read(PAGE);
    let (head, rest) = page.split_once(BEGIN).expect("the mark of the table");
    let (stated, tail) = rest.split_once("\n\n").unwrap();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(root().join(PAGE), format!("{head}{BEGIN}{}\n{tail}", computed.table)).unwrap();
    } else {
        let stated = format!("{stated}\n");
        assert_eq!(stated, computed.table, "`UPDATE_DOCS=1 cargo test --test docs` writes {PAGE}");
    }
    let readme = read("README.md");
    for (feature, sentence) in computed.sentences {
        let row = readme.lines().find(|line| line.starts_with(&format!("| {feature} |")));
        let row = row.unwrap_or_else(|| panic!("the README has no row of {feature}"));
        assert!(row.ends_with(&format!("| {sentence} |")), "the README says {row:?}, and it is {sentence:?}");
    }
}

/// The names that a module has for its users: those that its `mod.rs` re-exports, and its own functions and types.
fn public_names(module: &Path) -> BTreeSet<String> {
    let text = read(module);
    let mut names = BTreeSet::new();
    for statement in text.split("\npub use ").skip(1) {
        let list = statement.split(';').next().unwrap();
        let list = list.split_once('{').map_or(list, |(_, list)| list.trim_end_matches('}'));
        names.extend(list.split(',').filter_map(|name| name.trim().rsplit("::").next()).map(str::to_owned));
    }
    for line in text.lines() {
        let mut words = line.trim_start_matches("pub async ").trim_start_matches("pub ").split(' ');
        let is_item = line.starts_with("pub ") && ["fn", "struct", "enum", "trait"].contains(&words.next().unwrap());
        let name = words.next().and_then(|word| word.split(|c: char| !c.is_alphanumeric() && c != '_').next());
        names.extend(name.filter(|_| is_item).map(str::to_owned));
    }
    names.remove("");
    names
}

/// Types that programs have without their names, and the calls by which they have them; traits that are bounds only.
const UNNAMED: [(&str, &str); 62] = [
    ("ArrayGuard", "view_mut"),
    ("AsyncResult", "apply_async"),
    ("BarrierWaitResult", "is_leader"),
    ("Bind", "Listener"),
    ("BroadcastSender", "broadcast"),
    ("ByteConnection", "connect"),
    ("ByteReceiver", "connect"),
    ("ByteSender", "connect"),
    ("Call", "apply"),
    ("Checkout", "checkout"),
    ("ConditionGuard", "wait_for"),
    ("Connect", "connect"),
    ("CurrentTask", "current_task"),
    ("DeadLetters", "dead_letters"),
    ("Events", "events"),
    ("Function", "spawn"),
    ("Grant", "LockProxy"),
    ("Integer", "fetch_add"),
    ("Lease", "try_lease"),
    ("LockError", "acquire"),
    ("LockGuard", "acquire"),
    ("Maker", "manager"),
    ("ManagerBuilder", "authkey"),
    ("ManagerConnect", "authkey"),
    ("Map", "map"),
    ("MapAsync", "map_async"),
    ("Method", "call"),
    ("OneshotReceiver", "oneshot"),
    ("PanicInfo", "panic"),
    ("ParentProcess", "parent_process"),
    ("Permit", "forget"),
    ("PoolBuilder", "max_waiting"),
    ("PoolResponse", "oneshot"),
    ("PoolService", "service"),
    ("PoolStats", "stats"),
    ("PoolTotals", "totals"),
    ("ProcessBuilder", "start_method"),
    ("ProcessInfo", "active_children"),
    ("Proxy", "proxy"),
    ("PutError", "put"),
    ("QueueOf", "QueueSet"),
    ("QueueSink", "sink"),
    ("QueueStream", "stream"),
    ("RLockGuard", "RLock"),
    ("Replies", "replies"),
    ("Results", "imap_stream"),
    ("RetryIf", "retry_if"),
    ("RwLockReadGuard", "RwLock"),
    ("RwLockWriteGuard", "RwLock"),
    ("SendError", "send"),
    ("Shutdown", "not_begun"),
    ("ShutdownSignal", "shutdown_signal"),
    ("StateFunction", "with_state"),
    ("StatePool", "with_state"),
    ("StatePoolBuilder", "state"),
    ("Supervised", "restarts"),
    ("SupervisedBuilder", "restart"),
    ("TryPutError", "try_put"),
    ("ValueGuard", "Value"),
    ("WatchSender", "watch"),
    ("WithState", "with_state"),
    ("WorkerStats", "workers"),
];

#[test]
fn every_public_name_is_in_an_example() {
    let words = |text: &str| -> BTreeSet<String> {
        let is_other = |c: char| !c.is_alphanumeric() && c != '_';
        text.split(is_other).map(str::to_owned).collect()
    };
    let programs: String = files_below(&root().join("examples"), "rs").iter().map(read).collect();
    let programs = words(&programs);
    let modules = fs::read_dir(root().join("src")).unwrap().map(|entry| entry.unwrap().path().join("mod.rs"));
    let private = ["guide", "os", "shm", "wait"].map(|name| root().join("src").join(name).join("mod.rs"));
    let names: BTreeSet<_> =
        modules.filter(|path| path.exists() && !private.contains(path)).flat_map(|path| public_names(&path)).collect();
    assert!(names.len() > 130 && names.contains("Queue") && names.contains("active_children"), "{names:?}");
    let unnamed: BTreeMap<_, _> = UNNAMED.into_iter().collect();
    let is_shown =
        |name: &&String| programs.contains(*name) || unnamed.get(&***name).is_some_and(|call| programs.contains(*call));
    let missing: Vec<_> = names.iter().filter(|name| !is_shown(name)).collect();
    assert!(missing.is_empty(), "in no example: {missing:?}");
    let gone: Vec<_> = unnamed.keys().filter(|name| !names.contains(**name)).collect();
    assert!(gone.is_empty(), "no public names (any more): {gone:?}");
}

/// What has siblings, and which of them its documentation names, with when to take them instead.
const SIBLINGS: &str = "
    Array: Value SharedMemory Manager
    ArrayProxy: Array
    AsyncResult: apply
    Barrier: Event
    BarrierProxy: Barrier
    Batch: call
    BoundedSemaphore: Semaphore
    ByteConnection: pipe
    Call: apply_async
    CancellationToken: Event
    Checkout: state
    Condition: Event Queue
    ConditionProxy: Condition
    Connection: connection
    Dashboard: MetricsReporter
    Deep: with_depth_limit
    DictProxy: Proxy
    Event: Condition watch CancellationToken
    EventProxy: Event
    Group: Pool Process
    JoinableQueue: Queue Pool
    Lease: get
    ListProxy: Queue Array
    Listener: pipe Queue
    Lock: RwLock Semaphore RLock
    LockProxy: Lock
    Manager: Value Array Queue
    Map: imap
    MapAsync: map
    MetricsReporter: Dashboard stats
    Namespace: DictProxy
    Pool: Process Group
    PoolService: apply
    PoolStreamExt: imap
    Process: Pool Group restart
    Proxy: ListProxy DictProxy Namespace Value Array
    Queue: JoinableQueue pipe broadcast Pool
    QueueProxy: Queue
    RLock: Lock
    Results: map
    RwLock: Lock Value
    Semaphore: Lock BoundedSemaphore
    SemaphoreProxy: Semaphore
    Sender: Queue
    SharedMemory: Array Queue
    StatePool: checkout preload Array
    Supervised: Process
    Task: spawn apply
    Value: Array Manager watch
    ValueProxy: Value
    broadcast: Queue watch
    init: run
    oneshot: simplex Queue
    pipe: simplex Queue connection
    preload: state Array
    simplex: pipe Queue oneshot
    watch: broadcast Queue Value
    with_depth_limit: with_depth_limit_async Deep
";

/// The documentation of each public type and function of the source, by its name, without its examples.
fn documented() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for path in files_below(&root().join("src"), "rs") {
        let text = read(path);
        let mut lines: Vec<&str> = Vec::new();
        for line in text.lines() {
            if let Some(line) = line.strip_prefix("///") {
                lines.push(line.strip_prefix(' ').unwrap_or(line));
            } else if let Some(item) = line.strip_prefix("pub ") {
                let mut words = item.trim_start_matches("async ").split(|c: char| !c.is_alphanumeric() && c != '_');
                let is_documented = ["struct", "enum", "trait", "fn"].contains(&words.next().unwrap());
                let name = words.next().filter(|_| is_documented).unwrap_or_default();
                // An item of the same name may be private to its module.
                let text: &mut String = found.entry(name.to_owned()).or_default();
                text.push_str(&prose(&lines.join("\n")).join("\n"));
                lines.clear();
            } else if !line.starts_with("#[") {
                lines.clear();
            }
        }
    }
    found
}

#[test]
fn each_type_says_when_to_take_its_sibling_instead() {
    let documented = documented();
    let rows = SIBLINGS.lines().filter_map(|line| line.trim().split_once(": "));
    let mut missing = Vec::new();
    for (name, siblings) in rows.clone() {
        let text = documented.get(name).unwrap_or_else(|| panic!("{name} is not public"));
        let words: BTreeSet<_> = text.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        let says_when =
            [" instead", " is faster", " is enough", "For ", "use that one if"].iter().any(|when| text.contains(when));
        missing.extend((!says_when).then(|| format!("{name} does not say when")));
        let unnamed = siblings.split(' ').filter(|sibling| !words.contains(sibling));
        missing.extend(unnamed.map(|sibling| format!("{name} does not name {sibling}")));
    }
    assert!(rows.count() > 50 && missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn each_type_has_a_place_in_a_module_and_at_the_root() {
    // Compiles only if both names are the same type.
    fn is<T>(_: Option<T>) {}
    is::<mp::Queue<u8>>(None::<mp::channel::Queue<u8>>);
    is::<mp::Error>(None::<mp::error::Error>);
    is::<mp::Manager>(None::<mp::manager::Manager>);
    is::<mp::SharedMemory>(None::<mp::memory::SharedMemory>);
    is::<mp::Pool>(None::<mp::pool::Pool>);
    is::<mp::Process<u8>>(None::<mp::process::Process<u8>>);
    is::<mp::Restart>(None::<mp::supervision::Restart>);
    is::<mp::Lock>(None::<mp::sync::Lock>);
    is::<mp::Deep<u8>>(None::<mp::wire::Deep<u8>>);
}

#[test]
fn glossary_is_alphabetical_and_has_one_row_for_each_term() {
    let text = read("docs/architecture.md");
    let glossary = text.split("## Glossary").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = glossary.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let terms: Vec<_> = rows.skip(1).map(str::to_lowercase).collect();
    assert!(terms.len() > 50, "{}", terms.len());
    for pair in terms.windows(2) {
        assert!(pair[0] < pair[1], "{} before {}", pair[0], pair[1]);
    }
}
