//! What a child may do, and what else it has from its parent at the spawn. Each scenario changes what its whole process
//! is, so each runs in a process of its own.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

#[path = "common/alone.rs"]
mod alone;

use alone::{Scenario, block_on, scenarios};
use multiprocess::{self as mp, ErrorKind, Pool, Process, Queue};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const SCENARIOS: &[Scenario] = scenarios! {
    process_that_gives_up_root_gets_children_without_it
    process_that_takes_root_back_gets_children_with_it
    a_thread_that_is_another_user_gets_children_of_that_user
    a_kill_by_a_process_that_is_another_user_for_a_while_costs_no_later_child
    a_kill_by_a_thread_that_is_another_user_costs_no_later_child
    a_thread_that_is_another_user_for_files_gets_no_child
    a_process_made_without_fork_handlers_gets_no_child
    threads_of_two_users_that_spawn_in_turn_take_no_more_descriptors_each_time
    a_process_that_changes_its_user_again_and_again_takes_no_more_descriptors_each_time
    a_process_that_becomes_many_users_keeps_no_descriptors_for_those_without_children
    death_of_a_process_that_gave_up_root_ends_its_root_children
    a_child_that_gives_up_root_gets_no_child_with_it
    a_child_has_exactly_the_capabilities_of_its_parent
    capabilities_that_root_has_dropped_do_not_come_back_before_init
    promises_and_filters_of_the_parent_hold_in_later_children
    a_child_has_the_root_directory_and_the_namespaces_of_its_parent
    a_child_of_a_new_user_namespace_is_in_it
    children_in_another_pid_namespace_are_refused
    process_that_gave_up_root_can_still_end_children_that_have_it
    workers_that_replace_others_have_the_rights_of_that_moment
    a_pool_with_privileged_workers_keeps_its_deadlines_and_ends
    a_retired_server_ends_with_its_last_child
    preload_of_root_runs_again_for_the_user_that_it_becomes
    names_are_removed_by_a_process_of_the_user_that_gave_them
    umask_nice_value_cpus_and_limits_are_those_of_the_parent_at_the_spawn
    the_score_for_the_end_of_memory_is_that_at_the_start_of_the_fork_server
    a_builder_gives_a_child_umask_nice_value_cpus_and_limits
    option_that_cannot_be_granted_is_an_error_that_names_it
    a_panic_at_the_memory_limit_of_a_builder_is_an_error
    a_panic_at_a_memory_limit_without_spare_is_an_error_and_a_line
    a_working_directory_that_the_user_may_not_search_is_no_hindrance
    a_working_directory_that_is_closed_later_is_no_hindrance
    a_working_directory_that_was_removed_is_no_hindrance
    three_hundred_starts_at_once_need_no_more_than_a_usual_limit
    a_spawn_waits_while_too_many_descriptors_are_on_their_way
    at_a_low_limit_a_program_has_children_or_an_error_that_names_the_need
    a_pool_of_sixty_workers_needs_no_more_than_a_usual_limit
    a_pool_starts_when_fewer_descriptors_are_on_their_way
    a_pool_beyond_the_limit_works_with_the_workers_that_there_can_be
    a_pool_without_descriptors_for_a_worker_names_the_limit_and_the_need
    where_close_range_is_refused_a_child_has_the_same_descriptors
    a_refused_system_call_that_is_needed_is_an_error_that_names_it
};

/// What is permitted to this process where `main` begins; a forked child has it from the fork server.
static AT_BEGIN: std::sync::OnceLock<u64> = std::sync::OnceLock::new();

fn main() -> ExitCode {
    AT_BEGIN.get_or_init(permitted);
    mp::init();
    alone::main_once_of(
        SCENARIOS,
        scenarios! { gives_names_as_two_users spawns_with_a_refused_call spawns_at_a_limit spawns_at_this_limit gives_up_root_and_waits },
    )
}

/// Waits until `done`, looking often.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Whether this test can be done here: it begins as root, or with another right that a machine may withhold.
fn can(what: &str, it_can: bool) -> bool {
    if !it_can {
        eprintln!("SKIPPED: {what} is not permitted here");
    }
    it_can
}

fn is_root() -> bool {
    can("changing users (CAP_SETUID, CAP_SETGID)", {
        let sets = rustix::thread::capabilities(None).unwrap();
        Uid::effective().is_root() && sets.effective.contains(CapabilitySet::SETUID | CapabilitySet::SETGID)
    })
}

const NOBODY: u32 = 65534;

/// For good, and for every thread.
fn become_nobody() {
    setgroups(&[]).unwrap();
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(group, group, group).unwrap();
    setresuid(user, user, user).unwrap();
}

/// What /proc says about this process under these names.
fn status(names: Vec<String>) -> Vec<String> {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = |name: &String| {
        let line = status.lines().find_map(|line| line.strip_prefix(name.as_str())?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    names.iter().map(line).collect()
}

/// Every line of it that tells of a right.
const RIGHTS: [&str; 10] =
    ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp_filters"];

fn rights() -> Vec<String> {
    status(RIGHTS.map(str::to_owned).to_vec())
}

fn spawn_rights() -> Process<Vec<String>> {
    Process::spawn(rights, ()).unwrap()
}

/// Has spare children wait by now.
async fn with_spares() {
    for _ in 0..6 {
        spawn_rights().await.unwrap();
    }
}

fn users() -> [u32; 6] {
    let (user, group) = (nix::unistd::getresuid().unwrap(), nix::unistd::getresgid().unwrap());
    let users = [user.real, user.effective, user.saved].map(Uid::as_raw);
    let groups = [group.real, group.effective, group.saved].map(Gid::as_raw);
    [users[0], users[1], users[2], groups[0], groups[1], groups[2]]
}

fn process_that_gives_up_root_gets_children_without_it() {
    if !is_root() {
        return;
    }
    block_on(async {
        with_spares().await;
        assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [0; 6]);
        become_nobody();
        let mine = rights();
        assert!(!mine[0].contains('0'), "{mine:?}");
        for _ in 0..20 {
            assert_eq!(spawn_rights().await.unwrap(), mine);
        }
        let mut afresh = Process::builder().start_method(mp::StartMethod::Spawn).spawn(rights, ()).unwrap();
        assert_eq!(afresh.join().await.unwrap(), mine);
    });
}

fn process_that_takes_root_back_gets_children_with_it() {
    if !is_root() {
        return;
    }
    block_on(async {
        let (root, nobody) = (Uid::from_raw(0), Uid::from_raw(NOBODY));
        for (user, times) in [(root, 6), (nobody, 6), (root, 3), (nobody, 3)] {
            setresuid(root, user, root).unwrap();
            let mut mine = users();
            mine[2] = mine[1]; // An exec forgets the saved one: a child may have less, and never more.
            for _ in 0..times {
                assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), mine);
            }
        }
    });
}

fn a_thread_that_is_another_user_gets_children_of_that_user() {
    if !is_root() {
        return;
    }
    let (theirs, ours) = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            // By the bare system call, so for this thread alone.
            let nobody = rustix::process::Uid::from_raw(NOBODY);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            block_on(async { (Process::spawn(users, ()).unwrap().await.unwrap(), users()) })
        });
        let theirs = other.join().unwrap();
        (theirs, block_on(async { Process::spawn(users, ()).unwrap().await.unwrap() }))
    });
    assert_eq!(theirs.0, theirs.1);
    assert_eq!(ours, [0; 6]);
}

async fn sleeps() {
    std::future::pending::<()>().await;
}

fn a_kill_by_a_process_that_is_another_user_for_a_while_costs_no_later_child() {
    if !is_root() {
        return;
    }
    block_on(async {
        let (root, nobody) = (Uid::from_raw(0), Uid::from_raw(NOBODY));
        with_spares().await;
        for _ in 0..3 {
            let mut child = Process::spawn(sleeps, ()).unwrap();
            setresuid(nobody, nobody, root).unwrap();
            child.kill().unwrap();
            setresuid(root, root, root).unwrap();
            for _ in 0..5 {
                assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [0; 6]);
            }
            assert_eq!(child.wait().await.unwrap().signal(), Some(libc::SIGKILL));
        }
    });
}

fn a_kill_by_a_thread_that_is_another_user_costs_no_later_child() {
    if !is_root() {
        return;
    }
    block_on(async {
        with_spares().await;
        let mut child = Process::spawn(sleeps, ()).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                // By the bare system call, so for this thread alone.
                let nobody = rustix::process::Uid::from_raw(NOBODY);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                child.kill().unwrap();
            });
            other.join().unwrap();
        });
        for _ in 0..5 {
            assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [0; 6]);
        }
        assert_eq!(child.wait().await.unwrap().signal(), Some(libc::SIGKILL));
    });
}

fn a_thread_that_is_another_user_for_files_gets_no_child() {
    if !is_root() {
        return;
    }
    block_on(async {
        with_spares().await;
        for _ in 0..2 {
            nix::unistd::setfsuid(Uid::from_raw(NOBODY));
            let error = Process::spawn(users, ()).unwrap_err();
            assert!(error.kind() == ErrorKind::Spawn && error.to_string().contains("setfsuid"), "{error}");
            nix::unistd::setfsuid(Uid::from_raw(0));
            nix::unistd::setfsgid(Gid::from_raw(NOBODY));
            let error = Process::spawn(users, ()).unwrap_err();
            assert!(error.kind() == ErrorKind::Spawn && error.to_string().contains("setfsgid"), "{error}");
            nix::unistd::setfsgid(Gid::from_raw(0));
            assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [0; 6]);
        }
    });
}

/// As by `_Fork`.
fn a_process_made_without_fork_handlers_gets_no_child() {
    block_on(async {
        with_spares().await;
        // SAFETY: a fork by the bare system call, in a process that has no other thread of the program.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            let error = Process::spawn(users, ()).map(drop).unwrap_err();
            let is_right = error.kind() == ErrorKind::Forked && Queue::<u8>::unbounded().is_err();
            // SAFETY: it takes no pointer.
            unsafe { libc::_exit(if is_right { 7 } else { 8 }) }
        }
        let mut status = 0;
        // SAFETY: the number is ours.
        assert_eq!(i64::from(unsafe { libc::waitpid(pid as i32, &mut status, 0) }), pid);
        assert_eq!(std::process::ExitStatus::from_raw(status).code(), Some(7));
        assert_eq!(Process::spawn(plus_one, (1,)).unwrap().await.unwrap(), 2);
    });
}

fn threads_of_two_users_that_spawn_in_turn_take_no_more_descriptors_each_time() {
    if !is_root() {
        return;
    }
    let spawn_as = |user: u32| {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let user = rustix::process::Uid::from_raw(user);
                rustix::thread::set_thread_res_uid(user, user, user).unwrap();
                block_on(async { Process::spawn(users, ()).unwrap().await.unwrap()[0] })
            });
            assert_eq!(other.join().unwrap(), user);
        });
    };
    let pipes = || {
        let links =
            std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
    };
    let in_turn = || [NOBODY, NOBODY - 1].into_iter().for_each(spawn_as);
    in_turn();
    let before = pipes();
    in_turn();
    in_turn();
    assert_eq!(pipes(), before);
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn a_process_that_changes_its_user_again_and_again_takes_no_more_descriptors_each_time() {
    if !is_root() {
        return;
    }
    block_on(async {
        let begun = Queue::bounded(8).unwrap();
        // One that outlives all changes.
        let mut child = Process::spawn(sleep_for_ever, (begun.clone(),)).unwrap();
        begun.get().await.unwrap();
        let change = async |to: u32| {
            nix::unistd::seteuid(Uid::from_raw(to)).unwrap();
            assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap()[1], to);
        };
        let mut most_at_first = 0;
        for round in 0..100 {
            change(NOBODY).await;
            change(0).await;
            if round == 10 {
                most_at_first = open_descriptors();
            }
        }
        // Retired servers end a moment after their last child.
        until("no more descriptors", || open_descriptors() <= most_at_first + 2).await;
        until("the retired servers end, but for the first", || servers().len() == 2).await;
        child.kill().unwrap();
        child.wait().await.unwrap();
    });
}

fn a_process_that_becomes_many_users_keeps_no_descriptors_for_those_without_children() {
    if !is_root() {
        return;
    }
    let pipes = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
    };
    let before = pipes();
    block_on(async {
        for user in 20_000..20_030 {
            nix::unistd::seteuid(Uid::from_raw(user)).unwrap();
            assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap()[1], user);
            nix::unistd::seteuid(Uid::from_raw(0)).unwrap();
        }
        // Nobody of these is left, and there is one that nobody has been yet.
        until("the servers end", || servers().len() <= 1).await;
        nix::unistd::seteuid(Uid::from_raw(NOBODY)).unwrap();
        Process::spawn(users, ()).unwrap().await.unwrap();
        let kept = pipes() - before;
        assert!(kept <= 2 * 4 + 2, "{kept} ends of pipes");
    });
}

async fn is_a_worker() -> u32 {
    std::process::id()
}

/// Has workers, a fork server and spare children of root, and some of nobody.
fn gives_up_root_and_waits() {
    block_on(async {
        let pool = Pool::builder().workers(2).build().unwrap();
        pool.map(|_: u32| (), 0..4_u32).await.unwrap();
        pool.apply(is_a_worker, ()).await.unwrap();
        with_spares().await;
        let begun = Queue::bounded(8).unwrap();
        let _of_root = Process::spawn(sleep_for_ever, (begun.clone(),)).unwrap();
        begun.get().await.unwrap();
        become_nobody();
        let _of_nobody = Process::spawn(sleep_for_ever, (begun.clone(),)).unwrap();
        begun.get().await.unwrap();
        println!("ready");
        std::future::pending::<()>().await;
    });
}

/// It could not kill them, but the kernel does.
fn death_of_a_process_that_gave_up_root_ends_its_root_children() {
    use std::io::BufRead;
    if !is_root() {
        return;
    }
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
    let mut inner = Command::new(std::env::current_exe().unwrap());
    let mut inner =
        inner.env("SCENARIO", "gives_up_root_and_waits").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(inner.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let all = || {
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let parents = pids.filter_map(|pid: u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
            Some((pid, parent.trim().parse::<u32>().ok()?))
        });
        let parents: std::collections::BTreeMap<u32, u32> = parents.collect();
        let mut found = vec![inner.id()];
        while let Some((pid, _)) = parents.iter().find(|(pid, parent)| found.contains(parent) && !found.contains(pid)) {
            found.push(*pid);
        }
        found
    };
    let family = all();
    assert!(family.len() >= 7, "two servers, two workers, two children: {family:?}");
    inner.kill().unwrap();
    inner.wait().unwrap();
    // The orphans are ours now.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::NOHANG) {
            Err(rustix::io::Errno::CHILD) => break,
            Ok(Some(_)) => continue,
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
        let left = servers();
        assert!(Instant::now() < deadline, "they live on: {left:?} of {family:?}");
    }
}

async fn gives_up_and_spawns(begins_with_a_child: bool) -> (Vec<String>, Vec<String>) {
    if begins_with_a_child {
        assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [0; 6]);
    }
    become_nobody();
    (rights(), spawn_rights().await.unwrap())
}

fn a_child_that_gives_up_root_gets_no_child_with_it() {
    if !is_root() {
        return;
    }
    block_on(async {
        for method in [mp::StartMethod::ForkServer, mp::StartMethod::Spawn] {
            for begins_with_a_child in [false, true] {
                let child = Process::builder().start_method(method).spawn(gives_up_and_spawns, (begins_with_a_child,));
                let (mine, theirs) = child.unwrap().await.unwrap();
                assert_eq!(mine, theirs);
            }
        }
        assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [0; 6]);
    });
}

fn a_child_has_exactly_the_capabilities_of_its_parent() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    if !can("giving up a capability", sets.permitted.contains(CapabilitySet::KILL | CapabilitySet::SETPCAP)) {
        return;
    }
    block_on(async {
        with_spares().await;
        assert_eq!(spawn_rights().await.unwrap(), rights());
        sets.effective.remove(CapabilitySet::KILL);
        rustix::thread::set_capabilities(None, sets).unwrap();
        assert_eq!(spawn_rights().await.unwrap(), rights(), "not effective");
        sets.permitted.remove(CapabilitySet::KILL);
        rustix::thread::set_capabilities(None, sets).unwrap();
        assert_eq!(spawn_rights().await.unwrap()[4..6], rights()[4..6], "not permitted");
        rustix::thread::remove_capability_from_bounding_set(CapabilitySet::SYS_BOOT).unwrap();
        // An exec by root gives what is in the bounding set, no more: a child may have less than its parent.
        let boot = CapabilitySet::SYS_BOOT.bits();
        let less = rights()[4..7].iter().map(|set| u64::from_str_radix(set, 16).unwrap() & !boot).collect::<Vec<_>>();
        let sets = |rights: Vec<String>| -> Vec<u64> {
            rights[4..7].iter().map(|set| u64::from_str_radix(set, 16).unwrap()).collect()
        };
        assert_eq!(sets(spawn_rights().await.unwrap()), less, "not in the bounding set");
        for _ in 0..3 {
            let mut afresh = Process::builder().start_method(mp::StartMethod::Spawn).spawn(rights, ()).unwrap();
            assert_eq!(sets(afresh.join().await.unwrap()), less);
        }
    });
}

fn permitted() -> u64 {
    rustix::thread::capabilities(None).unwrap().permitted.bits()
}

fn permitted_at_begin_and_now() -> (u64, u64) {
    (*AT_BEGIN.get().unwrap(), permitted())
}

fn capabilities_that_root_has_dropped_do_not_come_back_before_init() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    if !is_root() || !can("giving up a capability", sets.permitted.contains(CapabilitySet::KILL)) {
        return;
    }
    block_on(async {
        sets.effective.remove(CapabilitySet::KILL);
        sets.permitted.remove(CapabilitySet::KILL);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let mine = permitted();
        for method in [mp::StartMethod::ForkServer, mp::StartMethod::Spawn] {
            let child = Process::builder().start_method(method).spawn(permitted_at_begin_and_now, ());
            assert_eq!(child.unwrap().await.unwrap(), (mine, mine), "{method:?}");
        }
    });
}

/// A filter that lets everything pass.
fn filter() {
    refuse(-1);
}

/// A filter that lets every system call pass but this one, which is not permitted from now on.
fn refuse(call: libc::c_long) {
    let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    rustix::thread::set_no_new_privs(true).unwrap();
    // SAFETY: the program is as long as it says and outlives the call, which copies it.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn promises_and_filters_of_the_parent_hold_in_later_children() {
    block_on(async {
        with_spares().await;
        rustix::thread::set_no_new_privs(true).unwrap();
        assert_eq!(spawn_rights().await.unwrap(), rights());
        for _ in 0..2 {
            filter();
            assert_eq!(spawn_rights().await.unwrap(), rights());
        }
    });
}

fn namespaces() -> Vec<String> {
    let names = ["user", "mnt", "net", "ipc", "uts", "cgroup", "pid"];
    let link = |name| std::fs::read_link(format!("/proc/thread-self/ns/{name}")).unwrap();
    names.map(|name| link(name).to_string_lossy().into_owned()).to_vec()
}

fn root_names() -> Vec<String> {
    let entries = std::fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

fn a_child_has_the_root_directory_and_the_namespaces_of_its_parent() {
    let kinds = [
        CloneFlags::CLONE_NEWNET,
        CloneFlags::CLONE_NEWUTS,
        CloneFlags::CLONE_NEWIPC,
        CloneFlags::CLONE_NEWCGROUP,
        CloneFlags::CLONE_NEWNS,
    ];
    block_on(async {
        with_spares().await;
        for kind in kinds {
            if can("a new namespace (CAP_SYS_ADMIN)", unshare(kind).is_ok()) {
                for _ in 0..3 {
                    assert_eq!(Process::spawn(namespaces, ()).unwrap().await.unwrap(), namespaces());
                }
            }
        }
        let place = std::env::temp_dir().join(format!("multiprocess-rights-{}", alone::unique()));
        std::fs::create_dir(&place).unwrap();
        let changed = change_root(&place);
        if can("changing the root directory", changed.is_ok()) {
            std::fs::create_dir("/below").unwrap();
            assert_eq!(Process::spawn(root_names, ()).unwrap().await.unwrap(), root_names());
            // Nothing starts where there is no /proc, and nothing starts elsewhere instead.
            nix::unistd::chroot("/below").unwrap();
            let error = Process::spawn(root_names, ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Spawn);
            assert!(error.to_string().contains("/proc"), "{error}");
        }
    });
}

/// A root directory in memory that has /proc and /dev and nothing else; it goes with the mount namespace.
fn change_root(place: &std::path::Path) -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), NONE)?;
    for name in ["proc", "dev", "lib", "lib64", "usr"] {
        let (from, to) = (std::path::Path::new("/").join(name), place.join(name));
        if from.is_dir() {
            std::fs::create_dir(&to).unwrap();
            mount(Some(&from), &to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        }
    }
    std::fs::remove_dir(place).unwrap_err();
    nix::unistd::chroot(place)?;
    nix::unistd::chdir("/")
}

fn a_child_of_a_new_user_namespace_is_in_it() {
    block_on(async {
        with_spares().await;
        if can("a new user namespace", unshare(CloneFlags::CLONE_NEWUSER).is_ok()) {
            for _ in 0..3 {
                assert_eq!(Process::spawn(namespaces, ()).unwrap().await.unwrap(), namespaces());
            }
            let child = spawn_rights().await.unwrap();
            assert_eq!(child[..3], rights()[..3]);
        }
    });
}

fn children_in_another_pid_namespace_are_refused() {
    block_on(async {
        with_spares().await;
        if can("a new pid namespace (CAP_SYS_ADMIN)", unshare(CloneFlags::CLONE_NEWPID).is_ok()) {
            let error = Process::spawn(users, ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Spawn);
            assert!(error.to_string().contains("pid namespace"), "{error}");
        }
    });
}

fn sleep_for_ever(begun: Queue<u32>) {
    begun.blocking_put(std::process::id()).unwrap();
    std::thread::sleep(Duration::from_secs(3600));
}

fn process_that_gave_up_root_can_still_end_children_that_have_it() {
    if !is_root() {
        return;
    }
    block_on(async {
        let begun = Queue::bounded(8).unwrap();
        let mut children: Vec<_> = (0..3).map(|_| Process::spawn(sleep_for_ever, (begun.clone(),)).unwrap()).collect();
        for _ in 0..3 {
            begun.get().await.unwrap();
        }
        become_nobody();
        assert_eq!(Process::spawn(users, ()).unwrap().await.unwrap(), [NOBODY; 6]);
        let [first, second, third] = &mut children[..] else { unreachable!() };
        first.kill().unwrap();
        assert_eq!(first.wait().await.unwrap().signal(), Some(Signal::KILL.as_raw()));
        assert!(second.is_alive() && third.is_alive());
        second.terminate().unwrap();
        assert_eq!(second.wait().await.unwrap().signal(), Some(Signal::TERM.as_raw()));
        assert!(third.is_alive());
        third.kill().unwrap();
        assert_eq!(third.wait().await.unwrap().signal(), Some(Signal::KILL.as_raw()));
    });
}

fn workers_that_replace_others_have_the_rights_of_that_moment() {
    if !is_root() {
        return;
    }
    block_on(async {
        let pool = Pool::builder().workers(1).max_tasks_per_worker(2).build().unwrap();
        assert_eq!(pool.apply(users, ()).await.unwrap(), [0; 6]);
        become_nobody();
        assert_eq!(pool.apply(users, ()).await.unwrap(), [0; 6], "it was started before");
        for _ in 0..5 {
            assert_eq!(pool.apply(users, ()).await.unwrap(), [NOBODY; 6]);
        }
    });
}

fn stuck() {
    std::thread::sleep(Duration::from_secs(3600));
}

fn a_pool_with_privileged_workers_keeps_its_deadlines_and_ends() {
    if !is_root() {
        return;
    }
    block_on(async {
        let pool = Pool::builder().workers(2).build().unwrap();
        assert_eq!(pool.apply(users, ()).await.unwrap(), [0; 6]);
        become_nobody();
        let error = pool.apply(stuck, ()).timeout(Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        let waits = pool.apply_async(stuck, ());
        pool.terminate();
        tokio::time::timeout(Duration::from_secs(20), pool.join()).await.unwrap().unwrap();
        waits.await.unwrap_err();
    });
}

/// The children of this process that have not ended.
fn servers() -> Vec<u32> {
    let me = std::process::id();
    let children = std::fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn a_retired_server_ends_with_its_last_child() {
    if !is_root() {
        return;
    }
    block_on(async {
        let begun = Queue::bounded(8).unwrap();
        let mut child = Process::spawn(sleep_for_ever, (begun.clone(),)).unwrap();
        begun.get().await.unwrap();
        let first = servers();
        become_nobody();
        Process::spawn(users, ()).unwrap().await.unwrap();
        assert_eq!(servers().len(), 2);
        child.kill().unwrap();
        child.wait().await.unwrap();
        drop(child);
        until("the first server ends, and is no zombie", || servers() != first && servers().len() == 1).await;
    });
}

fn preload_of_root_runs_again_for_the_user_that_it_becomes() {
    const LONG: Duration = Duration::from_secs(8);
    static LOADED_BY: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    fn load() {
        if Uid::current().is_root() {
            // It cannot be killed by the user any more, and must not be waited for.
            std::thread::sleep(LONG);
        }
        LOADED_BY.get_or_init(|| Uid::current().as_raw());
    }
    if !is_root() {
        return;
    }
    mp::preload(load).unwrap();
    become_nobody();
    block_on(async {
        let start = Instant::now();
        let loaded_by = Process::spawn(|| LOADED_BY.get().copied(), ()).unwrap().await.unwrap();
        assert_eq!(loaded_by, Some(NOBODY));
        assert!(start.elapsed() < LONG, "it did not wait for what it has no use for");
        until("the first server has ended, and is no zombie", || servers().len() == 1).await;
    });
}

/// The users of the processes that remove names when this one ends.
fn removers() -> Vec<String> {
    let pids = alone::children_of(std::process::id()).into_iter();
    let statuses = pids.filter_map(|(pid, _)| std::fs::read_to_string(format!("/proc/{pid}/status")).ok());
    let of_cleaners = statuses.filter(|status| status.starts_with("Name:\tmp-cleaner\n"));
    let mut users: Vec<String> = of_cleaners
        .filter_map(|status| {
            Some(status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.to_owned())
        })
        .collect();
    users.sort();
    users
}

fn gives_names_as_two_users() {
    let give = |number: u32| mp::SharedMemory::create(&format!("given-{number}-{}", std::process::id()), 10).unwrap();
    let change = |user: u32| {
        let (user, saved) = (Uid::from_raw(user), Uid::from_raw(0));
        setresuid(Uid::from_raw(0), Uid::from_raw(0), saved).unwrap();
        setresuid(user, user, saved).unwrap();
    };
    let mut all = vec![give(0)];
    change(NOBODY);
    all.push(give(1));
    assert_eq!(removers(), ["0", &NOBODY.to_string()]);
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).unwrap();
    all.push(give(2));
    change(NOBODY);
    all.push(give(3));
    let left = mp::SharedMemory::create(&format!("left-{}", std::process::id()), 10).unwrap();
    left.unlink().unwrap();
    assert_eq!(removers(), ["0", &NOBODY.to_string()], "there is one for each");
    println!("given");
    std::thread::sleep(Duration::from_secs(90)); // Until it is killed.
    drop(all);
}

fn names_are_removed_by_a_process_of_the_user_that_gave_them() {
    if !is_root() {
        return;
    }
    let mut inner = Command::new(std::env::current_exe().unwrap());
    let mut inner =
        inner.env("SCENARIO", "gives_names_as_two_users").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(inner.stdout.take().unwrap()), &mut line).unwrap();
    assert_eq!(line, "given\n");
    let names: Vec<_> = (0..4).map(|number| format!("/dev/shm/given-{number}-{}", inner.id())).collect();
    assert!(names.iter().all(|name| std::path::Path::new(name).exists()));
    inner.kill().unwrap();
    inner.wait().unwrap();
    alone::until("the names are gone", || !names.iter().any(|name| std::path::Path::new(name).exists()));
}

fn descriptors() -> Vec<String> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.unwrap().path().read_link().ok());
    // The directory itself is one of them, under this process's pid.
    let links = links.filter(|path| !path.starts_with("/proc"));
    let kind = |path: std::path::PathBuf| path.to_string_lossy().split(':').next().unwrap_or_default().to_owned();
    let mut kinds: Vec<_> = links.map(kind).collect();
    kinds.sort_unstable();
    kinds
}

fn where_close_range_is_refused_a_child_has_the_same_descriptors() {
    block_on(async {
        let expected = Process::spawn(descriptors, ()).unwrap().await.unwrap();
        refuse(libc::SYS_close_range);
        for _ in 0..4 {
            assert_eq!(Process::spawn(descriptors, ()).unwrap().await.unwrap(), expected);
        }
    });
}

fn a_refused_system_call_that_is_needed_is_an_error_that_names_it() {
    let calls = [
        ("pidfd_open", libc::SYS_pidfd_open),
        ("memfd_create", libc::SYS_memfd_create),
        ("signalfd4", libc::SYS_signalfd4),
        ("fallocate", libc::SYS_fallocate),
    ];
    for (name, call) in calls {
        // Each in a process that has not done it yet.
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.env("SCENARIO", "spawns_with_a_refused_call").env("REFUSED", call.to_string()).output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {text} {}", String::from_utf8_lossy(&output.stderr));
        println!("{name}: {text}");
        assert!(text.contains(&format!("`{name}` is refused")), "{text}");
        assert!(text.contains("Operation not permitted") || text.contains("Permission denied"), "{name}: {text}");
    }
}

fn spawns_with_a_refused_call() {
    refuse(std::env::var("REFUSED").unwrap().parse().unwrap());
    let error = block_on(async { Process::spawn(users, ()).map(drop).unwrap_err() });
    assert_eq!(error.kind(), ErrorKind::Spawn, "{error}");
    println!("{error}");
}

/// What a process has beside its rights, as the kernel shows it.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Likeness {
    umask: String,
    nice: i32,
    cpus: String,
    limits: Vec<(Option<u64>, Option<u64>)>,
}

fn likeness() -> Likeness {
    use rustix::process::{Resource, getpid, getpriority_process, getrlimit};
    let [umask, cpus] = status(vec!["Umask".into(), "Cpus_allowed_list".into()]).try_into().unwrap();
    let resources = [Resource::Core, Resource::Nofile, Resource::Nproc, Resource::As, Resource::Fsize];
    let limits = resources.map(getrlimit).map(|limit| (limit.current, limit.maximum)).to_vec();
    Likeness { umask, nice: getpriority_process(Some(getpid())).unwrap(), cpus, limits }
}

fn set_soft_limit(resource: rustix::process::Resource, value: u64) {
    let maximum = rustix::process::getrlimit(resource).maximum;
    let current = Some(maximum.map_or(value, |maximum| maximum.min(value)));
    rustix::process::setrlimit(resource, rustix::process::Rlimit { current, maximum }).unwrap();
}

fn umask_nice_value_cpus_and_limits_are_those_of_the_parent_at_the_spawn() {
    use rustix::fs::Mode;
    use rustix::process::Resource;
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    async fn children_are_like_this_process() {
        for _ in 0..3 {
            assert_eq!(Process::spawn(likeness, ()).unwrap().await.unwrap(), likeness());
        }
        let mut afresh = Process::builder().start_method(mp::StartMethod::Spawn).spawn(likeness, ()).unwrap();
        assert_eq!(afresh.join().await.unwrap(), likeness());
        let grandchild = async || Process::spawn(likeness, ()).unwrap().await.unwrap();
        assert_eq!(Process::spawn(grandchild, ()).unwrap().await.unwrap(), likeness());
    }
    block_on(async {
        children_are_like_this_process().await;
        for mask in [0o077, 0o027] {
            rustix::process::umask(Mode::from_raw_mode(mask));
            children_are_like_this_process().await;
        }
        set_soft_limit(Resource::Core, 4096);
        set_soft_limit(Resource::Nofile, 600);
        children_are_like_this_process().await;
        set_soft_limit(Resource::Nofile, 700);
        children_are_like_this_process().await;
        let all = sched_getaffinity(None).unwrap();
        let last = (0..CpuSet::MAX_CPU).rfind(|cpu| all.is_set(*cpu)).unwrap();
        let mut one = CpuSet::new();
        one.set(last);
        for cpus in [one, all] {
            sched_setaffinity(None, &cpus).unwrap();
            children_are_like_this_process().await;
        }
        rustix::process::nice(3).unwrap();
        children_are_like_this_process().await;
        // A child that says it itself is asked, not this one.
        let mut other = Process::builder().umask(0o007).spawn(likeness, ()).unwrap();
        assert_eq!(other.join().await.unwrap().umask, "0007");
    });
}

fn oom_score() -> i32 {
    std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap()
}

fn the_score_for_the_end_of_memory_is_that_at_the_start_of_the_fork_server() {
    let set = |score: i32| std::fs::write("/proc/self/oom_score_adj", score.to_string()).unwrap();
    block_on(async {
        let of_children = async || {
            let forked = Process::spawn(oom_score, ()).unwrap().await.unwrap();
            let afresh = Process::builder().start_method(mp::StartMethod::Spawn).spawn(oom_score, ()).unwrap();
            let grandchild = async || Process::spawn(oom_score, ()).unwrap().await.unwrap();
            [forked, afresh.await.unwrap(), Process::spawn(grandchild, ()).unwrap().await.unwrap()]
        };
        let begin = oom_score() + 10;
        set(begin);
        assert_eq!(of_children().await, [begin; 3]);
        set(begin + 10);
        assert_eq!(of_children().await, [begin; 3], "it is not passed on");
        // The child itself may take another.
        let own = |score: i32| {
            std::fs::write("/proc/self/oom_score_adj", score.to_string()).unwrap();
            oom_score()
        };
        assert_eq!(Process::spawn(own, (begin + 30,)).unwrap().await.unwrap(), begin + 30);
    });
}

fn a_builder_gives_a_child_umask_nice_value_cpus_and_limits() {
    let one = || mp::cpu_count() - 1;
    block_on(async {
        for method in [mp::StartMethod::ForkServer, mp::StartMethod::Spawn] {
            for _ in 0..3 {
                let builder = Process::builder().start_method(method).umask(0o123).nice(7);
                let builder = builder.memory_limit(6 << 30).descriptor_limit(321);
                let child = builder.spawn(likeness, ()).unwrap().await.unwrap();
                assert_eq!((child.umask.as_str(), child.nice), ("0123", 7));
                assert_eq!(child.limits[1], (Some(321), Some(321)));
                let (soft, hard) = child.limits[3];
                assert_eq!(soft, Some(6 << 30));
                assert!(hard.is_some_and(|hard| (6 << 30..8 << 30).contains(&hard)), "{hard:?}");
                let others = Process::spawn(likeness, ()).unwrap().await.unwrap();
                assert_eq!(others, likeness());
            }
        }
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (one()..rustix::thread::CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap();
        let child = Process::builder().cpus([cpu]).spawn(likeness, ()).unwrap().await.unwrap();
        assert_eq!(child.cpus, cpu.to_string());
    });
}

fn option_that_cannot_be_granted_is_an_error_that_names_it() {
    block_on(async {
        let error = Process::builder().cpus([100_000]).spawn(likeness, ()).unwrap_err();
        assert!(error.kind() == ErrorKind::Spawn && error.to_string().contains("100000"), "{error}");
        let error = Process::builder().cpus([1000]).spawn(likeness, ()).unwrap().await.unwrap_err();
        assert!(error.kind() == ErrorKind::Spawn && error.to_string().contains("its CPUs"), "{error}");
        if is_root() {
            become_nobody();
            let error = Process::builder().nice(-5).spawn(likeness, ()).unwrap().await.unwrap_err();
            assert!(error.kind() == ErrorKind::Spawn && error.to_string().contains("nice value"), "{error}");
        }
    });
}

/// Takes all the memory that it gets.
fn fill() {
    let (mut all, mut size) = (Vec::new(), 64 << 20);
    while size > 16 {
        let mut block = Vec::<u8>::new();
        match all.try_reserve(1).is_ok() && block.try_reserve_exact(size).is_ok() {
            true => all.push(block),
            false => size /= 2,
        }
    }
    std::mem::forget(all);
}

fn panics_when_full() {
    fill();
    panic!("it is full")
}

async fn is_an_error_in_time(child: Process<()>) {
    let error = alone::within(child).await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Panicked | ErrorKind::MemoryLimit), "{error}");
    if let Some(panic) = error.panic() {
        assert_eq!(panic.message(), "it is full");
    }
}

fn a_panic_at_the_memory_limit_of_a_builder_is_an_error() {
    block_on(async {
        for method in [mp::StartMethod::ForkServer, mp::StartMethod::Spawn] {
            let builder = Process::builder().start_method(method).memory_limit(4 << 30).env("RUST_BACKTRACE", "1");
            is_an_error_in_time(builder.spawn(panics_when_full, ()).unwrap()).await;
        }
    });
}

/// As after `ulimit -v`.
fn a_panic_at_a_memory_limit_without_spare_is_an_error_and_a_line() {
    fn at_a_hard_limit() {
        let limit = rustix::process::Rlimit { current: Some(4 << 30), maximum: Some(4 << 30) };
        rustix::process::setrlimit(rustix::process::Resource::As, limit).unwrap();
        // A few pages stay, as what is said needs some.
        let some = vec![1_u8; 256 << 10];
        fill();
        drop(std::hint::black_box(some));
        panic!("it is full")
    }
    block_on(async {
        let builder = Process::builder().env("RUST_BACKTRACE", "1").stderr(mp::Stdio::piped());
        let mut child = builder.spawn(at_a_hard_limit, ()).unwrap();
        let mut said = child.take_stderr().unwrap();
        is_an_error_in_time(child).await;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut said, &mut text).unwrap();
        assert!(text.contains("it is full") && text.contains("no room to find out its stack"), "{text}");
    });
}

fn directory() -> String {
    std::fs::read_link("/proc/self/cwd").unwrap().to_string_lossy().into_owned()
}

async fn children_are_where_this_process_is() {
    for _ in 0..3 {
        assert_eq!(Process::spawn(directory, ()).unwrap().await.unwrap(), directory());
    }
    let mut afresh = Process::builder().start_method(mp::StartMethod::Spawn).spawn(directory, ()).unwrap();
    assert_eq!(afresh.join().await.unwrap(), directory());
}

/// In a directory of its own, which it makes.
fn enter(name: &str) -> std::path::PathBuf {
    let place = std::env::temp_dir().join(format!("multiprocess-{name}-{}", alone::unique()));
    std::fs::create_dir(&place).unwrap();
    std::env::set_current_dir(&place).unwrap();
    place
}

fn close(place: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(place, std::fs::Permissions::from_mode(0o700)).unwrap();
}

fn a_working_directory_that_the_user_may_not_search_is_no_hindrance() {
    if !is_root() {
        return;
    }
    let place = enter("closed");
    close(&place);
    become_nobody();
    assert!(std::fs::metadata(".").is_err(), "it may not search it");
    block_on(async {
        children_are_where_this_process_is().await;
        let child = Process::builder().current_dir("/").spawn(directory, ()).unwrap();
        assert_eq!(child.await.unwrap(), "/");
        children_are_where_this_process_is().await;
        // A child that goes elsewhere and has children there does not take those of its parent with it.
        let goes = async || {
            std::env::set_current_dir("/proc").unwrap();
            Process::spawn(directory, ()).unwrap().await.unwrap()
        };
        assert_eq!(Process::spawn(goes, ()).unwrap().await.unwrap(), "/proc");
        children_are_where_this_process_is().await;
        let grandchild = async || Process::spawn(directory, ()).unwrap().await.unwrap();
        assert_eq!(Process::spawn(grandchild, ()).unwrap().await.unwrap(), directory());
        std::env::set_current_dir("/").unwrap();
        children_are_where_this_process_is().await;
    });
}

fn a_working_directory_that_is_closed_later_is_no_hindrance() {
    if !is_root() {
        return;
    }
    block_on(async {
        children_are_where_this_process_is().await;
        let place = enter("closed-later");
        children_are_where_this_process_is().await;
        close(&place);
        become_nobody();
        children_are_where_this_process_is().await;
    });
}

fn a_working_directory_that_was_removed_is_no_hindrance() {
    block_on(async {
        let place = enter("removed");
        children_are_where_this_process_is().await;
        std::fs::remove_dir(&place).unwrap();
        children_are_where_this_process_is().await;
        let place = enter_below_root("removed-before");
        std::fs::remove_dir(&place).unwrap();
        children_are_where_this_process_is().await;
    });
}

/// The same from a directory that is gone.
fn enter_below_root(name: &str) -> std::path::PathBuf {
    std::env::set_current_dir("/").unwrap();
    enter(name)
}

fn limit_descriptors(limit: u64) {
    let limits = rustix::process::Rlimit { current: Some(limit), maximum: Some(limit) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limits).unwrap();
}

fn plus_one(n: u64) -> u64 {
    n + 1
}

fn three_hundred_starts_at_once_need_no_more_than_a_usual_limit() {
    if !is_root() {
        return;
    }
    limit_descriptors(1024);
    become_nobody(); // Root may have any number on their way.
    block_on(async {
        for (method, starts) in [(mp::StartMethod::ForkServer, 300), (mp::StartMethod::Spawn, 60)] {
            let builder = || Process::builder().start_method(method);
            let children = (0..starts).map(|n| builder().spawn(plus_one, (n,)).unwrap()).collect::<Vec<_>>();
            let sums = futures::future::try_join_all(children).await.unwrap();
            assert!(sums.into_iter().eq(1..=starts), "{method:?}");
        }
    });
}

/// Sends descriptors to nobody until the kernel says that there are enough.
fn fill_the_way() -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
    use std::os::fd::AsFd;
    let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
    let null = std::fs::File::open("/dev/null").unwrap();
    let many = [null.as_fd(); 200];
    let (to, keeps) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
    loop {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        let bytes = [std::io::IoSlice::new(&[0])];
        match rustix::net::sendmsg(&to, &bytes, &mut control, SendFlags::empty()) {
            Err(rustix::io::Errno::TOOMANYREFS) => return keeps,
            sent => _ = sent.unwrap(),
        }
    }
}

fn a_spawn_waits_while_too_many_descriptors_are_on_their_way() {
    if !is_root() {
        return;
    }
    limit_descriptors(1024);
    become_nobody();
    block_on(async {
        assert_eq!(Process::spawn(plus_one, (1,)).unwrap().await.unwrap(), 2);
        let held = fill_the_way();
        let main = rustix::thread::gettid();
        let lets_go = std::thread::spawn(move || {
            alone::until("the spawn waits", || alone::thread_is_asleep(main));
            drop(held);
        });
        assert_eq!(Process::spawn(plus_one, (2,)).unwrap().await.unwrap(), 3);
        lets_go.join().unwrap();
        let _held = fill_the_way();
        let error = Process::spawn(plus_one, (3,)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Spawn);
        assert!(error.to_string().contains("RLIMIT_NOFILE, here 1024"), "{error}");
    });
}

/// How many descriptors a worker takes in the process of its pool, as the guide has it.
const OF_A_WORKER: usize = 7;

fn a_pool_of_sixty_workers_needs_no_more_than_a_usual_limit() {
    if !is_root() {
        return;
    }
    limit_descriptors(1024);
    become_nobody(); // Root may have any number on their way.
    block_on(alone::within(async {
        let first = Pool::new(1).unwrap();
        first.apply(plus_one, (1,)).await.unwrap();
        let before = open_descriptors();
        let pool = Pool::new(60).unwrap();
        assert!(pool.map(plus_one, 0..2000).chunksize(1).await.unwrap().into_iter().eq(1..=2000));
        until("all workers are there", || pool.stats().workers.len() == 60).await;
        until("each has its descriptors", || (open_descriptors() - before) / 60 == OF_A_WORKER).await;
    }));
}

fn a_pool_starts_when_fewer_descriptors_are_on_their_way() {
    if !is_root() {
        return;
    }
    limit_descriptors(1024);
    become_nobody();
    block_on(alone::within(async {
        assert_eq!(Process::spawn(plus_one, (1,)).unwrap().await.unwrap(), 2);
        let held = fill_the_way();
        let main = rustix::thread::gettid();
        let lets_go = std::thread::spawn(move || {
            alone::until("the start of a worker waits", || alone::thread_is_asleep(main));
            drop(held);
        });
        let pool = Pool::new(3).unwrap();
        assert!(pool.map(plus_one, 0..300).await.unwrap().into_iter().eq(1..=300));
        lets_go.join().unwrap();
    }));
}

fn a_pool_beyond_the_limit_works_with_the_workers_that_there_can_be() {
    block_on(alone::within(async {
        assert_eq!(Process::spawn(plus_one, (1,)).unwrap().await.unwrap(), 2);
        limit_descriptors((open_descriptors() + 10 * OF_A_WORKER) as u64);
        let pool = Pool::new(40).unwrap();
        for _ in 0..10 {
            assert!(pool.map(plus_one, 0..500).chunksize(1).await.unwrap().into_iter().eq(1..=500));
        }
        let workers = pool.stats().workers.len();
        assert!((1..=10).contains(&workers), "{workers}");
        assert_eq!(pool.broken(), None);
    }));
}

fn a_pool_without_descriptors_for_a_worker_names_the_limit_and_the_need() {
    block_on(alone::within(async {
        assert_eq!(Process::spawn(plus_one, (1,)).unwrap().await.unwrap(), 2);
        let pool = Pool::builder().workers(2).build().unwrap();
        let limit = open_descriptors() + 2;
        limit_descriptors(limit as u64);
        let error = pool.apply(plus_one, (1,)).await.unwrap_err().to_string();
        assert!(error.contains(&format!("{limit} (RLIMIT_NOFILE)")), "{error}");
        assert!(error.contains(&format!("each worker of a pool takes {OF_A_WORKER}")), "{error}");
        assert!(error.ends_with("[too-many-descriptors]") || error.ends_with("[pool-broken]"), "{error}");
    }));
}

fn at_a_low_limit_a_program_has_children_or_an_error_that_names_the_need() {
    let limit = Command::new(std::env::current_exe().unwrap()).env("SCENARIO", "spawns_at_a_limit").output().unwrap();
    let text = String::from_utf8_lossy(&limit.stdout);
    assert!(limit.status.success(), "{text} {}", String::from_utf8_lossy(&limit.stderr));
    let first: u64 = text.trim().parse().unwrap();
    println!("the first child was there at a limit of {first}");
    assert!(first <= 32, "the guide says 32");
}

/// Prints the lowest limit at which there is a child.
fn spawns_at_a_limit() {
    for limit in 8..200 {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("SCENARIO", "spawns_at_this_limit").env("LIMIT", limit.to_string());
        let output = command.output().unwrap();
        match String::from_utf8_lossy(&output.stdout).trim() {
            "done" => return println!("{limit}"),
            text => assert!(text.contains("RLIMIT_NOFILE") || limit < 16, "{limit}: {text}"),
        }
    }
}

fn spawns_at_this_limit() {
    limit_descriptors(std::env::var("LIMIT").unwrap().parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return println!("{}", std::env::var("LIMIT").unwrap()) };
    match runtime.block_on(async { Process::spawn(plus_one, (1,))?.await }) {
        Ok(_) => println!("done"),
        Err(error) => println!("{error}"),
    }
}
