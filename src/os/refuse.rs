//! Where a test has a single system call refused, in whichever process of the family makes it.
//!
//! `MULTIPROCESS_REFUSE` names a file of four words that every process of the family maps: a call, an errno, how many such
//! calls are left until it is refused, and how often that has happened. In debug builds only: in others nothing is asked.

#[cfg(any(not(debug_assertions), multiprocess_loom))]
#[inline(always)]
pub(crate) fn at(_call: &'static str) -> rustix::io::Result<()> {
    Ok(())
}

/// [`at`] for a call that may not wait: there EAGAIN is an answer, and not a failure.
pub(crate) fn at_waiting(call: &'static str, may_wait: bool) -> rustix::io::Result<()> {
    match at(call) {
        Err(rustix::io::Errno::AGAIN) if !may_wait => Ok(()),
        refused => refused,
    }
}

#[cfg(all(debug_assertions, not(multiprocess_loom)))]
pub(crate) use seam::at;

#[cfg(all(debug_assertions, not(multiprocess_loom)))]
mod seam {
    use rustix::io::Errno;
    use rustix::mm::{MapFlags, ProtFlags};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

    /// What the words are, in their order.
    struct Control {
        call: AtomicI64,
        errno: AtomicI64,
        left: AtomicI64,
        refused: AtomicI64,
    }

    /// An error if this call is to fail here and now; it is not made then.
    pub(crate) fn at(call: &'static str) -> rustix::io::Result<()> {
        let Some(control) = control() else { return Ok(()) };
        if control.call.load(SeqCst) != name(call) || control.left.fetch_sub(1, SeqCst) != 1 {
            return Ok(());
        }
        control.refused.fetch_add(1, SeqCst);
        Err(Errno::from_raw_os_error(control.errno.load(SeqCst) as i32))
    }

    /// FNV-1a.
    fn name(call: &str) -> i64 {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        call.bytes().fold(0xcbf2_9ce4_8422_2325, step) as i64
    }

    fn control() -> Option<&'static Control> {
        static CONTROL: OnceLock<Option<&'static Control>> = OnceLock::new();
        *CONTROL.get_or_init(|| {
            let path = std::env::var_os("MULTIPROCESS_REFUSE")?;
            let file = std::fs::File::options().read(true).write(true).open(path).ok()?;
            let (flags, len) = (ProtFlags::READ | ProtFlags::WRITE, size_of::<Control>());
            // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of ours.
            let map = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, flags, MapFlags::SHARED, &file, 0) }.ok()?;
            // SAFETY: page-aligned, never unmapped, and used by atomics alone; the test's file is long enough.
            Some(unsafe { &*map.cast::<Control>() })
        })
    }
}
