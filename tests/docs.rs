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

/// The targets of all links, and the labels that nothing defines.
fn links(text: &str) -> (Vec<String>, Vec<String>) {
    let (text, defined) = (without_code(text), definitions(text));
    let after = |begin: &'static str, end: char| {
        let found = text.split(begin).skip(1).filter_map(move |rest| rest.split_once(end));
        found.map(|(target, _)| target.replace('\n', " ")).collect::<Vec<_>>()
    };
    let targets = after("](", ')').into_iter().chain(defined.values().cloned()).collect();
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
    assert_eq!(count("[a][pools]"), 1);
    assert_eq!(count("[a][pools]\n\n[pools]: docs/guide/pools.md"), 0);
    assert_eq!(count("[pools]: docs/no.md"), 1);
    assert_eq!(count("```\n[a](docs/no.md)\n```\n`[a](docs/no.md)`"), 0);
}

#[test]
fn every_page_of_the_guide_is_in_the_book_and_in_rustdoc() {
    let (book, module, ours) = (read("docs/guide/SUMMARY.md"), read("src/guide/mod.rs"), read("src/guide/links.md"));
    let ours = definitions(&ours);
    for path in files_below(&root().join("docs/guide"), "md") {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name == "SUMMARY.md" {
            continue;
        }
        assert!(book.contains(&format!("({name})")), "{name} is not in SUMMARY.md");
        assert!(module.contains(name), "{name} is not in src/guide/mod.rs");
        for (label, target) in definitions(&read(&path)) {
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
    }
}

/// All text of the source, in which a literal of several lines is one line.
fn source() -> String {
    let text: String = files_below(&root().join("src"), "rs").iter().map(read).collect();
    let lines = text.split("\\\n").enumerate();
    lines.map(|(n, line)| if n == 0 { line } else { line.trim_start() }).collect()
}

#[test]
fn messages_quoted_by_the_troubleshooting_page_are_in_the_source() {
    let (page, source) = (read("docs/guide/troubleshooting.md"), source());
    let quotes: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("> ")).collect();
    let said = |quote: &&str| quote.split("..").map(str::trim).all(|part| source.contains(part));
    let unsaid: Vec<_> = quotes.iter().filter(|quote| !said(quote)).collect();
    assert!(quotes.len() > 60 && unsaid.is_empty(), "{unsaid:#?}");
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
        rows += 1;
    }
    assert_eq!(rows, 5);
    assert!(readme.lines().count() < 150);
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
