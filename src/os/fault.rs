//! Named points at which a test kills or stops a process: the moves in the Death tables.
//!
//! `MULTIPROCESS_KILL_AT=put.written` kills a process with SIGKILL when it gets to that point, `put.written:3` at the
//! third time; `MULTIPROCESS_STOP_AT` stops it with SIGSTOP. In debug builds only: in others a point is nothing.
//! A program whose file gives it rights ignores both.
//! In models, and where threads play processes on heap memory, it ends the thread that plays the process.

#[cfg(not(any(debug_assertions, test, multiprocess_loom)))]
#[inline(always)]
pub(crate) fn point(_name: &'static str) {}

#[cfg(multiprocess_loom)]
loom::thread_local! {
    pub(crate) static DIES_AT: std::cell::Cell<Option<&'static str>> = std::cell::Cell::new(None);
}

/// The panic payload by which a process that a thread plays dies.
#[cfg(any(test, multiprocess_loom))]
pub(crate) struct Death;

#[cfg(multiprocess_loom)]
pub(crate) fn point(name: &'static str) {
    if DIES_AT.with(std::cell::Cell::get) == Some(name) {
        std::panic::resume_unwind(Box::new(Death));
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
thread_local! {
    static POINTS_LEFT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// This thread ends at the `points`-th point that it comes to from now on, whichever that is; at none for 0.
#[cfg(all(test, not(multiprocess_loom)))]
pub(crate) fn die_after(points: u32) {
    POINTS_LEFT.set(points);
}

#[cfg(all(test, not(multiprocess_loom)))]
fn die_if_due() {
    match POINTS_LEFT.get() {
        0 => {}
        left => {
            POINTS_LEFT.set(left - 1);
            if left == 1 {
                std::panic::resume_unwind(Box::new(Death));
            }
        }
    }
}

#[cfg(all(any(debug_assertions, test), not(multiprocess_loom)))]
pub(crate) fn point(name: &'static str) {
    #[cfg(test)]
    die_if_due();
    for fault in FAULTS.get_or_init(Fault::both).iter().flatten() {
        fault.pass(name);
    }
}

#[cfg(all(any(debug_assertions, test), not(multiprocess_loom)))]
static FAULTS: std::sync::OnceLock<[Option<Fault>; 2]> = std::sync::OnceLock::new();

#[cfg(all(any(debug_assertions, test), not(multiprocess_loom)))]
struct Fault {
    name: String,
    /// Passages left until it happens.
    left: std::sync::atomic::AtomicU64,
    signal: rustix::process::Signal,
}

#[cfg(all(any(debug_assertions, test), not(multiprocess_loom)))]
impl Fault {
    fn both() -> [Option<Self>; 2] {
        use rustix::process::Signal;
        [("MULTIPROCESS_KILL_AT", Signal::KILL), ("MULTIPROCESS_STOP_AT", Signal::STOP)]
            .map(|(variable, signal)| Self::from_variable(variable, signal))
    }

    fn from_variable(variable: &str, signal: rustix::process::Signal) -> Option<Self> {
        let value = std::env::var(variable).ok().filter(|_| !super::secure::is_secure())?;
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
