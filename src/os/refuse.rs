//! Where a test has a single system call refused, in whichever process of the family makes it.
//!
//! `MULTIPROCESS_REFUSE` names a file of some words that every process of the family maps: which call fails, with which errno, and
//! how many such calls are left until then; how often that has happened; and how often each kind of call was made. The first three are one word, so
//! that no process takes a part of one fault for a part of another. In debug builds only: in others nothing is asked. A program whose file gives it
//! rights ignores it. `tests/layers.rs` sees that each call of `os` that can fail asks here, and `tests/faults.rs` that some use makes it.

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
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    /// In this order, which tests write by.
    #[repr(C)]
    struct Control {
        /// From the top: 24 bits of the call's [`name`], 8 of the errno, 32 of how many calls are left. 0: none fails.
        armed: AtomicU64,
        refused: AtomicU64,
        /// How often each kind was made, by whichever process: 24 bits of its name, 40 of the count. A kind has the first free place.
        made: [AtomicU64; 256],
    }

    impl Control {
        fn count(&self, name: u64) {
            for place in &self.made {
                match place.compare_exchange(0, name << 40 | 1, SeqCst, SeqCst) {
                    Ok(_) => return,
                    Err(seen) if seen >> 40 == name => {
                        place.fetch_add(1, SeqCst);
                        return;
                    }
                    Err(_) => {}
                }
            }
        }
    }

    /// An error if this call is to fail here and now; it is not made then.
    pub(crate) fn at(call: &'static str) -> rustix::io::Result<()> {
        let Some(control) = control() else { return Ok(()) };
        let name = name(call);
        control.count(name);
        let next = |armed: u64| (armed >> 40 == name && armed as u32 > 0).then(|| armed - 1);
        match control.armed.fetch_update(SeqCst, SeqCst, next) {
            Ok(armed) if armed as u32 == 1 => {
                control.refused.fetch_add(1, SeqCst);
                Err(Errno::from_raw_os_error((armed >> 32 & 0xff) as i32))
            }
            _ => Ok(()),
        }
    }

    /// 24 bits of FNV-1a.
    fn name(call: &str) -> u64 {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        call.bytes().fold(0xcbf2_9ce4_8422_2325, step) >> 40
    }

    fn control() -> Option<&'static Control> {
        static CONTROL: OnceLock<Option<&'static Control>> = OnceLock::new();
        *CONTROL.get_or_init(|| {
            let path = std::env::var_os("MULTIPROCESS_REFUSE").filter(|_| !crate::os::secure::is_secure())?;
            let file = std::fs::File::options().read(true).write(true).open(path).ok()?;
            let (flags, len) = (ProtFlags::READ | ProtFlags::WRITE, size_of::<Control>());
            // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of ours.
            let map = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, flags, MapFlags::SHARED, &file, 0) }.ok()?;
            // SAFETY: page-aligned, never unmapped, and used by atomics alone; the test's file is long enough.
            Some(unsafe { &*map.cast::<Control>() })
        })
    }
}
