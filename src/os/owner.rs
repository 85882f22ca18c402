//! The owner of a file: in directories that all users may write to, another user may have put a file there first.

use crate::error::{Explained, Topic};
use rustix::fs::{FileType, Stat};
use std::io;

/// Refuses a file that belongs neither to this process's user nor to the permitted one.
pub(crate) fn check(stat: &Stat, permitted: Option<u32>) -> io::Result<()> {
    let (own, theirs) = (rustix::process::geteuid().as_raw(), stat.st_uid);
    match theirs == own || Some(theirs) == permitted {
        true => Ok(()),
        false => {
            let why = format!("it belongs to the user with uid {theirs}, and this process is of uid {own}");
            Err(Explained::error(io::ErrorKind::PermissionDenied, Topic::NameTaken, why))
        }
    }
}

/// The error of a taken name, with the user that it belongs to.
pub(crate) fn taken(kind: io::ErrorKind, stat: &Stat) -> io::Error {
    let own = rustix::process::geteuid().as_raw();
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => "a symbolic link",
        FileType::Socket => "a socket",
        FileType::RegularFile => "a file",
        FileType::Directory => "a directory",
        _ => "something",
    };
    let why = match stat.st_uid {
        theirs if theirs == own => format!("it is in use: there is {what} of that name, of this user"),
        theirs => {
            format!("it is in use: there is {what} of that name, which belongs to another user, with uid {theirs}")
        }
    };
    Explained::error(kind, Topic::NameTaken, why)
}
