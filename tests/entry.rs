//! What can be a function that runs elsewhere, and what the compiler says of the rest.

use multiprocess::{self as mp, Process};
use std::path::{Path, PathBuf};
use std::process::Command;

mp::test_support!();

struct Shape;

impl Shape {
    fn area(width: f64, height: f64) -> f64 {
        width * height
    }
}

fn largest<T: PartialOrd + Copy>(all: Vec<T>) -> Option<T> {
    all.into_iter().reduce(|a, b| if b > a { b } else { a })
}

async fn later(text: String) -> mp::Result<String> {
    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    Ok(text + "!")
}

#[tokio::test]
async fn functions_of_every_kind() -> mp::Result<()> {
    assert_eq!(Process::spawn(Shape::area, (2.0, 3.0))?.await?, 6.0);
    assert_eq!(Process::spawn(largest::<u8>, (vec![1, 3, 2],))?.await?, Some(3));
    assert_eq!(Process::spawn(largest::<char>, (vec!['a', 'c'],))?.await?, Some('c'));
    assert_eq!(Process::spawn(later, ("hi".to_string(),))?.await??, "hi!");
    assert_eq!(Process::spawn(|a: u8, b: u8| a + b, (1, 2))?.await?, 3);
    assert_eq!(Process::spawn(async |a: u8| a + 1, (1,))?.await?, 2);
    let child = Process::spawn(std::process::id, ())?;
    let pid = child.pid();
    assert_eq!(child.await?, pid);
    Ok(())
}

/// Two functions with equal code may share an address; they must still be told apart by their types.
#[tokio::test]
async fn equal_code_of_other_types_is_not_confused() -> mp::Result<()> {
    fn one(x: u32) -> u32 {
        x
    }
    fn two(x: i32) -> i32 {
        x
    }
    assert_eq!(Process::spawn(one, (u32::MAX,))?.await?, u32::MAX);
    assert_eq!(Process::spawn(two, (-1,))?.await?, -1);
    Ok(())
}

/// By the compiler alone, with the libraries that this test was built with. Nothing is built anew for it.
#[test]
fn mistakes_are_compile_errors_that_say_what_to_do() {
    let (compiled, output) = compile("tests/ui/pass.rs");
    assert!(compiled, "{output}");
    for name in ["captures", "pointer", "arguments"] {
        let (compiled, output) = compile(&format!("tests/ui/{name}.rs"));
        assert!(!compiled, "{name} is not refused");
        let expected = std::fs::read_to_string(format!("{ROOT}/tests/ui/{name}.stderr")).unwrap();
        let mut said = output.lines().map(bare);
        for line in expected.lines().map(bare) {
            assert!(said.any(|said| said == line), "of {name} it is not said, or not there: {line}\n{output}");
        }
    }
}

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Whether it compiles, and what the compiler says. The size of a closure is asserted when code is generated.
fn compile(file: &str) -> (bool, String) {
    let libraries = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libmultiprocess-") && name.ends_with(".rlib")
    };
    let all = std::fs::read_dir(&libraries).unwrap().map(|entry| entry.unwrap().path()).filter(is_ours);
    let newest = all.max_by_key(|path| path.metadata().unwrap().modified().unwrap()).expect("the library is built");
    let object =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(Path::new(file).with_extension("o").file_name().unwrap());
    let output = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .current_dir(ROOT)
        .args(["--edition", "2024", "--crate-type", "bin", "--emit", "obj", "--verbose", "-o"])
        .arg(object)
        .arg("-L")
        .arg(format!("dependency={}", libraries.display()))
        .arg("--extern")
        .arg(format!("multiprocess={}", newest.display()))
        .arg(file)
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

/// A line of a message without what differs from one machine, or version of ours, to the next: numbers of lines that
/// are not the user's, and where things lie.
fn bare(line: &str) -> String {
    let line = line.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit());
    let line = line.trim_start_matches(['|', ' ']).trim_end().replace(&format!("{ROOT}/"), "").replace("$DIR/", "");
    let Some((mark, path)) = ["--> ", "::: "].iter().find_map(|mark| Some((mark, line.strip_prefix(mark)?))) else {
        return line;
    };
    let path = path.rsplit_once("/library/").map_or(path.to_owned(), |(_, path)| format!("$RUST/{path}"));
    let is_users = path.starts_with("tests/");
    let path = if is_users { &path } else { path.split_inclusive(".rs").next().unwrap_or_default() };
    format!("{mark}{path}")
}
