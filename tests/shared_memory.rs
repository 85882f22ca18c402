//! Shared memory by name and without: the reference suite's cases, its own Python at the other end, and what is left
//! when somebody is killed.

mod common;

use common::{eventually, holdings, in_child, within};
use multiprocess::{self as mp, ErrorKind, Process, SharedMemory};
use std::error::Error as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

mp::test_support!();

fn name(what: &str) -> String {
    format!("test-{}-{what}", common::alone::unique())
}

fn is_there(name: &str) -> bool {
    std::fs::exists(format!("/dev/shm/{name}")).unwrap()
}

fn io_kind<T>(result: mp::Result<T>) -> Option<io::ErrorKind> {
    let error = result.err().expect("an error");
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    error.source()?.downcast_ref::<io::Error>().map(io::Error::kind)
}

fn text(memory: &SharedMemory, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.read(0, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Runs a program in the machine's Python, which must succeed without a word on stderr but for `told`.
fn python(program: &str, arguments: &[&str], told: fn(&str) -> bool) -> String {
    let output = Command::new("python3").arg("-c").arg(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && (stderr.is_empty() || told(&stderr)), "{}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

#[test]
fn shm_01_invalid_names_are_refused() {
    for bad in ["a\0b", "", "/", "a/b", "..", "."] {
        assert_eq!(io_kind(SharedMemory::create(bad, 10)), Some(io::ErrorKind::InvalidInput), "{bad:?}");
        assert_eq!(io_kind(SharedMemory::open(bad)), Some(io::ErrorKind::InvalidInput), "{bad:?}");
        assert_eq!(io_kind(SharedMemory::open_or_create(bad, 10)), Some(io::ErrorKind::InvalidInput), "{bad:?}");
    }
    assert!(SharedMemory::create(&"long".repeat(64), 10).is_err());
    let longest = format!("{:a<255}", name("longest"));
    assert_eq!(SharedMemory::create(&longest, 10).unwrap().name(), longest);
}

#[test]
fn shm_02_written_here_read_there() {
    let memory = SharedMemory::create(&name("basics"), 512).unwrap();
    assert_eq!((memory.name(), memory.len()), (name("basics").as_str(), 512));
    memory.write(0, b"howdy").unwrap();
    let second = SharedMemory::open(&format!("/{}", name("basics"))).unwrap();
    assert_eq!((second.len(), second.name()), (512, memory.name()));
    assert_eq!(text(&second, 5), "howdy");
    second.write(507, b"there").unwrap();
    let mut end = [0; 6];
    memory.read(506, &mut end).unwrap();
    assert_eq!(&end, b"\0there");
    for memory in [&memory, &SharedMemory::anonymous(512).unwrap()] {
        assert_eq!(io_kind(memory.read(507, &mut end)), Some(io::ErrorKind::InvalidInput));
        assert_eq!(io_kind(memory.write(usize::MAX, b"x")), Some(io::ErrorKind::InvalidInput));
        memory.write(512, b"").unwrap();
        memory.read(512, &mut []).unwrap();
    }
    assert_eq!(std::fs::metadata(format!("/dev/shm/{}", memory.name())).unwrap().len(), 512);
}

#[test]
fn shm_04_generated_names_differ_and_can_be_opened() {
    let both = [SharedMemory::generate(10).unwrap(), SharedMemory::generate(10).unwrap()];
    assert_ne!(both[0].name(), both[1].name());
    assert!(both.iter().all(|memory| SharedMemory::open(memory.name()).is_ok()));
}

#[test]
fn shm_05_unlinked_twice_is_not_found() {
    let memory = SharedMemory::create(&name("twice"), 10).unwrap();
    memory.unlink().unwrap();
    assert_eq!(io_kind(memory.unlink()), Some(io::ErrorKind::NotFound));
    let successor = SharedMemory::create(&name("twice"), 20).unwrap();
    assert_eq!(io_kind(memory.unlink()), Some(io::ErrorKind::NotFound));
    drop(memory);
    assert!(is_there(successor.name()), "a name goes only with the memory that it was given to");
    assert_eq!(SharedMemory::anonymous(1).unwrap().unlink().unwrap_err().kind(), ErrorKind::Other);
}

#[test]
fn shm_06_name_in_use_is_refused() {
    let _memory = SharedMemory::create(&name("exclusive"), 10).unwrap();
    assert_eq!(io_kind(SharedMemory::create(&name("exclusive"), 10)), Some(io::ErrorKind::AlreadyExists));
    assert!(is_there(&name("exclusive")));
}

#[test]
fn shm_07_open_or_create_keeps_an_existing_block() {
    let made = SharedMemory::open_or_create(&name("either"), 100).unwrap();
    made.write(0, b"kept").unwrap();
    let found = SharedMemory::open_or_create(&name("either"), 5).unwrap();
    assert_eq!((found.len(), text(&found, 4)), (100, "kept".to_string()));
    drop(found);
    assert!(is_there(&name("either")), "who found it does not remove it");
    drop(made);
    assert!(!is_there(&name("either")));
}

#[test]
fn shm_08_missing_name_is_not_found() {
    assert_eq!(io_kind(SharedMemory::open(&name("missing"))), Some(io::ErrorKind::NotFound));
}

#[test]
fn shm_09_zero_bytes_are_refused() {
    assert_eq!(io_kind(SharedMemory::create(&name("zero"), 0)), Some(io::ErrorKind::InvalidInput));
    assert_eq!(io_kind(SharedMemory::anonymous(0)), Some(io::ErrorKind::InvalidInput));
    assert!(!is_there(&name("zero")));
}

#[test]
fn shm_22_more_memory_than_the_machine_has_is_an_error() {
    for size in [1 << 62, 1 << 45, usize::MAX] {
        assert_eq!(io_kind(SharedMemory::create(&name("absurd"), size)), Some(io::ErrorKind::OutOfMemory), "{size}");
        assert_eq!(io_kind(SharedMemory::anonymous(size)), Some(io::ErrorKind::OutOfMemory), "{size}");
    }
    assert!(!is_there(&name("absurd")));
}

#[test]
fn shm_22_memory_is_reserved_when_it_is_created() {
    let memory = SharedMemory::create(&name("reserved"), 1 << 20).unwrap();
    let blocks = || {
        use std::os::linux::fs::MetadataExt;
        std::fs::metadata(format!("/dev/shm/{}", memory.name())).unwrap().st_blocks()
    };
    assert_eq!(blocks() * 512, 1 << 20);
}

async fn shout(memory: SharedMemory) -> mp::Result<SharedMemory> {
    let text = text(&memory, 5).to_uppercase();
    memory.write(0, text.as_bytes())?;
    Ok(memory)
}

fn shout_by_name(name: String) -> mp::Result<()> {
    let memory = SharedMemory::open(&name)?;
    memory.write(0, text(&memory, 5).to_uppercase().as_bytes())
}

#[tokio::test]
async fn shm_10_handle_is_the_same_memory_in_every_process() {
    for memory in [SharedMemory::anonymous(100).unwrap(), SharedMemory::create(&name("handle"), 100).unwrap()] {
        memory.write(0, b"hello").unwrap();
        let before = holdings();
        let back = within(Process::spawn(shout, (memory.clone(),)).unwrap()).await.unwrap().unwrap();
        assert_eq!(text(&memory, 5), "HELLO");
        back.write(0, b"again").unwrap();
        assert_eq!((text(&memory, 5), back.name()), ("again".to_string(), memory.name()));
        drop(back);
        // The child, the first that was started here, needs a line to the fork server and a lifeline.
        assert!(holdings().descriptors <= before.descriptors + 75, "{before:?} {:?}", holdings());
    }
    assert!(!is_there(&name("handle")));
}

#[tokio::test]
async fn shm_11_shm_19_handle_works_after_the_name_is_gone() {
    let memory = SharedMemory::create(&name("unlinked"), 100).unwrap();
    memory.write(0, b"hello").unwrap();
    let child = Process::spawn(shout, (memory.clone(),)).unwrap();
    memory.unlink().unwrap();
    within(child).await.unwrap().unwrap();
    assert_eq!(text(&memory, 5), "HELLO");
    let by_name = within(Process::spawn(shout_by_name, (name("unlinked"),)).unwrap()).await.unwrap();
    let error = by_name.unwrap_err().to_string();
    assert!(error.contains("unlinked") && error.contains("No such file"), "{error}");
}

#[tokio::test]
async fn shm_12_shm_17_exit_of_a_child_that_opened_a_name_removes_nothing() {
    let memory = SharedMemory::create(&name("child"), 100).unwrap();
    memory.write(0, b"hello").unwrap();
    within(Process::spawn(shout_by_name, (name("child"),)).unwrap()).await.unwrap().unwrap();
    assert_eq!(text(&memory, 5), "HELLO");
    async fn open_and_hang(name: String) {
        let _memory = SharedMemory::open(&name).unwrap();
        std::future::pending().await
    }
    let mut reader = Process::spawn(open_and_hang, (name("child"),)).unwrap();
    eventually("it is open twice", || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", reader.pid()));
        fds.is_ok_and(|fds| {
            fds.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.ends_with(name("child"))))
        })
    })
    .await;
    reader.kill().unwrap();
    assert!(within(reader.join()).await.is_err());
    assert!(is_there(memory.name()));
}

async fn create_and_hang(names: Vec<String>, persist: bool, created: mp::Queue<()>) {
    let all: Vec<_> = names.iter().map(|name| SharedMemory::create(name, 100).unwrap()).collect();
    all[0].write(0, b"here").unwrap();
    if persist {
        all[0].persist().unwrap();
    }
    created.put(()).await.unwrap();
    std::future::pending().await
}

#[tokio::test]
async fn shm_16_p17_names_of_a_killed_child_are_removed() {
    for persist in [false, true] {
        let (names, created) = (vec![name("killed-1"), name("killed-2")], mp::Queue::unbounded().unwrap());
        let mut child = Process::spawn(create_and_hang, (names.clone(), persist, created.clone())).unwrap();
        within(created.get()).await.unwrap();
        let open = SharedMemory::open(&names[0]).unwrap();
        child.kill().unwrap();
        assert!(within(child.join()).await.is_err());
        eventually("its second name is gone", || !is_there(&names[1])).await;
        if persist {
            assert!(is_there(&names[0]));
            open.unlink().unwrap();
        } else {
            eventually("its first name is gone", || !is_there(&names[0])).await;
        }
        assert_eq!(text(&open, 4), "here");
    }
}

#[tokio::test]
async fn handle_that_returns_to_its_creator_is_the_creators() {
    let memory = SharedMemory::create(&name("back"), 100).unwrap();
    memory.write(0, b"hello").unwrap();
    let back = within(Process::spawn(shout, (memory.clone(),)).unwrap()).await.unwrap().unwrap();
    drop(memory);
    assert!(is_there(back.name()), "the creator still has a handle");
    drop(back);
    assert!(!is_there(&name("back")));
}

#[tokio::test]
async fn name_created_by_a_child_goes_with_it_and_memory_stays_with_the_handle() {
    let make = |name: String| SharedMemory::create(&name, 100).unwrap();
    let memory = in_child(make, (name("made-there"),)).await;
    eventually("the name is gone", || !is_there(&name("made-there"))).await;
    memory.write(0, b"fine").unwrap();
    assert_eq!(memory.persist().unwrap_err().kind(), ErrorKind::Other);
}

/// `names`: killed exactly there, the name is gone or was never given.
#[cfg(debug_assertions)]
#[tokio::test]
async fn shm_16_killed_at_each_step_of_creating_and_removing() {
    let make = |name: String| drop(SharedMemory::create(&name, 100).unwrap());
    for point in ["name.promised", "name.given", "name.taken"] {
        let victim = Process::builder().env("MULTIPROCESS_KILL_AT", point).spawn(make, (name(point),));
        let error = within(victim.unwrap()).await.unwrap_err();
        assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{point}");
        eventually("no name is left", || !is_there(&name(point))).await;
        SharedMemory::create(&name(point), 10).unwrap();
    }
}

#[test]
fn shm_02_python_opens_a_block_of_this_crate() {
    let memory = SharedMemory::create(&name("to-python"), 100).unwrap();
    memory.write(0, b"hello").unwrap();
    let program = "
import sys
from multiprocessing import shared_memory, resource_tracker
block = shared_memory.SharedMemory(sys.argv[1])
resource_tracker.unregister(block._name, 'shared_memory')
print(bytes(block.buf[:5]).decode(), block.size, block.name)
block.buf[:5] = b'HELLO'
block.close()
";
    let said = python(program, &[memory.name()], |_| false);
    assert_eq!(said, format!("hello 100 {}", memory.name()));
    assert_eq!(text(&memory, 5), "HELLO");
    assert!(is_there(memory.name()), "a reader that says it is one removes nothing");
}

#[test]
fn shm_02_this_crate_opens_a_block_of_python() {
    let mut creator = Command::new("python3");
    let program = "
import sys
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=100)
block.buf[:5] = b'hello'
print(block.name, flush=True)
sys.stdin.readline()
print(bytes(block.buf[:5]).decode(), flush=True)
block.close()
block.unlink()
";
    creator.arg("-c").arg(program).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut creator = creator.spawn().unwrap();
    let mut lines = io::BufRead::lines(io::BufReader::new(creator.stdout.take().unwrap()));
    let name = lines.next().unwrap().unwrap();
    assert!(name.starts_with("psm_"));
    let memory = SharedMemory::open(&name).unwrap();
    assert_eq!((memory.len(), text(&memory, 5)), (100, "hello".to_string()));
    memory.write(0, b"HELLO").unwrap();
    drop(memory);
    assert!(is_there(&name));
    drop(creator.stdin.take());
    assert_eq!(lines.next().unwrap().unwrap(), "HELLO");
    assert!(creator.wait().unwrap().success());
    assert!(!is_there(&name));
}

/// What it does to others too: the name goes with the reader. Nothing else of ours does.
#[tokio::test]
async fn p17_python_that_removes_our_name_removes_only_the_name() {
    let memory = SharedMemory::create(&name("p17"), 100).unwrap();
    memory.write(0, b"hello").unwrap();
    let program = "
import sys
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(sys.argv[1])
block.close()
";
    python(program, &[memory.name()], |stderr| stderr.contains("resource_tracker"));
    eventually("its tracker has removed the name", || !is_there(&name("p17"))).await;
    within(Process::spawn(shout, (memory.clone(),)).unwrap()).await.unwrap().unwrap();
    assert_eq!(text(&memory, 5), "HELLO");
    let again = SharedMemory::create(&name("p17"), 10).unwrap();
    drop(memory);
    assert!(is_there(again.name()));
}

/// Ours never: any number of readers come and go.
#[tokio::test]
async fn p17_our_readers_remove_nothing_and_print_nothing() {
    let memory = SharedMemory::create(&name("readers"), 100).unwrap();
    memory.write(0, b"hello").unwrap();
    let read = |name: String| text(&SharedMemory::open(&name).unwrap(), 5);
    for _ in 0..5 {
        assert_eq!(in_child(read, (name("readers"),)).await, "hello");
        assert!(is_there(memory.name()));
    }
}

/// Another program that cuts a block short makes errors, no SIGBUS.
#[test]
fn truncated_block_is_an_error() {
    let memory = SharedMemory::create(&name("short"), 8192).unwrap();
    std::fs::File::options().write(true).open(format!("/dev/shm/{}", memory.name())).unwrap().set_len(100).unwrap();
    assert_eq!(io_kind(memory.read(4096, &mut [0; 4])), Some(io::ErrorKind::UnexpectedEof));
    assert_eq!(text(&memory, 4), "\0\0\0\0");
}

#[test]
fn pointer_reaches_the_same_bytes() {
    for memory in [SharedMemory::anonymous(100).unwrap(), SharedMemory::create(&name("pointer"), 100).unwrap()] {
        memory.write(99, b"x").unwrap();
        let start = memory.as_ptr().unwrap();
        // SAFETY: 100 bytes are mapped there while `memory` lives, and nobody else has this block.
        unsafe {
            assert_eq!(start.add(99).read(), b'x');
            start.write(b'y');
        }
        assert_eq!(text(&memory, 1), "y");
    }
}

#[tokio::test]
async fn heap_02_dropped_blocks_leave_nothing() {
    // In a process of its own, where nobody else opens anything.
    let rounds = |name: String| {
        let round = || {
            for n in 1..100 {
                drop(SharedMemory::anonymous(n * 100).unwrap());
                drop(SharedMemory::create(&name, n * 100).unwrap());
            }
            holdings()
        };
        (round(), round())
    };
    let (first, second) = in_child(rounds, (name("rounds"),)).await;
    assert_eq!(first, second);
}

#[tokio::test]
async fn block_of_another_user_is_refused_unless_its_owner_is_named() {
    let name = name("of-a-stranger");
    let path = format!("/dev/shm/{name}");
    std::fs::write(&path, b"12345").unwrap();
    if common::give_to_stranger(&path) {
        let says_whose = |result: mp::Result<SharedMemory>, kind| {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("uid 65534"), "{error}");
            assert_eq!(io_kind(Err::<(), _>(error)), Some(kind));
        };
        says_whose(SharedMemory::create(&name, 10), io::ErrorKind::AlreadyExists);
        says_whose(SharedMemory::open(&name), io::ErrorKind::PermissionDenied);
        says_whose(SharedMemory::open_or_create(&name, 10), io::ErrorKind::PermissionDenied);
        says_whose(SharedMemory::open_of_user(&name, common::STRANGER - 1), io::ErrorKind::PermissionDenied);
        let memory = SharedMemory::open_of_user(&name, common::STRANGER).unwrap();
        assert_eq!(text(&memory, 5), "12345");
    }
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn symbolic_link_is_not_followed() {
    let (name, target) = (name("link"), name("target"));
    let _memory = SharedMemory::create(&target, 10).unwrap();
    let path = format!("/dev/shm/{name}");
    std::os::unix::fs::symlink(format!("/dev/shm/{target}"), &path).unwrap();
    assert!(SharedMemory::open(&name).is_err());
    assert!(SharedMemory::open_of_user(&name, common::STRANGER).is_err());
    let error = SharedMemory::create(&name, 10).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    assert_eq!(io_kind(Err::<(), _>(error)), Some(io::ErrorKind::AlreadyExists));
    std::fs::remove_file(&path).unwrap();
}
