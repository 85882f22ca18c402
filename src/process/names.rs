//! Names in /dev/shm that go with the process that gave them, however it ends.
//!
//! The kernel takes memory away from the dead, but not a name. So a process that gives names has an heir: a process of
//! the same program that does nothing but wait for it to end and then remove what it left. The heir belongs to no
//! group, holds no stream, and is started with the first name.
//!
//! # Death
//! | killed | what becomes of its names |
//! |---|---|
//! | before its heir has taken note of the name | it has not given it |
//! | after that, with or without the name | its heir removes them, each if it is still that of the same file |
//! | its heir, then nobody | its own end removes them, and its next name starts an heir that is told them all |
//! | its heir, and then itself before its next name | they stay until a program of the same user gives its first name |
//!
//! The last row needs a SIGKILL of both, the heir first: of the two, or of their control group as a whole. A signal to the
//! program's process group does not reach the heir. Nobody watches it: that would take a thread, or an heir of the heir.
//! What is left is marked as going with a process, and that process has it locked as long as it lives (`os::named`).
//!
//! # Rights
//! An heir removes names with the rights that its testator had when it started it. It takes note of a name only from a process that
//! has its own user and group, by the kernel's word. A testator that has become another user starts another heir for what it
//! names from then on, and keeps the former one for what that has taken note of.
//!
//! # Limits
//! An heir that does not answer in time (stopped, or a message was lost) is killed and replaced, so that giving a name waits
//! for it [`ANSWER`] at most, and then for a new one to start. Who only takes a name away waits for neither: what it has to
//! say is left for whoever has the lock.
#![forbid(unsafe_code)]

use super::protocol::{self, Answer, Named, Ready, Role, Variables, Will};
use super::{boot, door};
use crate::error::{Error, ErrorKind, Result};
use crate::os::{attributes::Attributes, exec, fork, named, signal, socket, socket::Sender, spawn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// In which an heir takes note of a name. It has nothing else to do.
const ANSWER: Duration = Duration::from_secs(3);

struct Heir {
    /// Of this process: one that was forked from it has no heir yet.
    testator: u32,
    /// Real user and group of the testator when it started it.
    user: (u32, u32),
    /// It hangs up when this process ends, whatever was forked from it meanwhile.
    _private: fork::Private,
    socket: OwnedFd,
    process: exec::Process,
}

struct Estate {
    heir: Option<Heir>,
    /// Heirs from before this process was another user.
    former: Vec<Heir>,
    names: Vec<Named>,
}

impl Estate {
    const EMPTY: Self = Self { heir: None, former: Vec::new(), names: Vec::new() };
}

static ESTATE: Mutex<Estate> = Mutex::new(Estate::EMPTY);
/// What the heir need not remove any more, and does not know yet. Its lock is held for a moment only.
static LEFT: Mutex<Vec<Named>> = Mutex::new(Vec::new());

/// From now on `name` goes when this process ends, if it is still that of the file that `identity` is.
/// The file may get its name later.
pub(crate) fn remove_at_end(name: &str, identity: named::Identity) -> Result<()> {
    fork::check()?;
    let mut estate = Estate::get();
    let named = Named { name: name.to_string(), identity };
    let is_told = estate.promise(&named);
    estate.names.push(named);
    let appointed = if is_told { Ok(()) } else { estate.appoint() };
    if appointed.is_err() {
        estate.names.pop();
    }
    drop(estate);
    pass_on();
    appointed
}

/// Not any more: the name is taken away already.
pub(crate) fn leave(name: &str, identity: named::Identity) {
    if fork::is_forked() {
        return;
    }
    lock(&LEFT).push(Named { name: name.to_string(), identity });
    pass_on();
}

/// Not any more: the name stays when this process ends.
pub(crate) fn keep(name: &str, identity: named::Identity) -> Result<()> {
    fork::check()?;
    let mut estate = Estate::get();
    let named = Named { name: name.to_string(), identity };
    estate.names.retain(|other| *other != named);
    // One that cannot be told would remove it, so another one takes its place. One that is gone removes nothing.
    estate.former.iter().for_each(|heir| heir.hint(&Will::Leave(named.clone())));
    let kept = if estate.heir.is_none() || estate.tell(&Will::Leave(named)) { Ok(()) } else { estate.appoint() };
    drop(estate);
    pass_on();
    kept
}

/// Has the heir know what was left, unless another thread has its lock: that one does when it lets go.
fn pass_on() {
    while !lock(&LEFT).is_empty() {
        let mut estate = match ESTATE.try_lock() {
            Ok(estate) => estate,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        estate.forget_others();
        for named in std::mem::take(&mut *lock(&LEFT)) {
            estate.names.retain(|other| *other != named);
            // One that is gone, or has no room, removes nothing that is not there.
            estate.hint(&Will::Leave(named));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Estate {
    fn get() -> MutexGuard<'static, Self> {
        let mut estate = lock(&ESTATE);
        estate.forget_others();
        estate
    }

    /// What another process had that this one was forked from.
    fn forget_others(&mut self) {
        let estate = self;
        if estate.heir.as_ref().is_some_and(|heir| heir.testator != std::process::id()) {
            *estate = Self::EMPTY;
        }
    }

    /// False if there is no heir.
    fn tell(&self, will: &Will) -> bool {
        self.heir.as_ref().is_some_and(|heir| protocol::send(heir.socket.as_fd(), will, &[], &[]).is_ok())
    }

    /// Tells all that there are something that they can do without.
    fn hint(&self, will: &Will) {
        self.heir.iter().chain(&self.former).for_each(|heir| heir.hint(will));
    }

    /// False if there is no heir that has taken note: one that is being killed still takes what it is sent.
    fn promise(&self, named: &Named) -> bool {
        let heard = |heir: &Heir| {
            socket::is_readable_within(heir.socket.as_fd(), ANSWER)
                && matches!(protocol::recv::<Answer<Ready>>(heir.socket.as_fd()), Ok(Some((Ok(_), _))))
        };
        self.heir.as_ref().is_some_and(|heir| heir.user == own_user())
            && self.tell(&Will::Remove(named.clone()))
            && self.heir.as_ref().is_some_and(heard)
    }

    /// Starts an heir and tells it all names.
    fn appoint(&mut self) -> Result<()> {
        match self.heir.take() {
            Some(former) if former.user != own_user() => self.former.push(former),
            // It has closed its socket, so it is ending, or does not answer.
            Some(gone) => gone.process.end(),
            None => {}
        }
        // One from when this process was this user before.
        if let Some(at) = self.former.iter().position(|heir| heir.user == own_user()) {
            self.heir = Some(self.former.swap_remove(at));
            if self.names.iter().all(|named| self.promise(named)) {
                return Ok(());
            }
            self.heir.take().into_iter().for_each(|gone| gone.process.end());
        }
        // Those that had no luck with theirs.
        named::sweep();
        let failed = |error| Error::io("cannot start the process that removes names when this one is killed", error);
        let program = boot::program()?;
        // In this directory: who was started by `ld.so ./program` is found from this one alone.
        let variables = Variables::of_this_process();
        let start = || {
            let (socket, theirs) = socket::packet_pair().map_err(failed)?;
            socket::learn_senders(theirs.as_fd()).map_err(failed)?;
            let started = door::start(program.as_fd(), &variables, Role::Heir, &[], (&socket, theirs));
            let process = started.map_err(failed)?;
            socket::limit_sends(socket.as_fd(), ANSWER).map_err(failed)?;
            door::hear_ready(&socket, &process, "the process that removes names when this one is killed")?;
            Ok((socket, process))
        };
        let (socket, process) = match start() {
            Err(error) if door::was_hit(&error) => start()?,
            started => started?,
        };
        let _private = fork::Private::mark(socket.as_fd());
        self.heir = Some(Heir { testator: std::process::id(), user: own_user(), _private, socket, process });
        let untold = self.names.iter().any(|named| !self.promise(named));
        if untold { Err(failed(io::ErrorKind::BrokenPipe.into())) } else { Ok(()) }
    }
}

impl Heir {
    fn hint(&self, will: &Will) {
        let _ = protocol::try_send(self.socket.as_fd(), will);
    }
}

/// What the kernel tells of a sender.
fn own_user() -> (u32, u32) {
    (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}

/// The whole life of an heir.
pub(super) fn serve(testator: OwnedFd) -> ! {
    // It holds no stream: whoever waits for the end of one is not to wait for it.
    if let Ok(nowhere) = exec::nowhere_to_write() {
        let _ = rustix::stdio::dup2_stdout(&nowhere);
        let _ = rustix::stdio::dup2_stderr(&nowhere);
    }
    // What is sent to the group of the program, or to its terminal, is not for this process.
    let _ = rustix::process::setsid();
    // Nor does it keep the directory, or what is mounted there, busy.
    let _ = std::env::set_current_dir("/");
    signal::ignore_group_signals();
    spawn::set_name(c"mp-heir");
    // Who is gone needs no answer, but may have left names.
    let answer = || {
        _ = protocol::send(
            testator.as_fd(),
            &Answer::<Ready>::Ok(Ready { must_exec: false, attributes: Attributes::default() }),
            &[],
            &[],
        )
    };
    answer();
    let (mut names, mut errors) = (Vec::new(), 0);
    loop {
        socket::until_readable(testator.as_fd());
        let sender = socket::sender(testator.as_fd());
        match protocol::recv::<Will>(testator.as_fd()) {
            Ok(Some((Will::Remove(named), _))) if sender == Sender::SameUser => {
                names.push(named);
                answer();
            }
            Ok(Some((Will::Remove(_), _))) => {
                let other = Error::new(ErrorKind::Io, "a name of another user is not for this process to remove");
                let _ = protocol::send(testator.as_fd(), &Answer::<Ready>::Err(other), &[], &[]);
            }
            Ok(Some((Will::Leave(named), _))) => names.retain(|other| *other != named),
            Ok(None) => break,
            // That it did not read our answer is told as an error, before what it has sent.
            // Of a message that was lost its sender must hear: it takes this heir for none. If nothing was lost, it hears of
            // one answer too many, and does the same.
            Err(error) if errors < 10 => {
                errors += 1;
                let failed = protocol::spawn_error("a message was lost", error);
                let _ = protocol::send(testator.as_fd(), &Answer::<Ready>::Err(failed), &[], &[]);
            }
            Err(_) => break,
        }
    }
    for Named { name, identity } in names {
        let _ = named::unlink(&name, identity);
    }
    spawn::exit_now(0)
}
