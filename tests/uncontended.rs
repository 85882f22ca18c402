//! A call that need not wait makes no system call and allocates nothing. Counted in a child that the kernel kills at its first
//! system call.

mod common;

use common::within;
use futures::FutureExt;
use multiprocess::{
    self as mp, Barrier, BoundedSemaphore, CancellationToken, Event, Process, Queue, RwLock, Semaphore,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

mp::test_support!();

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// From now on any system call of this thread but the exit kills the process.
fn forbid_system_calls() {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_exit_group as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions outlive the call, which copies them.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(refused, 0, "{}", std::io::Error::last_os_error());
}

/// Does `work` a few times, then without system calls a thousand times, and ends with how often that allocated.
fn count(mut work: impl FnMut()) {
    (0..3).for_each(|_| work());
    forbid_system_calls();
    let before = ALLOCATIONS.load(Relaxed);
    (0..1000).for_each(|_| work());
    let allocated = ALLOCATIONS.load(Relaxed) - before;
    // SAFETY: nothing is left to be done here.
    unsafe { libc::_exit(allocated.min(255) as i32) }
}

/// The exit code, or the signal negated.
async fn verdict(mut child: Process<()>) -> i32 {
    let status = within(child.wait()).await.unwrap();
    status.code().unwrap_or_else(|| -status.signal().unwrap())
}

#[tokio::test]
async fn semaphores() {
    let work = || {
        let (semaphore, bounded) = (Semaphore::new(2).unwrap(), BoundedSemaphore::new(2).unwrap());
        count(|| {
            drop(semaphore.try_acquire().unwrap());
            drop(semaphore.acquire().now_or_never().unwrap().unwrap());
            drop(semaphore.blocking_acquire().unwrap());
            semaphore.release().unwrap();
            semaphore.try_acquire().unwrap().forget();
            assert_eq!(semaphore.available(), 2);
            drop((bounded.try_acquire().unwrap(), bounded.acquire().now_or_never().unwrap().unwrap()));
        })
    };
    assert_eq!(verdict(Process::spawn(work, ()).unwrap()).await, 0);
}

#[tokio::test]
async fn uncontended_rwlock_makes_no_system_call() {
    let work = || {
        let lock = RwLock::new().unwrap();
        count(|| {
            drop((lock.try_read().unwrap(), lock.read().now_or_never().unwrap().unwrap()));
            drop(lock.try_write().unwrap());
            drop(lock.write().now_or_never().unwrap().unwrap());
            drop(lock.blocking_read().unwrap());
            drop(lock.blocking_write().unwrap());
        })
    };
    assert_eq!(verdict(Process::spawn(work, ()).unwrap()).await, 0);
}

#[tokio::test]
async fn uncontended_event_and_barrier_make_no_system_call() {
    let work = || {
        let (event, barrier) = (Event::new().unwrap(), Barrier::new(1).unwrap());
        count(|| {
            event.set();
            event.wait().now_or_never().unwrap().unwrap();
            event.blocking_wait().unwrap();
            event.clear();
            barrier.wait().now_or_never().unwrap().unwrap();
            barrier.blocking_wait().unwrap();
            assert_eq!((event.is_set(), barrier.waiting()), (false, 0));
        })
    };
    assert_eq!(verdict(Process::spawn(work, ()).unwrap()).await, 0);
}

#[tokio::test]
async fn asking_a_token_makes_no_system_call() {
    let work = || {
        let token = CancellationToken::new().unwrap();
        let (child, cancelled) = (token.child_token().unwrap(), CancellationToken::new().unwrap());
        cancelled.cancel();
        count(|| {
            assert!(!token.is_cancelled() && !child.is_cancelled() && cancelled.is_cancelled());
            cancelled.cancelled().now_or_never().unwrap();
            cancelled.cancel();
        })
    };
    assert_eq!(verdict(Process::spawn(work, ()).unwrap()).await, 0);
}

#[tokio::test]
async fn queues() {
    let work = || {
        let (numbers, words) = (Queue::bounded(8).unwrap(), Queue::<(u32, char)>::unbounded().unwrap());
        count(|| {
            numbers.put(1u64).now_or_never().unwrap().unwrap();
            numbers.try_put(2).unwrap();
            assert_eq!(numbers.get().now_or_never().unwrap().unwrap(), 1);
            assert_eq!((numbers.try_get().unwrap(), numbers.len()), (2, 0));
            words.put((3, 'x')).now_or_never().unwrap().unwrap();
            assert_eq!(words.get().now_or_never().unwrap().unwrap(), (3, 'x'));
        })
    };
    assert_eq!(verdict(Process::spawn(work, ()).unwrap()).await, 0);
}

#[tokio::test]
async fn the_count_can_fail() {
    let calls = || count(|| drop(std::fs::metadata("/")));
    assert_eq!(verdict(Process::spawn(calls, ()).unwrap()).await, -libc::SIGSYS);
    let allocates = || count(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(verdict(Process::spawn(allocates, ()).unwrap()).await, 255);
}
