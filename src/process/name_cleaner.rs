//! Removes the names that this process gave in /dev/shm when it ends, however it ends.
//!
//! The kernel frees the memory of a dead process, but not a name. So a process that gives names starts a name cleaner: a
//! process of the same program that waits for its owner to end and then removes the names that are left. It is started with
//! the first name, has a session of its own and holds no stream.
//!
//! # Death
//! | killed | the names |
//! |---|---|
//! | the owner, before its cleaner has registered the name | the name was never given |
//! | the owner, after that | the cleaner removes each name that still belongs to the same file |
//! | the cleaner only | the owner removes its names itself; its next name starts a cleaner and registers them all |
//! | the cleaner, then the owner before its next name | they stay until a program of the same user gives its first name |
//!
//! The last row needs SIGKILL for both, the cleaner first, or for their whole control group. A signal to the
//! program's process group does not reach the cleaner. Nothing watches the cleaner: that would take a thread or a second
//! cleaner. Each file that is left is marked as temporary; its owner holds a lock on it while it lives (`os::named`).
//!
//! # Rights
//! A cleaner removes names with the rights that its owner had when it started it. It registers a name only for a process with
//! its own user and group, as the kernel reports them. An owner that becomes another user starts another cleaner for its
//! later names, and keeps the former one for the names registered there.
//!
//! # Limits
//! A cleaner that does not answer in time (it is stopped, or a message was lost) is killed and replaced. So giving a name waits
//! for at most [`ANSWER`], plus the start of a new cleaner. Taking a name away waits for neither: the request is
//! queued, and the next thread to release the lock sends it.
#![forbid(unsafe_code)]

use super::protocol::{self, Answer, CleanerRequest, Named, Ready, Role};
use super::variables::Variables;
use super::{origin, role};
use crate::error::{Error, ErrorKind, Result};
use crate::os::sync::{lock, try_lock};
use crate::os::{attributes::Attributes, exec, fork, named, rights, signal, socket, socket::Sender, spawn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// The time in which a cleaner must confirm a name. It has nothing else to do.
const ANSWER: Duration = Duration::from_secs(3);

struct NameCleaner {
    /// The pid of the process that started it. A process forked from that one has no cleaner yet.
    owner: u32,
    /// Real user and group of the owner at the start of the cleaner.
    user: (u32, u32),
    /// The socket hangs up when this process ends, whatever was forked from it meanwhile.
    _private: fork::Private,
    socket: OwnedFd,
    process: exec::Process,
}

struct Cleaners {
    current: Option<NameCleaner>,
    /// Cleaners from before this process was another user.
    former: Vec<NameCleaner>,
    names: Vec<Named>,
}

impl Cleaners {
    const EMPTY: Self = Self { current: None, former: Vec::new(), names: Vec::new() };
}

static CLEANERS: Mutex<Cleaners> = Mutex::new(Cleaners::EMPTY);
/// Names that need not be removed any more and that the cleaner still has. The lock is held for a moment only.
static FORGOTTEN: Mutex<Vec<Named>> = Mutex::new(Vec::new());

/// Has `name` removed when this process ends, if it then still belongs to the file `identity`.
/// The file may get its name later.
pub(crate) fn remove_at_end(name: &str, identity: named::Identity) -> Result<()> {
    fork::check()?;
    let mut cleaners = Cleaners::get();
    let named = Named { name: name.to_string(), identity };
    let is_registered = cleaners.register(&named);
    cleaners.names.push(named);
    let started = if is_registered { Ok(()) } else { cleaners.start_cleaner() };
    if started.is_err() {
        cleaners.names.pop();
    }
    drop(cleaners);
    send_forgotten();
    started
}

/// Takes back [`remove_at_end`]: the name is removed already.
pub(crate) fn forget(name: &str, identity: named::Identity) {
    if fork::is_forked() {
        return;
    }
    lock(&FORGOTTEN).push(Named { name: name.to_string(), identity });
    send_forgotten();
}

/// Takes back [`remove_at_end`]: the name stays when this process ends.
pub(crate) fn keep(name: &str, identity: named::Identity) -> Result<()> {
    fork::check()?;
    let mut cleaners = Cleaners::get();
    let named = Named { name: name.to_string(), identity };
    cleaners.names.retain(|other| *other != named);
    // A cleaner that cannot be reached would remove the name, so it is replaced. One that is gone removes nothing.
    cleaners.former.iter().for_each(|cleaner| cleaner.try_send(&CleanerRequest::Forget(named.clone())));
    let kept = if cleaners.current.is_none() || cleaners.send(&CleanerRequest::Forget(named)) {
        Ok(())
    } else {
        cleaners.start_cleaner()
    };
    drop(cleaners);
    send_forgotten();
    kept
}

/// Sends the queued names to the cleaner, unless another thread has the lock: that thread sends them when it unlocks.
fn send_forgotten() {
    while !lock(&FORGOTTEN).is_empty() {
        let Some(mut cleaners) = try_lock(&CLEANERS) else { return };
        cleaners.forget_inherited();
        for named in std::mem::take(&mut *lock(&FORGOTTEN)) {
            cleaners.names.retain(|other| *other != named);
            // A cleaner that misses this tries to remove a name that is gone, which does nothing.
            cleaners.try_send(&CleanerRequest::Forget(named));
        }
    }
}

impl Cleaners {
    fn get() -> MutexGuard<'static, Self> {
        let mut cleaners = lock(&CLEANERS);
        cleaners.forget_inherited();
        cleaners
    }

    /// Drops the cleaners of the process that this one was forked from.
    fn forget_inherited(&mut self) {
        let cleaners = self;
        if cleaners.current.as_ref().is_some_and(|cleaner| cleaner.owner != std::process::id()) {
            *cleaners = Self::EMPTY;
        }
    }

    /// Sends to the current cleaner; false if there is none.
    fn send(&self, request: &CleanerRequest) -> bool {
        self.current.as_ref().is_some_and(|cleaner| protocol::send(cleaner.socket.as_fd(), request, &[], &[]).is_ok())
    }

    /// Sends to all cleaners what they can do without.
    fn try_send(&self, request: &CleanerRequest) {
        self.current.iter().chain(&self.former).for_each(|cleaner| cleaner.try_send(request));
    }

    /// False unless the current cleaner confirms the name: a cleaner that is being killed still accepts messages.
    fn register(&self, named: &Named) -> bool {
        let has_confirmed = |cleaner: &NameCleaner| {
            socket::is_readable_within(cleaner.socket.as_fd(), ANSWER)
                && matches!(protocol::recv::<Answer<Ready>>(cleaner.socket.as_fd()), Ok(Some((Ok(_), _))))
        };
        self.current.as_ref().is_some_and(|cleaner| cleaner.user == rights::real_user())
            && self.send(&CleanerRequest::Register(named.clone()))
            && self.current.as_ref().is_some_and(has_confirmed)
    }

    /// Starts a cleaner and registers all names with it.
    fn start_cleaner(&mut self) -> Result<()> {
        match self.current.take() {
            Some(former) if former.user != rights::real_user() => self.former.push(former),
            // It has closed its socket and is ending, or it does not answer.
            Some(gone) => gone.process.end(),
            None => {}
        }
        // A former cleaner, from when this process was this user before.
        if let Some(at) = self.former.iter().position(|cleaner| cleaner.user == rights::real_user()) {
            self.current = Some(self.former.swap_remove(at));
            if self.names.iter().all(|named| self.register(named)) {
                return Ok(());
            }
            self.current.take().into_iter().for_each(|gone| gone.process.end());
        }
        // Names of dead processes whose cleaners were killed, too.
        named::sweep();
        let failed = |error| Error::io("cannot start the process that removes names when this one is killed", error);
        let program = origin::program()?;
        // In this directory: a program started as `ld.so ./program` is found from here only.
        let variables = Variables::of_this_process();
        let start = || {
            let (socket, theirs) = socket::packet_pair().map_err(failed)?;
            socket::learn_senders(theirs.as_fd()).map_err(failed)?;
            let started = role::start(program.as_fd(), &variables, Role::NameCleaner, &[], (&socket, theirs));
            let process = started.map_err(failed)?;
            socket::limit_sends(socket.as_fd(), ANSWER).map_err(failed)?;
            role::wait_until_ready(&socket, &process, "the process that removes names when this one is killed")?;
            Ok((socket, process))
        };
        let (socket, process) = match start() {
            Err(error) if role::was_killed_early(&error) => start()?,
            started => started?,
        };
        let _private = fork::Private::mark(socket.as_fd());
        self.current =
            Some(NameCleaner { owner: std::process::id(), user: rights::real_user(), _private, socket, process });
        let is_missing = self.names.iter().any(|named| !self.register(named));
        if is_missing { Err(failed(io::ErrorKind::BrokenPipe.into())) } else { Ok(()) }
    }
}

impl NameCleaner {
    fn try_send(&self, request: &CleanerRequest) {
        let _ = protocol::try_send(self.socket.as_fd(), request);
    }
}

/// Runs the name cleaner of the process at the other end of `owner`, until that ends.
pub(super) fn serve(owner: OwnedFd) -> ! {
    // It holds no stream, so that a reader that waits for the end of one does not wait for the cleaner.
    let _ = exec::write_to_nobody();
    // Signals to the group of the program, or to its terminal, are not for this process.
    spawn::leave_session();
    // It does not keep the directory, or a mount there, busy.
    let _ = std::env::set_current_dir("/");
    signal::ignore_group_signals();
    spawn::set_name(c"mp-cleaner");
    let answer = || {
        let ready = Ready { must_exec: false, attributes: Attributes::default() };
        protocol::send(owner.as_fd(), &Answer::<Ready>::Ok(ready), &[], &[])
    };
    // An owner that is gone needs no answer, but may have left names. One that lives would wait for it for ever.
    if answer().is_err_and(|error| !role::is_gone(&error)) {
        spawn::exit_now(1);
    }
    let (mut names, mut errors) = (Vec::new(), 0);
    loop {
        socket::until_readable(owner.as_fd());
        let sender = socket::sender(owner.as_fd());
        match protocol::recv::<CleanerRequest>(owner.as_fd()) {
            Ok(Some((CleanerRequest::Register(named), _))) if sender == Sender::SameUser => {
                names.push(named);
                // Without it the owner, which waits for a limited time, replaces this cleaner.
                let _ = answer();
            }
            Ok(Some((CleanerRequest::Register(_), _))) => {
                let other = Error::new(ErrorKind::Io, "a name of another user is not for this process to remove");
                let _ = protocol::send(owner.as_fd(), &Answer::<Ready>::Err(other), &[], &[]);
            }
            Ok(Some((CleanerRequest::Forget(named), _))) => names.retain(|other| *other != named),
            Ok(None) => break,
            // An owner that ended without reading our answer is an error here, before its last messages.
            // If a message was lost, the owner must learn that and replace this cleaner. If none was lost, it gets one
            // answer too many, and does the same.
            Err(error) if errors < 10 => {
                errors += 1;
                let failed = protocol::spawn_error("a message was lost", error);
                let _ = protocol::send(owner.as_fd(), &Answer::<Ready>::Err(failed), &[], &[]);
            }
            Err(_) => break,
        }
    }
    for Named { name, identity } in names {
        let _ = named::unlink(&name, identity);
    }
    spawn::exit_now(0)
}
