//! The standard streams of a child.
#![forbid(unsafe_code)]

use crate::os::{exec, pipe, refuse, spawn};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Describes a standard stream of a child: inherited, `/dev/null`, a pipe or a file.
///
/// Given to [`ProcessBuilder::stdin`](crate::ProcessBuilder::stdin), `stdout` and `stderr`. The default is
/// [`inherit`](Self::inherit).
///
/// ```
/// use multiprocess::{self as mp, Process, Stdio};
/// use std::io::Read;
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let hello = || println!("hello from {}", std::process::id());
///         let mut child = Process::builder().stdout(Stdio::piped()).stderr(Stdio::null()).spawn(hello, ())?;
///         child.join().await?;
///         let mut text = String::new();
///         child.take_stdout().expect("it was piped").read_to_string(&mut text)?;
///         assert_eq!(text, format!("hello from {}\n", child.pid()));
///         Ok(())
///     })
/// }
/// ```
#[derive(Debug, Default)]
pub struct Stdio(Inner);

#[derive(Debug, Default)]
enum Inner {
    #[default]
    Inherit,
    Null,
    Piped,
    To(OwnedFd),
}

impl Stdio {
    /// Uses the stream of the spawning process, as it is at the spawn.
    pub fn inherit() -> Self {
        Self(Inner::Inherit)
    }

    /// Uses `/dev/null`: reads end at once, and writes go nowhere.
    pub fn null() -> Self {
        Self(Inner::Null)
    }

    /// Makes a pipe, of which the [`Process`](crate::Process) holds the other end; see
    /// [`take_stdout`](crate::Process::take_stdout).
    pub fn piped() -> Self {
        Self(Inner::Piped)
    }
}

impl Stdio {
    /// The same for another process; `None` for a pipe, of which this process has the other end.
    pub(super) fn again(&self) -> io::Result<Option<Self>> {
        Ok(Some(Self(match &self.0 {
            Inner::Inherit => Inner::Inherit,
            Inner::Null => Inner::Null,
            Inner::Piped => return Ok(None),
            Inner::To(fd) => {
                refuse::at("dup")?;
                Inner::To(fd.try_clone()?)
            }
        })))
    }
}

impl From<OwnedFd> for Stdio {
    fn from(fd: OwnedFd) -> Self {
        Self(Inner::To(fd))
    }
}

impl From<File> for Stdio {
    fn from(file: File) -> Self {
        Self(Inner::To(file.into()))
    }
}

/// The child's ends of its three streams, and this process's ends of those that are piped.
#[derive(Default)]
pub(super) struct Streams {
    theirs: [Option<Stream>; 3],
    pub(super) stdin: Option<PipeWriter>,
    pub(super) stdout: Option<PipeReader>,
    pub(super) stderr: Option<PipeReader>,
}

enum Stream {
    Own(OwnedFd),
    Parent(BorrowedFd<'static>),
}

impl Streams {
    pub(super) fn open([stdin, stdout, stderr]: [Stdio; 3]) -> io::Result<Self> {
        let mut streams = Self::default();
        let piped = |stdio: &Stdio| {
            if matches!(stdio.0, Inner::Piped) { pipe::pair().map(Some) } else { Ok(None) }
        };
        let pipes = [piped(&stdin)?, piped(&stdout)?, piped(&stderr)?];
        for (number, stdio) in [stdin, stdout, stderr].into_iter().enumerate() {
            streams.theirs[number] = match stdio.0 {
                Inner::Inherit => spawn::standard(number as i32).map(Stream::Parent),
                Inner::To(fd) => Some(Stream::Own(fd)),
                Inner::Null => Some(Stream::Own(exec::null_device()?)),
                Inner::Piped => None,
            };
        }
        let [stdin, stdout, stderr] = pipes;
        if let Some((read, write)) = stdin {
            (streams.theirs[0], streams.stdin) = (Some(Stream::Own(read.into())), Some(write));
        }
        if let Some((read, write)) = stdout {
            (streams.theirs[1], streams.stdout) = (Some(Stream::Own(write.into())), Some(read));
        }
        if let Some((read, write)) = stderr {
            (streams.theirs[2], streams.stderr) = (Some(Stream::Own(write.into())), Some(read));
        }
        Ok(streams)
    }

    /// The streams for the child; a stream that is closed in this process is missing.
    pub(super) fn theirs(&self) -> [Option<BorrowedFd<'_>>; 3] {
        self.theirs.each_ref().map(|stream| match stream {
            Some(Stream::Own(fd)) => Some(fd.as_fd()),
            Some(Stream::Parent(fd)) => Some(*fd),
            None => None,
        })
    }

    /// Closes this process's copies of the child's ends, so that the child's end of a pipe is the only one.
    pub(super) fn close_theirs(&mut self) {
        self.theirs = Default::default();
    }
}
