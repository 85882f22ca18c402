//! Which CPU a thread is on: [getcpu(2)](https://man7.org/linux/man-pages/man2/getcpu.2.html) and
//! [sched_setaffinity(2)](https://man7.org/linux/man-pages/man2/sched_setaffinity.2.html).

use super::attributes::set_affinity;
use super::poll::again;
use rustix::thread::sched_getaffinity;

/// The CPU that this thread is on: no system call. Not by rustix, for the reason that `os::clock` has.
pub(crate) fn current() -> usize {
    // Only a kernel from before 2.6.19 has none.
    nix::sched::sched_getcpu().unwrap_or(0)
}

/// Moves this thread to another of the CPUs that it may use, if there is one. Where it may run from then on is as before.
pub(crate) fn leave() {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut others = allowed;
    others.unset(current());
    if others.count() > 0 && set_affinity(&others).is_ok() {
        // It was in force a moment ago. If the machine has taken CPUs away since, it has seen to the threads as well.
        let _ = again(|| set_affinity(&allowed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinity_is_the_same_after_leaving_a_cpu() {
        let before = sched_getaffinity(None).unwrap();
        let here = current();
        assert!(before.is_set(here));
        leave();
        assert_eq!(sched_getaffinity(None).unwrap(), before);
        let mut only = before;
        only.clear();
        only.set(here);
        set_affinity(&only).unwrap();
        leave();
        assert_eq!((sched_getaffinity(None).unwrap(), current()), (only, here));
    }
}
