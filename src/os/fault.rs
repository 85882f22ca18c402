//! Where a test has a process killed or stopped: named points at the moves that the Death tables tell of.
//!
//! `MULTIPROCESS_KILL_AT=put.written` kills a process with SIGKILL when it gets to that point, `put.written:3` at the
//! third time; `MULTIPROCESS_STOP_AT` stops it with SIGSTOP. In debug builds only: in others a point is nothing.
//! In models it ends the thread that plays the process.

#[cfg(not(any(debug_assertions, multiprocess_loom)))]
#[inline(always)]
pub(crate) fn point(_name: &'static str) {}

#[cfg(multiprocess_loom)]
loom::thread_local! {
    pub(crate) static DIES_AT: std::cell::Cell<Option<&'static str>> = std::cell::Cell::new(None);
}

/// What a process of a model unwinds with.
#[cfg(multiprocess_loom)]
pub(crate) struct Death;

#[cfg(multiprocess_loom)]
pub(crate) fn point(name: &'static str) {
    if DIES_AT.with(std::cell::Cell::get) == Some(name) {
        std::panic::resume_unwind(Box::new(Death));
    }
}

#[cfg(all(debug_assertions, not(multiprocess_loom)))]
pub(crate) fn point(name: &'static str) {
    for fault in FAULTS.get_or_init(Fault::both).iter().flatten() {
        fault.pass(name);
    }
}

#[cfg(all(debug_assertions, not(multiprocess_loom)))]
static FAULTS: std::sync::OnceLock<[Option<Fault>; 2]> = std::sync::OnceLock::new();

#[cfg(all(debug_assertions, not(multiprocess_loom)))]
struct Fault {
    name: String,
    /// Passages left until it happens.
    left: std::sync::atomic::AtomicU64,
    signal: rustix::process::Signal,
}

#[cfg(all(debug_assertions, not(multiprocess_loom)))]
impl Fault {
    fn both() -> [Option<Self>; 2] {
        use rustix::process::Signal;
        [("MULTIPROCESS_KILL_AT", Signal::KILL), ("MULTIPROCESS_STOP_AT", Signal::STOP)]
            .map(|(variable, signal)| Self::from_variable(variable, signal))
    }

    fn from_variable(variable: &str, signal: rustix::process::Signal) -> Option<Self> {
        let value = std::env::var(variable).ok()?;
        let (name, left) = match value.split_once(':') {
            Some((name, left)) => (name.to_owned(), left.parse().ok()?),
            None => (value, 1),
        };
        Some(Self { name, left: u64::into(left), signal })
    }

    fn pass(&self, name: &str) {
        let is_it = self.name == name && self.left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 1;
        if is_it {
            let _ = rustix::process::kill_process(rustix::process::getpid(), self.signal);
        }
    }
}
